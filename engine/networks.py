"""The networks of a run: built for its data set, as scripts see them, and averaged over the updates."""
from __future__ import annotations

import torch
from torch import Tensor, nn

import models
from engine import capture, data
from engine.config import Config
from engine.errors import Misuse


class Classifier(nn.Module):
    """The network as scripts see it: images in [0, 1] to full-precision logits; memory layout and bf16 are inside."""

    def __init__(self, network: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.autocast = network, autocast

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self.autocast is None:
            return self.network(x)
        with torch.autocast(x.device.type, self.autocast):
            return self.network(x).float()


def build(cfg: Config, dataset: data.Dataset, device: torch.device, arch: str, width: int | None) -> nn.Module:
    """A new network from `models` for the data set's images.

    Raises:
        Misuse: there is none of that name and size for such images.
    """
    statistics = data.NORMALISATIONS[cfg.dataset] if cfg.normalise == "dataset" else None
    try:
        network = models.build(arch, classes=dataset.classes, channels=dataset.channels, width=width, normalise=statistics,
                               image_size=dataset.image_size)
    except ValueError as error:
        raise Misuse(f"{'--arch' if arch == cfg.arch else 'the other network'} {arch}: {error}") from error
    return network.to(device, memory_format=torch.channels_last)


def seen_by_scripts(network: nn.Module, cfg: Config, autocast: torch.dtype | None) -> Classifier:
    """The network in training mode, compiled where that was asked for."""
    if cfg.compile and cfg.COMPILES:
        network = capture.Compiled(network)
    return Classifier(network, autocast).train()


def autocast_dtype(cfg: Config, device: torch.device) -> torch.dtype | None:
    """What --precision has the network run in while it trains; None: in its parameters' own numbers."""
    use = cfg.precision == "bf16"
    if cfg.precision == "auto":
        use = device.type == "cuda" and torch.get_default_dtype() == torch.float32 and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if use else None


def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Moves an exponential average one update on: every entry of the state, BatchNorm's too, as the FastAT Benchmark has it."""
    with torch.no_grad():
        pairs = list(zip(average.state_dict().values(), network.state_dict().values()))
        averaged, current = map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point())))
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
