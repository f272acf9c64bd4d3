"""A script's step as one CUDA graph: recorded once, then replayed, so that Python and kernel launches cost nothing.

A recording holds addresses and plain numbers. What changes from batch to batch must therefore lie in memory that stays where it is, or
be part of what tells recordings apart; a step that reads a number which would be frozen is refused. docs/performance.md has the rest.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import Failure

if TYPE_CHECKING:
    from engine.run import Run

WARM_UP = 2
"""Batches that are trained on plainly before a recording is made: compilation, the choice of kernels and the optimizer's state come with them."""


def possible(device: torch.device) -> bool:
    """Whether work on this device can be recorded."""
    return device.type == "cuda"


@contextmanager
def compiling() -> Iterator[None]:
    """What torch.compile cannot do is one sentence."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Failure(f"the network cannot be compiled here ({' '.join(str(error).splitlines()[:2])}): leave out --compile") from error


class Compiled(nn.Module):
    """`network` by torch.compile: anew for each size of a batch and each use, which are modes, frozen or not, with an image's gradient or without.

    A compiled network computes all gradients that its parameters ask for when it is called: an attack freezes them around it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.graphs = network, torch.compile(_passed, dynamic=False)
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
        setattr(torch._dynamo.config, limit, max(64, getattr(torch._dynamo.config, limit)))
        # A backward pass that frees what it read cannot be gone through twice, and the cache on the disk gives one script's to another, which may.
        torch._functorch.config.donated_buffer = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        with compiling():
            return self.graphs(self.network, x, any(parameter.requires_grad for parameter in self.network.parameters()))


def _passed(network: nn.Module, x: Tensor, learns: bool) -> Tensor:
    return network(x) if learns else network(x)  # torch 2.6 tells frozen parameters from others by nothing else


def make_recordable(optimizer: Optimizer) -> None:
    """Adam and its kind count their steps on the device instead of in Python; SGD counts none."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group.update(capturable=True, fused=True, foreach=False)


class Graph:
    """Recordings on one GPU, which share their memory: one runs at a time, and none needs what another left there.

    Args:
        generators: whose random numbers are drawn anew in every replay, from wherever they have been put.
    """

    def __init__(self, device: torch.device, generators: list[torch.Generator]) -> None:
        self.generators, self.stream, self.pool = generators, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Does the work, on the stream where it will be recorded."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            work()
        outside.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work without doing it; returns what does it."""
        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < (2, 14):  # later ones find out by themselves
            for generator in self.generators:
                graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):  # other threads read images
            work()
        return graph.replay


class Rates:
    """The learning rate and momentum of every update of a run, where a recording can read them, and how many are done.

    Args:
        rates: (lr, momentum) of every update.
    """

    def __init__(self, rates: Iterable[tuple[float, float]], device: torch.device) -> None:
        self.table = torch.tensor(list(rates), device=device, dtype=torch.float32 if device.type == "cuda" else None)  # what its fused kernel reads
        self.at = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, optimizer: Optimizer, made: Tensor) -> None:
        """Those of the next update, which is `made` or left out, () bool: the kernel takes a rate from memory, but a momentum as a number only."""
        lr, momentum = self.table.index_select(0, self.at.view(1))[0]
        buffers = [state["momentum_buffer"] for state in optimizer.state.values() if state.get("momentum_buffer") is not None]
        if buffers:
            torch._foreach_mul_(buffers, torch.where(made, momentum, 1))
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr, 1.0


class Captured:
    """What `run.captured` makes of a step; called like it.

    Tensors must be those of the batch. A float arrives as a scalar tensor where the step is recorded. Integers, booleans and
    strings are decisions: there is one recording for each combination of them and of the batch's size.
    """

    def __init__(self, step: Callable[..., None], run: Run) -> None:
        self.step, self.run = step, run
        self.forget()

    def forget(self) -> None:
        """Everything is recorded anew: what the run keeps has moved."""
        self.calls: dict[tuple, int] = {}
        self.recordings: dict[tuple, tuple[Callable[[], None], dict[int, Tensor], list[int], int]] = {}

    def __call__(self, *arguments: Any) -> None:
        run = self.run
        key = tuple(tuple(a.shape) if isinstance(a, Tensor) else float if isinstance(a, float) else a for a in arguments)
        seen = self.calls[key] = self.calls.get(key, -1) + 1
        if not run._captures:
            with run._preparing() if run.cfg.compile and not seen else nullcontext():
                return self._plainly(arguments)
        if key in self.recordings:
            replay, numbers, addresses, updates = self.recordings[key]
            if addresses != _addresses(arguments):
                raise Failure(f"{self.step.__name__} was given a tensor that is not the batch's: what changes must be a tensor that run.keep has, or a number")
            for place, number in numbers.items():
                number.fill_(arguments[place])
            replay()
            run._replayed(updates)
            return None
        with run._preparing():
            numbers = {place: torch.tensor(a, device=run.device) for place, a in enumerate(arguments) if isinstance(a, float)}
            steady = [numbers.get(place, a) for place, a in enumerate(arguments)]
            if seen < WARM_UP:
                run._graph.warm_up(lambda: self._plainly(steady))
                return run._replayed(0)
            kept, before = _addresses(run._kept.tensors()), run.step
            replay = run._graph.record(lambda: self._plainly(steady))
            if kept != _addresses(run._kept.tensors()):
                raise Failure(f"{self.step.__name__} puts a new tensor where run.keep has an old one: update it in place, for example with copy_")
            self.recordings[key] = replay, numbers, _addresses(arguments), run.step - before
            replay()
            run._replayed(0)

    def _plainly(self, arguments: Any) -> None:
        with self.run._within():
            if self.step(*arguments) is not None:
                raise Failure(f"{self.step.__name__} returns something: a recorded step leaves its results in tensors that run.keep has")


def _addresses(values: Any) -> list[int]:
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]
