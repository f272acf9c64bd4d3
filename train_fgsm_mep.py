"""FGSM-MEP (FGSM-PGI): the step starts where the momentum of the same image's past gradients leads.

Jia et al., "Prior-guided adversarial initialization for fast adversarial training", ECCV 2022,
Algorithm 3. docs/methods.md#fgsm-mep.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from utils import inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-mep"
    GRAD_NORMS = {"tiny-imagenet": 10.0}  # as the published script clips

    label_factor: float = 0.6  # the published code's; the paper does not mention it
    alpha: float | None = engine.step_size(1)
    pgi_lambda: float = engine.flag(10.0, "weight of the regulariser")
    reduction: Literal["mean", "sum"] = engine.flag("mean", "of the regulariser over the classes: mean, the published code's, or the paper's sum, "
                                                    "which is classes times as large")
    init: Literal["corner", "uniform", "zero"] = engine.flag("corner", "where the first perturbations start: a random corner of the ball, "
                                                             "as in the published code, uniform noise, as in the paper, or zero")
    mu: float = engine.flag(0.3, "decay of the momentum")
    accumulate: Literal["normalised", "sign"] = engine.flag("normalised", "what the momentum gathers: the gradient over the batch's L1 norm, "
                                                            "as in the published code, or its sign, as in the paper")
    reset: int | None = engine.flag(None, "epochs after which the memory starts anew, 0: never (default: 40, and 10 with 100 classes and more, as published)", at_least=0)
    align: bool = engine.flag(False, "move what is remembered along with the random crop and flip; the published code does not")

    def complete(self) -> None:
        super().complete()
        if self.reset is None:
            self.reset = 10 if self.dataset in ("cifar100", "tiny-imagenet", "imagenet") else 40


def start(noise, init, eps):
    """Where an image without a past starts; `noise` is U(-1, 1)."""
    return eps * {"corner": noise.sign(), "uniform": noise, "zero": 0 * noise}[init]


def perturb(model, x, target, eta, momentum, eps, alpha, mu, accumulate, share=1, whole=lambda part: part):
    """Inner maximisation: delta to train on, the next epoch's eta, the momentum, and the logits at x + eta.

    x + eta may leave [0, 1], as published: eta was clipped for another crop of the image.
    """
    noisy = (x + eta).requires_grad_()
    logits = model(noisy)
    gradient, = torch.autograd.grad(F.cross_entropy(logits, target), noisy, retain_graph=True)
    part = share * gradient  # of the whole batch's, whose L1 norm it is divided by
    momentum = mu * momentum + (gradient.sign() if accumulate == "sign" else part / whole(part).abs().sum().clamp(min=1e-30))
    delta = inside_image(project(eta + alpha * gradient.sign(), eps), x)
    following = inside_image(project(eta + alpha * momentum.sign(), eps), x)
    return delta, following, momentum, logits


def regularised_loss(logits, prior_logits, target, weight, reduction):
    """Cross-entropy at x + delta plus the squared distance to the logits at x + eta; both sides are differentiated."""
    distance = F.mse_loss(logits, prior_logits)  # over batch and classes
    return F.cross_entropy(logits, target) + weight * distance * (1 if reduction == "mean" else logits.shape[1])


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255
    prior = run.memory("prior", aligned=cfg.align)
    momenta = run.memory("momenta", aligned=cfg.align, scale=2**18 if cfg.accumulate == "normalised" else 1)  # about one over a CIFAR batch's pixels

    @run.captured
    def step(x, y, index, anew):  # BatchNorm is in training mode in both passes, as published
        target = soft_labels(y, run.classes, cfg.label_factor)
        if anew:
            eta, momentum = start(run.uniform(x), cfg.init, eps), torch.zeros_like(x)
        else:
            eta, momentum = project(prior[index], eps), momenta[index]  # a half-precision memory rounds
        delta, following, momentum, prior_logits = perturb(
            run.model, x, target, eta, momentum, eps, alpha, cfg.mu, cfg.accumulate, run.share, run.gathered)
        logits = run.model(x + delta)
        run.update(regularised_loss(logits, prior_logits, target, cfg.pgi_lambda, cfg.reduction), logits=logits)
        prior[index], momenta[index] = following, momentum

    for x, y, index in run.batches():
        anew = run.epoch == 0 or (cfg.reset and run.epoch % cfg.reset == 0)
        if anew and run.batch == 0:
            prior.forget()  # with --align, pixels outside this epoch's crops must not keep the last period's
            momenta.forget()
        step(x, y, index, anew)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
