"""Accuracy under the papers' attacks and AutoAttack: fp32, eval mode, one verdict per image."""
from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import attacks
from engine import checkpoint, distributed, record
from engine.capture import compiling
from engine.data import to_images
from engine.errors import Failure, Misuse
from engine.random_streams import evaluation_generator, in_ball
from utils import eval_mode

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "cw", "apgd", "aa")
"""The papers' columns. fgsm: a random start, then one step of eps, as their evaluation script has it; pgdN: one
restart, a random start; cw: 20 steps of PGD on the margin; apgd: AutoAttack's first attack; aa: all four."""
AUTOATTACK_COLUMNS = {"apgd": "apgd-ce", "aa": "square"}  # and the attack after which each stands
SAVE_EVERY = 60.0  # seconds within one of AutoAttack's attacks, or a batch, whichever is longer
SQUARE_MAY_TAKE = 0.2  # points; the package has the same flag, but sees one attack at a time here


@contextmanager
def trustworthy() -> Iterator[None]:
    """fp32 means fp32, and nothing that happens here moves anybody else's random numbers.

    cuDNN does not look for the fastest convolutions: attacks leave images alone that have fallen, and each number of images would be another search.
    """
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    allowing = [library for library in (torch.backends.cuda.matmul, torch.backends.cudnn) if library.allow_tf32]
    for library in allowing:  # the others are not touched: torch.compile takes "set to False" for another state than "never set"
        library.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the default, without its warning where there are several
            yield
    finally:
        torch.backends.cudnn.benchmark = searching
        for library in allowing:
            library.allow_tf32 = True


