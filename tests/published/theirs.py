"""The published side of a comparison: a process of its own, and what every published script finds around it there."""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def alone(execute: Callable[..., None], method: str, experiment: Any, checkout: Path, pipe: Any) -> None:
    """What the process does: executes the published script in an empty folder, quietly, in float64.

    Args:
        execute: called with the other arguments. Of this repository it can import nothing but by `of_ours`.
        pipe: to our side, which is told what goes wrong, unless it hung up first.
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # not every script does
    sys.dont_write_bytecode = True
    sys.path[:] = [str(checkout)] + [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, Path(__file__).parent)]
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            os.chdir(folder)
            sys.stdout = sys.stderr = nowhere
            try:
                stand_ins()
                execute(method, experiment, checkout, pipe)
            finally:
                sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
                os.chdir("/")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # our side has seen enough
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def of_ours(package: str) -> types.ModuleType:
    """Our package of that name, none of whose modules stays where the published script looks for its own of these names."""
    sys.path.insert(0, str(ROOT))
    found = importlib.import_module(package)
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "utils", "attacks")]:
        del sys.modules[name]
    return found


def stand_ins() -> None:
    """No GPU, float64 and no apex."""
    torch.cuda.is_available = lambda: False
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    torch.Tensor.float = lambda self: self.to(torch.get_default_dtype())
    torch.cuda.FloatTensor = torch.empty
    stub("apex")
    stub("apex.amp", initialize=lambda network, optimizer, **_: (network, optimizer), scale_loss=lambda loss, optimizer: contextlib.nullcontext(loss))


def stub(name: str, **content: Any) -> None:
    """Makes a module of that name, which has just this, importable."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, sys.modules[name])


class Nothing:
    """An instance of any class that is only there to be called: whatever is called, nothing happens."""

    def __init__(self, *a: Any, **k: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *a, **k: None


def executed(checkout: Path, *files: Path) -> dict[str, str]:
    """The digests of the published files that run in this process: these, and all modules that are imported by now."""
    modules = (Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None))
    places = [file.resolve() for file in (*files, *modules)]
    names = sorted({place.relative_to(checkout).as_posix() for place in places if place.is_relative_to(checkout)})
    return {name: hashlib.sha256((checkout / name).read_bytes()).hexdigest() for name in names}


def initial_state(network: torch.nn.Module) -> dict[str, Any]:
    """A network's state as numpy arrays, as it is sent to our side to begin from."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


class Losses:
    """Every loss that the script calls backward on, from now on; the last one is `value`."""

    def __init__(self) -> None:
        self.value = 0.0
        backward = torch.Tensor.backward

        def watched(tensor: torch.Tensor, *a: Any, **k: Any) -> None:
            self.value = tensor.item()
            backward(tensor, *a, **k)
        torch.Tensor.backward = watched
