"""Updates that are not finite (`--on-nonfinite`): noticed on the device, kept away from the weights, counted. docs/guard.md."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import Failure

IN_A_ROW = 10  # updates that are not finite, one after the other, before --on-nonfinite skip gives up


class Finite:
    """Which updates may be made, decided on the device without making it wait.

    Args:
        skips: whether an update that is not finite is left out and counted: up to 1 % of an epoch's classifier updates
            (at least one), and fewer than `IN_A_ROW` one after the other; the next one, or else the first, is fatal.
        updates: of the classifier in an epoch.
        deferred: whether an update is not to wait for what it finds, because reading a number would make the device wait.
        last_save: the file that the message names.
    """

    def __init__(self, skips: bool, updates: int, device: torch.device, *, deferred: bool, last_save: Path) -> None:
        self.skips, self.updates, self.allowed = skips, updates, math.ceil(updates / 100)
        self.deferred, self.last_save = deferred, last_save
        self.fatal = torch.full((), -1, dtype=torch.int64, device=device)  # the number of the update that ends the run
        self.skipped, self.row = torch.zeros_like(self.fatal), torch.zeros_like(self.fatal)  # in this epoch; one after the other
        self._buffers: list[Tensor] = []
        self._copy: Tensor | None = None

    def watch(self, buffers: list[Tensor]) -> None:
        """These are put back where an update is left out: BatchNorm's averages took in what led to it."""
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()] if self.skips else []
        self._copy = self._flat()

    def remember(self) -> None:
        """The buffers were restored: as they are now is what they are put back to."""
        if self._copy is not None:
            self._copy.copy_(self._flat())

    @contextmanager
    def admitting(
        self, loss: Tensor, parameters: list[Tensor], optimizer: torch.optim.Optimizer, *, step: int | Tensor,
    ) -> Iterator[Tensor]:
        """Around `optimizer.step()` of update number `step`: a loss or a gradient that is not finite does not reach the parameters.

        Yields:
            Whether the update is made, () bool.

        Raises:
            Failure: the run is to end; unless that is deferred.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        finite = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients, foreach=True))
        made = self.admit(finite, step)
        if not self.deferred:
            self.read()
        if not self.deferred and made:
            yield made
        elif optimizer.defaults.get("fused"):
            new = [parameter for parameter in parameters if parameter not in optimizer.state]
            optimizer.found_inf = (~made).float()  # a fused optimizer then leaves out its step
            yield made
            del optimizer.found_inf
            for parameter in new if self.skips else ():  # a step left out makes SGD's buffers without filling them
                for value in optimizer.state[parameter].values():
                    if isinstance(value, Tensor):
                        value.copy_(torch.where(made, value, 0))
        else:
            before = [parameter.detach().clone() for parameter in parameters]
            for gradient in gradients if self.skips else ():
                gradient.copy_(torch.where(made, gradient, 0))  # what the optimizer remembers only fades
            yield made
            with torch.no_grad():
                for parameter, value in zip(parameters, before):
                    parameter.copy_(torch.where(made, parameter, value))
        self.repair(made)

    def admit(self, finite: Tensor, step: int | Tensor) -> Tensor:
        """Whether update number `step` is to be made, () bool; none is after a fatal one."""
        fine = finite
        if self.skips:
            self.skipped += ~finite
            self.row.add_(1).mul_(~finite)
            fine = finite | (self.skipped <= self.allowed) & (self.row < IN_A_ROW)
        self.fatal.copy_(torch.where(fine | (self.fatal >= 0), self.fatal, step))
        return finite & (self.fatal < 0)

    def repair(self, made: Tensor) -> None:
        """After an update that was made or not, () bool."""
        if self._copy is not None:
            self._copy.copy_(torch.where(made, self._flat(), self._copy))  # in place: a recorded step reads it where it was
            parts = self._copy.split([buffer.numel() for buffer in self._buffers])
            torch._foreach_copy_(self._buffers, [part.view_as(buffer) for part, buffer in zip(parts, self._buffers)])

    def read(self) -> None:
        """Makes the device wait.

        Raises:
            Failure: there was an update with which the run is to end.
        """
        if (step := int(self.fatal)) >= 0:
            reason = f"; {int(self.skipped)} updates of this epoch were not finite, {int(self.row)} one after the other" if self.skips else ""
            raise Failure(f"the loss or its gradient is not finite at update {step} (epoch {step // self.updates + 1}){reason}; the weights were left "
                          f"as they were, and {self.last_save} holds the last save: try a smaller --lr or --precision fp32")

    def state(self) -> list[int]:
        return [int(self.skipped), int(self.row)]

    def load(self, state: list[int]) -> None:
        self.skipped.fill_(state[0])
        self.row.fill_(state[1])

    def _flat(self) -> Tensor | None:
        return torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else None
