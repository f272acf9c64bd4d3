"""Reads checkpoints: this repository's own, and those that the field has published.

Published files differ in container, in prefix, in where the input is normalised, and in two places that the
names of the weights do not show (docs/methods.md). Nothing is guessed in silence: what a file does not say is
measured on training images, recorded, and can be overruled. Weights load strictly. Nothing in a file is ever
executed.

The way of a file: `read` (bytes to a dict), `unwrap` (to a bare state_dict), `candidates` (the networks that
fit), and `load`, which does it all. Every refusal is a `Misuse` of one sentence.
"""
from __future__ import annotations

import io
import math
import pickle
import types
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from engine import checkpoint, record
from engine.data import NORMALISATIONS as NORMALISATIONS_OF_DATASETS
from engine.errors import Misuse

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    **NORMALISATIONS_OF_DATASETS,
    "cifar10-ckpt": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "svhn-nfgsm": ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744)),
}
"""Channel means and standard deviations that published networks were trained with: fast_adversarial, Rice and AWP use
cifar10, CKPT cifar10-ckpt, N-FGSM cifar100 and svhn-nfgsm; on ImageNet fast_adversarial and Free AT imagenet."""

TRIED: dict[int | None, tuple[str, ...]] = {
    10: ("none", "cifar10", "cifar10-ckpt", "svhn-nfgsm", "svhn", "imagenet"),
    100: ("none", "cifar100", "cifar10", "cifar10-ckpt", "imagenet"),
    43: ("none", "gtsrb", "cifar10", "imagenet"),
    200: ("none", "tiny-imagenet", "imagenet"),
    1000: ("none", "imagenet"),
    None: ("none", "cifar10", "imagenet"),
}
"""By number of classes, None for any other: what to try when the file does not say. The first wins a tie."""

SNAPSHOTS = ("best", "last", "best_test")
CONTAINERS = ("state_dict", "net", *SNAPSHOTS, "rmodel", "model", "model_state_dict")
"""Where scripts put the weights: the first that is there counts, and `which` picks among the SNAPSHOTS."""

PREFIXES = ("module.", "model.", "network.", "net.", "_orig_mod.", "1.")
"""Of DataParallel, of wrappers, this repository's among them, of torch.compile, of a network behind a normalisation in a Sequential."""

NORMALISATION_KEYS = (
    ("normalize.mean", "normalize.std"),  # this repository, RobustBench on ImageNet
    ("0.mean", "0.std"),  # CKPT
    ("mean", "std"),  # MAIR
    ("mu", "sigma"),  # RobustBench
)

DISCARDED = {
    "model_preact_hl1.": "GradAlign's second name for its first layers",
    "n_classes": "MAIR's count of the classes",
}
"""Beginnings of keys that say nothing new, and what they are."""

NEVER_CALLED = "sub_block1."  # TRADES registers this block and never calls it

FAMILIES = {
    "preactresnet18": ("preactresnet18a", "preactresnet18b", "preactresnet18c", "preactresnet18d"),
    "wideresnet": tuple(name for name in models.NAMES if name.startswith("wideresnet")),
}
FAMILIES["preactresnest18"] = FAMILIES["preactresnet18"]  # so misspelt in all of jiaxiaojunQAQ's scripts
"""Names that the published scripts use for several networks; the file then decides which."""

TWINS = {"preactresnet18": "preactresnet18a", "preactresnet18-gap": "preactresnet18a", "wideresnet34-20": "wideresnet34-10"}
"""Names that at equal width, and with the same last layer, build the same network as another name: never two candidates."""


@dataclass(frozen=True)
class Origin:
    """Where in the file the weights were found, and what was done to them.

    container: the entries on the way to the weights, "raw" when the file holds nothing else; prefix: what
    every key began with; arch: the network of ours that the file names, if it does; notes: sentences.
    """

    container: str
    prefix: str
    arch: str | None
    notes: list[str]


