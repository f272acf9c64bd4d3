"""Images per second of every method's training on this machine, beside the published FGSM-SDI loop and two floors.

    python -m benchmarks.throughput --checkout DIR --data-dir data/ [--only FGSM-SDI,PGD-AT] [--flags=--compile]

Each method's script runs as a user runs it, in a process of its own: ResNet18, batch 128, real CIFAR-10 images, bf16 where
the GPU has it; some batches to warm up, then as many as are timed between two synchronisations. What comes before the first
timed batch is reported apart. DIR is a copy of https://github.com/jiaxiaojunQAQ/FGSM-SDI: its training script runs
unchanged, data loader and all (benchmarks/published_script.py).

Floors, counted on the CPU while a few small batches pass. Arithmetic: the floating-point operations of all convolutions
and matrix products. Memory: the bytes of their operands and results at two bytes a number, as if everything else were
fused into them. A fraction is the floor's time over the measured time.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import resource
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import published_script

ROOT = Path(__file__).resolve().parent.parent
BATCH = 128
PEAKS = {"H100": (800e12, 3.0e12), "H200": (800e12, 4.5e12), "A100": (312e12, 1.9e12), "V100": (112e12, 0.85e12)}
"""Device name to bf16 (V100: fp16) operations and bytes per second that its matrix units and memory reach at best in practice."""
METHODS: dict[str, tuple[str, ...]] = {
    "Standard": ("train_standard.py",), "FGSM-RS": ("train_fgsm_rs.py",), "FGSM-SDI": ("train_fgsm_sdi.py",), "N-FGSM": ("train_n_fgsm.py",),
    "FGSM-BP": ("train_fgsm_bp.py",), "FGSM-EP": ("train_fgsm_ep.py",), "FGSM-MEP": ("train_fgsm_mep.py",), "FGSM-UAP": ("train_fgsm_uap.py",),
    "FGSM-RS-CS": ("train_fgsm_rs_cs.py",), "LIET": ("train_liet.py",), "FGSM-CKPT": ("train_fgsm_ckpt.py",), "NuAT": ("train_nuat.py",), "GAT": ("train_gat.py",),
    "VFSAT": ("train_vfsat.py",), "FGSM-GA": ("train_fgsm_ga.py",), "GradSum": ("train_gradsum.py",), "Free-AT": ("train_free_at.py",),
    "PGD-AT": ("train_pgd_at.py",), "TRADES": ("train_trades.py",), "MART": ("train_mart.py",), "AWP": ("train_awp.py",), "FAT": ("train_fat.py",),
    "GAIRAT": ("train_gairat.py",), "LBGAT": ("train_lbgat.py",), "LAS-AT": ("train_las_at.py",),
}
VARYING = {"FAT"}
"""Methods whose work depends on what the network makes of the images: steps of a few tell nothing of a step of many."""


class Counted(TorchDispatchMode):
    """Floating-point operations of convolutions and matrix products, and the bytes of their operands and results at two bytes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, operation: Any, classes: Any, arguments: Any = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        if count := flop_registry.get(operation._overloadpacket):
            self.operations += count(*arguments, **(named or {}), out_val=made)
            self.bytes += sum(2 * each.numel() for each in tree_leaves((arguments, made)) if isinstance(each, torch.Tensor))
        return made


def limited(batches: int, warm_up: int, done: Any) -> type:
    """An engine.Run whose batches end after `batches`, the first `warm_up` of which do not count; `done` gets the seconds of both parts.

    Raises (when run):
        Misuse: an epoch ends before, whose evaluation would be timed too.
    """
    from engine import Misuse
    from engine.device import clock
    from engine.run import Run  # not engine.Run, which may be another Limited by now

    class Limited(Run):
        def batches(self):
            began = clock(self.device)
            for given, batch in enumerate(super().batches()):
                if self.epoch:
                    break
                if given == warm_up:
                    if self.device.type == "cuda":  # what compilation and the search for fast convolutions took does not count
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats(self.device)
                    middle = clock(self.device)
                if given == batches:
                    done(self, middle - began, clock(self.device) - middle)
                    return
                yield batch
            raise Misuse(f"--batches {batches}: the first epoch is over before; ask for fewer")

    return Limited


def ours(flags: tuple[str, ...], batches: int, warm_up: int) -> dict[str, Any]:
    """Trains a method for so many batches; seconds, images per second and peak memory."""
    import engine
    from engine import record

    found: dict[str, Any] = {}

    def done(run: Any, before: float, timed: float) -> None:
        rate = (batches - warm_up) * run.cfg.batch_size / timed
        found.update(images_per_second=rate, seconds_before=before, precision=run.precision,
                     peak_memory_bytes=record.peak_memory(run.device), **reserved(run.device), seconds_per_epoch=50_000 / rate)

    script, *rest = flags
    module = importlib.import_module(script.removesuffix(".py"))
    with tempfile.TemporaryDirectory() as folder:
        engine.Run = limited(batches, warm_up, done)
        module.main(module.Config.parse(None, [*rest, "--out-dir", folder, "--co-guard", "off", "--save-every", "1e9"]))
    return found