def verdicts(
    model: nn.Module, x: Tensor, y: Tensor, *, columns: Sequence[str], eps: float, alpha: float, seed: int,
    batch_size: int, first: int = 0, search: nn.Module | None = None, progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Which images are still classified as y under each attack. AutoAttack's columns are `auto_attack`'s.

    The random starts are a function of (seed, attack, image): of neither the batch size nor the device.

    Args:
        x: (N, H, W, C) uint8; y: (N,) int64.
        eps, alpha: fractions of 1; alpha is PGD's and C&W's step.
        first: how many images of the set stand before x[0], where another process measures those.
        search: `model` in a faster form, in which the attacks look; the verdict is `model`'s.
        progress: called with the number of images done.

    Returns:
        For each column (N,) bool on the CPU.
    """
    weight, search = next(model.parameters()), model if search is None else search
    device = weight.device
    starts = {name: evaluation_generator(seed, name) for name in ("fgsm", "pgd", "cw")}
    lengths = sorted(int(column[3:]) for column in columns if column.startswith("pgd"))
    for name in {"pgd" if column.startswith("pgd") else column for column in columns} & starts.keys():
        for passed in range(0, first, batch_size):  # the other images' numbers
            torch.rand((min(batch_size, first - passed), *x.shape[1:]), generator=starts[name])
    found: dict[str, list[Tensor]] = {column: [] for column in columns}
    with trustworthy(), eval_mode(model):
        for part_x, part_y in zip(x.split(batch_size), y.split(batch_size)):
            images, labels = to_images(part_x.to(device), weight.dtype), part_y.to(device)

            def start(name: str) -> Tensor:
                return in_ball(images.shape, eps, starts[name], device)

            def judge(column: str, delta: Tensor | float) -> None:
                found[column].append((attacks.predict(model, images + delta) == labels).cpu())

            if "clean" in columns:
                judge("clean", 0.0)
            if "fgsm" in columns:
                judge("fgsm", attacks.pgd(search, images, labels, eps=eps, alpha=eps, steps=1, start=start("fgsm")))
            delta, done = start("pgd") if lengths else None, 0
            for length in lengths:  # PGD-20 goes on where PGD-10 stopped
                delta = attacks.pgd(search, images, labels, eps=eps, alpha=alpha, steps=length - done, start=delta)
                judge(f"pgd{length}", delta)
                done = length
            if "cw" in columns:
                judge("cw", attacks.pgd(search, images, labels, eps=eps, alpha=alpha, steps=20, start=start("cw"), loss=attacks.margin))
            if progress:
                progress(len(labels))
    return {column: torch.cat(parts) for column, parts in found.items()}


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, columns: Sequence[str], eps: float, seed: int, batch_size: int,
    path: Path, log: Callable[[str], None], search: nn.Module | None = None, classes: int = 10,
) -> dict[str, Tensor]:
    """The columns apgd and aa, one attack at a time on what the ones before left standing: an interrupted evaluation continues.

    It is saved after each attack, and within one every minute, or every batch where one takes longer. torchrun's processes share the images
    that are left, however many began.

    Args:
        x, y: all images, on every process; eps, seed, batch_size, search: as for `verdicts`. What is found counts where `model`
            is fooled, too.
        classes: as for `attacks.auto_attack`.
        path: the file in which the first process leaves the verdicts, of an attack that is not finished too, the adversarial images, whose code's
            they are, the seconds that they took, and what the package warned of.

    Returns:
        For each of the columns asked for, (N,) bool on the CPU.

    Raises:
        Misuse: `path` holds verdicts of this network at another radius, seed or batch size, or on more images.
    """
    wanted = attacks.AUTOATTACK if "aa" in columns else attacks.AUTOATTACK[:1]
    images, leads, device = to_images(x).contiguous(), distributed.rank() == 0, next(model.parameters()).device

    def stand(points: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([(attacks.predict(model, part.to(device)) == label.to(device)).cpu()
                          for part, label in zip(points.split(batch_size), labels.split(batch_size))])

    def report(line: str) -> None:
        warning = line.removeprefix("warning: ")
        if warning != line and warning not in state["warnings"]:  # it says so of every batch
            state["warnings"].append(warning)
            log(line)

    def attacked(points: Tensor, labels: Tensor, attack: str) -> tuple[Tensor, Tensor]:
        """Adversarial images, and which still stand."""
        x_adv, still = (found.cpu() for found in attacks.auto_attack(
            model if search is None else search, points, labels, attack=attack, eps=eps, seed=seed, batch_size=batch_size, classes=classes, log=report))
        if search is not None and not still.all():
            still[~still] = stand(x_adv[~still], labels[~still])
        return x_adv, still

    def through(attack: str, standing: Tensor) -> Tensor:
        """Which of the standing images still stand after this attack; goes on where it stopped."""
        found = state["unfinished"] = state["unfinished"] or {"standing": standing.clone(), "attacked": ~standing}
        left, saved, saving = (~found["attacked"]).nonzero().squeeze(1), time.monotonic(), 0.0
        for batch in left.split(batch_size * distributed.world_size()) if len(left) else ():
            began, mine = time.perf_counter(), batch[distributed.shard(len(batch))]
            x_adv, still = attacked(images[mine], y[mine], attack) if len(mine) else (images[mine], standing[mine])
            found["attacked"][batch], found["standing"][batch] = True, distributed.gathered(still, len(batch))
            fooled = distributed.gather(x_adv[~still])
            state["warnings"] = list(dict.fromkeys(chain(*distributed.all_gather_object(state["warnings"]))))
            if leads:
                state["x_adv"][batch[~found["standing"][batch]]] = fooled
            state["seconds"] += time.perf_counter() - began
            log(f"{attack}: {found['attacked'][standing].sum()} of {standing.sum()} images, {(standing & ~found['standing']).sum()} fooled")
            if leads and time.monotonic() - saved > SAVE_EVERY * max(1, saving / 3):  # of large images a twentieth of the time at most
                before = time.monotonic()
                checkpoint.save(state, path)
                saved = time.monotonic()
                saving = saved - before
        state["unfinished"] = {}
        return found["standing"]

    with trustworthy(), eval_mode(model):
        identity = _identity(model, x, y, eps=eps, seed=seed) | {"batch_size": batch_size}
        state = (_load_attacks(path, identity, log) if leads else None) or {
            "identity": identity, "standing": {}, "unfinished": {}, "x_adv": images.clone(), "seconds": 0.0, "warnings": []}
        state["source"] = record.continued(record.source(), state.get("source"))
        verdict = state["standing"] = _of_first(state["standing"], ("clean", *attacks.AUTOATTACK), len(x))
        state["unfinished"] = _of_first(state.get("unfinished", {}), ("standing", "attacked"), len(x))
        if "clean" not in verdict:
            part = distributed.shard(len(x))
            verdict["clean"] = distributed.gathered(stand(images[part], y[part]), len(x))
        standing = verdict["clean"]
        for attack in wanted:
            if attack not in verdict:
                verdict[attack] = through(attack, standing)
                fell = int((standing & ~verdict[attack]).sum())
                if attack == "square" and (taken := 100 * fell / len(x)) > SQUARE_MAY_TAKE + 196 * fell**0.5 / len(x):
                    report(f"warning: Square takes {taken:.2f} points from what the three attacks before it left; its authors call AutoAttack's accuracy "
                           f"unreliable where these are more than {SQUARE_MAY_TAKE}, and the error of {len(x)} images does not explain them")
                if leads:
                    checkpoint.save(state, path)
            standing = verdict[attack]
            log(f"after {attack}: robust accuracy {record.percent(standing)['value']:.2f} %")
    return {column: verdict[attack] for column, attack in AUTOATTACK_COLUMNS.items() if column in columns}


def _of_first(rows: dict[str, Tensor], names: Sequence[str], n: int) -> dict[str, Tensor]:
    """The first process's (n,) bool rows, as many of these names as it has, on every process."""
    absent = 2
    table = torch.full((len(names), n), absent, dtype=torch.uint8)
    for row, name in zip(table, names):
        if name in rows:
            row.copy_(rows[name])
    distributed.broadcast([table])
    return {name: row.bool() for row, name in zip(table, names) if row[0] != absent}


def _identity(model: nn.Module, x: Tensor, y: Tensor, **settings: float) -> dict[str, Any]:
    """What AutoAttack's verdicts depend on. Of the network its form too: several of the published ones may have the same weights."""
    form = [(name, type(layer).__name__, sorted((key, value) for key, value in vars(layer).items() if isinstance(value, (int, float, str))))
            for name, layer in model.named_modules()]
    network = hashlib.sha256(repr((form, checkpoint.digest(model.state_dict()))).encode()).hexdigest()
    return {"network": network, "n": len(x), **settings, "images": checkpoint.digest({"x": x, "y": y})}


def _load_attacks(path: Path, identity: dict[str, Any], log: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """The evaluation that `path` holds, if it is this one; without a batch size in `identity`, one of any: random starts are drawn by the batch.

    Raises:
        Misuse: it is another one of the same network, which took long and would be lost; one of fewer images may go.
    """
    if not path.is_file():
        return None
    try:
        state = checkpoint.load(path)
        before = state["identity"]
        differing = [name for name in identity if identity[name] != before[name]]
        if not differing:
            log(f"continuing from {path}: {', '.join(state['standing'])} done")
            return state
        if before["network"] == identity["network"] and not (before["n"] < identity["n"] and {"eps", "seed"}.isdisjoint(differing)):
            name = differing[0]
            _refuse(path, "on other images" if name == "images" else f"with {name} {before[name]}, where this one has {identity[name]},")
        log(f"{path} belongs to another evaluation; starting anew")
    except (PermissionError, MemoryError, Misuse):
        raise
    except Exception:
        log(f"{path} is damaged; starting anew")
    return None


def check_replaceable(path: Path, content: dict[str, Any]) -> None:
    """Raises Misuse where evaluation.json at `path` holds numbers of the same weights that the one to come will not have.

    Args:
        content: of the one to come: `checkpoint`, `metrics` (its columns), and whatever of the rest the numbers depend on; of `n`, more replace fewer.
    """
    before = record.read_json(path) if path.is_file() else {}
    if before.get("checkpoint", {}).get("sha256") == content["checkpoint"]["sha256"]:
        for name, value in content.items():
            if name not in ("checkpoint", "metrics") and before.get(name) != value and not (name == "n" and before["n"] < value):
                _refuse(path, f"with {name} {before.get(name)}, where this one has {value},")
        if lost := before["metrics"].keys() - set(content["metrics"]):
            _refuse(path, f"with the columns {', '.join(name for name in before['metrics'] if name in lost)}, for which this one does not ask,")


def _refuse(path: Path, what: str) -> NoReturn:
    raise Misuse(f"{path} holds an evaluation of the same network {what} and would be replaced: give another --out-dir, or move it away")


def columns_named(text: str) -> tuple[str, ...]:
    """A comma-separated list of columns, in the papers' order; pgdN is allowed for every N.

    Raises:
        Misuse: an unknown column.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise Misuse(f"--attacks {text}: must name a column: {', '.join(COLUMNS)}, or pgdN for any N")
    for name in names:
        if name not in COLUMNS and not re.fullmatch("pgd[1-9][0-9]{0,5}", name):
            raise Misuse(f"{name!r} is no column of the evaluation: allowed are {', '.join(COLUMNS)}, and pgdN for any N")
    order = ["clean", "fgsm", *sorted({n for n in names if n.startswith("pgd")}, key=lambda n: int(n[3:])), "cw", "apgd", "aa"]
    return tuple(name for name in order if name in names)


class CompiledSearch(nn.Module):
    """`model` by torch.compile, to search with. Every batch is filled up to a multiple of a quarter of the largest: at most eight graphs.

    `model` itself is frozen for good: a compiled network computes the gradients of all weights that could ask for one.

    Args:
        x: (N, H, W, C) uint8; y: (N,) int64: a batch of the largest size.

    Raises:
        Failure: it cannot be compiled, or its logits or its gradients are not the plain network's.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, backend: str | Callable = "inductor") -> None:
        super().__init__()
        self.quarter = -(-len(x) // 4)
        self.graphs = torch.compile(model.requires_grad_(False), dynamic=False, backend=backend)
        weight = next(model.parameters())
        images, labels = to_images(x.to(weight.device), weight.dtype), y.to(weight.device)
        with trustworthy(), eval_mode(model), torch.no_grad(), compiling():
            pairs = {"logits": [network(images) for network in (model, self)],
                     "gradients": [attacks.input_gradient(network, images, labels) for network in (model, self)]}
        for name, (plain, ours) in pairs.items():
            if not (difference := ((ours - plain).abs().max() / plain.abs().max()).item()) < 1e-3:  # nan, too
                raise Failure(f"the compiled network's {name} differ from the plain one's by {difference:.1e} of the largest: leave out --compile")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        missing = max(1, -(-len(x) // self.quarter)) * self.quarter - len(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):  # a graph of its own for each, and for each memory layout
            return self.graphs(torch.cat([x, x.new_zeros(missing, *x.shape[1:])]).contiguous())[:len(x)]


LARGEST_BATCH = 1024  # so that an attack has several batches to report of


def batch_size_for(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int, path: Path | None, asked: int | None = None) -> int:
    """How many images per batch: the same on every process. Arguments as for `auto_attack`.

    As many as were asked for, or as the evaluation had that goes on from `path`; otherwise 500 on the CPU, and on a GPU the power of two, up to
    `LARGEST_BATCH`, that half of its free memory holds.

    Raises:
        Misuse: as `auto_attack`, but before anything is measured.
    """
    device, batch_size = next(model.parameters()).device, asked or 500
    if device.type == "cuda" and asked is None:
        images, labels, before = to_images(x[:64].to(device)), y[:64].to(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with trustworthy(), eval_mode(model):
            attacks.input_gradient(model, images, labels)
        each = (torch.cuda.max_memory_allocated(device) - before) / len(images)
        batch_size = power_of_two(torch.cuda.mem_get_info(device)[0] / 2 / each)
    chosen = torch.tensor(-distributed.maximum(-batch_size, torch.device("cpu")))
    if path is not None and path.is_file():
        identity = _identity(model, x, y, eps=eps, seed=seed, **({"batch_size": asked} if asked else {}))  # which looks at every pixel
        if before := _load_attacks(path, identity):
            chosen.fill_(before["identity"]["batch_size"])
    distributed.broadcast([chosen])
    return int(chosen)


def power_of_two(most: float) -> int:
    """The largest one that is not above `most`, from 1 to `LARGEST_BATCH`."""
    return min(LARGEST_BATCH, 1 << max(0, int(most).bit_length() - 1))


def check_finite(model: nn.Module, x: Tensor) -> None:
    """Raises Failure when the network's logits are not finite on clean images x, (N, H, W, C) uint8."""
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model):
        if not torch.isfinite(model(to_images(x[:64].to(device)))).all():
            raise Failure("the network's logits on clean images are not finite: the weights are damaged, or the training diverged")
