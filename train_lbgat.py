"""LBGAT: the robust network follows the logits of a clean network that is trained beside it.

Cui et al., "Learnable boundary guided adversarial training", ICCV 2021, Eq. 7; `--beta 6` adds TRADES's divergence.
docs/methods.md#lbgat.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from utils import divergence, eval_mode, inside_image, project, soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "lbgat"

    alpha: float | None = engine.step_size(1 / 4)
    steps: int = engine.flag(10, "steps of the attack", at_least=1)
    beta: float = engine.flag(0.0, "weight of TRADES's divergence: the papers' rows are 0 and 6", at_least=0)
    teacher: str | None = engine.flag(None, "the clean network, a name from models (default: resnet18, and --arch itself for digits)")
    teacher_width: int | None = engine.flag(None, "its width (default: --width, and its own beside a wide ResNet, whose --width is a factor)", at_least=1)

    def complete(self) -> None:
        super().complete()
        if self.teacher is None:
            self.teacher = self.arch if self.dataset == "digits" else "resnet18"
        if self.teacher_width is None and self.arch.startswith("wide") == self.teacher.startswith("wide"):
            self.teacher_width = self.width


def perturb(model, x, eta, eps, alpha, steps):
    """Inner maximisation, TRADES's: climbs KL(p(x) || p(x + delta)) of the robust network."""
    delta = eta
    with torch.no_grad():
        clean_logits = model(x)
    for _ in range(steps):
        gradient = input_gradient(model, x + delta, clean_logits, loss=lambda *logits: divergence(*logits).mean())
        delta = inside_image(project(delta + alpha * gradient.sign(), eps), x)
    return delta


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    eps, alpha = cfg.eps, cfg.alpha / 255
    teacher = run.classifier(cfg.teacher, cfg.teacher_width)
    run.optimizer.add_param_group({"params": list(teacher.parameters())})  # one optimizer for both, as published
    run.keep(teacher=teacher)

    @run.captured
    def step(x, y):
        target = soft_labels(y, run.classes, cfg.label_factor)
        with eval_mode(run.model):
            delta = perturb(run.model, x, 0.001 * run.normal(x), eps, alpha, cfg.steps)
        logits, clean_logits = run.model(x + delta), run.model(x)
        guide = teacher(x)  # learns from both terms
        loss = F.mse_loss(logits, guide) + F.cross_entropy(guide, target) + cfg.beta * divergence(logits, clean_logits).mean()
        run.update(loss, logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
