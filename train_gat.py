"""GAT: clean cross-entropy, and the squared distance by which the probabilities move.

Sriramanan et al., "Guided adversarial attack for evaluating and enhancing adversarial defenses", NeurIPS 2020, Algorithm 2.
Its published network is `--arch resnet18-nuat`. docs/methods.md#gat.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "gat"

    alpha: float | None = engine.step_size(1)
    guidance: float = engine.flag(10.0, "weight of the squared distance")
    late_factor: float = engine.flag(4.0, "what the weight is multiplied by from 0.86 of the epochs on (published: after epoch 85 of 100)")


def perturb(model, x, target, eta, eps, alpha, guide):
    """Inner maximisation: one step that climbs the cross-entropy plus `guide`, a function of the logits."""
    eta = inside_image(eta, x)
    gradient = input_gradient(model, x + eta, target, loss=lambda logits, target: F.cross_entropy(logits, target) + guide(logits))
    return inside_image(project(inside_image(eta + alpha * gradient.sign(), x), eps), x)


def distance(logits, clean_logits):
    """Mean over the batch of ||p(x) - p(x + delta)||^2."""
    return (F.softmax(clean_logits, 1) - F.softmax(logits, 1)).square().sum(1).mean()


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y, late, guided):  # guided: in every other batch the attack climbs the distance too
        target = soft_labels(y, run.classes, cfg.label_factor)
        weight = cfg.guidance * (cfg.late_factor if late else 1)
        with torch.no_grad():
            clean_logits = run.model(x)  # training mode, and it moves BatchNorm's averages, as published
        with eval_mode(run.model):
            delta = perturb(run.model, x, target, eps / 2 * run.uniform(x).sign(), eps, alpha,
                            lambda logits: weight * guided * distance(logits, clean_logits))
        logits, clean_logits = run.model(x + delta), run.model(x)
        run.update(F.cross_entropy(clean_logits, target) + weight * distance(logits, clean_logits), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, run.epoch >= round(0.86 * cfg.epochs), run.batch % 2 == 1)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
