"""VFSAT: FGSM-AT from zero with a radius that changes from epoch to epoch.

The variable-radius method of "Improving single-step adversarial training by local smoothing", from the code on GitHub
(CharlesJames13586). docs/methods.md#vfsat.
"""
from dataclasses import dataclass

import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import inside_image, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "vfsat"

    max_grad_norm: float | None = 20.0
    radii: str | None = engine.flag(None, "radii of the epochs, in 255ths, in turn (default: 2,4,6,8,8,8,8,8, and 2,4,...,14,16,16,16,16,16 at epsilon 16, "
                                    "as published; at other radii the first list times epsilon / 8)")

    def complete(self) -> None:
        super().complete()
        if self.radii is None:
            published = [2, 4, 6, 8, 10, 12, 14] + 5 * [16] if self.epsilon == 16 else [radius * self.epsilon / 8 for radius in (2, 4, 6, 8, 8, 8, 8, 8)]
            self.radii = ",".join(str(radius) for radius in published)

    def check(self) -> None:
        super().check()
        engine.numbers("radii", self.radii)


def perturb(model, x, target, eps):
    """Inner maximisation from zero: one step of this epoch's radius."""
    return inside_image(eps * input_gradient(model, x, target).sign(), x)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    cycle = [radius / 255 for radius in engine.numbers("radii", cfg.radii)]

    @run.captured
    def step(x, y, eps):
        target = soft_labels(y, run.classes, cfg.label_factor)
        delta = perturb(run.model, x, target, eps)  # BatchNorm in training mode, as published
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, cycle[run.epoch % len(cycle)])


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