@dataclass(frozen=True)
class Candidate:
    """A network that the weights fit, and how its images are normalised.

    width and image_size are those of `models.build`; without: the beginnings of keys that this network has no
    use for; normalise: a name of the table, or `its own`; mean and std have one number per channel.
    """

    arch: str
    classes: int
    channels: int
    width: int | None
    image_size: int
    without: tuple[str, ...]
    normalise: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def build(self, weights: dict[str, Tensor]) -> nn.Module:
        """The network with these weights, in eval mode on the CPU; torch's random numbers are left alone."""
        with torch.random.fork_rng(devices=[]):
            net = models.build(self.arch, classes=self.classes, channels=self.channels, width=self.width,
                               normalise=(self.mean, self.std), image_size=self.image_size)
        layer = {key: value for key, value in net.state_dict().items() if key in NORMALISATION_KEYS[0]}
        kept = {key: value for key, value in weights.items() if not key.startswith(self.without)}
        net.load_state_dict(kept | layer)
        return net.eval()


# From bytes to a dict ---------------------------------------------------------------------------------------

class _Inert:
    """Stands for what a file names that is not data: takes any construction, call, state or item."""

    origin = ""  # the name that the file asked for

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __call__(self, *args: Any, **named: Any) -> _Inert:
        return self

    def __getattr__(self, name: str) -> _Inert:
        if name.startswith("__"):  # protocols that are not spelled out here stay absent
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False


class _Mapping(dict):
    """An OrderedDict's entries without what else a file may hang on it (state_dicts carry `_metadata`)."""

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *hooks: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _rebuild_parameter(data: Tensor, *hooks: Any) -> Tensor:
    return data


_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__")
       for kind in (bool, int, float, complex, str, tuple, list, dict, set, frozenset)},
}
"""All that a file may name and get. The names of storages torch.load makes into types before it asks here."""


class _Unpickler(pickle._Unpickler):  # the one in C allocates gigabytes for one flipped bit in an index
    def find_class(self, module: str, name: str) -> Any:
        return _REAL.get((module, name)) or type("Inert", (_Inert,), {"origin": f"{module}.{name}"})


_RESTRICTED = types.SimpleNamespace(
    __name__=__name__, Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load())
"""What torch.load takes as its pickle module."""


