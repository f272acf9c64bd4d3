"""NuAT: clean cross-entropy, and the nuclear norm of how far the whole batch's logits move.

Sriramanan et al., "Towards efficient and effective adversarial training", NeurIPS 2021, Algorithm 1. Its published network
is `--arch resnet18-nuat`. docs/methods.md#nuat.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "nuat"

    alpha: float | None = engine.step_size(1)
    nuclear: float = engine.flag(4.5, "largest weight of the nuclear norm; it grows from zero over the first nine tenths of the epochs")


def perturb(model, x, target, eta, eps, alpha, guide):
    """Inner maximisation: one step that climbs the cross-entropy plus `guide`, a function of the logits."""
    eta = inside_image(eta, x)
    gradient = input_gradient(model, x + eta, target, loss=lambda logits, target: F.cross_entropy(logits, target) + guide(logits))
    return inside_image(project(inside_image(eta + alpha * gradient.sign(), x), eps), x)


def nuclear_norm(logits, clean_logits, batch_size):
    """Of the (B, classes) difference, over the full batch size even for a short batch, as published."""
    difference = clean_logits - logits
    norm = torch.linalg.matrix_norm(difference.nan_to_num(0, 0, 0), "nuc")  # which ends the program at a nan; the engine knows what to do
    return (norm + 0 * difference.sum()) / batch_size


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    for x, y, _ in run.batches():  # not captured: the singular values make a GPU wait
        target = soft_labels(y, run.classes, cfg.label_factor)
        weight = cfg.nuclear * min(run.epoch / (0.9 * cfg.epochs), 1)
        with torch.no_grad():
            clean_logits = run.model(x)  # training mode, and it moves BatchNorm's averages, as published
        guided = weight * (run.batch % 2)  # in every other batch the attack climbs the norm too
        with eval_mode(run.model):
            delta = perturb(run.model, x, target, eps / 2 * run.uniform(x).sign(), eps, alpha,
                            lambda logits: guided * nuclear_norm(run.gathered(logits), run.gathered(clean_logits), cfg.batch_size))
        logits, clean_logits = run.model(x + delta), run.model(x)
        loss = F.cross_entropy(clean_logits, target) + weight * nuclear_norm(run.gathered(logits), run.gathered(clean_logits), cfg.batch_size)
        run.update(loss, logits=logits)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
