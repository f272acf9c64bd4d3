"""Convolutional networks without BatchNorm, for catastrophic overfitting as GradAlign's authors study it.

Theirs (Andriushchenko and Flammarion 2020, arXiv:2007.02617) is a single-layer CNN, in the figures with four
filters: `--n_filters_cnn=4` in the README of their code, whose plots are called cnn4 for that; the flag's
default is 16. Their class takes any number of layers, but no script asks for more: `--n_layers` is not read.
"""

from math import sqrt

from torch import Tensor, nn

from models.normalize import Normalize


class CNN(nn.Module):
    """Images (N, channels, image_size, image_size) in [0, 1] to logits (N, classes).

    3x3 convolutions with bias, stride 1 and padding 1, each followed by ReLU, then one linear layer that sees
    every position: there is no pooling, so images of another size do not fit. Weights start normal with
    variance 2 / n, n being 9 x filters in a convolution and the inputs in the linear layer; biases at 0.

    Args:
        normalize: the first layer.
        classes: rows of the last layer.
        channels: of the images.
        layers: how many convolutions.
        width: filters of each.
        image_size: side of the images.
    """

    def __init__(
        self,
        *,
        normalize: Normalize,
        classes: int,
        channels: int,
        layers: int = 1,
        width: int = 4,
        image_size: int = 32,
    ):
        super().__init__()
        self.normalize = normalize
        self._model = nn.Sequential()  # the published name
        for i in range(layers):
            self._model.append(nn.Conv2d(width if i else channels, width, 3, padding=1))
            self._model.append(nn.ReLU())
        self._model.append(nn.Flatten())
        self._model.append(nn.Linear(width * image_size**2, classes))

        for module in self._model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                n = 9 * width if isinstance(module, nn.Conv2d) else module.in_features
                nn.init.normal_(module.weight, std=sqrt(2 / n))
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._model(self.normalize(x))
