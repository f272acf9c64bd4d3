"""torchrun's processes: the only file that names torch.distributed. Without torchrun everything here is a no-op."""
from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
import torch.distributed as dist

from engine.errors import Misuse


def start(device: torch.device, *, seldom: bool = False) -> torch.device:
    """Joins the process group when torchrun started this process; returns the device this process is to use.

    They wait for each other for up to two hours: the first one may have to make a data set, and torchrun itself ends them where one is lost.

    Args:
        seldom: the processes meet after hours, in which one may have been much slower than another, and exchange tensors on
            the CPU only, whatever their device: for evaluation. They then wait for each other for up to a day.

    Raises:
        Misuse: more processes than GPUs; or another launcher's environment.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if missing := [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise Misuse(f"RANK is {os.environ['RANK']} in the environment, and {missing[0]} is missing: start with torchrun, which sets both, or unset RANK")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            raise Misuse(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: every process needs a GPU, and this machine has {count}; "
                         "start fewer, or give --device cpu")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" and not seldom else "gloo", timeout=timedelta(days=1) if seldom else timedelta(hours=2))
    return device


@contextmanager
def leaving() -> Iterator[None]:
    """At its end the process group that `start` joined is left, and a process that is no longer needed ends at once.

    One that cannot go on because another one ended says so in one sentence. One that fails does not take leave: NCCL would wait there for the
    others, which wait for this one.

    Tearing the interpreter down would take longer, and gloo's threads outlive the group by a moment: one that wants the
    interpreter just then aborts the process (in one of several hundred runs, after all was done).
    """
    status: object = 0
    try:
        yield
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        status = end.code or 0
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo/transport" in str(error):
            print(f"error: process {rank()} of {world_size()} has lost another one, whose own message or torchrun's below says why", file=sys.stderr)
            time.sleep(1)  # torchrun calls the process that ended first the cause
        else:
            traceback.print_exc()
        status = 1
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(n: int) -> slice:
    """This process's contiguous part of n items, the parts differing by at most one item."""
    r, w = rank(), world_size()
    return slice(-(-n * r // w), -(-n * (r + 1) // w))  # rounded up: the first process always has something


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if dist.is_initialized():
        _together(tensors, dist.all_reduce)


def _together(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """One `collective` for all tensors of a dtype, in place: a network has more than a hundred, and each call takes a GPU longer than what most of them hold."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for several in kinds.values():
        several = [tensor.detach() for tensor in several]
        flat = torch.cat([tensor.reshape(-1) for tensor in several])
        collective(flat)
        parts = flat.split([tensor.numel() for tensor in several])
        torch._foreach_copy_(several, [part.view(tensor.shape) for tensor, part in zip(several, parts)])


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors, with derivatives of every order.

    Each process's loss is a mean over its own images, and what is minimised is the mean of these losses, each weighing its
    process's `share` of the batch. A gradient in a process's graph is that of this mean divided by its share: here, where the
    graphs meet, it is multiplied by one share and divided by the other.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, share: float | Tensor) -> Tensor:
        ctx.share = share
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient * ctx.share, ctx.share) / ctx.share, None


NO_SHARE = 1e-20  # of a process without images: its graphs are empty, but 0 / 0 in them would reach the others


def summed(part: Tensor, share: float | Tensor) -> Tensor:
    """The sum over the processes, of which gradients may be taken, also twice.

    Args:
        part: this process's summand, of the same shape everywhere.
        share: what part of the batch's images this process has.
    """
    return _Sum.apply(part, share) if dist.is_initialized() else part


def gathered(part: Tensor, n: int) -> Tensor:
    """All processes' parts of n items, put together in order: `part` is items[shard(n)] here. Differentiable like `summed`."""
    if not dist.is_initialized():
        return part
    whole = part.new_zeros((n, *part.shape[1:]), dtype=torch.uint8 if part.dtype == torch.bool else part.dtype)  # gloo sums no bool
    whole[shard(n)] = part
    return summed(whole, len(part) / n or NO_SHARE).to(part.dtype)


def gather(rows: Tensor) -> Tensor:
    """On the first process all processes' rows (n, ...), in the processes' order; on another its own. On the CPU, under `seldom`."""
    if not dist.is_initialized():
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    if rank() > 0:
        if len(rows):
            dist.send(rows.contiguous(), 0)
        return rows
    parts = [rows]
    for source, count in enumerate(counts.tolist()):
        if source and count:
            parts.append(rows.new_empty((count, *rows.shape[1:])))
            dist.recv(parts[-1], source)
    return torch.cat(parts)


def all_gather_object(mine: Any) -> list[Any]:
    """What each process has, a list of strings say, on all of them. Under `seldom`."""
    found = [mine] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, mine)
    return found


def maximum(value: int, device: torch.device) -> int:
    """The largest value on any process."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def agree(value: bytes, device: torch.device) -> bool:
    """Whether all processes have the same."""
    key = int(hashlib.sha256(value).hexdigest()[:15], 16)
    return maximum(key, device) == -maximum(-key, device)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes that of the first process, in place."""
    if dist.is_initialized():
        _together(tensors, partial(dist.broadcast, src=0))


def barrier() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The other processes go through the block when the first one has: it makes the files that they then find."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()
