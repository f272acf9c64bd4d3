"""The yardstick: attacks as plain functions of (model, x, y). No attack here is ever tuned for a training method.

Everywhere `model` maps images in [0, 1], (N, C, H, W), to logits (N, classes) and should be in eval mode; `eps` and
`alpha` are fractions of 1; a perturbation `delta` has the shape of `x`, |delta| <= eps and x + delta in [0, 1].
"""
from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import frozen, inside_image, project

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four attacks of standard AutoAttack, in its order (Croce & Hein, ICML 2020)."""


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Callable = F.cross_entropy) -> Tensor:
    """Gradient of loss(model(x), y) at the point x, detached, of x's shape. Parameter gradients are not computed.

    Args:
        y: whatever `loss` compares the logits with: labels (N,), soft labels or other logits (N, classes).
        loss: from (logits, y) to a scalar tensor.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), frozen(model):
        return torch.autograd.grad(loss(model(x), y), x)[0]


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) max_{k != y} z_k - z_y: positive where a class other than y is predicted."""
    true = y[:, None]
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true)[:, 0]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of `margins`: the C&W loss that the papers ascend (no hinge, no kappa)."""
    return margins(logits, y).mean()


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, alpha: float, steps: int, start: Tensor | None = None,
    loss: Callable = F.cross_entropy,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018) that leaves an image alone once it is misclassified.

    Args:
        y: (N,) int64.
        start: where to begin, clipped to the image; zero when not given. PGD has no memory, so that 10 steps from
            where 10 steps ended are 20 steps.
        loss: what is ascended; `margin` gives the papers' C&W attack.

    Returns:
        delta, the last iterate.
    """
    delta = torch.zeros_like(x) if start is None else inside_image(start, x)
    standing = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        x_adv = (x[standing] + delta[standing]).requires_grad_()
        with torch.enable_grad(), frozen(model):
            logits = model(x_adv)
            gradient = torch.autograd.grad(loss(logits, y[standing]), x_adv)[0]
        correct = logits.argmax(1) == y[standing]
        standing, gradient = standing[correct], gradient[correct]
        if len(standing) == 0:
            break
        moved = project(delta[standing] + alpha * gradient.sign(), eps)
        delta[standing] = inside_image(moved, x[standing])
    return delta


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """delta: one step of eps from x itself (Goodfellow et al., ICLR 2015). The column fgsm of an evaluation begins at a random start."""
    return inside_image(eps * input_gradient(model, x, y).sign(), x)


@torch.no_grad()
def square(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int, generator: torch.Generator) -> Tensor:
    """A short Square attack (Andriushchenko et al., ECCV 2020, Algorithm 2): random search that uses no gradient.

    From vertical stripes of +-eps, every query sets one random square of every image to +-eps per channel, and is kept
    where `margins` rises. The square's area falls geometrically from 0.8 of the image to one pixel, so that a few hundred
    queries go through all scales (the paper's table of halvings is made for 10,000). Leaves an image alone once it is
    misclassified.

    Args:
        y: (N,) int64.
        generator: a CPU generator.

    Returns:
        delta.
    """
    n, channels, height, width = x.shape
    rows, columns = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator).to(x.device)

    delta = inside_image(eps * (2 * draw(2, n, channels, 1, width) - 1), x)
    worst = margins(model(x + delta), y)
    for query in range(1, queries):
        standing = (worst < 0).nonzero().squeeze(1)
        if len(standing) == 0:
            break
        side = max(1, min(height, width, round((0.8 * height * width) ** ((1 - query / queries) / 2))))
        top = draw(height - side + 1, len(standing), 1, 1, 1)
        left = draw(width - side + 1, len(standing), 1, 1, 1)
        within = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        sign = 2 * draw(2, len(standing), channels, 1, 1) - 1
        tried = torch.where(within, inside_image((eps * sign).expand_as(x[standing]), x[standing]), delta[standing])
        found = margins(model(x[standing] + tried), y[standing])
        better = found > worst[standing]
        delta[standing[better]], worst[standing[better]] = tried[better], found[better]
    return delta


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """(N,) int64: the class of the largest logit, or -1, which is no class, where one of them is nan."""
    logits = model(x)
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, attack: str, eps: float, seed: int, batch_size: int, classes: int = 10,
    log: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One of AutoAttack's four attacks, with the settings of its standard version, by the `pyautoattack` package.

    Run in the order of `AUTOATTACK`, each on the images that the ones before left standing, the four give image by
    image what the package's own standard evaluation gives: it reseeds for every batch.

    Args:
        x: (N, C, H, W) in [0, 1]; y: (N,) int64; both may lie on the CPU, batches go to the model's device.
        classes: how many the model has; 10 stands for all above. apgd-t, whose loss compares four logits, needs four.
        log: called with every line that the package reports, a line a batch; its own warnings begin with "warning: ".

    Returns:
        x_adv like x, and (N,) bool: still classified as y.

    Raises:
        ValueError: an unknown attack.
    """
    from pyautoattack import AutoAttack  # here, because importing it is slow and only evaluation needs it

    if attack not in AUTOATTACK:
        raise ValueError(f"attack {attack!r} is not one of {', '.join(AUTOATTACK)}")
    logger = logging.getLogger("auto-attack")
    handler = _Report(log or (lambda line: None))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), frozen(model):  # they reseed torch globally, and FAB calls backward()
            runner = AutoAttack(model, eps=eps, seed=seed, device=next(model.parameters()).device)
            runner.attacks_to_run = [attack]
            runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(9, classes - 1)  # the standard version's nine, where there are so many
            x_adv, predicted = runner.run_standard_evaluation(x.contiguous(), y, batch_size=batch_size)  # it flattens by view
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    return x_adv, predicted == y


class _Report(logging.Handler):
    """Hands every log line to a function."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())
