"""Free-AT: every batch m times, and each backward pass moves both the weights and the perturbation.

Shafahi et al., "Adversarial training for free!", NeurIPS 2019, Algorithm 1. The perturbation belongs to a position in the
batch, not to an image, and is carried from batch to batch. docs/methods.md#free-at.
"""
from dataclasses import dataclass

import torch.nn.functional as F

import engine
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "free-at"

    replays: int | None = engine.flag(None, "how often each batch is used in a row, the paper's m (default: 8, imagenet 4)", at_least=1)
    divide_epochs: bool = engine.flag(False, "train for epochs / m, rounded up, as Free-AT's authors do; the papers' tables do not divide")

    def complete(self) -> None:
        super().complete()
        if self.replays is None:
            self.replays = 4 if self.dataset == "imagenet" else 8
        if self.divide_epochs and self.replays > 0:
            self.epochs, self.divide_epochs = -(-self.epochs // self.replays), False


def perturb(delta, gradient, x, eps):
    """Inner maximisation: one step of eps with the gradient of the pass that also trains the weights."""
    return inside_image(project(delta + eps * gradient.sign(), eps), x)


def main(cfg: Config) -> None:
    run = engine.Run(cfg, updates_per_batch=cfg.replays)
    carried = run.memory("carried", per_image=False)

    @run.captured
    def step(x, y):  # BatchNorm is in training mode; x + delta of the first replay may leave [0, 1], as published
        target = soft_labels(y, run.classes, cfg.label_factor)
        delta = carried[run.positions]
        for _ in range(cfg.replays):
            noisy = (x + delta).requires_grad_()
            logits = run.model(noisy)
            run.update(F.cross_entropy(logits, target), logits=logits, leaf=noisy)
            delta = perturb(delta, noisy.grad, x, cfg.eps)
        carried[run.positions] = delta

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
