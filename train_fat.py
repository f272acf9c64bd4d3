"""FAT: early-stopped PGD, which leaves an image tau steps after it is misclassified, so that no attack is stronger than it need be.

Zhang et al., "Attacks which do not kill training make adversarial learning stronger", ICML 2020, Algorithms 1 and 2.
docs/methods.md#fat.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from utils import eval_mode, frozen, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fat"
    COMPILES = SAME_SIZES = False  # each number of images that are left in the attack would be compiled, or looked at, anew

    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "largest number of steps", at_least=1)
    tau: int | None = engine.flag(None, "steps after the first misclassification (default: 0, then 1 from 5/12 and 2 from 9/12 of the epochs on: "
                                  "published as 50 and 90 of 120)")
    omega: float = engine.flag(0.001, "standard deviation of the noise that every step adds")


def perturb(model, x, y, target, eta, eps, alpha, steps, tau, noise):
    """Inner maximisation by early-stopped PGD, Algorithm 1; `noise()` is drawn once a step. Only images still moving are computed."""
    delta = inside_image(eta, x)
    patience = torch.full_like(y, tau)
    moving = torch.arange(len(y), device=y.device)
    for _ in range(steps):
        x_adv = (x[moving] + delta[moving]).requires_grad_()
        with frozen(model):
            logits = model(x_adv)
            gradient, = torch.autograd.grad(F.cross_entropy(logits, target[moving]), x_adv)
        wrong = logits.argmax(1) != y[moving]
        goes_on = ~wrong | (patience[moving] > 0)
        patience[moving] -= wrong.long()
        moving, step = moving[goes_on], alpha * gradient.sign()[goes_on]
        if len(moving) == 0:
            break
        delta[moving] = inside_image(project(delta[moving] + step + noise()[moving], eps), x[moving])
    return delta


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255

    for x, y, _ in run.batches():  # not captured: the attack looks at which images are left
        target = soft_labels(y, run.classes, cfg.label_factor)
        done = run.epoch / cfg.epochs
        tau = cfg.tau if cfg.tau is not None else (done >= 5 / 12) + (done >= 9 / 12)
        with eval_mode(run.model):
            delta = perturb(run.model, x, y, target, eps * run.uniform(x), eps, alpha, cfg.steps, tau, lambda: cfg.omega * run.normal(x))
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, target), logits=logits)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
