"""FGSM-GA (GradAlign): FGSM from zero, and a penalty where the gradient turns inside the ball.

Andriushchenko & Flammarion, "Understanding and improving fast adversarial training", NeurIPS 2020, Eq. 4. The penalty
needs a second derivative, which is why the method costs about as much as three FGSM-AT. docs/methods.md#fgsm-ga.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import cosine, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-ga"
    COMPILES = False  # a compiled network has no second derivative
    CYCLIC_LR = 0.3

    alpha: float | None = engine.step_size(1.25)
    ga_lambda: float | None = engine.flag(None, "weight of the penalty (default: the published log-linear rule, 0.2 at epsilon 8 and 2 from 16 on, where it ends; svhn 2.5 at 8 and 3.2 from 12 on)")

    def complete(self) -> None:
        super().complete()
        if self.ga_lambda is None:
            at_zero, growth, most = (1.5625, 1.6, 12) if self.dataset == "svhn" else (0.02, 10, 16)
            self.ga_lambda = at_zero * growth ** (min(self.epsilon, most) / 8)


def perturb(x, gradient, eps, alpha):
    """Inner maximisation from zero, with the gradient at x."""
    return inside_image(project(alpha * gradient.sign(), eps), x)


def misalignment(model, x, target, gradient, eta, whole=lambda alignment: alignment):
    """Eq. 4: 1 - cos(grad L(f(x)), grad L(f(x + eta))), mean over the samples where neither gradient is zero.

    The gradient at x is a constant; only the one at x + eta is differentiated, as published. x + eta may leave [0, 1].
    `whole` puts the processes' parts of the batch together.
    """
    noisy = (x + eta).requires_grad_()
    noisy_gradient, = torch.autograd.grad(F.cross_entropy(model(noisy), target), noisy, create_graph=True)
    alignment = whole(cosine(gradient, noisy_gradient))
    return (1 - alignment).nansum() / (~alignment.isnan()).sum().clamp(min=1)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):  # BatchNorm is in training mode in all three passes, as published
        target = soft_labels(y, run.classes, cfg.label_factor)
        gradient = input_gradient(run.model, x, target)
        logits = run.model(x + perturb(x, gradient, eps, alpha))
        penalty = misalignment(run.model, x, target, gradient, eps * run.uniform(x), whole=run.gathered)
        run.update(F.cross_entropy(logits, target) + cfg.ga_lambda * penalty, logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
