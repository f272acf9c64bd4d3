"""FGSM-SDI: a three-layer network learns where the FGSM step should start.

Jia et al., "Boosting fast adversarial training with learnable adversarial initialization", IEEE TIP 2022, Algorithm 3.
The generator sees the image and the sign of its gradient, and plays the classifier's loss up while the classifier
plays it down. What differs between paper, published code and this script: docs/methods.md#fgsm-sdi.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from models.generator import PerturbationGenerator
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-sdi"

    label_factor: float = 0.5  # the published code's; the paper does not mention it
    alpha: float | None = engine.step_size(1)
    k: int = engine.flag(20, "the generator learns on every k-th batch of an epoch, from the first one on", at_least=1)
    generator_lr: float = engine.flag(1e-3, "learning rate of the generator's Adam, constant", at_least=0)
    generator_input: Literal["both", "image", "gradient"] = engine.flag("both", "what the generator sees (the paper's Table III)")
    generator_layout: Literal["code", "paper"] = engine.flag("code", "the published code's generator, or the paper's Table I")
    clip_image: bool = engine.flag(False, "keep x + delta in [0, 1] for the classifier's step (neither paper nor published code do)")


def perturb(model, generator, x, y, s_x, eps, alpha):
    """Inner maximisation, Eq. 7: delta = P[eta + alpha sign(grad L(f(x + eta), y))] with eta = eps g(x, s_x), Eq. 6.

    The gradient is a constant, so that the generator learns through the start eta alone. x + eta may leave [0, 1].
    """
    eta = eps * generator(x, s_x)
    gradient = input_gradient(model, x + eta, y)
    return project(eta + project(alpha * gradient.sign(), eps), eps)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255
    generator = PerturbationGenerator(run.channels, inputs=cfg.generator_input, layout=cfg.generator_layout)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=cfg.generator_lr, weight_decay=5e-4)
    run.keep(generator=generator, generator_optimizer=generator_optimizer)

    @run.captured
    def step(x, y, learns):  # the classifier's BatchNorm is in training mode in every pass, as published
        target = soft_labels(y, run.classes, cfg.label_factor)
        s_x = input_gradient(run.model, x, y).sign()  # Eq. 5, of the hard-label loss
        if learns:  # line 4: the generator ascends
            delta = perturb(run.model, generator.train(), x, y, s_x, eps, alpha)
            run.update(-F.cross_entropy(run.model(x + delta), target), generator_optimizer)
        with torch.no_grad():  # line 9: the classifier descends, from the new generator's start
            delta = perturb(run.model, generator.eval(), x, y, s_x, eps, alpha)
        if cfg.clip_image:
            delta = inside_image(delta, x)
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, run.batch % cfg.k == 0)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
