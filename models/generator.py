"""The generative network of FGSM-SDI (Jia et al. 2022, arXiv:2110.05007, section III-B, Table I)."""

import math

import torch
from torch import Tensor, nn


class PerturbationGenerator(nn.Module):
    """g(x, s_x; theta) of Eq. 6: an initial perturbation in [-1, 1] per pixel, to be multiplied by eps.

    Two layouts, because the published code is not the published table:

    - `code` is what the authors ran: Conv+BN+ReLU, a residual block with PReLU, BN, Conv, tanh. Its
      parameters have their names, `scale_last` included, which they register and never use.
    - `paper` is Table I: Conv+BN+ReLU, ResBlock, Conv+BN, with ReLU throughout as the text says. The table
      leaves open what bounds the output, the inside of the block, biases and initial weights. Chosen: tanh,
      and for the rest what the code does, with the last Conv+BN made like the first.

    Both are fully convolutional: any image size.

    Args:
        channels: of the images.
        inputs: what the network sees: `both` the image and the sign of its gradient (2 x channels), or one of
            them (the ablation of section IV-C).
        layout: `code` or `paper`.
        width: channels of the hidden layers.

    Raises:
        ValueError: an unknown `inputs` or `layout`.
    """

    def __init__(self, channels: int = 3, inputs: str = "both", layout: str = "code", width: int = 64):
        super().__init__()
        if inputs not in ("both", "image", "gradient"):
            raise ValueError(f"unknown generator inputs {inputs!r}; known: both, image, gradient")
        if layout not in ("code", "paper"):
            raise ValueError(f"unknown generator layout {layout!r}; known: code, paper")
        self.inputs = inputs
        seen = 2 * channels if inputs == "both" else channels
        if layout == "code":
            self.res_group = nn.Sequential(
                _ConvBN(seen, width, nn.ReLU()),
                _ResBlock(width, nn.PReLU),
                nn.BatchNorm2d(width, affine=False),
                nn.Conv2d(width, channels, 3, padding=1),
            )
            # Frozen: it exists only so that the authors' weights load.
            self.scale_last = nn.Parameter(torch.full((1,), 5.0), requires_grad=False)
        else:
            self.res_group = nn.Sequential(
                _ConvBN(seen, width, nn.ReLU()),
                _ResBlock(width, nn.ReLU),
                _ConvBN(width, channels, nn.Identity()),
            )

    def forward(self, x: Tensor, s_x: Tensor) -> Tensor:
        """x: images (N, C, H, W) in [0, 1]; s_x: the sign of the loss gradient at x, same shape.

        Returns:
            Values in [-1, 1], of x's shape and dtype.
        """
        seen = {"both": (x, s_x), "image": (x,), "gradient": (s_x,)}[self.inputs]
        out = self.res_group(torch.cat(seen, dim=1))
        # To x's dtype before tanh: in bfloat16 (autocast) values near the bound would lie 1/256 apart.
        return torch.tanh(out.to(x.dtype))


class _ConvBN(nn.Module):
    def __init__(self, inputs: int, outputs: int, activation: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class _ResBlock(nn.Module):
    """The block of SN-GAN's generator without its up-sampling; nothing follows the sum."""

    def __init__(self, width: int, activation: type[nn.Module]):
        super().__init__()
        self.b1 = nn.BatchNorm2d(width, affine=False)
        self.act1 = activation()
        self.b2 = nn.BatchNorm2d(width, affine=False)
        self.act2 = activation()
        self.c1 = nn.Conv2d(width, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, width, 3, padding=1)
        for conv in (self.c1, self.c2):
            nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.c1(self.act1(self.b1(x)))
        out = self.c2(self.act2(self.b2(out)))
        return out + x
