"""The flags of every training script, as a dataclass: what a script adds to it is its method's own."""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import models
from engine.errors import Misuse
from engine.schedule import DECAYS, SCHEDULES, Rates

RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(arch="resnet8", epochs=30, batch_size=64, lr=0.2, lr_schedule="cyclic", weight_decay=5e-4,
                   epsilon=51.0, val_size=137),
    "cifar10": dict(arch="resnet18", epochs=110, batch_size=128, lr=0.1, lr_schedule="multistep", weight_decay=5e-4,
                    epsilon=8.0, val_size=1000),
    "svhn": dict(arch="preactresnet18c", epochs=30, batch_size=128, lr=0.05, lr_schedule="cyclic", cyclic_lr=0.05, weight_decay=5e-4,
                 epsilon=8.0, val_size=1000),
    "imagenet": dict(arch="resnet50", epochs=90, batch_size=256, lr=0.1, lr_schedule="multistep", decays=(1 / 3, 2 / 3), weight_decay=5e-4,
                     epsilon=4.0, val_size=5000, image_size=224),
}
RECIPES["cifar100"] = RECIPES["gtsrb"] = RECIPES["cifar10"]
RECIPES["tiny-imagenet"] = RECIPES["cifar10"] | dict(arch="preactresnet18")
"""Per data set: the papers' recipe (FGSM-SDI, section IV-A), and our own for digits. SVHN's network is GradAlign's, its
rate N-FGSM's too, both of which also let the perturbation grow over the first five epochs. LAS-AT has results on GTSRB without saying how."""


