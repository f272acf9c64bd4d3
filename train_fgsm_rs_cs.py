"""FGSM-RS with ConvergeSmooth: a regulariser pulls the loss of noisy images back whenever it leaves the last epoch's mean.

Zhao, Zhang, Kong & Yin, "Fast adversarial training with smooth convergence", ICCV 2023, in the form of the FastAT Benchmark (its
FGSM-RS-CS). docs/methods.md#fgsm-rs-cs.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import inside_image, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "fgsm-rs-cs"

    alpha: float | None = engine.step_size(1)
    label_factor: float = 0.4  # the benchmark smooths twice: 0.6 on the true class, and torch's smoothing 0.4 over that
    attack_factor: float = engine.flag(0.64, "label factor of the attack's loss (torch's smoothing 0.4)")
    gamma: float = engine.flag(0.03, "how far the loss may stray from the last epoch's mean", at_least=0)
    cs_weight: float = engine.flag(1.0, "weight of the pull")
    stride: int = engine.flag(1, "epochs at the end of the run, and one more at its beginning, in which nothing pulls", at_least=0)


def perturb(model, noisy, target, alpha):
    """Inner maximisation: one step from the noisy image, in the image but not in the ball around the clean one."""
    return inside_image(alpha * input_gradient(model, noisy, target).sign(), noisy)


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255
    statistics = torch.zeros(3, device=run.device)  # of the noisy images' loss
    level, epoch_sum, seen = statistics  # the mean of the last epoch; the sum of this one, and over how many images
    run.keep(statistics=statistics)

    @run.captured
    def step(x, y, smooth):
        target = soft_labels(y, run.classes, cfg.label_factor)
        noisy = x + inside_image(eps * run.uniform(x), x)
        delta = perturb(run.model, noisy, soft_labels(y, run.classes, cfg.attack_factor), alpha)
        logits = run.model(noisy + delta)
        noisy_logits = run.gathered(run.model(noisy))  # BatchNorm is in training mode in all three passes
        noisy_loss = F.cross_entropy(noisy_logits, run.gathered(target))
        loss = F.cross_entropy(logits, target)
        if smooth:
            strays = (noisy_loss - level).detach()
            loss = loss + cfg.cs_weight * strays.sign() * (strays.abs() > cfg.gamma) * noisy_loss
        run.update(loss, logits=logits)
        # A batch whose loss is not finite does not count.
        epoch_sum.add_(noisy_loss.detach().nan_to_num(0, 0, 0) * len(noisy_logits))
        seen.add_(noisy_loss.isfinite() * len(noisy_logits))

    for x, y, _ in run.batches():
        if run.batch == 0 and run.epoch > 0:
            level.copy_(epoch_sum / seen)
            statistics[1:] = 0
        step(x, y, cfg.stride < run.epoch < cfg.epochs - cfg.stride)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
