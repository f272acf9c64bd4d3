"""FGSM-RS: one gradient-sign step from a random start.

Wong, Rice & Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020; Algorithm 2 of the
FGSM-SDI paper. `--init zero` is FGSM-AT (Goodfellow et al., ICLR 2015). Both collapse at large radii: catastrophic
overfitting. What differs from the published code: docs/methods.md#fgsm-rs.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-rs"

    alpha: float | None = engine.step_size(1.25)
    init: Literal["uniform", "zero"] = engine.flag("uniform", "where the step starts: uniform noise in the ball, or zero (FGSM-AT)")


def perturb(model, x, target, eta, eps, alpha):
    """Inner maximisation: delta = P[eta + alpha sign(grad L(f(x + eta), y))], in the ball and in the image."""
    eta = inside_image(eta, x)
    gradient = input_gradient(model, x + eta, target)
    return inside_image(project(eta + alpha * gradient.sign(), eps), x)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        eta = eps * run.uniform(x) if cfg.init == "uniform" else torch.zeros_like(x)
        delta = perturb(run.model, x, target, eta, eps, alpha)  # BatchNorm stays in training mode, as published
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
