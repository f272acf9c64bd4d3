"""Files that a kill at any instant leaves whole: the state of a run, and weights."""
from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
import sys
import weakref
import zipfile
from pathlib import Path
from typing import Any, IO

import torch
from torch import nn

from engine import record
from engine.config import Config
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


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of what `source` is now, whole at any instant; a copy where the disk has no second names."""
    unfinished = target.with_name(target.name + ".part")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state_dict's names and numbers: which network it is, whatever file it lies in."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_state(path: Path) -> dict[str, Any]:
    """A run's state.

    Raises:
        Misuse: the file is damaged or something else.
    """
    try:
        state = load(path)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise Misuse(f"{path} is damaged or not a run's state ({type(error).__name__}): start again with --resume never, or in another --out-dir") from error
    if not isinstance(state, dict) or "position" not in state:
        raise Misuse(f"{path} is not a run's state: start again with --resume never, or in another --out-dir")
    return state


MAY_CHANGE = {"data_dir", "out_dir", "resume", "save_every", "time_limit", "tensorboard", "device", "workers", "snapshots", "co_guard", "on_nonfinite"}
"""The flags that a resumed run may be given anew: they change nothing of what it computes, or only from then on."""


def find(path: Path, cfg: Config) -> dict[str, Any] | None:
    """The saved run that `cfg` goes on with, or None. What --precision comes to on this machine is the run's to compare.

    Raises:
        Misuse: it is damaged, or of another configuration; or there is none, with --resume must.
    """
    if cfg.resume == "must" and not path.is_file():
        raise Misuse(f"--resume must: there is no {path} to continue from")
    if cfg.resume == "never" or not path.is_file():
        return None
    saved = load_state(path)
    if missing := {"kept", "sums", "history", "best", "seconds", "rng", "rng_cuda", "guard", "finite", "config"} - saved.keys():
        raise Misuse(f"{path} has no {', '.join(sorted(missing))}: it is another version's; start again with --resume never, or in another --out-dir")
    wanted = {"method": cfg.METHOD, **dataclasses.asdict(cfg)}
    for name in [*wanted, *(saved["config"].keys() - wanted.keys())]:
        if name not in {*MAY_CHANGE, "precision"} and saved["config"].get(name) != wanted.get(name):
            raise Misuse(f"{path} was saved with {name} {saved['config'].get(name)}, this run has {wanted.get(name)}: give the same, "
                         "or another --out-dir; or --resume never, which deletes that run and begins anew")
    return saved


def weights(network: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """A weights file: the state_dict, and the plain numbers and strings that say what network it is."""
    return {"state_dict": {name: value.detach().cpu() for name, value in network.state_dict().items()}, **description}


def lock(directory: Path) -> IO:
    """Holds `directory` for this process until the returned file is closed or the process ends, though its workers live on.

    Raises:
        Misuse: another process holds it.
    """
    file = open(directory / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Misuse(f"--out-dir {directory}: another run is writing there; wait for it, or choose another directory") from None
    except OSError as error:  # some network disks have no locks
        print(f"warning: {directory} cannot be locked ({error.strerror}): see to it that no other run writes there", file=sys.stderr)
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (inherited := held()) and inherited.close())
    return file
