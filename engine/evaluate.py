"""Accuracy under the papers' attacks and AutoAttack: fp32, eval mode, one verdict per image."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attacks
from engine import checkpoint, record
from engine.data import evaluation_generator, to_images
from engine.errors import Failure, Misuse
from utils import eval_mode

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "cw", "apgd", "aa")
"""The papers' columns. fgsm: a random start, then one step of eps, as their evaluation script has it; pgdN: one
restart, a random start; cw: 20 steps of PGD on the margin; apgd: AutoAttack's first attack; aa: all four."""
AUTOATTACK_COLUMNS = ("apgd", "aa")


@contextmanager
def trustworthy():
    """fp32 means fp32, and nothing that happens here moves anybody else's random numbers."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def verdicts(
    model: nn.Module, x: Tensor, y: Tensor, *, columns: Sequence[str], eps: float, alpha: float, seed: int,
    batch_size: int, progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Which images are still classified as y under each attack. AutoAttack's columns are `auto_attack`'s.

    The random starts are a function of (seed, attack, image): of neither the batch size nor the device.

    Args:
        x: (N, H, W, C) uint8; y: (N,) int64.
        eps, alpha: fractions of 1; alpha is PGD's and C&W's step.
        progress: called with the number of images done.

    Returns:
        For each column (N,) bool on the CPU.
    """
    weight = next(model.parameters())
    device = weight.device
    starts = {name: evaluation_generator(seed, stream) for stream, name in enumerate(("fgsm", "pgd", "cw"))}
    lengths = sorted(int(column[3:]) for column in columns if column.startswith("pgd"))
    found: dict[str, list[Tensor]] = {column: [] for column in columns}
    with trustworthy(), eval_mode(model):
        for part_x, part_y in zip(x.split(batch_size), y.split(batch_size)):
            images, labels = to_images(part_x.to(device), weight.dtype), part_y.to(device)

            def start(name: str) -> Tensor:
                return eps * (2 * torch.rand(images.shape, generator=starts[name]) - 1).to(device)

            def judge(column: str, delta: Tensor | float) -> None:
                found[column].append((attacks.predict(model, images + delta) == labels).cpu())

            if "clean" in columns:
                judge("clean", 0.0)
            if "fgsm" in columns:
                judge("fgsm", attacks.pgd(model, images, labels, eps=eps, alpha=eps, steps=1, start=start("fgsm")))
            delta, done = start("pgd") if lengths else None, 0
            for length in lengths:  # PGD-20 goes on where PGD-10 stopped
                delta = attacks.pgd(model, images, labels, eps=eps, alpha=alpha, steps=length - done, start=delta)
                judge(f"pgd{length}", delta)
                done = length
            if "cw" in columns:
                judge("cw", attacks.pgd(model, images, labels, eps=eps, alpha=alpha, steps=20, start=start("cw"), loss=attacks.margin))
            if progress:
                progress(len(labels))
    return {column: torch.cat(parts) for column, parts in found.items()}


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, columns: Sequence[str], eps: float, seed: int, batch_size: int,
    path: Path, log: Callable[[str], None],
) -> dict[str, Tensor]:
    """The columns apgd and aa, one attack at a time, saved after each: an interrupted evaluation continues.

    Args:
        x, y, eps, seed, batch_size: as for `verdicts`.
        path: the file that holds, after each attack, the verdicts and the adversarial images.

    Returns:
        For each of the columns asked for, (N,) bool on the CPU.
    """
    wanted = attacks.AUTOATTACK if "aa" in columns else attacks.AUTOATTACK[:1]
    images = to_images(x).contiguous()
    with trustworthy(), eval_mode(model):
        identity = _fingerprint(model, x, y, eps, seed, batch_size)
        state = _load_attacks(path, identity, log)
        if state is None:
            device = next(model.parameters()).device
            clean = torch.cat([(attacks.predict(model, part.to(device)) == label.to(device)).cpu()
                               for part, label in zip(images.split(batch_size), y.split(batch_size))])
            state = {"identity": identity, "standing": {"clean": clean}, "x_adv": images.clone()}
        standing = state["standing"]["clean"].clone()
        for attack in attacks.AUTOATTACK:
            if attack in state["standing"]:
                standing = state["standing"][attack].clone()
            elif attack in wanted:
                which = standing.nonzero().squeeze(1)
                if len(which):
                    x_adv, still = attacks.auto_attack(
                        model, images[which], y[which], attack=attack, eps=eps, seed=seed, batch_size=batch_size,
                        log=lambda line: log(line) if "successfully" in line or line.startswith("warning") else None)
                    state["x_adv"][which[~still]] = x_adv[~still].cpu()
                    standing[which] = still.cpu()
                state["standing"][attack] = standing.clone()
                checkpoint.save(state, path)
            log(f"after {attack}: robust accuracy {100 * standing.float().mean():.2f} %")
            if attack == wanted[-1]:
                break
    return {column: state["standing"][{"apgd": "apgd-ce", "aa": "square"}[column]]
            for column in columns if column in AUTOATTACK_COLUMNS}


def _fingerprint(model: nn.Module, x: Tensor, y: Tensor, *settings: float) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_attacks(path: Path, identity: str, log: Callable[[str], None]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state = checkpoint.load(path)
        if state["identity"] == identity:
            log(f"continuing from {path}: {', '.join(state['standing'])} done")
            return state
        log(f"{path} belongs to another evaluation; starting anew")
    except Exception:
        log(f"{path} is damaged; starting anew")
    return None


def columns_named(text: str) -> tuple[str, ...]:
    """A comma-separated list of columns, in the papers' order; pgdN is allowed for every N.

    Raises:
        Misuse: an unknown column.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS and not (name.startswith("pgd") and name[3:].isdigit() and int(name[3:]) > 0):
            raise Misuse(f"{name!r} is no column of the evaluation: allowed are {', '.join(COLUMNS)}, and pgdN for any N")
    order = [*COLUMNS[:2], *sorted({n for n in names if n.startswith("pgd")}, key=lambda n: int(n[3:])), *COLUMNS[5:]]
    return tuple(name for name in order if name in names)


def check_finite(model: nn.Module, x: Tensor) -> None:
    """Raises Failure when the network's logits are not finite on clean images."""
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model):
        if not torch.isfinite(model(to_images(x[:64].to(device)))).all():
            raise Failure("the network's logits on clean images are not finite: the weights are damaged, or the training diverged")


def metrics(found: dict[str, Tensor]) -> dict[str, Any]:
    """Per column the accuracy in percent, n, and its 95 % interval."""
    return {column: record.percent(standing) for column, standing in found.items()}
