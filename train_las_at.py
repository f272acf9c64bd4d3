"""LAS-AT: a strategy network chooses radius, steps and step size of each image's attack, and learns what serves the classifier.

Jia et al., "LAS-AT: Adversarial training with learnable attack strategy", CVPR 2022, Algorithm 1. `--base trades` is
LAS-TRADES, which also chooses beta, `--base awp` is LAS-AWP. docs/methods.md#las-at.
"""
import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import engine
from attacks import input_gradient
from models.strategy import StrategyNetwork
from utils import divergence, eval_mode, inside_image, moved, project, soft_labels, untracked

# The published scripts' settings by base and data set; a set without a script has CIFAR-10's.
SETTINGS = ("radii", "steps", "step_sizes", "label_factor", "interval", "robust", "clean", "momentum")
PUBLISHED = {
    ("pgd", "cifar10"): ("3-15", "3-14", "1-5", 0.7, 20, 4, 2, 0.0), ("pgd", "cifar100"): ("3-15", "3-12", "1-5", 0.6, 20, 4, 2, 0.9),
    ("pgd", "tiny-imagenet"): ("3-15", "3-14", "1-5", 0.8, 1, 4, 2, 0.0),
    ("trades", "cifar10"): ("5-9", "7-14", "2-4", 1.0, 1, 8, 4, 0.9), ("trades", "cifar100"): ("5-10", "7-14", "2-4", 1.0, 1, 8, 2, 0.9),
    ("trades", "tiny-imagenet"): ("5-10", "7-14", "2-4", 1.0, 1, 8, 2, 0.0),
    ("awp", "cifar10"): ("7-15", "8-16", "2-5", 0.7, 1, 1, 1, 0.0), ("awp", "cifar100"): ("7-15", "8-15", "2-5", 0.7, 10, 4, 2, 0.9),
    ("awp", "tiny-imagenet"): ("7-15", "8-15", "2-5", 0.7, 10, 8, 2, 0.0),
}


@dataclass
class Config(engine.Config):
    METHOD = "las-at"
    GRAD_NORMS = {"tiny-imagenet": 10.0}  # as its three published scripts clip

    base: Literal["pgd", "trades", "awp"] = engine.flag("pgd", "what the strategies attack and train: LAS-AT, LAS-TRADES or LAS-AWP")
    label_factor: float | None = engine.flag(None, "probability kept on the true class (default: published, 0.7 on CIFAR-10); with awp of the reward's copy only, and 1 with trades")
    radii: str | None = engine.flag(None, "radii to choose from, in 255ths at epsilon 8 and in proportion at others: 3-15 or 3,5,8 (default: published)")
    steps: str | None = engine.flag(None, "numbers of steps to choose from (default: published)")
    step_sizes: str | None = engine.flag(None, "step sizes to choose from, like the radii (default: published)")
    betas: str = engine.flag("5-9", "TRADES's betas to choose from")
    interval: int | None = engine.flag(None, "updates of the classifier for one of the strategy network (default: published, 20 with pgd on CIFAR-10)", at_least=1)
    reward: Literal["accuracy", "cross-entropy"] = engine.flag("accuracy", "what rewards a strategy: accuracies after a step of training, as in the "
                                                               "published code, or minus the cross-entropies, as in the paper")
    robust: float | None = engine.flag(None, "weight of the robust reward (default: published, 4 with pgd; 1 with cross-entropies)")
    clean: float | None = engine.flag(None, "weight of the clean reward (default: published, 2 with pgd; 1 with cross-entropies)")
    strategy_lr: float = engine.flag(1e-4, "learning rate of the strategy network's SGD; with awp it follows the schedule", at_least=0)
    momentum: float | None = engine.flag(None, "its momentum; with one it has the weight decay 5e-4 too (default: published, 0 with pgd on CIFAR-10)", at_least=0)
    strategy_width: int | None = engine.flag(None, "width of the strategy network, a ResNet18 (default: 64; digits: a resnet8 of 16)", at_least=1)
    gamma: float = engine.flag(0.01, "size of AWP's perturbation of the weights", at_least=0)

    def complete(self) -> None:
        super().complete()
        published = dict(zip(SETTINGS, PUBLISHED.get((self.base, self.dataset), PUBLISHED[self.base, "cifar10"])))
        if self.reward == "cross-entropy":
            published = published | dict(robust=1, clean=1)
        for name, value in published.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.strategy_width is None:
            self.strategy_width = 16 if self.dataset == "digits" else 64
        self.DECAYS = {"pgd": (99 / 110, 104 / 110), "trades": (0.75, 0.9), "awp": (0.5, 0.75)}[self.base]

    def check(self) -> None:
        super().check()
        _, steps, *_ = map(self.options, ("radii", "steps", "step_sizes", "betas"))
        if any(number < 1 or number % 1 for number in steps):
            raise engine.Misuse(f"--steps {self.steps}: must be whole numbers, from 1 on")
        if self.base == "trades" and self.label_factor != 1:
            raise engine.Misuse(f"--label-factor {self.label_factor}: LAS-TRADES has hard labels; leave it out, or choose another --base")

    def options(self, name: str) -> list[float]:
        """What there is to choose from; radii and step sizes as fractions of 1, in proportion to --epsilon."""
        scale = self.epsilon / 8 / 255 if name in ("radii", "step_sizes") else 1
        return [scale * number for number in engine.numbers(name, getattr(self, name))]


