"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv:1605.07146), parameters named as in TRADES."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


class WideBlock(nn.Module):
    """BN-ReLU-conv twice plus shortcut; where channels differ a 1x1 conv of the first activation projects.

    The ReLUs are out of place: gradient alignment differentiates twice.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class WideResNet(nn.Module):
    """Images (N, channels, H, W) in [0, 1] to logits (N, classes). No dropout, as in adversarial training.

    The pooling is global, which at 32x32 is the published `avg_pool2d(8)`, except at `image_size` 64: there the
    published Tiny ImageNet network keeps that window, so that the last layer sees 2 x 2 positions.

    Args:
        normalize: the first layer.
        classes: rows of the last layer.
        channels: of the images.
        depth: number of layers, 6n + 4.
        width: the widening factor; stages have 16, 32 and 64 times as many channels.
        image_size: side of the training images.
        sub_block1: register the block that TRADES' file builds and never calls; weights saved by it, and
            by the files that took it over (FGSM-SDI, LAS-AT), hold its parameters.

    Raises:
        ValueError: a depth that is not 6n + 4.
    """

    def __init__(
        self,
        *,
        normalize: Normalize,
        classes: int,
        channels: int,
        depth: int = 34,
        width: int = 10,
        image_size: int = 32,
        sub_block1: bool = False,
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet's depth must be 6n + 4 (10, 16, 22, 28, 34, ...), got {depth}")
        count = (depth - 4) // 6
        self.grid = 2 if image_size == 64 else 1
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _group(count, 16, 16 * width, stride=1)
        if sub_block1:
            # Frozen, for it never gets a gradient, and autograd.grad refuses to look for one in vain.
            self.sub_block1 = _group(count, 16, 16 * width, stride=1).requires_grad_(False)
        self.block2 = _group(count, 16 * width, 32 * width, stride=2)
        self.block3 = _group(count, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width * self.grid**2, classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn1(out))
        height, width = out.shape[-2:]
        return self.fc(F.avg_pool2d(out, (height // self.grid, width // self.grid)).flatten(1))


def _group(count: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    blocks = [WideBlock(inputs, outputs, stride)]
    blocks += [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))  # the published name has a `layer` in it
