"""Images per second of every method's training on this machine, beside the published FGSM-SDI loop and two floors.

    python -m benchmarks.throughput --checkout DIR --data-dir data/ [--only FGSM-SDI,PGD-AT] [--flags "--compile"]

Each method's script runs as a user runs it, in a process of its own: ResNet18, batch 128, real CIFAR-10 images, bf16 where
the GPU has it; some batches to warm up, then as many as are timed between two synchronisations. What comes before the first
timed batch is reported apart. DIR is a copy of https://github.com/jiaxiaojunQAQ/FGSM-SDI: its training script runs
unchanged, data loader and workers and all, with only the argument that it forgot to define and without its evaluation.

Floors, counted on the CPU while a few small batches pass. Arithmetic: the floating-point operations of all convolutions
and matrix products. Memory: the bytes of their operands and results at two bytes a number, as if everything else were
fused into them. A fraction is the floor's time over the measured time.
"""
from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pickle
import shlex
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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
    """An engine.Run whose batches end after `batches`, the first `warm_up` of which do not count; `done` gets the seconds of both parts."""
    from engine.run import Run  # not engine.Run, which may be another Limited by now

    class Limited(Run):
        given = 0

        def _epoch(self):
            if not self.given:
                self.began = self._clock()
            for batch in super()._epoch():
                if self.given == warm_up:
                    self.middle = self._clock()
                if self.given == batches:
                    done(self, self.middle - self.began, self._clock() - self.middle)
                    self.batch, self.epoch = -1, self.cfg.epochs  # the run is over
                    return
                self.given += 1
                yield batch

        def _end_of_epoch(self) -> None:
            self.batch, self.epoch = 0, self.epoch + 1

        def _finish(self) -> None:
            """No files."""

    return Limited


def ours(flags: tuple[str, ...], batches: int, warm_up: int) -> dict[str, Any]:
    """Trains a method for so many batches; seconds, images per second and peak memory."""
    import engine
    from engine import record

    found: dict[str, Any] = {}

    def done(run: Any, before: float, timed: float) -> None:
        found.update(images_per_second=(batches - warm_up) * run.cfg.batch_size / timed, seconds_before=before, precision=run._precision,
                     peak_memory_bytes=record.peak_memory(run.device), seconds_per_epoch=50_000 / ((batches - warm_up) * run.cfg.batch_size / timed))

    script, *rest = flags
    module = importlib.import_module(script.removesuffix(".py"))
    with tempfile.TemporaryDirectory() as folder:
        engine.Run = limited(batches, warm_up, done)
        module.main(module.Config.parse(None, [*rest, "--out-dir", folder, "--co-guard", "off", "--save-every", "1e9"]))
    return found


def floors(flags: tuple[str, ...]) -> dict[str, float]:
    """Operations and bytes per image of a method's step at batch 128, from what steps of 4 and of 8 images do on the CPU."""
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