def choose(logits, uniform):
    """One action per image and attack parameter, sampled by the Gumbel-max trick, and the sum of their log-probabilities, (B,)."""
    log_p = {name: F.log_softmax(values, 1) for name, values in logits.items()}
    gumbel = {name: -(-((1 + uniform(values)) / 2).log()).log() for name, values in log_p.items()}  # of noise in (0, 1)
    action = {name: (values.detach() + gumbel[name]).argmax(1) for name, values in log_p.items()}
    return action, sum(log_p[name].gather(1, chosen[:, None])[:, 0] for name, chosen in action.items())


def perturb(model, x, target, eta, eps, alpha, steps, most_steps, loss):
    """Inner maximisation, each image with its own eps, alpha and number of steps, all (B, 1, 1, 1)."""
    delta = eta
    for step in range(most_steps):
        gradient = input_gradient(model, x + delta, target, loss)
        delta = inside_image(project(delta + (step < steps) * alpha * gradient.sign(), eps), x)
    return delta


def perturb_weights(model, loss, gamma, averaged=lambda gradients: gradients):
    """AWP's inner maximisation over the weights, which train_awp.py explains."""
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name and p.requires_grad]
    with untracked(model):
        gradients = averaged(torch.autograd.grad(loss(), weights))
    return weights, [(gamma * w.detach().norm() / (g.norm() + 1e-20) * g).nan_to_num(0) for w, g in zip(weights, gradients)]


def strongest(model, x, y, starts, eps, alpha, stop_when_fooled, gathered=lambda moves: moves):
    """PGD-10 with restarts, in training mode: per image the delta of the highest loss. `stop_when_fooled`: not moved while it is misclassified."""
    best, highest = torch.zeros_like(x), torch.zeros_like(x[:, 0, 0, 0])
    for start in starts:
        delta = inside_image(start, x)
        for _ in range(10):
            x_adv = (x + delta).requires_grad_()
            logits = model(x_adv)
            moves = (logits.argmax(1) == y) | (not stop_when_fooled)
            if not gathered(moves).any():  # of the whole batch: every process makes the same passes
                break
            gradient, = torch.autograd.grad(F.cross_entropy(logits, y), x_adv)
            delta = torch.where(moves[:, None, None, None], inside_image(project(delta + alpha * gradient.sign(), eps), x), delta)
        with torch.no_grad():
            loss = F.cross_entropy(model(x + delta), y, reduction="none")
        best, highest = torch.where((loss >= highest)[:, None, None, None], delta, best), loss.maximum(highest)
    return best


def descended(model, x, y, delta, beta, cfg, classes, lr, averaged=lambda gradients: gradients):
    """A copy of the classifier, one step of training further. `averaged` is over the processes."""
    model = copy.deepcopy(model).train()
    with moved(*perturb_weights(model, lambda: F.cross_entropy(model(x + delta), y), cfg.gamma, averaged)) if cfg.base == "awp" else nullcontext():
        if cfg.base == "trades":
            loss = F.cross_entropy(model(x), y) + (beta * divergence(model(x + delta), model(x))).mean()
        else:
            loss = F.cross_entropy(model(x + delta), soft_labels(y, classes, cfg.label_factor))
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, g in zip(parameters, averaged(torch.autograd.grad(loss, parameters))):
                p.sub_(lr * (g + cfg.weight_decay * p))
    return model


