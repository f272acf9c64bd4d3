"""The published FGSM-SDI training script, unchanged, with only its surroundings replaced.

Of a copy of https://github.com/jiaxiaojunQAQ/FGSM-SDI runs FGSM_SDI.py itself: it gets the argument `attacker` that it
reads and never defines, no TensorBoard, no evaluation after its epochs, and writes no weights.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(checkout: Path, data_dir: Path, loaders: Callable[[Callable], Callable], *, cpu: bool) -> None:
    """Runs the script in this process, which is of no use for anything else afterwards.

    Its modules have the names of this repository's (`utils`, `models`), none of which may have been imported before.

    Args:
        loaders: gets the script's own get_loaders(data_dir, batch_size), and returns the one that it is to use.
        cpu: make every .cuda() do nothing.
    """
    if cpu:
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    board = sys.modules["tensorboardX"] = types.ModuleType("tensorboardX")
    board.SummaryWriter = lambda *a, **k: None
    sys.path[:] = [str(checkout)] + [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    utils = importlib.import_module("utils")
    utils.get_loaders = loaders(utils.get_loaders)
    utils.evaluate_pgd = utils.evaluate_standard = lambda *a, **k: (0.0, 0.0)
    torch.save = lambda *a, **k: None
    script = checkout / "FGSM_SDI.py"
    sys.argv = [script.name]
    parse = argparse.ArgumentParser.parse_args
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        added = {"attacker": "generator", "data_dir": str(data_dir), "out_dir": folder}
        argparse.ArgumentParser.parse_args = lambda self: types.SimpleNamespace(**vars(parse(self)) | added)
        exec(compile(script.read_text(), script.name, "exec"), {"__name__": "__main__", "__file__": str(script)})


def as_torchvision(npz: Path, folder: Path) -> None:
    """Writes the images of a cifar10.npz into `folder` in the layout that torchvision.datasets.CIFAR10 reads, and has it do so.

    They are the same images, in files that are not the original bytes: its check of them is left out.
    """
    import pickle

    import numpy as np
    import torchvision

    root = folder / "cifar-10-batches-py"
    root.mkdir()
    with np.load(npz) as arrays:
        x, y = arrays["x_train"], arrays["y_train"]
        fifth = len(x) // 5
        parts = {f"data_batch_{i + 1}": (x[i * fifth:(i + 1) * fifth], y[i * fifth:(i + 1) * fifth]) for i in range(5)}
        parts["test_batch"] = arrays["x_test"], arrays["y_test"]
    for name, (x, y) in parts.items():
        (root / name).write_bytes(pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()}))
    torchvision.datasets.CIFAR10._check_integrity = lambda self: True
    torchvision.datasets.CIFAR10._load_meta = lambda self: None
