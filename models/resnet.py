"""Residual networks for small images (He et al. 2016, arXiv:1512.03385): 3x3 stem, no max-pooling.

Parameter names are those of the files which the field shares (kuangliu's ResNet18), so their weights load.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU; where shapes differ a 1x1 conv with BN projects."""

    def __init__(self, inputs: int, outputs: int, stride: int, relu_before_add: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu_before_add = relu_before_add

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.relu_before_add:
            out = F.relu(out)
        return F.relu(out + self.shortcut(x))


class Backbone(nn.Module):
    """Stem, four stages and pooling: what a ResNet is without its last layer.

    Args:
        normalize: the first layer.
        channels: of the images.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        blocks: how many blocks each stage has; a stage of none is left out.
        relu_before_add: see `ResNet`.
        grid: the pooling keeps this many positions along either side.
    """

    def __init__(
        self,
        *,
        normalize: nn.Module,
        channels: int,
        width: int,
        blocks: tuple[int, int, int, int],
        relu_before_add: bool = False,
        grid: int = 1,
    ):
        super().__init__()
        self.features = width
        self.relu_before_add = relu_before_add
        self.grid = grid
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks[0], width, stride=1)
        self.layer2 = self._stage(blocks[1], 2 * width, stride=2)
        self.layer3 = self._stage(blocks[2], 4 * width, stride=2)
        self.layer4 = self._stage(blocks[3], 8 * width, stride=2)
        self.features *= grid**2  # now what a last layer sees

    def _stage(self, count: int, outputs: int, stride: int) -> nn.Sequential:
        stage = nn.Sequential()
        for i in range(count):
            stage.append(BasicBlock(self.features, outputs, stride if i == 0 else 1, self.relu_before_add))
            self.features = outputs
        return stage

    def embed(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) in [0, 1] to pooled activations (N, features)."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        height, width = out.shape[-2:]
        return F.avg_pool2d(out, (height // self.grid, width // self.grid)).flatten(1)


class ResNet(Backbone):
    """Images (N, channels, H, W) in [0, 1] to logits (N, classes); any image size, for the pooling is global.

    At 32x32 that is the published `avg_pool2d(4)`.

    Args:
        normalize: the first layer.
        classes: rows of the last layer.
        channels: of the images.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        blocks: how many blocks each stage has; a stage of none is left out.
        relu_before_add: rectify each block's residual before the sum, as the ResNet18 of NuAT and GAT does.
            The parameter names do not show it.
    """

    def __init__(
        self,
        *,
        normalize: nn.Module,
        classes: int,
        channels: int,
        width: int = 64,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        relu_before_add: bool = False,
    ):
        super().__init__(
            normalize=normalize, channels=channels, width=width, blocks=blocks, relu_before_add=relu_before_add
        )
        self.linear = nn.Linear(self.features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embed(x))
