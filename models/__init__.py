"""The networks. Apart from the first layer, `normalize`, parameter names are those of the published files."""

from collections.abc import Sequence

from torch import nn

from models.cnn import CNN
from models.generator import PerturbationGenerator
from models.normalize import Normalize
from models.preact_resnet import PreActResNet
from models.resnet import ResNet
from models.resnet50 import ResNet50
from models.strategy import StrategyNetwork
from models.wide_resnet import WideResNet

__all__ = ["NAMES", "Normalize", "PerturbationGenerator", "StrategyNetwork", "build"]

_NETWORKS = {
    "resnet18": (ResNet, {}),
    "resnet18-nuat": (ResNet, {"relu_before_add": True}),
    "resnet8": (ResNet, {"blocks": (1, 1, 1, 0), "width": 16}),
    "preactresnet18": (PreActResNet, {}),
    "preactresnet18a": (PreActResNet, {}),
    "preactresnet18b": (PreActResNet, {"raw_shortcut": True, "final_bn": True}),
    "preactresnet18c": (PreActResNet, {"raw_shortcut": True}),
    "preactresnet18d": (PreActResNet, {"final_bn": True}),
    "preactresnet18-gap": (PreActResNet, {"pool_globally": True}),
    "preactresnet34": (PreActResNet, {"blocks": (3, 4, 6, 3), "raw_shortcut": True}),
    "resnet50": (ResNet50, {}),
    "wideresnet28-10": (WideResNet, {"depth": 28}),
    "wideresnet34-10": (WideResNet, {}),
    "wideresnet34-10-subblock": (WideResNet, {"sub_block1": True}),
    "wideresnet34-20": (WideResNet, {"width": 20}),
    "wideresnet70-16": (WideResNet, {"depth": 70, "width": 16}),
    "cnn1": (CNN, {}),
    "cnn4": (CNN, {"layers": 4, "width": 16}),
}

NAMES = tuple(_NETWORKS)


def build(
    name: str,
    *,
    classes: int = 10,
    channels: int = 3,
    width: int | None = None,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    image_size: int = 32,
) -> nn.Module:
    """A freshly initialised network: images (N, channels, H, W) in [0, 1] to logits (N, classes).

    Args:
        name: one of `NAMES`.
        width: channels of a ResNet's first stage (published: 64; resnet8: 16), in resnet50 of those inside its
            blocks alone; a wide ResNet's widening factor; a CNN's filters; None for what the name says.
        normalise: (mean, std) per channel, or None for the identity. Either way they are in the state_dict as
            `normalize.mean` and `normalize.std`; published files lack them.
        image_size: side of the training images. For ResNets only 64 makes a difference: pre-activation and wide
            ones then have the published Tiny ImageNet head. The others, and preactresnet18-gap, pool globally,
            whatever the size. A CNN takes images of this size alone.

    Raises:
        ValueError: an unknown name, a count that is not positive, or a normalisation that does not fit.
    """
    if name not in _NETWORKS:
        raise ValueError(f"unknown network {name!r}; known networks: {', '.join(NAMES)}")
    counts = {"classes": classes, "channels": channels, "width": width, "image_size": image_size}
    for what, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"a network's {what} must be at least 1, got {value}")
    mean, std = normalise or ((0.0,) * channels, (1.0,) * channels)
    if len(mean) != channels:
        raise ValueError(f"images have {channels} channels, but the normalisation has {len(mean)} means")
    network, defaults = _NETWORKS[name]
    options = defaults | {"normalize": Normalize(mean, std), "classes": classes, "channels": channels}
    if width is not None:
        options["width"] = width
    if network not in (ResNet, ResNet50):
        options["image_size"] = image_size
    return network(**options)
