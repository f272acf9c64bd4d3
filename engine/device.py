"""The device of a run: which one, how torch is set up for it, its clock."""
from __future__ import annotations

import ctypes
import os
import time

import torch

from engine.errors import Misuse


def chosen_device(name: str) -> torch.device:
    """The device that --device names; auto: a GPU where there is one.

    Raises:
        Misuse: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Misuse(f"--device {name}: allowed are auto, cpu, cuda and cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise Misuse(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; choose --device cpu, or auto")
    if device.type not in ("cpu", "cuda"):
        raise Misuse(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    return device


def set_up(device: torch.device, deterministic: bool, *, same_sizes: bool = True) -> None:
    """torch's own settings for training on `device`.

    Args:
        same_sizes: whether a network's batches have few sizes, for each of which cuDNN then looks for the fastest convolutions.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on a GPU
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = same_sizes
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Has glibc keep what torch frees on the CPU; elsewhere it does nothing.

    Every step allocates and frees the same activations, larger than what malloc keeps by itself: each goes back to the
    kernel and comes back zeroed, a page at a time. Keeping them made a ResNet18 step at batch 128 about a fifth shorter.
    """
    mmap_max, trim_threshold = -4, -1  # of mallopt(3)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass


def clock(device: torch.device) -> float:
    """Seconds, read when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
