"""N-FGSM: one gradient-sign step from a point of strong noise, and no clip to the ball.

de Jorge et al., "Make some noise: Reliable and efficient single-step adversarial training", NeurIPS 2022. The
perturbation may be as large as (k + 1) eps. docs/methods.md#n-fgsm.
"""
from dataclasses import dataclass

import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import inside_image, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "n-fgsm"

    alpha: float | None = engine.step_size(1)
    k: float | None = engine.flag(None, "the noise is uniform in k balls (default: 2, imagenet 1; published too are 3 for SVHN at 12, 4 for WideResNet-28-10 at 16)",
                                  at_least=0)

    def complete(self) -> None:
        super().complete()
        if self.k is None:
            self.k = 1.0 if self.dataset == "imagenet" else 2.0


def perturb(model, x, target, eta, alpha):
    """Inner maximisation: delta = eta + alpha sign(grad L(f(x + eta), y)), in the image but not in the ball."""
    eta = inside_image(eta, x)
    gradient = input_gradient(model, x + eta, target)
    return inside_image(eta + alpha * gradient.sign(), x)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        delta = perturb(run.model, x, target, cfg.k * eps * run.uniform(x), alpha)  # BatchNorm in training mode, as published
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
