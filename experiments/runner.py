"""Trains and evaluates, several runs side by side; what is done is not done again, and one failure does not stop the rest.

A run is finished once its JSON is there: everything that its training and its evaluations measured, in one file.
"""
from __future__ import annotations

import dataclasses
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from engine import record
from engine.checkpoint import MAY_CHANGE
from engine.config import spelled
from engine.device import cores
from engine.errors import Failure, Misuse


class TimeLimit:
    """Runs processes until so many minutes are over, SIGTERM comes, or an error leaves the `with` block; then sends SIGTERM to those that still run.

    A training saves itself on SIGTERM, and AutoAttack saves as it goes, so that the next call goes on with both.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.over = False
        self._running: set[subprocess.Popen] = set()

    def __enter__(self) -> TimeLimit:
        self._before = signal.signal(signal.SIGTERM, self.end)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.end()
        signal.signal(signal.SIGTERM, self._before)

    def end(self, *_: Any) -> None:
        """Also a signal's handler."""
        self.over = True
        for process in tuple(self._running):
            process.terminate()

    def left(self) -> float:
        """Seconds."""
        return 0.0 if self.over else max(0.0, self.deadline - time.monotonic())

    def run(self, command: Sequence[str], grace: float = 0.0, **more: Any) -> int:
        """A process's status. `grace`: seconds after the time, for one that knows the time and ends by itself."""
        process = subprocess.Popen(command, **more)
        self._running.add(process)
        if self.over:  # since before it was one of those that are running
            process.terminate()
        try:
            return process.wait(None if self.deadline == math.inf else self.left() + grace)
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()
        finally:
            self._running.remove(process)


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        label: what it is called where it is shown.
        train: script and flags, without --data-dir, --device and --out-dir.
        evaluation: flags of test_FGSM_SDI.py, without those and --model-path.
        checkpoints: of best and last, those that are evaluated.
        folder: where the run's own files go.
        result: its JSON.
        suffix: of the evaluations' folders, for several evaluations of one training.
    """

    label: str
    seed: int
    train: tuple[str, ...]
    evaluation: tuple[str, ...]
    checkpoints: tuple[str, ...]
    folder: Path
    result: Path
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    def is_done(self) -> bool:
        """Whether its JSON has all that is to be measured.

        Raises:
            Misuse: it is of other settings, as of a version whose defaults were others.
        """
        if not self.result.is_file():
            return False
        found = record.read_json(self.result)
        self._check_settings(self.result, found["run"]["config"])
        return set(self.checkpoints) <= found["evaluations"].keys()

    def changes(self, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What a configuration that was trained with, and the one that would be now, do not have in common, of the flags that both know."""
        script, *flags = self.train
        now = dataclasses.asdict(importlib.import_module(script.removesuffix(".py")).Config.parse(None, flags))
        return {name: (config[name], now[name]) for name in now if name in config and name not in MAY_CHANGE and config[name] != now[name]}

    def _check_settings(self, path: Path, config: dict[str, Any]) -> None:
        """Raises Misuse where `path` is of other settings, as of a version whose defaults were others."""
        if changes := self.changes(config):
            name, (before, now) = next(iter(changes.items()))
            raise Misuse(f"{path} was measured with {spelled(name)} {before}, and now it would be {now}: move {self.result} and {self.folder} away, "
                         "or give other --results and --output")

    def do(self, data_dir: Path, device: str, limit: TimeLimit) -> str | None:
        """Does what is missing, until the limit; returns what it had no time for, or None.

        Raises:
            Failure: a script failed.
        """
        if self.is_done():
            return None
        shared = ("--data-dir", str(data_dir), "--device", device, "--out-dir")
        left = () if limit.deadline == math.inf else ("--time-limit", f"{limit.left() / 60:.2f}")
        finished = self.folder / "result.json"
        if finished.is_file():  # of an unfinished training the script itself says so
            self._check_settings(finished, record.read_json(finished)["config"])
        said = self._step("training", (*self.train, *shared, str(self.folder), *left), finished.is_file, limit, grace=60)
        for name in self._distinct() if said is None else ():
            command = ("test_FGSM_SDI.py", "--model-path", str(self.folder / f"{name}.pth"), *self.evaluation, *shared, str(self._evaluated(name)))
            said = said or self._step(f"evaluation of {name}.pth", command, partial(self._is_of, name), limit)
        if said is None:
            self._collect()
        return said

    def _evaluated(self, checkpoint: str) -> Path:
        return self.folder / f"{checkpoint}{self.suffix}"

    def _is_of(self, checkpoint: str) -> bool:
        """Whether there is an evaluation of the weights that the training left, and not of others that lay here before."""
        path = self._evaluated(checkpoint) / "evaluation.json"
        if not path.is_file():
            return False
        evaluated, trained = record.read_json(path)["checkpoint"], record.read_json(self.folder / "result.json")["checkpoints"][checkpoint]
        return evaluated.get("sha256") == trained.get("sha256")

    def _distinct(self) -> tuple[str, ...]:
        """The checkpoints, without the last one where it is the best one too."""
        best, last = (record.read_json(self.folder / "result.json")["checkpoints"][name] for name in ("best", "last"))
        same = len(self.checkpoints) == 2 and (best["epoch"], best["weights"]) == (last["epoch"], last["weights"])
        return ("best",) if same else self.checkpoints

    def _step(self, what: str, command: tuple[str, ...], is_done: Callable[[], bool], limit: TimeLimit, grace: float = 0.0) -> str | None:
        """Runs a command, unless its work is done."""
        if is_done():
            return None
        if limit.left() < 1:
            return f"no time left for the {what}"
        began = time.monotonic()
        output = self.folder / "output.log"
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"  {self.name}: {what}, which prints to {output}", flush=True)
        with open(output, "a") as log:
            status = limit.run([sys.executable, str(record.ROOT / command[0]), *command[1:]], grace, stdout=log, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        if is_done():
            print(f"  {self.name}: {what} done in {time.monotonic() - began:.0f} s", flush=True)
            return None
        if status in (0, -signal.SIGTERM) and (limit.over or limit.deadline < math.inf):
            return f"the {what} is not finished, the same command goes on with it"
        raise Failure(f"{' '.join(command)} ended with status {status}; see {output}")

    def _collect(self) -> None:
        """One small JSON of everything that was measured, evaluations of other checkpoints that it held before among them."""
        found = {name: record.read_json(self._evaluated(name) / "evaluation.json") for name in self._distinct()}
        before = record.read_json(self.result)["evaluations"] if self.result.is_file() else {}
        record.write_json({"label": self.label, "run": record.read_json(self.folder / "result.json"), "log": record.read_lines(self.folder / "log.jsonl"),
                           "evaluations": before | {name: found.get(name, found.get("best")) for name in self.checkpoints}}, self.result)


def do_all(jobs: Sequence[Job], data_dir: Path, devices: Sequence[str], minutes: float | None = None) -> tuple[list[str], list[str]]:
    """Does the jobs, as many at a time as there are `devices`, for at most so many minutes; returns what failed, and what wants only time.

    A device may stand there several times, for as many processes. SIGTERM ends them as the time does.
    """
    failed: list[str] = []
    unfinished: list[str] = []
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def do(job: Job) -> None:
        device = free.get()
        try:
            if said := job.do(data_dir, device, limit):
                unfinished.append(f"{job.name}: {said}")
        except (Failure, Misuse, OSError, KeyError, ValueError) as error:  # a script, or a file of its own that is damaged or cannot be written
            failed.append(f"{job.name}: {error}")
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool, TimeLimit(minutes) as limit:
        list(pool.map(do, jobs))
    return failed, unfinished


def all_devices() -> list[str]:
    """Every GPU, or the CPU once per core."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"] * cores()
