"""Files that a kill at any instant leaves whole: the state of a run, and weights."""
from __future__ import annotations

import fcntl
import zipfile
from pathlib import Path
from typing import Any, IO

import torch
from torch import Tensor, nn

from engine import record
from engine.errors import Misuse


def save(content: dict[str, Any], path: Path) -> None:
    """Writes tensors, numbers, strings, lists and dicts so that `path` holds either the old content or the new."""
    with record.replacing(path) as file:
        torch.save(content, file)


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU; nothing in the file is executed, and what was altered since is noticed.

    Raises:
        Exception: of many kinds, for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:  # torch writes a checksum of every entry and never looks at it again
        if altered := archive.testzip():
            raise ValueError(f"the checksum of {altered} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_state(path: Path) -> dict[str, Any]:
    """A run's state.

    Raises:
        Misuse: the file is damaged or something else.
    """
    try:
        state = load(path)
    except Exception as error:
        raise Misuse(f"{path} is damaged or not a run's state ({type(error).__name__}): start again with --resume never, or in another --out-dir") from error
    if not isinstance(state, dict) or "position" not in state:
        raise Misuse(f"{path} is not a run's state: start again with --resume never, or in another --out-dir")
    return state


def state_of(kept: Any) -> Any:
    """The saved form of a network, an optimizer or a tensor."""
    return kept.detach() if isinstance(kept, Tensor) else kept.state_dict()


def restore(kept: Any, saved: Any, name: str) -> None:
    """Puts a saved form back, in place.

    Raises:
        Misuse: it does not fit.
    """
    try:
        if isinstance(kept, Tensor):
            if kept.shape != saved.shape or kept.dtype != saved.dtype:
                raise ValueError(f"{saved.dtype} {tuple(saved.shape)} saved, {kept.dtype} {tuple(kept.shape)} wanted")
            with torch.no_grad():
                kept.copy_(saved)
        else:
            kept.load_state_dict(saved)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Misuse(f"the saved {name!r} does not fit this run ({error}): start again with --resume never") from error


def weights(network: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """A weights file: the state_dict, and the plain numbers and strings that say what network it is."""
    return {"state_dict": {name: value.detach().cpu() for name, value in network.state_dict().items()}, **description}


def lock(directory: Path) -> IO:
    """Holds `directory` for this process until the returned file is closed or the process ends.

    Raises:
        Misuse: another process holds it.
    """
    file = open(directory / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Misuse(f"--out-dir {directory}: another run is writing there; wait for it, or choose another directory") from None
    return file
