"""Tensor helpers that appear in the papers. Pure: tensors in, tensors out (the contexts restore what they change)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(delta: Tensor, eps: float) -> Tensor:
    """The papers' projection of each entry onto [-eps, eps], with a derivative of 1 inside, 1/2 on the bound and 0 outside.

    Written out because torch changed its own clamp's derivative on the bound between versions.
    """
    clamped = delta.detach().clamp(-eps, eps)
    if not delta.requires_grad:
        return clamped
    magnitude = delta.detach().abs()
    slope = ((magnitude < eps).to(delta.dtype) + (magnitude <= eps).to(delta.dtype)) / 2
    return clamped + slope * (delta - delta.detach())  # the bracket is exactly zero: only its derivative counts


def inside_image(delta: Tensor, x: Tensor) -> Tensor:
    """`delta` clipped so that x + delta lies in [0, 1], detached; x in [0, 1], of the same shape."""
    return delta.detach().clamp(-x, 1 - x)


def soft_labels(y: Tensor, classes: int, factor: float) -> Tensor:
    """(B,) int64 to (B, classes): `factor` on the true class, (1 - factor) / (classes - 1) on each other one.

    This is FGSM-SDI's label factor, not torch's `label_smoothing` e: factor = 1 - e * (classes - 1) / classes.
    """
    target = torch.full((len(y), classes), (1 - factor) / (classes - 1), device=y.device)
    return target.scatter_(1, y[:, None], factor)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two (B, ...) tensors per sample, (B,); nan, with no gradient into it, where either one has norm zero."""
    a, b = a.flatten(1), b.flatten(1)
    zero = (a.detach().norm(dim=1) == 0) | (b.detach().norm(dim=1) == 0)
    a, b = a.masked_fill(zero[:, None], 1), b.masked_fill(zero[:, None], 1)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)  # one by one: of small norms the product underflows
    return (a * b).sum(1).masked_fill(zero, torch.nan)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) per sample, (B, classes) twice to (B,); gradients flow into both."""
    log_q, log_p = F.log_softmax(logits, 1), F.log_softmax(reference, 1)  # F.kl_div's gradient into p is nan where p is zero
    return (log_p.exp() * (log_p - log_q)).sum(1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """No gradient for the parameters of `module`: what an attack needs, and half of a backward pass saved."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield module
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def eval_mode(module: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """BatchNorm (and dropout) in evaluation mode, each layer's own mode restored; does nothing unless `enabled`."""
    before = [(layer, layer.training) for layer in module.modules()]
    try:
        yield module.eval() if enabled else module
    finally:
        for layer, training in before:
            layer.training = training


@contextmanager
def untracked(module: nn.Module) -> Iterator[nn.Module]:
    """BatchNorm's running statistics stay as they are, whatever passes through in training mode."""
    tracking = [layer for layer in module.modules() if getattr(layer, "track_running_stats", False)]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield module
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@contextmanager
def moved(tensors: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    """Adds each move to its tensor inside the block and subtracts it afterwards, so that an optimizer's step made inside stays."""
    try:
        with torch.no_grad():
            torch._foreach_add_(tensors, moves)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(tensors, moves)
