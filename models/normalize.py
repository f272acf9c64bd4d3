"""Input normalisation as the first layer of every network, so that images and radii keep to [0, 1]."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; x itself, at no cost, when mean is 0 and std is 1.

    `mean` and `std` are buffers of shape (C,), present in the state_dict even when they do nothing, so that a
    checkpoint says how its network was trained. Change them only through `load_state_dict`: whether they are
    the identity is decided there and at construction, for `forward` would have to wait for the GPU to see it.

    Args:
        mean: one number per channel, in the units of the images.
        std: one positive number per channel.

    Raises:
        ValueError: the lengths differ, or a number is not finite, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = [float(m) for m in mean], [float(s) for s in std]
        if len(mean) != len(std):
            raise ValueError(f"normalisation needs as many means as stds, got {len(mean)} and {len(std)}")
        if not all(isfinite(value) for value in mean + std) or min(std) <= 0:
            raise ValueError(f"normalisation needs finite means and positive stds, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.identity = _is_identity(mean, std)
        self.register_load_state_dict_post_hook(_decide_identity)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in [0, 1]."""
        if self.identity:
            return x
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return "identity" if self.identity else ""


def _is_identity(mean: list[float], std: list[float]) -> bool:
    return all(m == 0 for m in mean) and all(s == 1 for s in std)


def _decide_identity(layer: Normalize, _incompatible_keys: object) -> None:
    # A function, not a bound method: a deep copy of the network must look at its own buffers.
    if not layer.mean.is_meta:
        layer.identity = _is_identity(layer.mean.tolist(), layer.std.tolist())
