"""LIET: the step starts where a grey image's label would push it, and one-step and two-point predictions are kept alike.

Pan et al., "Mitigating catastrophic overfitting in fast adversarial training via label information", ICCV 2025, in the form
of the FastAT Benchmark, where its recipe is. docs/methods.md#liet.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import eval_mode, inside_image, project


@dataclass
class Config(engine.Config):
    METHOD = "liet"

    label_factor: float = 0.4  # the benchmark's smoothing 0.6 on CIFAR-10 and Tiny ImageNet; it has 0.8 on CIFAR-100
    alpha: float | None = engine.step_size(1)
    liet_lambda: float = engine.flag(100.0, "weight of the divergence at the end of the run, up to which it grows epoch by epoch (CIFAR-100: 200)")
    refresh: int = engine.flag(20, "batches after which the label information is computed anew, from the first of each epoch on", at_least=1)
    least_noise: float = engine.flag(0.1, "smallest part of the pixels that start at noise instead")
    most_noise: float = engine.flag(0.5, "largest part")

    def check(self) -> None:
        super().check()
        if not 0 <= self.least_noise <= self.most_noise <= 1:
            raise engine.Misuse(f"--least-noise {self.least_noise}, --most-noise {self.most_noise}: must lie in [0, 1], the least not above the most")


def uneven_labels(y, factor, noise):
    """(B,) to (B, classes): `factor` on the true class, the rest spread over the others in proportion to `noise`."""
    others = noise.scatter(1, y[:, None], 0)
    others = others / others.sum(1, keepdim=True) * (1 - factor)
    return others.scatter(1, y[:, None], factor)


def perturb(model, x, target, eta, eps, alpha, in_ball):
    """Inner maximisation from eta: delta, and the logits at x + eta with their graph."""
    eta = inside_image(eta, x)
    noisy = (x + eta).requires_grad_()
    logits = model(noisy)
    gradient, = torch.autograd.grad(F.cross_entropy(logits, target), noisy, retain_graph=True)
    delta = eta + alpha * gradient.sign()
    return inside_image(project(delta, eps) if in_ball else delta, x), logits


def jensen_shannon(logits, other_logits):
    """Divergence of two predictions from their mean, averaged over both and the batch; gradients flow into both."""
    log_p, log_q = F.log_softmax(other_logits, 1), F.log_softmax(logits, 1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum((log.exp() * (log - log_mean)).sum(1).mean() for log in (log_p, log_q)) / 2


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255
    in_ball = cfg.epsilon <= 8  # beyond 8/255 the noise is twice as wide and the perturbation is not clipped, as in the benchmark
    grey, classes = torch.full((run.classes, *run.shape), 0.5, device=run.device), torch.arange(run.classes, device=run.device)
    information = torch.zeros_like(grey)
    run.keep(information=information)

    @run.captured
    def step(x, y, refresh, weight):
        def labels():  # drawn anew for every loss
            return uneven_labels(y, cfg.label_factor, (1 + run.uniform(x.new_empty(len(x), run.classes))) / 2)

        if refresh:
            with eval_mode(run.model):
                uneven = uneven_labels(classes, cfg.label_factor, run.random(run.classes, run.classes))
                information.copy_(eps * input_gradient(run.model, grey, uneven).sign())
        part = cfg.least_noise + (cfg.most_noise - cfg.least_noise) * run.random(1)
        noise = (1 if in_ball else 2) * eps * run.uniform(x)
        eta = torch.where((1 + run.uniform(x)) / 2 < part, noise, information[y])
        eta = eta * (run.random(1) - 0.5).sign()
        delta, prior_logits = perturb(run.model, x, labels(), eta, eps, alpha, in_ball)  # BatchNorm in training mode
        logits = run.model(x + delta)
        run.update(F.cross_entropy(logits, labels()) + weight * jensen_shannon(logits, prior_logits), logits=logits)

    for x, y, _ in run.batches():
        step(x, y, run.batch % cfg.refresh == 0, cfg.liet_lambda * (run.epoch + 1) / cfg.epochs)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
