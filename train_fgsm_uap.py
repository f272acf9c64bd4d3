"""FGSM-UAP: the step starts at one universal perturbation, which itself follows the momentum of all gradients.

Pan, Li & Yao, "Adversarial initialization with universal adversarial perturbation: A new approach to fast adversarial
training", AAAI 2024, in the form of the FastAT Benchmark, where its recipe is. docs/methods.md#fgsm-uap.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-uap"

    label_factor: float = 0.64  # torch's smoothing 0.4 at ten classes, the benchmark's
    alpha: float | None = engine.step_size(1)
    uap_epsilon: float | None = engine.flag(None, "radius and step size of the universal perturbation, in 255ths", times_epsilon=1.25, at_least=0)
    mu: float = engine.flag(0.3, "decay of the momentum")
    uap_lambda: float = engine.flag(10.0, "weight of the regulariser")
    momentum_of: Literal["both", "attack"] = engine.flag("both", "gradients at x + eta that the momentum gathers: the attack's and the whole loss's, as the "
                                                         "published code adds them up in one place, or the attack's alone")


def perturb(model, x, target, eta, eps, alpha):
    """Inner maximisation from the universal eta: delta, its gradient, and x + eta and the logits there with their graph."""
    eta = inside_image(project(eta, eps), x)
    noisy = (x + eta).requires_grad_()
    logits = model(noisy)
    gradient, = torch.autograd.grad(F.cross_entropy(logits, target), noisy, retain_graph=True)
    return inside_image(project(eta + alpha * gradient.sign(), eps), x), gradient, noisy, logits


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha, radius = cfg.eps, cfg.alpha / 255, cfg.uap_epsilon / 255
    universal = radius * torch.randn(run.shape).sign().to(run.device)
    momentum = torch.zeros_like(universal)
    run.keep(universal=universal, momentum=momentum)

    @run.captured
    def step(x, y):  # BatchNorm is in training mode in both passes
        target = soft_labels(y, run.classes, cfg.label_factor)
        delta, gradient, noisy, prior_logits = perturb(run.model, x, target, universal.expand_as(x), eps, alpha)
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target) + cfg.uap_lambda * F.mse_loss(logits, prior_logits), logits=logits, leaf=noisy)
        if cfg.momentum_of == "both":
            gradient = gradient + noisy.grad
        gradient = run.gathered(run.share * gradient)
        momentum.mul_(cfg.mu).add_((gradient.mean(0) / gradient.abs().sum()).nan_to_num(0))  # where it is zero or not finite it adds nothing
        universal.copy_(project(universal + radius * momentum.sign(), radius))

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