def main(cfg: Config) -> None:
    run = engine.Run(cfg)
    model, eps, most_steps = run.model, cfg.eps, int(max(cfg.options("steps")))
    values = {name: torch.tensor(cfg.options(name), dtype=torch.get_default_dtype(), device=run.device)
              for name in ("radii", "steps", "step_sizes", *(["betas"] if cfg.base == "trades" else []))}
    strategy = StrategyNetwork({name: len(options) for name, options in values.items()}, channels=run.channels, image_size=run.shape[1],
                               width=cfg.strategy_width)
    strategy_optimizer = torch.optim.SGD(strategy.parameters(), lr=cfg.strategy_lr, momentum=cfg.momentum, weight_decay=5e-4 if cfg.momentum else 0)
    run.keep(strategy=strategy, strategy_optimizer=strategy_optimizer)

    @torch.no_grad()
    def attack(x, y, action):
        """delta and beta of the chosen strategies; the classifier's BatchNorm in evaluation mode."""
        radius, alpha, steps = (values[name][action[name]].view(-1, 1, 1, 1) for name in ("radii", "step_sizes", "steps"))
        with eval_mode(model):
            if cfg.base == "trades":
                delta = perturb(model, x, model(x), 0.001 * run.normal(x), radius, alpha, steps, most_steps,
                                lambda *logits: divergence(*logits).mean())
                return delta, values["betas"][action["betas"]]
            eta = inside_image(eps * run.uniform(x), x)  # in the ball of --epsilon, whatever radius was chosen
            return perturb(model, x, y, eta, radius, alpha, steps, most_steps, F.cross_entropy), None

    for x, y, _ in run.batches():  # not captured: the reward's attack looks at which images still move
        if (run.step + 1) % cfg.interval == 0:  # the strategy network ascends the reward: REINFORCE, one reward for the batch
            action, log_p = choose(strategy.train()(x), run.uniform)
            delta, beta = attack(x, y, action)
            with torch.no_grad(), eval_mode(model, enabled=cfg.base != "trades"):  # TRADES's in training mode, as published
                labels = run.gathered(y)  # the reward is the global batch's
                if cfg.base == "trades":
                    clean_logits, logits = model(x), model(x + delta)
                    reward = (F.cross_entropy(run.gathered(clean_logits), labels) + run.gathered(beta * divergence(logits, clean_logits)).mean()).clamp(0, 20)
                else:
                    reward = F.cross_entropy(run.gathered(model(x + delta)), labels).clamp(0, 10)
            trained = descended(model, x, y, delta, beta, cfg, run.classes, run.lr, run.averaged)
            robust = strongest(trained, x, y, [eps * run.uniform(x) for _ in range(2)], eps, eps / 4, cfg.base != "awp", run.gathered)
            with torch.no_grad(), eval_mode(trained):
                for shift, weight in ((robust, cfg.robust), (0, cfg.clean)):
                    logits = run.gathered(trained(x + shift))
                    score = (logits.argmax(1) == labels).float().mean() if cfg.reward == "accuracy" else -F.cross_entropy(logits, labels)
                    reward = reward + weight * score
            decays = sum(run.step // cfg.interval >= round(part * run.total) for part in cfg.decays)  # its own updates count, against the classifier's total: as published
            strategy_optimizer.param_groups[0]["lr"] = cfg.strategy_lr * (run.lr / (cfg.lr or 1) if cfg.base == "awp" else 0.1**decays)
            run.update(-(log_p * reward).mean(), strategy_optimizer, max_norm=1.0)

        with torch.no_grad():
            action, _ = choose(strategy.eval()(x), run.uniform)
        delta, beta = attack(x, y, action)
        if cfg.base == "trades":
            clean_logits, logits = model(x), model(x + delta)
            run.update(F.cross_entropy(clean_logits, y) + (beta * divergence(logits, clean_logits)).mean(), logits=logits)
        elif cfg.base == "awp":
            delta = project(delta, eps)  # whatever radius was chosen, as published
            with run.moved(*perturb_weights(model, lambda: F.cross_entropy(model(x + delta), y), cfg.gamma, run.averaged)):
                logits = model(x + delta)
                run.update(F.cross_entropy(logits, y), logits=logits)
        else:
            logits = model(x + delta)
            run.update(F.cross_entropy(logits, soft_labels(y, run.classes, cfg.label_factor)), logits=logits)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
