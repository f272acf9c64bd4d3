"""The strategy network of LAS-AT (Jia et al. 2022, arXiv:2203.06616): it proposes how to attack each image."""

from collections.abc import Mapping

from torch import Tensor, nn

from models.resnet import Backbone


class StrategyNetwork(Backbone):
    """p(a | x; theta): one categorical distribution per attack parameter and image, independent given x.

    A ResNet18 with one linear layer per parameter in the place of its last. It sees the images as they are, as
    in all published scripts, LAS-AWP's included, whose classifier normalises.

    The published network has one more head, for the method of the attack, of which there is one. Its
    probability is 1 and the gradient of its logarithm 0: it changes nothing but how many random numbers are
    drawn, for initial weights and in sampling. To draw the same, name an action with one option first.

    Args:
        actions: how many options each attack parameter has, by its name. LAS-AT on CIFAR-10 has
            `{"epsilon": 13, "steps": 12, "alpha": 5}`: 3 to 15 and 1 to 5 in 255ths, and 3 to 14 steps.
        channels: of the images.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
        blocks: how many blocks each stage has; a stage of none is left out. Default: a ResNet18's, and below 16 pixels a resnet8's.
        image_size: side of the images. The pooling is global, which at 32x32 is the published `avg_pool2d(4)`,
            except at 64: there the published network keeps that window, so that the heads see 2 x 2 positions.

    Raises:
        ValueError: no actions, or one without options.
    """

    def __init__(
        self,
        actions: Mapping[str, int],
        *,
        channels: int = 3,
        width: int = 64,
        blocks: tuple[int, int, int, int] | None = None,
        image_size: int = 32,
    ):
        if not actions or min(actions.values()) < 1:
            raise ValueError(f"a strategy network needs actions with options, got {dict(actions)}")
        if blocks is None:
            blocks = (1, 1, 1, 0) if image_size < 16 else (2, 2, 2, 2)
        grid = 2 if image_size == 64 else 1
        super().__init__(normalize=nn.Identity(), channels=channels, width=width, blocks=blocks, grid=grid)
        self.heads = nn.ModuleDict({name: nn.Linear(self.features, n) for name, n in actions.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: images (N, channels, H, W) in [0, 1].

        Returns:
            By name, in the order of `actions`, logits (N, options): not yet normalised.
        """
        features = self.embed(x)
        return {name: head(features) for name, head in self.heads.items()}
