"""TRADES: clean cross-entropy, and the divergence between what the network says of an image and of its neighbour.

Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019, Algorithm 1.
docs/methods.md#trades.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import divergence, eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "trades"

    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "steps of the attack", at_least=1)
    beta: float = engine.flag(6.0, "weight of the divergence", at_least=0)


def perturb(model, x, eta, eps, alpha, steps):
    """Inner maximisation: climbs KL(p(x) || p(x + delta)); labels play no part."""
    delta = eta
    with torch.no_grad():
        clean_logits = model(x)
    for _ in range(steps):
        gradient = input_gradient(model, x + delta, clean_logits, loss=lambda *logits: divergence(*logits).mean())
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(run.model):
            delta = perturb(run.model, x, 0.001 * run.normal(x), eps, alpha, cfg.steps)
        clean_logits = run.model(x)
        logits = run.model(x + delta)
        robust = divergence(logits, run.model(x)).mean()  # the image twice, as published: BatchNorm's averages see it twice
        run.update(F.cross_entropy(clean_logits, target) + cfg.beta * robust, logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