def read(path: str | Path) -> dict[str, Any]:
    """What a file of torch.save holds, on the CPU. Never runs anything in it.

    First as torch does it with weights_only; where that refuses, tensors and plain types are made real and
    every other global (schedulers, numpy scalars, argparse namespaces, os.system) becomes an object that does
    nothing. Flipped bits are noticed by the file's checksums; torch's format of before 1.6 has none.

    Raises:
        Misuse: no such file; empty, cut short, altered, or no checkpoint; a pickled module, not weights.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Misuse(f"{path} cannot be read ({error.strerror}): give the path of a checkpoint") from error
    if not data:
        raise Misuse(f"{path} is empty: download or save it again")
    if data.startswith(b"PK\x03\x04"):
        _check_archive(path, data)
    try:
        try:
            content = _loaded(data, weights_only=True)
        except pickle.UnpicklingError:  # it names what torch does not allow; other errors mean damage
            content = _loaded(data, weights_only=False, pickle_module=_RESTRICTED, encoding="latin1")
    except Exception as error:  # a damaged file raises nearly anything, from EOFError to RuntimeError
        raise Misuse(f"{path} is damaged or is no PyTorch checkpoint ({_brief(error)}): "
                     "download or save it again") from error
    if isinstance(content, _Inert):
        raise Misuse(f"{path} {_pickled(content)}")
    if not isinstance(content, dict):
        raise Misuse(f"{path} holds a {type(content).__name__}, and no dict of weights: save a state_dict")
    return _plain(content)


def _loaded(data: bytes, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on old formats and on classes whose source it cannot find
        # From memory: given a path, torch tries the format of 2016 first, and unpacks a tar archive for it.
        return torch.load(io.BytesIO(data), map_location="cpu", **options)


def _check_archive(path: str | Path, data: bytes) -> None:
    """torch writes a checksum of every entry and never looks at it again."""
    remedy = "download or save it again"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names, altered = archive.namelist(), archive.testzip()
    except Exception as error:
        raise Misuse(f"{path} is damaged, or cut short: {remedy}") from error
    if altered is not None:
        raise Misuse(f"{path} is damaged (the checksum of {altered} does not match): {remedy}")
    if any(name.endswith("/constants.pkl") for name in names):
        raise Misuse(f"{path} is a TorchScript archive, which is a program: save the state_dict instead")


def _brief(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words[:120] if " " in words else type(error).__name__


def _pickled(value: _Inert) -> str:
    return (f"holds a pickled {value.origin}, which only its own program can read: "
            "with that program, save its state_dict() instead")


def _plain(mapping: dict) -> dict:
    """A dict of the same entries, by no method that a file could have overridden."""
    return {key: dict.__getitem__(mapping, key) for key in dict.__iter__(mapping)}


# From a dict to a state_dict --------------------------------------------------------------------------------

def unwrap(container: dict[str, Any], which: str = "best") -> tuple[dict[str, Tensor], Origin]:
    """The weights in a checkpoint, under the names that `models` has, and where they were.

    Floating-point values become float32. Where the file holds a normalisation, under whichever name, it
    becomes `normalize.mean` and `normalize.std` of shape (channels,); otherwise these are absent.

    Args:
        container: what `read` returned.
        which: which one of a file that holds several: best, last or best_test.

    Raises:
        Misuse: no weights in it; not the snapshot asked for; a value that is not finite.
    """
    if which not in SNAPSHOTS:
        raise Misuse(f"snapshot {which!r} is unknown: allowed are {', '.join(SNAPSHOTS)}")
    state, way, arch = container, [], None
    while held := [key for key in CONTAINERS if isinstance(state.get(key), (dict, _Inert))]:
        key = which if held[0] in SNAPSHOTS else held[0]
        if key not in held:
            raise Misuse(f"it holds no {which!r} weights: ask for one of {', '.join(held)}")
        if isinstance(state[key], _Inert):
            raise Misuse(f"under {key!r} it {_pickled(state[key])}")
        if len(way) == 3:
            raise Misuse(f"no weights within {'/'.join(way)}: save a state_dict")
        arch = next((name for name in models.NAMES if name == state.get("arch")), None)
        way.append(key)
        state = _plain(state[key])
    _check_weights(state)

    notes: list[str] = []
    state, prefix, carried = _peel({key: value.detach() for key, value in state.items()}, notes)
    for beginning, what in DISCARDED.items():
        superfluous = [key for key in state if key.startswith(beginning)]
        if superfluous:
            notes.append(f"left out {beginning}*: {what}")
            state = {key: value for key, value in state.items() if key not in superfluous}
    narrow = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()
                     if value.is_floating_point() and value.dtype != torch.float32})
    if narrow:
        notes.append(f"{' and '.join(narrow)} weights cast to float32")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise Misuse(f"{key} holds a value that is not finite: take a checkpoint from before")
    return state | carried, Origin("/".join(way) or "raw", prefix, arch, notes)


def _check_weights(state: dict[Any, Any]) -> None:
    if not any(isinstance(value, Tensor) for value in state.values()):
        entries = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise Misuse(f"it holds {entries}, but no weights: expected is a state_dict, alone or under one of "
                     f"{', '.join(CONTAINERS)}")
    for key, value in state.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not dense or value.is_quantized or value.is_complex():
            kind = value.origin if isinstance(value, _Inert) else type(value).__name__
            raise Misuse(f"among its weights, {key} is no dense array of numbers ({kind}): save a state_dict")
        if not 0 < value.numel() < 2**28:  # an expanded tensor may claim any size
            raise Misuse(f"{key} has shape {tuple(value.shape)}, as in no network here: save a state_dict")


def _peel(state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], str, dict[str, Tensor]]:
    """Takes off prefixes that every key has, and takes out the normalisation, until nothing changes."""
    removed, carried = "", {}
    while True:
        for keys in NORMALISATION_KEYS:
            if not all(key in state for key in keys):
                continue
            if carried:
                raise Misuse(f"it normalises twice, by {' and '.join(keys)} too: save it without its wrapper")
            mean, std = (state[key].float().reshape(-1) for key in keys)
            if len(mean) != len(std) or not mean.isfinite().all() or not (std.isfinite() & (std > 0)).all():
                raise Misuse(f"its {' and '.join(keys)} are no mean and positive deviation per channel")
            carried = dict(zip(NORMALISATION_KEYS[0], (mean, std)))
            if removed or keys != NORMALISATION_KEYS[0]:
                notes.append(f"normalisation read from {' and '.join(removed + key for key in keys)}")
            state = {key: value for key, value in state.items() if key not in keys}
        # Counters that a wrapper keeps beside the network would hide the prefix that the rest has in common.
        names = [key for key in state if not key.startswith(tuple(DISCARDED))]
        prefix = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return state, removed, carried
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        removed += prefix


# Which networks fit -----------------------------------------------------------------------------------------

def candidates(
    state_dict: dict[str, Tensor], *, arch: str | None = None,
    model: str | None = None, normalise: str | None = None,
) -> list[Candidate]:
    """Every network and normalisation that these weights could belong to, the likelier first; at least one.

    Args:
        state_dict: as `unwrap` returns it.
        arch: the network that the file names, `Origin.arch`.
        model: a name from `models` or of the published scripts, in any case: it overrules `arch`.
        normalise: a name from `NORMALISATIONS`, or numbers as mean/std (0.5,0.5,0.5/0.25,0.25,0.25): it overrules what the file holds.

    Raises:
        Misuse: an unknown name, or weights that fit no network that is allowed, naming up to five keys.
    """
    weights = {key: value for key, value in state_dict.items() if key not in NORMALISATION_KEYS[0]}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    fits = _fits(shapes, _allowed(model, arch))
    carried = [tuple(state_dict[key].tolist()) for key in NORMALISATION_KEYS[0] if key in state_dict]
    if len(carried) == 1:
        raise Misuse(f"it holds only one of {' and '.join(NORMALISATION_KEYS[0])}: save the whole state_dict")
    return [Candidate(*fit, *normalisation) for fit in fits
            for normalisation in _normalisations(carried, normalise, classes=fit[1], channels=fit[2])]


def _allowed(model: str | None, arch: str | None) -> tuple[str, ...]:
    if model is None:
        return (arch,) if arch else models.NAMES
    names = FAMILIES.get(model.lower()) or tuple(name for name in models.NAMES if name == model.lower())
    if not names:
        raise Misuse(f"--model {model} is unknown: allowed are {', '.join(models.NAMES)}")
    return (arch,) if TWINS.get(arch, arch) in names else names  # within a family the file decides


def _fits(shapes: dict[str, tuple], names: tuple[str, ...]) -> list[tuple]:
    """Candidates without their normalisation, as tuples in the order of their fields."""
    head = next((shape for shape in shapes.values() if len(shape) == 2), (10, 0))
    plain, stem, block, wide = (shapes.get(key, ()) for key in (
        "_model.0.weight", "conv1.weight", "layer1.0.conv1.weight", "block1.layer.0.conv1.weight"))
    stem = plain or stem
    classes, channels = head[0], stem[1] if len(stem) == 4 else 3
    told = (*stem[:1], *block[:1], *(first // 16 for first in wide[:1]))
    widths = [None, *dict.fromkeys(width for width in told if 0 < width < 10_000)]
    sizes = [32, 64]  # only at 64 has a ResNet another last layer
    if plain and plain[0]:  # a CNN's sees every position of every filter
        sizes = [max(1, math.isqrt(head[1] // plain[0]))]
    for without in ((), (NEVER_CALLED,)):
        kept = {key: shape for key, shape in shapes.items() if not key.startswith(without)}
        for width in widths:
            found = {}
            for name in names:
                for size in sizes:
                    missing, unexpected, misshaped = _differences(kept, name, classes, channels, width, size)
                    if missing or unexpected:  # no size changes the names
                        break
                    if not misshaped:
                        found[name] = (name, classes, channels, width, size, without)
                        break
            if found:
                return [fit for name, fit in found.items() if TWINS.get(name) not in found]
    closest = min(names, key=lambda name: sum(map(len, _differences(shapes, name, classes, channels))))
    differences = _listed(*_differences(shapes, closest, classes, channels))
    if names == models.NAMES:
        raise Misuse(f"its weights are those of no network here, the closest is {closest}: {differences}; "
                     f"there are {', '.join(names)}")
    raise Misuse(f"its weights are not those of {closest}: {differences}; "
                 "pass the --model that it was trained with, or rename its keys where they are only called otherwise")


@cache
def _shapes(arch: str, classes: int, channels: int, width: int | None, image_size: int) -> dict[str, tuple]:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        net = models.build(arch, classes=classes, channels=channels, width=width, image_size=image_size)
    weights = {key: value for key, value in net.state_dict().items() if key not in NORMALISATION_KEYS[0]}
    return {key: tuple(value.shape) for key, value in weights.items()}


def _differences(
    shapes: dict[str, tuple], arch: str, classes: int, channels: int,
    width: int | None = None, image_size: int = 32,
) -> tuple[list[str], list[str], list[str]]:
    """What the network has and the file has not, the reverse, and what has another shape there."""
    wanted = _shapes(arch, classes, channels, width, image_size)
    # torch before 0.4.1 did not count batches; torch fills the counts in, and no prediction depends on them.
    missing = [key for key in wanted if key not in shapes and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in shapes if key not in wanted]
    misshaped = [f"{key} is {shapes[key]} instead of {wanted[key]}" for key in wanted
                 if key in shapes and shapes[key] != wanted[key]]
    return missing, unexpected, misshaped


def _listed(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    kinds = {kind: keys for kind, keys in kinds.items() if keys}
    share = 5 // max(len(kinds), 1)
    phrases = []
    for kind, keys in kinds.items():
        named = ", ".join(keys[:share] + ["..."] * (len(keys) > share))
        phrases.append(f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {kind} ({named})")
    return ", ".join(phrases)


def _normalisations(
    carried: list[tuple[float, ...]], asked: str | None, classes: int, channels: int,
) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """(name, mean, std) of every normalisation that is possible."""
    table = {name: pair for name, pair in NORMALISATIONS.items() if len(pair[0]) == channels}
    table["none"] = ((0.0,) * channels, (1.0,) * channels)
    if asked is not None and "/" in asked:
        try:
            mean, std = (tuple(map(float, part.split(","))) for part in asked.split("/"))
        except ValueError:
            mean, std = (), ()
        if not len(mean) == len(std) == channels or not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
            raise Misuse(f"--normalise {asked}: must be {channels} means, a slash, and as many deviations above 0, separated by commas")
        return [("its own", mean, std)]
    if asked is not None:
        if asked.lower() not in table:
            raise Misuse(f"--normalise {asked} is unknown for images of {channels} channels: "
                         f"allowed are {', '.join(table)}, or numbers as mean/std")
        return [(asked.lower(), *table[asked.lower()])]
    if carried:
        if len(carried[0]) != channels:
            raise Misuse(f"its normalisation has {len(carried[0])} channels and its first layer {channels}")
        return [(_name(carried, table), *carried)]
    return [(name, *table[name]) for name in TRIED.get(classes, TRIED[None]) if name in table]


def _name(carried: list[tuple[float, ...]], table: dict[str, tuple]) -> str:
    """The normalisation of the table that agrees to half precision's three digits, or `its own`."""
    def close(pair: tuple) -> bool:
        return all(abs(a - b) < 1e-3 for ours, theirs in zip(pair, carried) for a, b in zip(ours, theirs))

    return next((name for name, pair in table.items() if close(pair)), "its own")