def flag(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field whose `text` is the flag's help.

    Of `extra`, `at_least=n` is the smallest number allowed, and `times_epsilon=m` makes a step size that is m times --epsilon
    unless it is given.
    """
    return dataclasses.field(default=default, metadata={"help": text, **extra})


MOST = 100_000  # numbers in one flag


def numbers(name: str, text: str) -> list[float]:
    """What the flag of the field `name`, one that holds several numbers, none of them negative, says: "2,4,8" is 2, 4, 8 and "3-5" is 3, 4, 5.

    Raises:
        Misuse: it says something else.
    """
    try:
        ends = re.fullmatch(r"(\d+)-(\d+)", text)
        found = list(range(int(ends[1]), int(ends[2]) + 1)[:MOST + 1]) if ends else [float(number) for number in text.split(",")]
        if 0 < len(found) <= MOST and all(0 <= number < 2**63 for number in found):
            return found
    except ValueError:
        pass
    raise Misuse(f"{spelled(name)} {text}: must be numbers that are not negative, as 2,4,8 or 3-5")


def by_dataset(text: str, **extra: Any) -> Any:
    """A flag whose default is the data set's entry in `RECIPES`."""
    return flag(None, text, by_dataset=True, **extra)


def step_size(multiple: float) -> Any:
    """A step size in 255ths that follows --epsilon."""
    return flag(None, "step size, in 255ths", times_epsilon=multiple, at_least=0)


@dataclass(kw_only=True)
class Config:
    """Shared by all methods. Radii and step sizes are in 255ths here, and fractions of 1 in `eps` and in the scripts."""

    dataset: Literal["digits", "cifar10", "cifar100", "svhn", "gtsrb", "tiny-imagenet", "imagenet"] = flag("cifar10", "data set")
    data_dir: str = flag("data/", "where data sets lie, and are downloaded to")
    arch: str | None = by_dataset(f"network: {', '.join(models.NAMES)}")
    width: int | None = flag(None, "base width of the network; default: the architecture's own", at_least=1)
    normalise: Literal["none", "dataset"] = flag("none", "input normalisation, the network's first layer: none, as in the papers, or the data set's mean and standard deviation")
    epochs: int | None = by_dataset("passes over the training images", at_least=1)
    batch_size: int | None = by_dataset("images per update, over all processes together", at_least=1)
    lr: float | None = by_dataset("learning rate, its peak where the schedule has one; cyclic: the papers' 0.2, or the method's own", at_least=0)
    lr_schedule: Literal["multistep", "cyclic", "onecycle", "constant"] | None = by_dataset("learning-rate schedule; cyclic and onecycle cycle the momentum too")
    milestones: str | None = flag(None, "epochs after which multistep divides the rate by 10, as 100,105; default: at 100/110 and 105/110 of the run, "
                                  "imagenet at thirds of it, LAS-AT at fractions of its own")
    cyclic_top: float = flag(0.5, "fraction of the run at which the cyclic schedule peaks (GradAlign's own code: 0.4)")
    cycle_momentum: bool = flag(True, "let cyclic and onecycle cycle the momentum (the papers' scripts do)")
    weight_decay: float | None = by_dataset("weight decay of SGD, on all parameters", at_least=0)
    max_grad_norm: float | None = flag(None, "gradient clipping: largest L2 norm of the classifier's gradient; 0: no clipping "
                                       "(default: none, or what the method's code has)", at_least=0)
    epsilon: float | None = by_dataset("radius of the L-infinity ball, in 255ths", at_least=0)
    label_factor: float = flag(1.0, "probability kept on the true class, the rest is spread evenly over the others")
    ema: float = flag(0.0, "decay of an exponential moving average of the weights, evaluated beside them (FastAT Benchmark: 0.9995); 0: none")
    augment: Literal["crop", "none"] = flag("crop", "data augmentation: random crop (imagenet: random resized crop), and horizontal flip where the data set has mirror images")
    padding: Literal["zero", "reflect"] = flag("zero", "padding of the random crop")
    image_size: int | None = by_dataset("side of a crop, where images are streamed; the other sets have their own size", at_least=8)
    workers: int | None = flag(None, "processes that read and decode streamed images; default: one for each core that this process has, up to 16", at_least=0)
    decode: Literal["cpu", "gpu"] = flag("cpu", "where streamed JPEGs are decoded; gpu is experimental, and has never been run on a GPU so far")
    skip_damaged: bool = flag(False, "look through all files of streamed images first, and leave out those that cannot be decoded")
    train_size: int | None = flag(None, "use the first N training images; default: all that are not held out", at_least=1)
    val_size: int | None = by_dataset("training images held out, from the end", at_least=0)
    select_on: Literal["val", "test"] = flag("val", "what picks best.pth; the published tables pick on the test set (with --val-size 0)")
    measure: str = flag("clean,fgsm,pgd10", "accuracies measured on those images after every epoch; pgd10 picks best.pth")
    measure_train: int = flag(0, "also evaluate the first N training images, without data augmentation", at_least=0)
    seed: int = flag(0, "of weights, order, augmentation and noise", at_least=0)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "fp32"] = flag("auto", "of the network while training; auto: bf16 on a GPU that has it, fp32 on a CPU. fp32 on a GPU lets convolutions use TF32, as torch does unless told otherwise; evaluation never does")
    compile: bool = flag(False, "compile the network, and on one GPU record the step as a CUDA graph and replay it (docs/performance.md); "
                         "has never been run on a GPU so far")
    batchnorm: Literal["process", "global"] = flag("process", "whose images BatchNorm averages over in training, with several processes: its own process's, "
                                                   "or the global batch's, with which the run computes what one process does, more slowly")
    co_guard: Literal["off", "warn", "stop", "rollback"] = flag("warn", "when accuracy under PGD-10 on the held-out images collapses while that under "
        "FGSM does not (catastrophic overfitting): say so; save and stop; or go back to the last healthy epoch and add noise to the images")
    on_nonfinite: Literal["stop", "skip"] = flag("stop", "an update whose loss or gradient is not finite ends the run, or is left out and counted, "
        "up to 1 % of an epoch's")
    deterministic: bool = flag(False, "deterministic kernels only, so that a resumed GPU run is bitwise the same")
    out_dir: str | None = flag(None, "where the run's files go; default: output/<method>-<dataset>-seed<seed>")
    resume: Literal["auto", "never", "must"] = flag("auto", "continue a run found in --out-dir; never: begin anew, and DELETE the run that lies there; must: end where there is none")
    save_every: float = flag(5.0, "minutes between saves inside an epoch; every epoch's end is saved too", at_least=0)
    time_limit: float | None = flag(None, "minutes after which the run saves itself and exits", at_least=0)
    snapshots: str | None = flag(None, "epochs, as 1,5,10, after which state.pth is also kept as state-<epoch>.pth")
    tensorboard: bool = flag(False, "also write TensorBoard event files (needs the tensorboard package)")

    CYCLIC_LR: ClassVar[float] = 0.2  # the papers' peak; GradAlign and FGSM-CKPT have their own
    DECAYS: ClassVar[tuple[float, ...]] = DECAYS  # multistep's, as fractions of the run
    GRAD_NORMS: ClassVar[dict[str, float]] = {}  # --max-grad-norm by data set, where the method's code clips
    METHOD: ClassVar[str] = ""
    SAME_SIZES: ClassVar[bool] = True  # whether its attack passes whole batches through the network
    COMPILES: ClassVar[bool] = True  # whether the network bears it; the step is recorded all the same

    def __post_init__(self) -> None:
        self.complete()
        self.check()

    def complete(self) -> None:
        """Fills in what follows from other flags, which may still hold what is not allowed. A script with such defaults of its own extends it."""
        recipe = RECIPES.get(self.dataset)
        if recipe is None:
            raise Misuse(f"--dataset {self.dataset}: allowed are {', '.join(RECIPES)}")
        schedule_given = self.lr_schedule or recipe["lr_schedule"]
        if self.lr is None and schedule_given == "cyclic":
            self.lr = recipe.get("cyclic_lr", self.CYCLIC_LR)
        fields = dataclasses.fields(self)
        for field in fields:
            if getattr(self, field.name) is None and _metadata(type(self), field).get("by_dataset"):
                setattr(self, field.name, recipe.get(field.name))
        for field in fields:
            if getattr(self, field.name) is None and (multiple := field.metadata.get("times_epsilon")):
                setattr(self, field.name, multiple * self.epsilon)
        if self.max_grad_norm is None:
            self.max_grad_norm = self.GRAD_NORMS.get(self.dataset)
        if self.out_dir is None:
            self.out_dir = f"output/{self.METHOD or 'run'}-{self.dataset}-seed{self.seed}"

    @property
    def eps(self) -> float:
        """The radius as a fraction of 1."""
        return self.epsilon / 255

    @property
    def decays(self) -> Sequence[float]:
        """After which fractions of the run multistep divides the rate by 10."""
        if self.milestones:
            return [epoch / self.epochs for epoch in numbers("milestones", self.milestones)]
        return RECIPES[self.dataset].get("decays", self.DECAYS)

    def schedule(self) -> Callable[[int, int, int], Rates]:
        """From (step, steps of the run, steps of an epoch) to rates."""
        options: dict[str, dict[str, Any]] = {"multistep": {"decays": self.decays}, "cyclic": {"top": self.cyclic_top}}
        return partial(SCHEDULES[self.lr_schedule], **options.get(self.lr_schedule, {}))

    def check(self) -> None:
        """Raises Misuse for the first value that is not allowed. A script with bounds of its own extends it."""
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), _metadata(type(self), field).get("at_least")
            if isinstance(value, int | float) and not abs(value) < (2**63 if isinstance(value, int) else math.inf):
                raise Misuse(f"{spelled(field.name)} {value}: must be finite, and an integer below 2^63")
            if low is not None and value is not None and not value >= low:
                raise Misuse(f"{spelled(field.name)} {value}: must be at least {low}")
        for name, (low, high) in {"label_factor": (0, 1), "ema": (0, 1), "epsilon": (0, 255)}.items():
            if not low <= getattr(self, name) <= high:
                raise Misuse(f"{spelled(name)} {getattr(self, name)}: must lie in [{low}, {high}]")
        if self.lr_schedule not in SCHEDULES:
            raise Misuse(f"--lr-schedule {self.lr_schedule}: allowed are {', '.join(SCHEDULES)}")
        for name in ("milestones", "snapshots"):
            if getattr(self, name):
                numbers(name, getattr(self, name))
        if self.image_size is not None and "image_size" not in RECIPES[self.dataset]:
            raise Misuse(f"--image-size {self.image_size}: images of {self.dataset} have a size of their own; leave it out")
        if self.decode == "gpu" and self.augment == "none":
            raise Misuse("--decode gpu: only random crops are made there; give --augment crop, or --decode cpu")
        if not 0 < self.cyclic_top < 1:
            raise Misuse(f"--cyclic-top {self.cyclic_top}: must lie between 0 and 1")
        measured = [name.strip() for name in self.measure.split(",")]
        if "pgd10" not in measured:
            raise Misuse(f"--measure {self.measure}: must hold pgd10, which picks best.pth")
        if self.co_guard in ("stop", "rollback") and "fgsm" not in measured:
            raise Misuse(f"--measure {self.measure}: must hold fgsm for --co-guard {self.co_guard}, which compares it with pgd10; or give --co-guard off")
        if self.select_on == "val" and self.val_size == 0:
            raise Misuse("--val-size 0: with --select-on val some training images must be held out; "
                         "give a size, or --select-on test")

    @classmethod
    def parse(cls, doc: str | None = None, argv: list[str] | None = None) -> Self:
        """The configuration that the command line asks for.

        Args:
            doc: the script's docstring, shown by --help.
            argv: the arguments; the process's own when not given.

        Raises:
            Misuse: an unknown flag, or a value that is not allowed.
        """
        return cls(**vars(parser(cls, doc).parse_args(argv)))


