"""Every stream of random numbers, but for initial weights: each a function of the seed and of what it is for, so that none depends on another's length.

Order, crops and flips are functions of (seed, epoch, image); attack noise of (seed, batch of the run) and the position in the
global batch; an evaluation's of its own seed, the attack and the image.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DATA, NOISE, EVALUATION, CROP = range(4)  # they must never meet
STREAMS = {"fgsm": 0, "pgd": 1, "cw": 2, "ball": 3, "order": 4, "directions": 5, "square": 6, "figures": 9}  # those of EVALUATION


def stream_seed(seed: int, *stream: int) -> int:
    """A function of (seed, stream): nearby numbers give unrelated ones."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]) >> 1  # 63 bits, which every generator of torch takes


def seeded(seed: int, *stream: int) -> torch.Generator:
    """A generator on the CPU that is a function of (seed, stream)."""
    return torch.Generator().manual_seed(stream_seed(seed, *stream))


def noise_generator(generator: torch.Generator, seed: int, step: int) -> None:
    """Puts `generator` at the start of the attack noise of batch `step` of the run."""
    generator.manual_seed(stream_seed(seed, NOISE, step))


def evaluation_generator(seed: int, stream: str) -> torch.Generator:
    """The generator of an evaluation's random numbers: a stream for each of their uses."""
    return seeded(seed, EVALUATION, STREAMS[stream])


def in_ball(shape: Sequence[int], eps: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform in [-eps, eps], the same on every device: `generator` is one of the CPU."""
    return eps * (2 * torch.rand(shape, generator=generator) - 1).to(device)
