"""What several test files share: tiny runs on the digits, as a command and as files, and how to compare them."""
from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as --deterministic sets it; a process reads it once, at its first product on a GPU

import pytest
import torch

from engine import sets

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dataset", "digits", "--train-size", "200", "--val-size", "40", "--batch-size", "32", "--epochs", "2", "--device", "cpu")
SMALL = {"train_las_at": ("--interval", "2"), "train_free_at": ("--replays", "2")}  # so that a tiny run shows the whole method
TIMES = {"seconds", "images_per_second"}  # what no two runs have in common
MAY_DIFFER = {"out_dir", "resume", "save_every", "time_limit"}  # flags that do not change what a run computes


@dataclass
class Result:
    """How a command ended. `status` is 0 when it simply returned."""

    status: int
    out: str
    err: str


@dataclass
class Tiny:
    """Commands run in this process, as `python <script>.py ...` would run them, without importing torch anew."""

    directory: Path
    root: Path = ROOT
    flags: tuple[str, ...] = TINY
    runs: list[Path] = field(default_factory=list)

    def command(self, script: str, *flags: Any) -> Result:
        """Runs a script's `__main__` part. An exception that is no exit passes through: it would be a traceback."""
        if script == "test_FGSM_SDI" and "--device" not in flags:
            flags = (*flags, "--device", "cpu")  # a GPU's kernels are tested in test_gpu.py
        before, status = sys.argv, 0
        out, err = io.StringIO(), io.StringIO()
        sys.argv = [str(self.root / f"{script}.py"), *map(str, flags)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        finally:
            sys.argv = before
        return Result(status, out.getvalue(), err.getvalue())

    def train(self, script: str, *flags: Any, out_dir: Path | None = None) -> Path:
        """A tiny run that must end well; returns its directory."""
        out_dir = out_dir or self.directory / f"run{len(self.runs)}"
        self.runs.append(out_dir)
        result = self.command(script, *self.flags, *SMALL.get(script, ()), *flags, "--out-dir", out_dir)
        assert result.status == 0, result.err
        return out_dir


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `train_script` runs for every training script there is."""
    if "train_script" in metafunc.fixturenames:
        metafunc.parametrize("train_script", sorted(path.stem for path in ROOT.glob("train_*.py")))


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """There are many runs in one process here: the digits are read once, and no file must outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "digits", functools.cache(sets.digits))
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """One thread; and the process-wide settings that a run changes are put back."""
    before = torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    torch.set_default_dtype(before[1])
    signal.signal(signal.SIGTERM, before[2])
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Inside, tensors and networks are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def float64() -> Iterator[None]:
    with doubles():
        torch.manual_seed(0)
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


@pytest.fixture
def in_this_process(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a table or a demo runs, one after another, is run without importing torch anew; the list holds flags that every training gets besides."""
    from experiments import runner

    added: list[str] = []

    def run(limit: runner.TimeLimit, command: Sequence[str], grace: float = 0.0, *, stdout: TextIO, **more: Any) -> int:
        script = Path(command[1]).stem
        result = tiny.command(script, *command[2:], *(added if script.startswith("train_") else ()))
        stdout.write(result.out + result.err)
        return result.status

    monkeypatch.setattr(runner.TimeLimit, "run", run)
    return added


@pytest.fixture(scope="session")
def differences() -> Callable[..., list[str]]:
    """A function that names every entry in which two nested structures of tensors and plain values differ."""
    def compare(a: Any, b: Any, where: str = "", ignore: set[str] = TIMES | MAY_DIFFER) -> list[str]:
        if type(a) is not type(b):
            return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
        if isinstance(a, dict):
            missing = [f"{where}/{key}: only in one" for key in a.keys() ^ b.keys()]
            return missing + [line for key in a if key in b and key not in ignore
                              for line in compare(a[key], b[key], f"{where}/{key}", ignore)]
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                return [f"{where}: {len(a)} and {len(b)} items"]
            return [line for i, pair in enumerate(zip(a, b)) for line in compare(*pair, f"{where}/{i}", ignore)]
        if isinstance(a, torch.Tensor):
            same = a.dtype == b.dtype and torch.equal(a, b)
            return [] if same else [f"{where}: tensors differ"]
        return [] if a == b else [f"{where}: {a} and {b}"]
    return compare


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FGSM-RS that learnt something: about 97 % clean and 60 % robust accuracy on the digits."""
    directory = tmp_path_factory.mktemp("digits")
    tiny = Tiny(directory, flags=("--dataset", "digits", "--device", "cpu"))
    return tiny.train("train_fgsm_rs", "--epochs", 6, "--batch-size", 64, "--epsilon", 38, out_dir=directory / "run")
