"""FGSM-CKPT: the FGSM-RS direction, and of the points along it the first one that is misclassified.

Kim, Lee & Lee, "Understanding catastrophic overfitting in single-step adversarial training", AAAI 2021, Algorithm 1.
docs/methods.md#fgsm-ckpt.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from utils import eval_mode, frozen, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-ckpt"
    CYCLIC_LR = 0.3

    alpha: float | None = engine.step_size(1.25)
    c: int = engine.flag(3, "checkpoints along the direction, its end included", at_least=1)
    correct_at: Literal["noisy", "clean"] = engine.flag("noisy", "which image must be classified correctly for an attack: "
                                                        "the start of the step, as in the published code, or the clean one, as in the paper")


def direction(model, x, target, eta, eps, alpha):
    """FGSM-RS: its perturbation, and the logits at the noisy point where its step begins."""
    noisy = (x + inside_image(eta, x)).requires_grad_()
    with frozen(model):
        logits = model(noisy)
        gradient, = torch.autograd.grad(F.cross_entropy(logits, target), noisy)
    step = noisy.detach() - x + alpha * gradient.sign()
    return inside_image(project(step, eps), x), logits.detach()


@torch.no_grad()
def shorten(model, x, y, delta, logits, c):
    """The smallest j / c of delta that is misclassified, all of it where none is, nothing where `logits` are wrong already."""
    part = torch.ones_like(x[:, :1, :1, :1])
    for j in range(c - 1, 0, -1):
        wrong = model(x + j / c * delta).argmax(1) != y
        part = torch.where(wrong.view(-1, 1, 1, 1), j / c, part)
    return torch.where((logits.argmax(1) != y).view(-1, 1, 1, 1), 0, part) * delta


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(run.model):  # BatchNorm's averages in the whole attack, as in the published code's version of its library
            delta, logits = direction(run.model, x, target, eps * run.uniform(x), eps, alpha)
            if cfg.correct_at == "clean":
                with torch.no_grad():
                    logits = run.model(x)
            delta = shorten(run.model, x, y, delta, logits, cfg.c)
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
