"""What AutoAttack costs, attack by attack, and how far evaluations of one network disagree.

    python -m benchmarks.autoattack [--model-path best.pth] [--n 60]

On the digits, on one core. Without --model-path the network is trained first: FGSM-RS, resnet8, epsilon 38/255.

Cost: each attack on the images that the ones before left standing, as one batch: forward passes, gradients of the image
and gradients of the weights, per image; the part of the batch that a forward pass holds on average; processor time. FAB
runs twice: with the network frozen, as attacks.auto_attack has it, and not, as the package alone would run.

Disagreement: test_FGSM_SDI.py on the first 100 test images, whose verdicts are held against those of a plain evaluation
with seed 0: compiled, by two processes, with another seed, and with another batch size. Processor time includes loading,
and for the compiled network compilation.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import attacks

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ("train_fgsm_rs.py", "--dataset", "digits", "--device", "cpu", "--epochs", "6", "--batch-size", "64", "--epsilon", "38")
EVALUATION = ("test_FGSM_SDI.py", "--dataset", "digits", "--device", "cpu", "--n-ex", "100", "--batch-size", "100", "--card-n", "0",
              "--attacks", "pgd10,pgd50,cw,apgd,aa")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain, seed 0": ((), ()), "compiled, seed 0": ((), ("--compile",)), "two processes, seed 0": (TWO, ()),
    "plain, seed 1": ((), ("--seed", "1")), "plain, seed 0, batches of 50": ((), ("--batch-size", "50")),
}
"""What stands before EVALUATION and what follows it. The first one is what the others are held against."""


class Passes:
    """Passes through a network inside `watching`, counted in images. A backward pass must belong to the latest forward pass."""

    def __init__(self) -> None:
        self.batches: list[int] = []  # of the forward passes
        self.input_gradients = self.weight_gradients = 0

    @contextlib.contextmanager
    def watching(self, network: nn.Module) -> Iterator[Passes]:
        hooks = [network.register_forward_pre_hook(self._forward), next(network.parameters()).register_hook(self._weight)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, network: nn.Module, arguments: tuple[Tensor]) -> Tensor | None:
        self.batches.append(len(arguments[0]))
        if not (torch.is_grad_enabled() and arguments[0].requires_grad):
            return None
        x = arguments[0].view_as(arguments[0])  # this pass's own: an image's gradient is the sum over all passes
        x.register_hook(self._input)
        return x

    def _input(self, gradient: Tensor) -> None:
        self.input_gradients += len(gradient)

    def _weight(self, gradient: Tensor) -> None:
        self.weight_gradients += self.batches[-1]


def cost(model: nn.Module, x: Tensor, y: Tensor, attack: str, eps: float, freeze: bool = True) -> tuple[dict[str, Any], Tensor]:
    """One of AutoAttack's attacks, all images in a batch.

    Args:
        x: (N, C, H, W) in [0, 1]; y: (N,) int64.
        freeze: the network's parameters, for the attack.

    Returns:
        What it cost; and (N,) bool: still classified as y.
    """
    package_alone = contextlib.nullcontext() if freeze else patch.object(attacks, "frozen", contextlib.nullcontext)
    with package_alone, Passes().watching(model) as passes:
        began = time.process_time()
        _, still = attacks.auto_attack(model, x, y, attack=attack, eps=eps, seed=0, batch_size=len(x))
        seconds = time.process_time() - began
    model.zero_grad()
    return {"attack": attack, "frozen": freeze, "images": len(x), "standing": int(still.sum()), "forward": sum(passes.batches) / len(x),
            "input_gradients": passes.input_gradients / len(x), "weight_gradients": passes.weight_gradients / len(x),
            "filling": sum(passes.batches) / len(passes.batches) / len(x), "processor_seconds": seconds}, still


def costs(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Iterator[dict[str, Any]]:
    """All four in AutoAttack's order, each on what still stands."""
    standing = (attacks.predict(model, x) == y).nonzero().squeeze(1)
    for attack in attacks.AUTOATTACK:
        row, still = cost(model, x[standing], y[standing], attack, eps)
        yield row
        if attack == "fab-t":
            yield cost(model, x[standing], y[standing], attack, eps, freeze=False)[0]
        standing = standing[still]


def launched(*command: str, folder: Path) -> float:
    """Runs a Python command on one core, nothing compiled before; returns the seconds of processor time.

    Raises:
        SystemExit: the command failed, and has said why.
    """
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, environment = spent(), {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
                                    "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    if status := subprocess.run([sys.executable, *command], env={**os.environ, **environment}, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(status)
    return spent() - before


def evaluated(path: Path, folder: Path, launcher: tuple[str, ...], flags: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The evaluation.json of test_FGSM_SDI.py, with its processor time, and per column the verdicts, (100,) bool."""
    script, *rest = EVALUATION
    seconds = launched(*launcher, str(ROOT / script), *rest, "--model-path", str(path), "--out-dir", str(folder), *flags, folder=folder)
    with np.load(folder / "verdicts.npz") as verdicts:
        return json.loads((folder / "evaluation.json").read_text()) | {"processor_seconds": seconds}, dict(verdicts)


def compared(evaluation: dict[str, Any], verdicts: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """Per column the robust accuracy in percent, and how many verdicts are not the reference's."""
    return {"processor_seconds": evaluation["processor_seconds"], "columns": {
        column: {"accuracy": metric["value"], "differ": int((verdicts[column] != reference[column]).sum())}
        for column, metric in evaluation["metrics"].items()}}


def main(argv: list[str] | None = None) -> None:
    from engine import data, foreign, record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="a checkpoint of a network for the digits (default: one is trained)")
    parser.add_argument("--n", type=int, default=60, help="the first N test images, whose passes are counted (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "autoattack.json")
    args, code = parser.parse_args(argv), record.source()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), args.model_path
        if path is None:
            path = folder / "best.pth"
            launched(str(ROOT / TRAINING[0]), *TRAINING[1:], "--out-dir", name, folder=folder)
        rows, reference = {}, None
        for number, (label, (launcher, flags)) in enumerate(VARIANTS.items()):
            evaluation, verdicts = evaluated(path, folder / str(number), launcher, flags)
            reference = reference or verdicts
            rows[label] = compared(evaluation, verdicts, reference)
            print(label, json.dumps(rows[label]), flush=True)
        model, _ = foreign.load(path)
    digits = data.load("digits", "data/")
    x, y = data.to_images(torch.from_numpy(digits.x_test[:args.n])).contiguous(), torch.from_numpy(digits.y_test[:args.n])
    counted = []
    for row in costs(model, x, y, evaluation["epsilon"] / 255):
        counted.append(row)
        print(json.dumps(row), flush=True)
    record.write_json({
        "what": "AutoAttack on the digits: its cost, and how far evaluations of one network disagree",
        "training": None if args.model_path else " ".join(TRAINING), "evaluation": " ".join(EVALUATION), "seed": 0,
        **{key: evaluation[key] for key in ("method", "arch", "epsilon", "n")}, "images_counted": len(x), "costs": counted, "evaluations": rows,
        **record.provenance(torch.device("cpu"), "fp32", code)}, args.out)


if __name__ == "__main__":
    main()