def parser(cls: type[Config], doc: str | None) -> Parser:
    """The command line of a Config: shared flags first, then the method's own."""
    built = Parser(description=doc)
    groups = {True: built.add_argument_group("shared by all methods"), False: built.add_argument_group("of this method")}
    shared = {field.name for field in dataclasses.fields(Config)}
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        metadata, kind = _metadata(cls, field), _without_none(kinds[field.name])
        options: dict[str, Any] = dict(default=field.default, help=metadata["help"] + _default_text(field, metadata))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options.update(type=kind, metavar=kind.__name__.upper())
        options["help"] = options["help"].replace("%", "%%")
        groups[field.name in shared].add_argument(spelled(field.name), **options)
    return built


def doubtful(radius: float) -> list[str]:
    """A sentence about --epsilon where it looks like a fraction of 1: 0.031 is what TRADES' and AWP's scripts call 8."""
    return [f"--epsilon {radius:g} is {radius:g}/255; if it was meant as a fraction of 1, give --epsilon {255 * radius:.3g}"] if 0 < radius < 0.2 else []


def spelled(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


def _metadata(cls: type, field: dataclasses.Field) -> Any:
    """The field's metadata; a subclass that only changes a shared default inherits its help."""
    metadata = field.metadata or getattr(Config.__dataclass_fields__.get(field.name), "metadata", None)
    if metadata is None:
        raise TypeError(f"{cls.__module__}.{cls.__name__}.{field.name} has no help: write it as engine.flag(default, help)")
    return metadata


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind, = (k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _default_text(field: dataclasses.Field, metadata: Any) -> str:
    if "times_epsilon" in metadata:
        return f" (default: {metadata['times_epsilon']:g} x epsilon)"
    if metadata.get("by_dataset") and field.default is None:
        values = {name: recipe[field.name] for name, recipe in RECIPES.items() if field.name in recipe}
        return f" (default: {', '.join(f'{name} {value}' for name, value in values.items())})"
    return "" if field.default is None else f" (default: {field.default})"


class Parser(argparse.ArgumentParser):
    """argparse that takes - and _ alike in flags, shows a docstring as it is, and answers misuse with one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(a) for a in args], namespace)

    @staticmethod
    def _dashed(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if argument.startswith("--") else argument

    def error(self, message: str) -> typing.NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split() or ["an empty argument"]
        if message.startswith("unrecognized"):
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(words[0].partition("=")[0], known, 1)
            message = f"{words[0]} is no flag of {self.prog}" + (f", did you mean {close[0]}?" if close else "") + "; --help lists them"
        raise Misuse(message)
