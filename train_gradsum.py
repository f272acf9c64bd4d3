"""GradSum: FGSM-AT from zero, and a penalty on the size of the input gradient near the image.

The gradient-penalty method of "Improving single-step adversarial training by local smoothing", from the code on GitHub
(CharlesJames13586). Needs a second derivative. docs/methods.md#gradsum.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "gradsum"
    COMPILES = False  # a compiled network has no second derivative

    max_grad_norm: float | None = 20.0
    alpha: float | None = engine.step_size(1)
    gradsum_lambda: float = engine.flag(10.0, "weight of the penalty, tied to the batch size as the loss is a mean: published at 256")


def perturb(model, x, target, eps, alpha):
    """Inner maximisation from zero."""
    return inside_image(project(alpha * input_gradient(model, x, target).sign(), eps), x)


def gradient_norm(model, x, target, eta, whole=lambda gradient: gradient):
    """The L2 norm of the whole batch's gradient at x + eta, of the mean loss; x + eta may leave [0, 1], as published.

    `whole` makes the batch's gradient of this process's part.
    """
    noisy = (x + eta).requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(noisy), target), noisy, create_graph=True)
    return whole(gradient).square().sum().sqrt()


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):  # BatchNorm is in training mode in all three passes, as published
        target = soft_labels(y, run.classes, cfg.label_factor)
        delta = perturb(run.model, x, target, eps, alpha)
        logits = run.model(x + delta)
        eta = (eps * run.uniform(x) * 255).round() / 255  # whole grey levels, as published
        penalty = gradient_norm(run.model, x, target, eta, whole=lambda gradient: run.gathered(run.share * gradient))
        run.update(F.cross_entropy(logits, target) + cfg.gradsum_lambda * penalty, logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
