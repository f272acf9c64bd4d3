"""The device of a run: which one, how torch is set up for it, its memory, cores and clock."""
from __future__ import annotations

import ctypes
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from engine.errors import Misuse

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, in how many


def chosen_device(name: str) -> torch.device:
    """The device that --device names; auto: a GPU where there is one. A GPU with a number becomes torch's current one.

    Raises:
        Misuse: there is no such device, or this torch has no kernels for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Misuse(f"--device {name}: allowed are auto, cpu, cuda and cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise Misuse(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; choose --device cpu, or auto")
    if device.type not in ("cpu", "cuda"):
        raise Misuse(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda":
        _check_kernels(device)
        if device.index is not None and "RANK" not in os.environ:  # torchrun's processes have one each
            torch.cuda.set_device(device)
    return device


def _check_kernels(device: torch.device) -> None:
    """Raises Misuse where this torch was built for newer GPUs only: the first kernel would fail, without naming the cause."""
    built = [int(found[1]) for kind in torch.cuda.get_arch_list() if (found := re.fullmatch(r"sm_(\d+)[a-z]?", kind))]  # AMD's have other names
    major, minor = torch.cuda.get_device_capability(device)
    if built and 10 * major + minor < min(built):
        raise Misuse(f"--device {device}: this torch ({torch.__version__}) has no kernels for {torch.cuda.get_device_name(device)}, whose compute capability is {major}.{minor}: "
                     "install one that was built for an older CUDA (README, Two commands), or choose --device cpu")


def set_up(device: torch.device, deterministic: bool, *, same_sizes: bool) -> None:
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
    keep_freed_memory(device)


def keep_freed_memory(device: torch.device) -> None:
    """Has glibc keep what torch frees on the CPU; on a GPU, or where libc is another one, it does nothing.

    Every step allocates and frees the same activations, larger than what malloc keeps by itself: each goes back to the
    kernel and comes back zeroed, a page at a time. Keeping them made a ResNet18 step at batch 128 about a fifth shorter.
    """
    if device.type != "cpu":
        return
    mmap_max, trim_threshold = -4, -1  # of mallopt(3)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass


def free_bytes(device: torch.device) -> int:
    """Memory that `device` could still give, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what is free, and what the system would give up for it
        return 1024 * next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cores() -> int:
    """How many of this machine's processor cores, or of its container's, are this process's share."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or no limit: "max"
        quota, period = map(int, QUOTA.read_text().split())
        found = min(found, -(-quota // period))
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def clock(device: torch.device) -> float:
    """Seconds, read when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
