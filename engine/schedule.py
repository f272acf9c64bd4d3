"""Learning rate and momentum as functions of how many of the run's updates are done.

Everywhere `step` is that number, in [0, total), `total` the updates of the whole run, and `per_epoch` those of an epoch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

MOMENTUM = 0.9
DECAYS = (100 / 110, 105 / 110)  # the FGSM-SDI and FGSM-PGI papers', as fractions of the run


class Rates(NamedTuple):
    lr: float  # as a fraction of the peak
    momentum: float


def multistep(step: int, total: int, per_epoch: int, decays: Sequence[float] = DECAYS) -> Rates:
    """x0.1 at each of `decays`, which are fractions of the run."""
    return Rates(0.1 ** sum(step >= round(total * decay) for decay in decays), MOMENTUM)


def cyclic(step: int, total: int, per_epoch: int, top: float = 0.5) -> Rates:
    """A triangle 0 -> peak -> 0 with momentum 0.9 -> 0.8 -> 0.9: torch's CyclicLR as the papers' scripts call it.

    `top` is the fraction of the run at which the peak comes. The published scripts leave `cycle_momentum` at its default, so
    momentum moves too. The arithmetic is in CyclicLR's order: the rates are then the same to the last bit.
    """
    way = 1 + step / total - 1
    height = way / top if way <= top else (way - 1) / (top - 1)
    return Rates(height, MOMENTUM - (MOMENTUM - 0.8) * height)


def onecycle(step: int, total: int, per_epoch: int) -> Rates:
    """torch's OneCycleLR, stepped once an epoch as the FastAT Benchmark does: cosine up over 30 %, cosine down.

    lr runs peak/25 -> peak -> peak/250,000 and momentum 0.95 -> 0.85 -> 0.95.
    """
    epoch, epochs = step // per_epoch, total // per_epoch
    top = 0.3 * epochs - 1
    if epoch <= top:
        start, end, way = Rates(1 / 25, 0.95), Rates(1, 0.85), epoch / top if top else 1
    else:
        start, end, way = Rates(1, 0.85), Rates(1 / 25e4, 0.95), (epoch - top) / (epochs - 1 - top)
    return Rates(*(b + (a - b) * (1 + math.cos(math.pi * way)) / 2 for a, b in zip(start, end)))


def constant(step: int, total: int, per_epoch: int) -> Rates:
    """The peak throughout."""
    return Rates(1.0, MOMENTUM)


SCHEDULES: dict[str, Callable[..., Rates]] = {
    "multistep": multistep, "cyclic": cyclic, "onecycle": onecycle, "constant": constant,
}
