"""AWP: the weights are perturbed against the batch as well as the images, and the descent step is taken from there.

Wu, Xia & Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020, Algorithm 1; on PGD-AT
(AT-AWP) or on TRADES (`--base trades`). docs/methods.md#awp.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import divergence, eval_mode, inside_image, project, soft_labels, untracked


@dataclass
class Config(engine.Config):
    METHOD = "awp"

    base: Literal["pgd", "trades"] = engine.flag("pgd", "what the weights are perturbed against: PGD-AT's loss or TRADES's")
    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "steps of the attack", at_least=1)
    beta: float = engine.flag(6.0, "weight of TRADES's divergence", at_least=0)
    gamma: float | None = engine.flag(None, "size of the weights' perturbation relative to theirs, layer by layer (default: 0.01, and 0.005 on TRADES)", at_least=0)
    warmup: int | None = engine.flag(None, "epochs without it (default: 0; on TRADES one less than a twentieth of the run: published from the 10th of 200 on)", at_least=0)
    attack_bn: Literal["train", "eval"] | None = engine.flag(None, "BatchNorm's mode during the attack (default: train, and eval on TRADES, as published)")

    def complete(self) -> None:
        super().complete()
        trades = self.base == "trades"
        self.gamma = (0.005 if trades else 0.01) if self.gamma is None else self.gamma
        self.warmup = (max(self.epochs // 20 - 1, 0) if trades else 0) if self.warmup is None else self.warmup
        self.attack_bn = ("eval" if trades else "train") if self.attack_bn is None else self.attack_bn


def perturb(model, x, target, eta, eps, alpha, steps, loss):
    """Inner maximisation over the image: `steps` times delta <- P[delta + alpha sign(grad loss(f(x + delta), target))]."""
    delta = eta
    for _ in range(steps):
        gradient = input_gradient(model, x + delta, target, loss)
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta


def perturb_weights(model, loss, gamma, averaged=lambda gradients: gradients):
    """Inner maximisation over the weights, in one step: the weights, and of each layer w the move gamma ||w|| g / ||g||.

    g is the gradient of loss(), whose pass leaves BatchNorm's averages alone, as published. Only weights of two and more
    dimensions move, and none along a gradient that is not finite. `averaged` is over the processes.
    """
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name and p.requires_grad]
    with untracked(model):
        gradients = averaged(torch.autograd.grad(loss(), weights))
    return weights, [(gamma * w.detach().norm() / (g.norm() + 1e-20) * g).nan_to_num(0) for w, g in zip(weights, gradients)]


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    model, eps, alpha = run.model, cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y, warm):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(model, enabled=cfg.attack_bn == "eval"):
            if cfg.base == "pgd":
                delta = perturb(model, x, target, inside_image(eps * run.uniform(x), x), eps, alpha, cfg.steps, F.cross_entropy)
            else:
                with torch.no_grad():
                    clean_logits = model(x)
                delta = perturb(model, x, clean_logits, 0.001 * run.normal(x), eps, alpha, cfg.steps, lambda *logits: divergence(*logits).mean())

        def loss(logits):
            if cfg.base == "pgd":
                return F.cross_entropy(logits, target)
            robust = divergence(logits, model(x)).mean()  # the image twice, as published
            return F.cross_entropy(model(x), target) + cfg.beta * robust

        with nullcontext() if warm else run.moved(*perturb_weights(model, lambda: loss(model(x + delta)), cfg.gamma, run.averaged)):
            logits = model(x + delta)
            run.update(loss(logits), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, run.epoch < cfg.warmup)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
