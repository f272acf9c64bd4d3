"""ResNet50 (He et al. 2016, arXiv:1512.03385) as torchvision has it: Free AT's and Fast AT's on ImageNet.

Written out, because importing torchvision takes as long as importing torch, and every command would.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with BN, plus shortcut, then ReLU; torchvision's names and order.

    The 3x3 convolution has the stride; in the paper the first 1x1 has it.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Images (N, channels, H, W) in [0, 1], 224x224 as published, to logits (N, classes); any image size.

    Weights of torchvision's `resnet50` load, and with `width` 128 those of its `wide_resnet50_2`.

    Args:
        normalize: the first layer.
        classes: rows of the last layer.
        channels: of the images.
        width: channels inside the blocks of the first stage, torchvision's `width_per_group`; the later stages
            have 2, 4 and 8 times as many. Between blocks there are always 256, 512, 1024 and 2048.
    """

    def __init__(self, *, normalize: Normalize, classes: int, channels: int, width: int = 64):
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(3, 64, width, 256, stride=1)
        self.layer2 = _stage(4, 256, 2 * width, 512, stride=2)
        self.layer3 = _stage(6, 512, 4 * width, 1024, stride=2)
        self.layer4 = _stage(3, 1024, 8 * width, 2048, stride=2)
        self.fc = nn.Linear(2048, classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = F.max_pool2d(out, 3, 2, padding=1)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(out.mean((2, 3)))


def _stage(count: int, inputs: int, inner: int, outputs: int, stride: int) -> nn.Sequential:
    blocks = [Bottleneck(inputs, inner, outputs, stride)]
    blocks += [Bottleneck(outputs, inner, outputs, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
