"""Images per second of FGSM-SDI's training step on the CPU: as published, written naively, and ours, in fp32 and in bf16.

    python -m benchmarks.cpu_step --checkout DIR

DIR is a copy of https://github.com/jiaxiaojunQAQ/FGSM-SDI; its training script runs unchanged, in a process of its own
(benchmarks/published_script.py), without a GPU and without loading data. The naive form is ours without care: weight
gradients in the attacks, contiguous layout, the generator in the classifier's graph.

ResNet18, batch 128. They take turns, a few batches a round, and what counts is the median over the rounds; the
first batch of a round, on which the generator learns, is left out. Loading data costs none of them anything.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import published_script

ROOT = Path(__file__).resolve().parent.parent
BATCH = 128


class Turns:
    """Hands out batches when it is this process's turn, for so many rounds, and reports how long all but the first one took."""

    def __init__(self, pipe: Any, batches: int, rounds: int) -> None:
        self.pipe, self.batches, self.rounds = pipe, batches, rounds
        torch.manual_seed(0)
        self.x, self.y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def __len__(self) -> int:
        return self.batches + 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.pipe.recv() != "go":
            raise SystemExit(0)
        for batch in range(self.batches + 1):
            if batch == 1:
                began = time.perf_counter()
            yield self.x, self.y
        self.pipe.send(self.batches * BATCH / (time.perf_counter() - began))


def published(turns: Turns, checkout: Path) -> None:
    """The published script itself."""
    published_script.run(checkout, Path(), lambda theirs: lambda *a, **k: (turns, []), cpu=True)


def naive(turns: Turns, checkout: Path) -> None:
    """FGSM-SDI as one writes it down first."""
    import models
    from models.generator import PerturbationGenerator
    from utils import soft_labels

    network, generator, eps = models.build("resnet18"), PerturbationGenerator(3).eval(), 8 / 255
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    while True:
        for x, y in turns:
            def sign(at: torch.Tensor) -> torch.Tensor:
                at = at.detach().requires_grad_()
                F.cross_entropy(network(at), y).backward()
                return at.grad.sign()

            eta = eps * generator(x, sign(x))
            delta = (eta + eps * sign(x + eta)).clamp(-eps, eps)
            optimizer.zero_grad()
            F.cross_entropy(network(x + delta), soft_labels(y, 10, 0.5)).backward()
            optimizer.step()


def ours(turns: Turns, checkout: Path, precision: str = "auto") -> None:
    """train_fgsm_sdi.py on the engine."""
    import engine
    import train_fgsm_sdi

    class Timed(engine.Run):
        def batches(self):
            batches = super().batches()
            while True:
                for _ in turns:
                    yield next(batches)

    engine.Run = Timed
    images = turns.rounds * len(turns) * BATCH  # one epoch, so that nothing is evaluated or saved; the others evaluate nothing either
    engine.run.data.load = lambda *a: synthetic(images)
    with tempfile.TemporaryDirectory() as folder:
        train_fgsm_sdi.main(train_fgsm_sdi.Config(
            dataset="cifar10", batch_size=BATCH, k=len(turns), val_size=1, epochs=1, device="cpu", out_dir=folder, save_every=1e9, co_guard="off",
            precision=precision))


def synthetic(n: int):
    """n + 1 random images, the last one held out."""
    import numpy as np
    from engine.data import Dataset

    x, y = np.random.default_rng(0).integers(0, 256, (n + 1, 32, 32, 3), dtype=np.uint8), np.arange(n + 1) % 10
    return Dataset("cifar10", 10, x, y, x[:1], y[:1], flip=True, pad=4)


VARIANTS = {"published": published, "naive": naive, "ours": ours, "ours, --precision bf16": partial(ours, precision="bf16")}


def work(name: str, checkout: Path, batches: int, rounds: int, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    VARIANTS[name](Turns(pipe, batches, rounds), checkout)


def main() -> None:
    from engine import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a copy of jiaxiaojunQAQ/FGSM-SDI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3, help="timed batches a round (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "cpu-step.json")
    args, code = parser.parse_args(), record.source()

    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in VARIANTS:
        pipes[name], other = context.Pipe()
        given = (name, args.checkout.resolve(), args.batches, args.rounds + 1, args.threads, other)
        processes.append(context.Process(target=work, args=given, daemon=True))
        processes[-1].start()
        other.close()
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name, pipe in pipes.items():
            pipe.send("go")
            rate = pipe.recv()
            if turn:
                rates[name].append(rate)
        print("round", turn, {name: round(values[-1], 1) for name, values in rates.items() if values}, flush=True)
    for pipe in pipes.values():
        pipe.send("stop")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    torch.set_num_threads(args.threads)
    record.write_json({
        "what": "FGSM-SDI training step, ResNet18, batch 128, fp32 unless it says bf16, without the generator's update",
        "published": "https://github.com/jiaxiaojunQAQ/FGSM-SDI", "rounds": args.rounds, "batches_per_round": args.batches,
        "variants": {name: {"images_per_second": rate, "rounds": rates[name], "ours_faster_by": medians["ours"] / rate}
                     for name, rate in medians.items()},
        **record.provenance(torch.device("cpu"), "fp32", code) | {"command": "python -m benchmarks.cpu_step --checkout DIR"},
    }, args.out)
    print({name: f"{rate:.1f} images/s, ours is faster by {medians['ours'] / rate:.2f}" for name, rate in medians.items()})


if __name__ == "__main__":
    main()
