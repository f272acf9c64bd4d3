"""GAIRAT: PGD-AT in which an image weighs the more, the fewer steps it takes to have it misclassified.

Zhang et al., "Geometry-aware instance-reweighted adversarial training", ICLR 2021, Algorithms 1 and 2. Its robustness does
not last against AutoAttack, as its authors agree. docs/methods.md#gairat.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from utils import eval_mode, frozen, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "gairat"

    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "steps of the attack, half of which are the measure of the boundary", at_least=2)
    gair_lambda: float = engine.flag(-1.0, "shift of the weights: the lower, the less the images far from the boundary weigh")
    weights: Literal["tanh", "sigmoid", "discrete"] = engine.flag("tanh", "the weight as a function of the steps survived")
    begin: float = engine.flag(0.5, "images are weighted from the epoch on that ends at this fraction of the run (published: the 60th of 120)")


def perturb(model, x, y, target, eta, eps, alpha, steps):
    """Inner maximisation by PGD: delta, and kappa, (B,), how many of the points on the way were classified correctly."""
    delta, kappa = inside_image(eta, x), torch.zeros_like(x[:, 0, 0, 0])
    for _ in range(steps):
        x_adv = (x + delta).requires_grad_()
        with frozen(model):
            logits = model(x_adv)
            gradient, = torch.autograd.grad(F.cross_entropy(logits, target), x_adv)
        kappa += logits.argmax(1) == y
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta, kappa


def instance_weights(kappa, steps, shift, function):
    """The paper's omega(x, y), scaled to a mean of 1 over the batch; (B,) to (B,). (tanh(a) + 1) / 2 is sigmoid(2a), which stays above zero."""
    half = steps // 2
    argument = shift + 5 * (half - kappa) / half
    weight = {"tanh": (2 * argument).sigmoid(), "sigmoid": argument.sigmoid(), "discrete": (steps + 1 - kappa) / (steps + 1)}[function]
    return weight * len(weight) / weight.sum()


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y, weighted):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(run.model):
            delta, kappa = perturb(run.model, x, y, target, eps * run.uniform(x), eps, alpha, cfg.steps)
        logits = run.model(x + delta)
        loss = F.cross_entropy(logits, target, reduction="none")
        if weighted:
            loss = loss * instance_weights(run.gathered(kappa), cfg.steps, cfg.gair_lambda, cfg.weights)[run.positions]
        run.update(loss.mean(), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, run.epoch + 1 >= cfg.begin * cfg.epochs)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
