"""PGD-AT: K gradient-sign steps, then a descent step on what they found.

Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, in the recipe of Rice, Wong &
Kolter, "Overfitting in adversarially robust deep learning", ICML 2020; Algorithm 1 of the FGSM-SDI paper. `--steps 2`
and `--steps 4` are the papers' PGD2-AT and PGD4-AT (`--init zero`). docs/methods.md#pgd-at.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "pgd-at"

    steps: int = engine.flag(10, "steps of the attack", at_least=1)
    alpha: float | None = engine.flag(None, "step size, in 255ths (default: epsilon / 4, and epsilon / 2 for 2 steps)", at_least=0)
    init: Literal["uniform", "zero"] = engine.flag("uniform", "where the attack starts: uniform noise in the ball, or zero")
    attack_bn: Literal["train", "eval"] = engine.flag("train", "BatchNorm's mode during the attack")

    def complete(self) -> None:
        super().complete()
        if self.alpha is None:
            self.alpha = self.epsilon / (2 if self.steps == 2 else 4)


def perturb(model, x, target, eta, eps, alpha, steps):
    """Inner maximisation: `steps` times delta <- P[delta + alpha sign(grad L(f(x + delta), y))]; no sample stops early."""
    delta = inside_image(eta, x)
    for _ in range(steps):
        gradient = input_gradient(model, x + delta, target)
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        eta = eps * run.uniform(x) if cfg.init == "uniform" else torch.zeros_like(x)
        with eval_mode(run.model, enabled=cfg.attack_bn == "eval"):
            delta = perturb(run.model, x, target, eta, eps, alpha, cfg.steps)
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
