"""How far two processes end from one after ten updates of every method: `python -m experiments.processes`.

The same global batches of seven digits (four and three of them, and at the end of an epoch one and none), BatchNorm over the
global batch, float64. Writes results/processes/equality.json, from which docs/processes.md has its table.
"""
from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import distributed, record
from engine.config import Parser
from engine.errors import Failure, one_sentence

SETTING = dict(dataset="digits", device="cpu", width=4, train_size=29, val_size=4, batch_size=7, epochs=2, measure="pgd10", batchnorm="global")
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {  # of methods whose flags change what couples the batch
    "awp": {"": {}, "--base trades": {"base": "trades"}},
    "las_at": {"": {}, "--base trades": {"base": "trades"}, "--base awp": {"base": "awp"}, "--reward cross-entropy": {"reward": "cross-entropy"}},
    "fgsm_mep": {"": {}, "--accumulate sign --align": {"accumulate": "sign", "align": True}},
}
SMALL = {  # so that ten updates show the whole method, and soon
    "las_at": {"interval": 2, "strategy_lr": 0.1}, "free_at": {"replays": 2}, "fgsm_sdi": {"k": 2}, "fgsm_rs_cs": {"stride": 0, "gamma": 0.0},
    "gairat": {"begin": 0.0, "steps": 3}, "lbgat": {"beta": 6.0, "steps": 3},
    **{name: {"steps": 3} for name in ("awp", "fat", "mart", "pgd_at", "trades")},
}
RUNS = {f"{name} {flags}".strip(): (f"train_{name}", SMALL.get(name, {}) | options)
        for name in sorted(path.stem.removeprefix("train_") for path in record.ROOT.glob("train_*.py"))
        for flags, options in VARIANTS.get(name, {"": {}}).items()}


def train(label: str, out_dir: Path, **more: Any) -> None:
    """One of `RUNS`, by as many processes as there are; leaves a run's files in `out_dir`."""
    name, options = RUNS[label]
    script = importlib.import_module(name)
    script.main(script.Config(out_dir=str(out_dir), **SETTING | options | more))
    distributed.barrier()


def train_all(directory: Path) -> None:
    """All of `RUNS`, each in a directory of its label's name, by as many processes as there are."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.start(torch.device("cpu"))
    for label in RUNS:
        train(label, directory / label)


def torchrun(*command: str, count: int = 2) -> subprocess.Popen:
    """So many processes of a Python command on this machine; their output is one stream."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *command], text=True,
        env={**os.environ, "PYTHONPATH": str(record.ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outcome(process: subprocess.Popen, seconds: float | None = None) -> tuple[int, str]:
    """The status and the output of `torchrun`'s processes.

    Raises:
        Failure: they have not ended in time.
    """
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise Failure(f"the processes wait for each other for ever: {process.communicate()[0][-2000:]}") from None
    return process.returncode, output


def farthest(a: Any, b: Any) -> float:
    """The largest difference of two tensors, or of any in two nests of dicts and lists, relative to the largest value in its tensor."""
    if isinstance(a, dict):
        return max((farthest(value, b[key]) for key, value in a.items()), default=0.0) if a.keys() == b.keys() else torch.inf
    if isinstance(a, list | tuple):
        return max(map(farthest, a, b), default=0.0) if len(a) == len(b) else torch.inf
    if not isinstance(a, Tensor):
        a, b = torch.tensor([a, b], dtype=torch.float64) if isinstance(a, float) else torch.tensor([0, a != b])
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    difference = float((a.double() - b.double()).abs().max() / a.abs().max())
    return difference if difference == difference else torch.inf


def compared(one: Path, other: Path) -> dict[str, Any]:
    """What two runs of the same flags kept (weights, optimizers, memories) and logged, as relative differences."""
    a, b = (torch.load(path / "state.pth", weights_only=True) for path in (one, other))
    logged = [[[row["loss"], row["train_accuracy"], row["val_pgd10"]] for row in state["history"]] for state in (a, b)]
    return {"updates": a["position"]["step"], "kept": {name: farthest(kept, b["kept"].get(name)) for name, kept in a["kept"].items()},
            "log": farthest(*logged)}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results" / "processes" / "equality.json")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)  # as one of two processes
    arguments = parser.parse_args(argv)
    if arguments.train_in:
        return train_all(arguments.train_in)
    code = record.source()
    with tempfile.TemporaryDirectory() as directory:
        one, two = Path(directory, "1"), Path(directory, "2")
        train_all(one)
        status, output = outcome(torchrun("-m", "experiments.processes", "--train-in", str(two)))
        print(output)
        if status:
            raise Failure("two processes ended early, as said above")
        report = {"setting": SETTING, "dtype": "float64", "runs": {label: compared(one / label, two / label) for label in RUNS},
                  **record.provenance(torch.device("cpu"), "float64", code)}
    record.write_json(report, arguments.out)
    print(f"{arguments.out}: the largest relative difference is {max(max(run['kept'].values()) for run in report['runs'].values()):.0e}")


if __name__ == "__main__":
    with distributed.leaving(), one_sentence():
        main()
