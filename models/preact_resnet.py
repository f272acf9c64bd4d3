"""Pre-activation ResNets (He et al. 2016, arXiv:1603.05027) in the four forms of published weights.

The field's files differ in two places, and the names of the parameters show only the second:

    variant   the projection shortcut sees   BN and ReLU after the last block   used by
    a         relu(bn1(x))                   no                                 FGSM-SDI, FGSM-PGI, CKPT
    b         x                              yes                                fast_adversarial, N-FGSM
    c         x                              no                                 GradAlign, VFSAT, RobustBench
    d         relu(bn1(x))                   yes                                robust_overfitting, AWP

So a file of variant a fits c, and b fits d, and the accuracy alone tells which it is. With 18 layers all four
are published, with 34 layers only c: VFSAT's network for Tiny ImageNet. There the FastAT Benchmark has variant a
with global pooling, preactresnet18-gap.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice plus shortcut; a bare 1x1 convolution projects where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, raw_shortcut: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.raw_shortcut = raw_shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        if self.shortcut is None:
            shortcut = x
        else:
            shortcut = self.shortcut(x if self.raw_shortcut else out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """Images (N, channels, H, W) in [0, 1] to logits (N, classes).

    The pooling is global, which at 32x32 is the published `avg_pool2d(4)`, except at `image_size` 64: there
    FGSM-SDI's Tiny ImageNet network keeps that window, so that the last layer sees 2 x 2 positions.

    Args:
        normalize: the first layer.
        classes: rows of the last layer.
        channels: of the images.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        blocks: how many blocks each stage has, at least one.
        image_size: side of the training images.
        raw_shortcut: feed projection shortcuts with the block's input instead of its first activation.
        final_bn: normalise and rectify once more before the pooling.
        pool_globally: at `image_size` 64 too.
    """

    def __init__(
        self,
        *,
        normalize: Normalize,
        classes: int,
        channels: int,
        width: int = 64,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        image_size: int = 32,
        raw_shortcut: bool = False,
        final_bn: bool = False,
        pool_globally: bool = False,
    ):
        super().__init__()
        self.grid = 2 if image_size == 64 and not pool_globally else 1
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(blocks[0], width, width, 1, raw_shortcut)
        self.layer2 = _stage(blocks[1], width, 2 * width, 2, raw_shortcut)
        self.layer3 = _stage(blocks[2], 2 * width, 4 * width, 2, raw_shortcut)
        self.layer4 = _stage(blocks[3], 4 * width, 8 * width, 2, raw_shortcut)
        self.bn = nn.BatchNorm2d(8 * width) if final_bn else None
        self.linear = nn.Linear(8 * width * self.grid**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        height, width = out.shape[-2:]
        return self.linear(F.avg_pool2d(out, (height // self.grid, width // self.grid)).flatten(1))


def _stage(count: int, inputs: int, outputs: int, stride: int, raw_shortcut: bool) -> nn.Sequential:
    blocks = [PreActBlock(inputs, outputs, stride, raw_shortcut)]
    blocks += [PreActBlock(outputs, outputs, 1, raw_shortcut) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
