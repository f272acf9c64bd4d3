"""MART: a margin on the adversarial image, and a divergence that weighs most where the clean image is misclassified.

Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
docs/methods.md#mart.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "mart"

    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "steps of the attack", at_least=1)
    beta: float = engine.flag(5.0, "weight of the divergence (published: 5 for ResNet18, 6 for WideResNet-34-10)", at_least=0)


def perturb(model, x, target, eta, eps, alpha, steps):
    """Inner maximisation: PGD on the cross-entropy from a point very near the image."""
    delta = eta
    for _ in range(steps):
        gradient = input_gradient(model, x + delta, target)
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta


def boosted_cross_entropy(logits, y, target):
    """Cross-entropy minus the log of what the strongest wrong class leaves over, with the published constants."""
    wrong = F.softmax(logits, 1).scatter(1, y[:, None], 0).amax(1)
    return F.cross_entropy(logits, target) - torch.log(1.0001 - wrong + 1e-12).mean()


def weighted_divergence(logits, clean_logits, y):
    """Mean of KL(p(x) || p(x + delta)) (1 - p_y(x)); gradients flow into both, with the published constants."""
    log_clean_p = F.log_softmax(clean_logits, 1)
    clean_p = log_clean_p.exp()
    divergence = (clean_p * (log_clean_p - torch.log(F.softmax(logits, 1) + 1e-12))).sum(1)
    return (divergence * (1.0000001 - clean_p.gather(1, y[:, None])[:, 0])).mean()


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(run.model):
            delta = perturb(run.model, x, target, 0.001 * run.normal(x), eps, alpha, cfg.steps)
        clean_logits, logits = run.model(x), run.model(x + delta)
        loss = boosted_cross_entropy(logits, y, target) + cfg.beta * weighted_divergence(logits, clean_logits, y)
        run.update(loss, logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