# All of it --------------------------------------------------------------------------------------------------

def load(
    path: str | Path, *, model: str | None = None, normalise: str | None = None, which: str = "best",
    images: Tensor | None = None, labels: Tensor | None = None, device: torch.device | str = "cpu", container: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a checkpoint, in eval mode on `device`, and a report of how it was read.

    Args:
        path: a file of this repository or of any published one.
        model, normalise: for what the file does not say, or instead of what it says; see `candidates`.
        which: which one of a file that holds several: best, last or best_test.
        images, labels: float32 (N, C, H, W) in [0, 1] and int64 (N,), clean training images, a thousand say.
            Where several networks fit, the one that is right on most of them is taken.
        container: what `read` says of `path`, where it has been asked; a file may change.

    Returns:
        The network, and a dict that json can write: path, sha256 (`checkpoint.digest` of the weights), container, prefix, arch, classes, channels, width
        (None: the architecture's own), normalise, mean, std, candidates (arch, normalise and accuracy in
        percent, None where there was nothing to compare), reason (why this one), notes (what was changed), doubts
        (why it may be another one, or not made for these images).

    Raises:
        Misuse: the file or a name is not usable, the weights do not fit, or several networks fit and there
            are no images to choose by.
    """
    container = read(path) if container is None else container
    with naming(path):
        weights, origin = unwrap(container, which)
        found = candidates(weights, arch=origin.arch, model=model, normalise=normalise)
        if len(found) == 1:
            chosen, net, accuracies = found[0], found[0].build(weights).to(device), [None]
        else:
            _check_images(found, images, labels)
            accuracies = []
            for candidate in found:
                trial = candidate.build(weights).to(device)
                accuracy = _accuracy(trial, images, labels, device)
                if accuracy > max(accuracies, default=-1.0):
                    chosen, net = candidate, trial
                accuracies.append(accuracy)
    reason, doubts = _justified(found, accuracies, chosen, 0 if images is None else len(images))
    notes = origin.notes + _overruled(chosen, origin.arch, weights, model, normalise)
    return net, {
        "path": str(path), "sha256": checkpoint.digest(net.state_dict()), "container": origin.container, "prefix": origin.prefix,
        "arch": chosen.arch, "classes": chosen.classes, "channels": chosen.channels, "width": chosen.width,
        "normalise": chosen.normalise, "mean": list(chosen.mean), "std": list(chosen.std),
        "candidates": [{"arch": candidate.arch, "normalise": candidate.normalise, "accuracy": accuracy}
                       for candidate, accuracy in zip(found, accuracies)],
        "reason": reason, "notes": notes, "doubts": doubts,
    }


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A Misuse in the block begins with the file's name."""
    try:
        yield
    except Misuse as error:
        raise Misuse(f"{path}: {error}") from error


def _check_images(found: list[Candidate], images: Tensor | None, labels: Tensor | None) -> None:
    if images is None or labels is None or len(images) == 0:
        flags = {"--model": dict.fromkeys(candidate.arch for candidate in found),
                 "--normalise": dict.fromkeys(candidate.normalise for candidate in found)}
        choices = [f"{flag} ({' or '.join(values)})" for flag, values in flags.items() if len(values) > 1]
        raise Misuse(f"the file does not say which network it is: pass {' and '.join(choices)}, "
                     "or have it measured on training images")
    classes, channels = found[0].classes, found[0].channels
    if images.dim() != 4 or images.shape[1] != channels or labels.shape != (len(images),):
        raise Misuse(f"its network takes images of {channels} channels, those to measure on are "
                     f"{tuple(images.shape)}, with labels {tuple(labels.shape)}: choose its own data set")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise Misuse(f"its network knows {classes} classes, the labels to measure on go from "
                     f"{int(labels.min())} to {int(labels.max())}: choose its own data set")


@torch.inference_mode()
def _accuracy(net: nn.Module, images: Tensor, labels: Tensor, device: torch.device | str) -> float:
    """In percent."""
    right = sum((net(x.to(device)).argmax(1) == y.to(device)).sum()
                for x, y in zip(images.split(250), labels.split(250)))
    return 100 * int(right) / len(images)


def _justified(
    found: list[Candidate], accuracies: list[float | None], chosen: Candidate, n: int,
) -> tuple[str, list[str]]:
    """Why this one, and what speaks against it."""
    if len(found) == 1:
        return "the only network that fits the keys and what was asked for", []
    best, second = sorted(accuracies, reverse=True)[:2]
    reason = f"the highest clean accuracy, {best:.2f} %, of {len(found)} candidates on {n} training images"
    doubts = []
    if second >= record.percent_of(best, n)["interval"][0]:
        rival = next(c for c, accuracy in zip(found, accuracies) if accuracy == second and c != chosen)
        doubts.append(f"{rival.arch} with normalisation {rival.normalise} is only {best - second:.2f} points "
                      f"behind on {n} images: pass --model and --normalise if you know them")
    if best <= 200 / chosen.classes:
        doubts.append(f"a clean accuracy of {best:.2f} % is near chance: not this file's data set or network")
    return reason, doubts


def _overruled(
    chosen: Candidate, arch: str | None, weights: dict[str, Tensor], model: str | None, normalise: str | None,
) -> list[str]:
    notes = [f"left out {beginning}*: {chosen.arch} has no such block, and no network calls it"
             for beginning in chosen.without]
    if arch not in (None, chosen.arch):
        notes.append(f"--model {model} overrules the file, which says {arch}")
    if normalise is not None and NORMALISATION_KEYS[0][0] in weights:
        mean, std = (weights[key].tolist() for key in NORMALISATION_KEYS[0])
        if any(abs(a - b) > 1e-6 for a, b in zip((*mean, *std), (*chosen.mean, *chosen.std))):
            notes.append(f"--normalise {normalise} overrules the file, which holds mean {mean} and std {std}")
    return notes