def published(checkout: Path, data_dir: Path, batches: int, warm_up: int) -> dict[str, Any]:
    """The published script's own loop, from its own data loader, on the GPU."""
    import numpy as np
    import torchvision

    found: dict[str, Any] = {}
    sys.modules["tensorboardX"] = types.ModuleType("tensorboardX")
    sys.modules["tensorboardX"].SummaryWriter = lambda *a, **k: None
    torchvision.datasets.CIFAR10._check_integrity = lambda self: True  # the same images, in files that are not the original bytes
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cifar-10-batches-py"
        root.mkdir()
        with np.load(data_dir / "cifar10.npz") as arrays:
            parts = [(f"data_batch_{i + 1}", arrays["x_train"][i * 10_000:(i + 1) * 10_000], arrays["y_train"][i * 10_000:(i + 1) * 10_000]) for i in range(5)]
            parts.append(("test_batch", arrays["x_test"], arrays["y_test"]))
        for name, x, y in parts:
            (root / name).write_bytes(pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()}))
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
        torchvision.datasets.CIFAR10._load_meta = lambda self: None
        parse = argparse.ArgumentParser.parse_args
        argparse.ArgumentParser.parse_args = lambda self: types.SimpleNamespace(**{**vars(parse(self)), "attacker": "generator", "data_dir": folder, "out_dir": folder})
        sys.path[:] = [str(checkout)] + [path for path in sys.path if Path(path or ".").resolve() != ROOT]
        utils = importlib.import_module("utils")
        get_loaders = utils.get_loaders

        class Counted:
            def __init__(self, loader: Any) -> None:
                self.loader, self.began, self.given = loader, time.perf_counter(), 0

            def __len__(self) -> int:
                return len(self.loader)

            def __iter__(self):
                for batch in self.loader:
                    if self.given == warm_up:
                        torch.cuda.synchronize()
                        self.middle = time.perf_counter()
                    if self.given == batches:
                        torch.cuda.synchronize()
                        rate = (batches - warm_up) * BATCH / (time.perf_counter() - self.middle)
                        found.update(images_per_second=rate, seconds_before=self.middle - self.began, precision="fp32", peak_memory_bytes=torch.cuda.max_memory_allocated(),
                                     seconds_per_epoch=50_000 / rate)
                        raise SystemExit(0)
                    yield batch
                    self.given += 1

        def counted(*a: Any, **k: Any) -> Any:
            train, test = get_loaders(*a, **k)
            return Counted(train), test

        utils.get_loaders = counted
        utils.evaluate_pgd = utils.evaluate_standard = lambda *a, **k: (0.0, 0.0)
        torch.save = lambda *a, **k: None
        script = checkout / "FGSM_SDI.py"
        sys.argv = [script.name]
        try:
            exec(compile(script.read_text(), script.name, "exec"), {"__name__": "__main__", "__file__": str(script)})
        except SystemExit:
            pass
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
    from engine.run import chosen_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a copy of jiaxiaojunQAQ/FGSM-SDI; without it the published loop is left out, as it is without a GPU")
    parser.add_argument("--data-dir", type=Path, default=Path("data/"), help="where cifar10.npz lies")
    parser.add_argument("--only", help="some of the methods, with commas between them")
    parser.add_argument("--flags", default="", help="more flags for all scripts, as one word: \"--compile\"")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "throughput.json")
    args = parser.parse_args(argv)
    device = chosen_device(args.device)
    wanted = args.only.split(",") if args.only else list(METHODS)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peaks for key, peaks in PEAKS.items() if key in name), None)
    shared = ("--dataset", "cifar10", "--data-dir", str(args.data_dir), *shlex.split(args.flags))
    rows: dict[str, dict[str, Any]] = {}
    if args.checkout and device.type == "cuda":
        rows["published FGSM-SDI"] = apart(published, args.checkout.resolve(), args.data_dir.resolve(), args.batches, args.warm_up)
        print("published FGSM-SDI", rows["published FGSM-SDI"], flush=True)
    for label in wanted:
        flags = (*METHODS[label], *shared)
        row = apart(ours, (*flags, "--device", str(device)), args.batches, args.warm_up)
        if "failed" not in row:
            row |= apart(floors, flags)
            if peak and "failed" not in row:
                row["fraction_of_arithmetic_floor"] = row["operations_per_image"] * row["images_per_second"] / peak[0]
                row["fraction_of_memory_floor"] = row["bytes_per_image"] * row["images_per_second"] / peak[1]
            if base := rows.get("published FGSM-SDI", {}).get("images_per_second"):
                row["times_the_published_fgsm_sdi"] = row["images_per_second"] / base
        rows[label] = row
        print(label, json.dumps(row), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record.write_json({"what": "training, ResNet18, CIFAR-10", "flags": args.flags, "batches": args.batches, "warm_up": args.warm_up, "peaks": peak, "rows": rows,
                           **record.provenance(device, "as in each row")}, args.out)


if __name__ == "__main__":
    main()