def reserved(device: torch.device) -> dict[str, int]:
    """What torch holds of a GPU at the end: a recorded graph's memory too, which does not count as allocated while it is replayed."""
    return {"reserved_memory_bytes": torch.cuda.memory_reserved(device)} if device.type == "cuda" else {}


def floors(flags: tuple[str, ...]) -> dict[str, float]:
    """Operations and bytes per image of a method's step at batch 128, from what steps of 4 and of 8 images do on the CPU."""
    flags = tuple(flag for flag in flags if flag != "--compile")  # the same operations, hidden from the count

    def step(batch: int) -> tuple[int, int]:
        counts = []
        for batches in (2, 3):  # of three batches less those of two: the first one may do more, as FGSM-SDI's does
            with Counted() as counted:
                ours((*flags, "--device", "cpu", "--batch-size", str(batch)), batches, 1)
            counts.append((counted.operations, counted.bytes))
        return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]

    few, many = step(4), step(8)
    slopes = [(b - a) / 4 for a, b in zip(few, many)]  # an image's own; the rest, the weights', is the batch's
    return {name: slope + (a - 4 * slope) / BATCH for name, slope, a in zip(("operations_per_image", "bytes_per_image"), slopes, few)}


def published(checkout: Path, data_dir: Path, batches: int, warm_up: int, device: str) -> dict[str, Any]:
    """The published script's own loop, from its own data loader."""
    found: dict[str, Any] = {}
    cpu = device == "cpu"

    def clock() -> float:
        if not cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __len__(self) -> int:
            return len(self.loader)

        def __iter__(self):
            began = clock()
            for given, batch in enumerate(self.loader):
                if given == warm_up:
                    middle = clock()
                if given == batches:
                    rate = (batches - warm_up) * BATCH / (clock() - middle)
                    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if cpu else torch.cuda.max_memory_allocated()
                    found.update(images_per_second=rate, seconds_before=middle - began, precision="fp32", peak_memory_bytes=memory,
                                 seconds_per_epoch=50_000 / rate)
                    raise SystemExit(0)
                yield batch

    def counted(get_loaders: Any) -> Any:
        def loaders(*a: Any, **k: Any) -> tuple[Any, Any]:
            train, test = get_loaders(*a, **k)
            return Timed(train), test
        return loaders

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SystemExit):
        published_script.as_torchvision(data_dir / "cifar10.npz", Path(folder))
        published_script.run(checkout, Path(folder), counted, cpu=cpu)
    return found


def apart(function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function returns, called in a process of its own; or what went wrong there."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(function, arguments)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}


def main(argv: list[str] | None = None) -> None:
    from engine import record
    from engine.device import chosen_device
    from engine.errors import Misuse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a copy of jiaxiaojunQAQ/FGSM-SDI; without it the published loop is left out")
    parser.add_argument("--data-dir", type=Path, default=Path("data/"), help="where cifar10.npz lies")
    parser.add_argument("--only", help="some of the methods, with commas between them")
    parser.add_argument("--flags", default="", help="more flags for all scripts, as one word: --flags=--compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "throughput.json")
    args = parser.parse_args(argv)
    device = chosen_device(args.device)
    wanted = args.only.split(",") if args.only else list(METHODS)
    if unknown := [label for label in wanted if label not in METHODS]:
        raise Misuse(f"--only {args.only}: {unknown[0]} is not one of {', '.join(METHODS)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peaks for key, peaks in PEAKS.items() if key in name), None)
    shared = ("--dataset", "cifar10", "--data-dir", str(args.data_dir), *shlex.split(args.flags))
    about = {"what": "training, ResNet18, CIFAR-10", "flags": args.flags, "batches": args.batches, "warm_up": args.warm_up, "peaks": peak,
             **record.provenance(device, "as in each row", record.source())}
    rows: dict[str, dict[str, Any]] = {}
    if args.out.is_file():  # those of other methods stay, where all else is alike
        before = record.read_json(args.out)
        if any(before.get(key) != about[key] for key in ("flags", "batches", "warm_up", "commit", "dirty", "versions", "device")):
            raise Misuse(f"--out {args.out}: it was measured with other flags, versions or on another device or commit: give another file, or delete it")
        rows = before["rows"]
    if args.checkout:
        rows["published FGSM-SDI"] = apart(published, args.checkout.resolve(), args.data_dir.resolve(), args.batches, args.warm_up, device.type)
        print("published FGSM-SDI", rows["published FGSM-SDI"], flush=True)
    for label in wanted:
        flags = (*METHODS[label], *shared)
        row = apart(ours, (*flags, "--device", str(device)), args.batches, args.warm_up)
        if "failed" not in row and label not in VARYING:
            row |= apart(floors, flags)
            if peak and "operations_per_image" in row:
                row["fraction_of_arithmetic_floor"] = row["operations_per_image"] * row["images_per_second"] / peak[0]
                row["fraction_of_memory_floor"] = row["bytes_per_image"] * row["images_per_second"] / peak[1]
        if "failed" not in row and (base := rows.get("published FGSM-SDI", {}).get("images_per_second")):
            row["times_the_published_fgsm_sdi"] = row["images_per_second"] / base
        rows[label] = row
        print(label, json.dumps(row), flush=True)
        record.write_json(about | {"rows": rows}, args.out)


if __name__ == "__main__":
    from engine.errors import one_sentence
    with one_sentence():
        main()
