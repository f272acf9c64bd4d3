"""Do our single-step scripts compute what their authors' published code computes? Their loop and ours, step by step.

    python tests/published/single_step.py mep     --checkout DIR   https://github.com/jiaxiaojunQAQ/FGSM-PGI
    python tests/published/single_step.py n-fgsm  --checkout DIR   https://github.com/pdejorge/N-FGSM
    python tests/published/single_step.py free    --checkout DIR   https://github.com/locuslab/fast_adversarial
    python tests/published/single_step.py ckpt    --checkout DIR   https://github.com/Harry24k/catastrophic-overfitting
    python tests/published/single_step.py vfsat   --checkout DIR   https://github.com/CharlesJames13586/Improving-Single-Step-
    python tests/published/single_step.py gradsum --checkout DIR                             Adversarial-Training-By-Local-Smoothing

As compare.py, which see, with two differences. The classifier is a small one of ours on both sides, since the networks
are compared with the published classes in tests/test_models.py. And beside all that network and optimizer remember, the
perturbation of every update and what a method remembers from one batch to another are compared: both are read from the
variables of the two training loops. Under a minute a run.
"""
from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compare import (
    BATCH, SHORT, Differences, Enough, Experiment, Feed, Method, _old, images, main, prefixed, receive, snapshot,
)
from theirs import Losses, Nothing, executed, initial_state, of_ours, stub
from torch.optim.optimizer import register_optimizer_step_post_hook

WIDTH = 8  # of the classifier

REPLACED = {
    "all": [
        "Tensor.cuda and Module.cuda return what they are given, and torch.cuda.is_available says no; torch is seeded with 0 beforehand",
        "the default dtype is float64; Tensor.float casts to it, torch.cuda.FloatTensor makes it",
        "the classifier is this repository's resnet8 of width 8, its first weights drawn by the script; the published class is not run",
        "the evaluation functions return zeros; what is printed is thrown away; files go to a temporary folder",
    ],
    "mep": [
        "the number of images, 50000 in two places of the script, is that of our run",
        "models.py and utils.py are stand-ins, as not every copy has them: mean 0, deviation 1, limits 0 and 1, and "
        "clamp(x, low, high) = torch.max(torch.min(x, high), low), as in the published utils.py",
        "the loader yields the images of our run, padded with four zeros as theirs are",
        "numpy.random.permutation gives the order of our run, at the places to which the script has moved the images by then; "
        "torch.randperm, by which it moves them, is a random permutation of its own",
        "random.getrandbits and random.randint, of which its crops are made, give the shifts and mirror images of our run: none but in one run",
        "Tensor.uniform_ and our run.uniform give the same noise, drawn for all images at the beginning of an epoch, as theirs is",
    ],
    "n-fgsm": [
        "the training loader yields the batches of our run, normalised in float64; there are no others",
        "Tensor.uniform_(-b, b), while an epoch is under way, gives b times the U(-1, 1) noise of our run",
        "in one run CIFAR10Utils is created with normalize=False, an argument of its own that the script leaves at True",
    ],
    "free": [
        "apex.amp is a stub: initialize returns what it is given, scale_loss the loss",
        "the training loader yields the batches of our run, normalised in float64; the test loader is empty",
        "in one run their mean is 0 and their deviation 1",
    ],
    "ckpt": [
        "the training loader yields the batches of our run",
        "torchattacks 2.12, which the repository pins, is a stub but for the base class Attack, which does what that version's does: a call puts the "
        "model into eval() and afterwards back into the mode that it was created in, _targeted is -1, _transform_label the identity",
        "the classifier has no normalisation (theirs divides by deviations that are not in our tables)",
        "Tensor.uniform_(-b, b), while an epoch is under way, gives b times the U(-1, 1) noise of our run",
        "torchhk's RecordManager and torchattacks' attacks, with which accuracies are recorded, do nothing; so does torch.cuda.set_device",
        "the loader without shuffling has a method next, as iterators had in the authors' version of torch",
    ],
}
REPLACED["vfsat"] = [
    "apex.amp is a stub",
    "the training loader yields the batches of our run and keeps the short last one, which the script's own drops (drop_last)",
    "the other loaders are empty",
    "epoch 0, one batch without an update, runs on random numbers of its own; the weights and BatchNorm buffers after it "
    "are the initial ones of the comparison",
]
REPLACED["gradsum"] = [*REPLACED["vfsat"], "Tensor.uniform_(-b, b), while an epoch is under way, gives b times the U(-1, 1) noise of our run"]

NETWORK = {  # where the published scripts take their classifier from
    "mep": ("models", "ResNet18"), "n-fgsm": ("architectures.preact_resnet", "PreActResNet18"), "free": ("preact_resnet", "PreActResNet18"),
    "ckpt": ("defenses.model", "get_model"), "vfsat": ("models", "get_model"), "gradsum": ("models", "get_model"),
}
LOOP = {"ckpt": "_do_iter"}  # the published function that makes an update, where it is not `main`


def _mep(rate: float, schedule: str, reset: int, **special: Any) -> dict[str, Any]:
    """Four epochs. Multistep's 44 updates make whole numbers of the published milestones, 40 and 42."""
    per_epoch = 11 if schedule == "multistep" else 8
    shared = dict(epochs=4, lr_schedule=schedule)
    return dict(published=shared | dict(lr_max=rate, epochs_reset=reset), ours=shared | dict(lr=rate, reset=reset) | special.pop("ours", {}),
                per_epoch=per_epoch, steps=4 * per_epoch, saturated=True, **special)


def _cyclic(rate: float, theirs: dict[str, Any], ours: dict[str, Any], epochs: int = 4, per_epoch: int = 8, **special: Any) -> dict[str, Any]:
    shared = dict(epochs=epochs, lr_schedule="cyclic")
    return dict(published=shared | dict(lr_max=rate) | theirs, ours=shared | dict(lr=rate) | ours, per_epoch=per_epoch, **special)


def _ckpt(scheduler: str, epochs: int, ours: dict[str, Any], radius: int = 8, c: int = 3, inf_batch: int = 1024, **special: Any) -> dict[str, Any]:
    return dict(
        published=dict(name="run", method="proposed", scheduler=scheduler, epochs=epochs, eps=radius, alpha=1.25 * radius, c=c, inf_batch=inf_batch),
        ours=dict(epochs=epochs, epsilon=radius, c=c) | ours, per_epoch=8, **special)


def _smooth(theirs: dict[str, Any], ours: dict[str, Any], rate: float = 0.01, epochs: int = 6, **special: Any) -> dict[str, Any]:
    """The published schedule `same` is constant."""
    shared = dict(epochs=epochs)
    return dict(published=shared | dict(lr_schedule="same", lr_max=rate, attack="fgsm", attack_init="zero", fgsm_alpha=1.0) | theirs,
                ours=shared | dict(lr_schedule="constant", lr=rate) | ours, per_epoch=5, steps=5 * epochs, warm_up=1) | special


_IMPROVING = ("https://github.com/CharlesJames13586/Improving-Single-Step-Adversarial-Training-By-Local-Smoothing",
              "9b877ea68086e392c48e6436d5ef55e7f16087e0", "0d58754ab53cfa7c517c6ef1f868173d0816234ef18a07f78a140ef45a2bf6ae", "train.py")
_STEPWISE = dict(lr_schedule="multistep", lr=0.01, milestones="60,120,160")

METHODS = {
    "mep": Method(
        "https://github.com/jiaxiaojunQAQ/FGSM-PGI", "fc15cfeffd48f8ebebaea7c7b46b72b1c99bd7d3",
        "108fa4b0f6f7f7d0c9279a07e7b4f15d864ac21732e8cfada0d9f8a3dbe9c8d2", "FGSM_MEP.py", "train_fgsm_mep", {
            "multistep": Experiment(
                says="the recipe's rate, the memory starts anew every two epochs, our engine in plain layout",
                **_mep(0.1, "multistep", 2, plain=True)),
            "cyclic": Experiment(
                says="three epochs of memory and momentum before it starts anew, our engine in plain layout", **_mep(0.2, "cyclic", 3, plain=True)),
            "crops": Experiment(
                says="with the crops and flips of our run, a small rate, our engine as it is", **_mep(0.02, "cyclic", 3, ours=dict(augment="crop"))),
        }),
    "n-fgsm": Method(
        "https://github.com/pdejorge/N-FGSM", "0a9e4f040b89a4bcd85763a34dea7866416927a2",
        "048b1f3567f8172e1d9d619b7e977ac597c3d2306a6f8bbe66f3377149332298", "train.py", "train_n_fgsm", {
            "normalised": Experiment(
                says="as published: their images, radius and step are divided by the deviation; our network begins with that; plain layout",
                **_cyclic(0.2, {}, dict(normalise="dataset"), steps=32, plain=True)),
            "identity": Experiment(
                says="without normalisation, our engine in plain layout", **_cyclic(0.2, {}, {}, steps=32, identity=True, plain=True)),
            "saturated": Experiment(
                says="images with pixels at 0 and 1, noise of four balls, a small rate, our engine as it is",
                **_cyclic(0.02, dict(unif=4), dict(k=4, normalise="dataset"), steps=32, saturated=True)),
        }),
    "free": Method(
        "https://github.com/locuslab/fast_adversarial", "54f728755e71857b632882ba6d6cef22f56e2172",
        "c4d8265822f15a011963440008ce787d1815c9d86f9a65b15b771fb597f920b9", "CIFAR10/train_free.py", "train_free_at", {
            "normalised": Experiment(
                says="as published, three replays: their images and radius are divided by the deviation; our network begins with that",
                **_cyclic(0.04, dict(minibatch_replays=3), dict(replays=3, normalise="dataset"), 2, 6, steps=36, saturated=True)),
            "identity": Experiment(
                says="two replays without normalisation, our engine in plain layout",
                **_cyclic(0.04, dict(minibatch_replays=2), dict(replays=2), 3, 6, steps=36, saturated=True, identity=True, plain=True)),
        }),
    "ckpt": Method(
        "https://github.com/Harry24k/catastrophic-overfitting", "049809bda5347f8c8230afeea3243f44e74f090b",
        "61adf90d6c2dd9da9226b7c0a7e0720e490632e3282615e457434ca93b83f62b", "train.py", "train_fgsm_ckpt", {
            "stepwise": Experiment(says="the authors' command", **_ckpt("Stepwise", 200, _STEPWISE, steps=64)),
            "stepwise, saturated": Experiment(
                says="radius 64, five checkpoints, tried in parts of at most eight images; pixels at 0 and 1",
                **_ckpt("Stepwise", 200, _STEPWISE, 64, c=5, inf_batch=8, steps=48, saturated=True)),
            "cyclic": Experiment(
                says="radius 32, our engine in plain layout", **_ckpt("Cyclic", 4, dict(lr_schedule="cyclic", lr=0.3), 32, steps=32, plain=True)),
        }),
    "vfsat": Method(*_IMPROVING, "train_vfsat", {
        "radius 8": Experiment(says="radii 2, 4, 6, 8, 8, 8", **_smooth(dict(discrete_eps=True), {})),
        "radius 16": Experiment(
            says="radii 2, 4, ..., 14, 16, 16, ... and 2 again, at a rate so absurd that gradients are clipped, our engine in plain layout",
            **_smooth(dict(discrete_eps=True, eps=16), dict(epsilon=16), 20.0, 14, per_epoch=2, steps=28, plain=True)),
        "saturated": Experiment(
            says="pixels at 0 and 1, whose gradient the published clamp(x + delta, 0, 1) halves; its sign is the same",
            **_smooth(dict(discrete_eps=True), {}, saturated=True, steps=10)),
        "saturated, before torch 1.9": Experiment(
            says="torch.max and torch.min with the derivative at ties that they had then: no gradient, hence no perturbation, there; "
                 "the authors name torch 1.9",
            **_smooth(dict(discrete_eps=True), {}, saturated=True, old_ties=True, steps=5)),
        "saturated, before torch 1.9, ours zero": Experiment(
            says="with our gradient zero at these pixels: the whole of the difference",
            **_smooth(dict(discrete_eps=True), {}, saturated=True, old_ties=True, tie=0.0, steps=10)),
    }),
    "gradsum": Method(*_IMPROVING, "train_gradsum", {
        "penalty 10": Experiment(says="the authors' weight", **_smooth(dict(grad_input_sum_coeff=10), {})),
        "penalty 200": Experiment(
            says="so large that gradients are clipped; radius 16, pixels at 0 and 1, our engine in plain layout",
            **_smooth(dict(grad_input_sum_coeff=200, eps=16), dict(gradsum_lambda=200, epsilon=16), 0.1, saturated=True, plain=True)),
    }),
}


# ---- the published side, in a process of its own ---------------------------------------------------------------------

def variables(function: str) -> dict[str, Any]:
    """The local variables of the innermost call of `function` that is under way."""
    frame = sys._getframe(1)
    while frame.f_code.co_name != function:
        frame = frame.f_back
    return frame.f_locals


class Visits(Feed):
    """FGSM-MEP's loader, which yields all images at once, and the random numbers by which the script takes them from there."""

    def __init__(self, pipe: Any, experiment: Experiment, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(pipe, experiment, change)
        self.n = BATCH * (experiment.per_epoch - 1) + SHORT
        self.image_at = self.before = torch.arange(self.n)  # where the script has moved them, and where they were an epoch ago
        self.known = np.zeros(0, int)  # this epoch's order as far as it is known, as places
        self.crops: list[int] = []
        self.permute = torch.randperm

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.begin()
        x, y = map(torch.from_numpy, self.pipe.recv())
        yield F.pad(x, (4, 4, 4, 4)), y

    def order(self, n: int) -> Visits:
        """For numpy.random.permutation, with which an epoch begins; what it gives is only ever sliced."""
        assert n == self.n
        self.on = True
        self.noise = torch.from_numpy(self.pipe.recv())
        self.moves = self.permute(n)
        self.before, self.image_at = self.image_at, self.image_at[self.moves]
        self.known = np.zeros(0, int)
        return self

    def __getitem__(self, part: slice) -> np.ndarray:
        if len(self.known) < part.stop:
            index, crops = self.pipe.recv()
            self.known = np.concatenate([self.known, self.place_of[index]])
            self.crops = crops[::-1]
        return self.known[part]

    @property
    def place_of(self) -> np.ndarray:
        return self.image_at.argsort().numpy()

    def draw(self, into: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """b times our noise, for the next channel of all images, which are not moved yet."""
        assert low == -high
        self.channel, channel = (self.channel + 1) % 3, self.channel
        return into.copy_(high * self.noise[self.before, channel])


class Attack:
    """What torchattacks 2.12's base class does for an attack in its default mode."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.model, self.training, self.device = model, model.training, next(model.parameters()).device
        self._targeted = -1

    def _transform_label(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def __call__(self, *inputs: torch.Tensor) -> Any:
        self.model.eval()
        found = self.forward(*inputs)
        self.model.train(self.training)
        return found


class Empty(Nothing):
    """Also a loader whose every batch is nothing."""

    def __iter__(self) -> Empty:
        return self

    def __next__(self) -> tuple[None, None]:
        return None, None

    next = __next__


def surround(method: str, experiment: Experiment, feed: Feed) -> None:
    """Puts the feed, and stand-ins for what is not there, where the published script looks for them."""
    if method == "mep":
        zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        stub("models")
        stub("utils", nn=torch.nn, mu=zero, std=one, lower_limit=zero, upper_limit=one, clamp=lambda x, low, high: torch.max(torch.min(x, high), low),
             get_all_loaders=lambda *a: (feed, []), evaluate_pgd=lambda *a: (0.0, 0.0), evaluate_standard=lambda *a: (0.0, 0.0))
        np.random.permutation, torch.randperm = feed.order, lambda n: feed.moves
        random.getrandbits, random.randint = lambda bits: feed.crops.pop(), lambda low, high: feed.crops.pop()
    elif method == "n-fgsm":
        data = importlib.import_module("utils.data_utils")
        utils = data.CIFAR10Utils(normalize=not experiment.identity)
        utils.img_size, utils.max_label = (32, 32), 9
        utils.get_indexed_loaders = lambda *a, **k: (feed, [], [], None, [], [])
        data.CIFAR10Utils = lambda: utils
        attack = importlib.import_module("utils.attack_utils").AttackUtils
        attack.evaluate_pgd = attack.evaluate_standard = lambda *a, **k: (0.0, 0.0)
        feed.change = lambda x: (x - utils.mu) / utils.std
    elif method == "free":
        utils = importlib.import_module("utils")
        if experiment.identity:
            utils.mu, utils.std = torch.zeros_like(utils.mu), torch.ones_like(utils.std)
            utils.lower_limit, utils.upper_limit = utils.mu, utils.std
        utils.get_loaders = lambda *a: (feed, [])
        utils.evaluate_pgd = utils.evaluate_standard = lambda *a: (0.0, 0.0)
        feed.change = lambda x: (x - utils.mu) / utils.std
    elif method == "ckpt":
        torch.cuda.set_device = lambda gpu: None
        stub("torchattacks", **dict.fromkeys(("VANILA", "FGSM", "PGD", "GN", "FFGSM"), lambda *a, **k: Nothing().attack))
        stub("torchattacks.attack", Attack=Attack)
        stub("torchhk", RecordManager=Nothing)
        importlib.import_module("defenses.trainers.adv_trainer").get_acc = lambda *a: 0.0
        importlib.import_module("defenses.loader").base_loader = lambda data_name, shuffle_train: (feed if shuffle_train else Empty(), Empty())
    else:
        utils = importlib.import_module("utils")
        utils.rob_acc = lambda *a, **k: (0.0, 0.0, None)
        importlib.import_module("data").get_loaders = lambda *a, train_set, data_augm, **k: feed if train_set and data_augm else []


class Indexed(Feed):
    """N-FGSM's loader yields the images' index too, which its script does not use."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for x, y in super().__iter__():
            yield x, y, torch.zeros_like(y)


def remembered(method: str, v: dict[str, Any], feed: Feed) -> dict[str, torch.Tensor]:
    """What the published loop's variables hold after an update; perturbations of images in [0, 1]."""
    if method == "mep":  # its memory, by image, is as it was before this batch
        place = feed.place_of
        return {"perturbation": v["delta"], "next start": v["next_delta"], "momentum of gradients": v["momentum"],
                "memory of starts": v["all_delta"][place], "memory of momenta": v["all_momentum"][place]}
    if method == "n-fgsm":
        return {"perturbation": v["delta"] * v["data_utils"].std}
    if method == "free":  # of all positions of a batch, for the next update
        return {"perturbation": v["delta"] * sys.modules["utils"].std}
    if method == "ckpt":
        delta = v["X_adv"] - v["X"]
        return {"perturbation": delta, "part": delta.abs().amax((1, 2, 3)) / v["pert"].abs().amax((1, 2, 3))}
    norm = torch.stack([p.grad.norm() for p in v["model"].parameters()]).norm()
    return {"perturbation": v["delta"], "gradient norm": norm}


def theirs(method: str, experiment: Experiment, checkout: Path, pipe: Any) -> None:
    """Executes the published script."""
    build = of_ours("models").build
    feed = {"mep": Visits, "n-fgsm": Indexed}.get(method, Feed)(pipe, experiment, lambda x: x)
    surround(method, experiment, feed)
    draw = torch.Tensor.uniform_
    torch.Tensor.uniform_ = lambda self, low=0.0, high=1.0, **k: feed.draw(self, low, high) if feed.on else draw(self, low, high, **k)
    if experiment.old_ties:
        torch.max, torch.min = _old(torch.max, torch.gt), _old(torch.min, torch.lt)

    seen: list[torch.nn.Module] = []

    def create(*a: Any, **k: Any) -> torch.nn.Module:
        feed.on = False  # FGSM-MEP's script makes another one at an epoch's end, to evaluate
        seen.append(build("resnet8", width=WIDTH))
        return seen[-1]

    module, name = NETWORK[method]
    setattr(importlib.import_module(module), name, create)
    losses = Losses()

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if feed.on:
            found = prefixed("classifier", snapshot(seen[0], optimizer) | {"loss": {"": np.array(losses.value)}})
            more = remembered(method, variables(LOOP.get(method, "main")), feed)
            pipe.send(found | {quantity: {"": value.detach().numpy().copy()} for quantity, value in more.items()})
    register_optimizer_step_post_hook(after_step)

    script = checkout / Path(METHODS[method].script).name

    def begin() -> None:
        pipe.send({"initial": initial_state(seen[0]), "files": executed(checkout, script)})
    feed.begin = begin

    text = script.read_text()
    folders = dict.fromkeys([flag for flag in ("out-dir", "root-model-dir") if f"--{flag}" in text], "run")
    batch = dict.fromkeys([flag for flag in ("batch-size", "batch_size") if f"'--{flag}'" in text], BATCH)
    sys.argv = [script.name]
    for name, value in (folders | batch | experiment.published).items():
        flag = name if f"--{name}" in text else name.replace("_", "-")
        sys.argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    if method == "mep":
        text = text.replace("50000", str(feed.n))
    exec(compile(text, script.name, "exec"), {"__name__": "__main__", "__file__": str(script)})


# ---- our side --------------------------------------------------------------------------------------------------------

def ours(method: str, experiment: Experiment, data: Path, steps: int, pipe: Any) -> tuple[Differences, dict[str, Any]]:
    """Runs our training script against the process at the other end of `pipe`."""
    import engine

    module = importlib.import_module(METHODS[method].module)
    start = receive(pipe)
    differences = Differences()
    n = BATCH * (experiment.per_epoch - 1) + SHORT

    class Watched(engine.Run):
        def __init__(self, *a: Any, **k: Any) -> None:
            super().__init__(*a, **k)
            if experiment.plain:
                self.model.forward = lambda x: self.network(x.contiguous())
                for group in self.optimizer.param_groups:
                    group["fused"] = False
            self.carried = np.zeros((BATCH, *self.shape))  # Free-AT: what theirs is after the update before

        def keep(self, **objects: Any) -> None:
            super().keep(**objects)
            if "classifier" in objects:
                network = objects["classifier"]
                own = {key: value for key, value in network.state_dict().items() if key.startswith("normalize.")}
                network.load_state_dict({key: torch.from_numpy(value) for key, value in start["initial"].items()} | own)
                if experiment.plain:
                    network.to(memory_format=torch.contiguous_format)

        def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
            for x, y, index in super().batches():
                pipe.send((x.contiguous().numpy(), y.numpy()))
                yield x.contiguous() if experiment.plain else x, y, index

        def uniform(self, x: torch.Tensor) -> torch.Tensor:
            noise = super().uniform(x)
            pipe.send(noise.contiguous().numpy())
            return noise

        def remembered(self, v: dict[str, Any], found: dict[str, Any]) -> dict[str, torch.Tensor]:
            """As `remembered`, and what of theirs is to be compared with it goes into `found`."""
            if method == "free":
                whole = v["carried"].values.clone()
                whole[:len(v["delta"])] = v["delta"]
                self.carried, found["perturbation"] = found["perturbation"][""], {"": self.carried}
                return {"perturbation": whole}
            if method == "ckpt":
                parts = differences.notes.setdefault("images_by_part_of_the_step", {f"{j}/{self.cfg.c}": 0 for j in range(self.cfg.c + 1)})
                for part in found.pop("part")[""]:
                    parts[f"{round(part * self.cfg.c)}/{self.cfg.c}"] += 1
            elif method in ("vfsat", "gradsum"):
                differences.notes.setdefault("updates_clipped", 0)
                differences.notes["updates_clipped"] += bool(found.pop("gradient norm")[""] > 19.999)
            return {"perturbation": v["delta"]}

        def update(self, loss: torch.Tensor, optimizer: Any = None, **rest: Any) -> None:
            v = variables("step")
            super().update(loss, optimizer, **rest)
            found = prefixed("classifier", snapshot(self.network, self.optimizer) | {"loss": {"": np.array(loss.item())}})
            theirs = receive(pipe)
            found |= {quantity: {"": value.detach().contiguous().numpy().copy()} for quantity, value in self.remembered(v, theirs).items()}
            differences.compare(self._position.step, found, theirs)
            if self._position.step == steps:
                raise Enough

    class Visiting(Watched):
        """FGSM-MEP: the images are handed over once, then every epoch's noise, then every batch's index and crops."""

        def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
            with np.load(data / "cifar10.npz") as file:
                pipe.send((file["x_train"].transpose(0, 3, 1, 2) / 255, file["y_train"]))
            self.written = torch.zeros(n, dtype=torch.bool)  # since the memory started anew
            for x, y, index in super(Watched, self).batches():
                if self._position.batch == 0:
                    self.noise = 2 * torch.rand(n, *self.shape, generator=torch.Generator().manual_seed(self._position.epoch)) - 1
                    pipe.send(self.noise.numpy())
                    if self._position.epoch % self.cfg.reset == 0:
                        self.written[:] = False
                self.index = index
                pipe.send((index.numpy(), self.crops()))
                yield x.contiguous() if experiment.plain else x, y, index
                self.written[index] = True

        def crops(self) -> list[int]:
            """Of every image in the order of theirs: mirrored or not, first row, first column."""
            if self.cfg.augment == "none":
                return [0, 4, 4] * len(self.index)
            rows, columns = self._data.places
            return torch.stack([columns[:, 0] > columns[:, 1], rows[:, 0], columns.amin(1)], 1).flatten().tolist()

        def uniform(self, x: torch.Tensor) -> torch.Tensor:
            return self.noise[self.index]

        def remembered(self, v: dict[str, Any], found: dict[str, Any]) -> dict[str, torch.Tensor]:
            memories = {"memory of starts": v["prior"], "memory of momenta": v["momenta"]}
            rows = self.written.nonzero()[:, 0]  # until an image is visited, ours holds what was before the memory started anew
            own = {"perturbation": v["delta"], "next start": v["following"], "momentum of gradients": v["momentum"]}
            for name, memory in memories.items():
                all_of_theirs = found.pop(name)[""]
                if len(rows):
                    own[name], found[name] = memory[rows], {"": all_of_theirs[rows]}
            return own

    images(n, experiment.saturated, data)
    cfg = module.Config(**dict(
        dataset="cifar10", data_dir=str(data), out_dir=str(data / "run"), arch="resnet8", width=WIDTH, batch_size=BATCH, augment="none",
        select_on="test", val_size=0, device="cpu", save_every=1e9) | experiment.ours)
    before, gradient = engine.Run, getattr(module, "input_gradient", None)

    def tied(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gradient(model, x, y) * torch.where((x == 0) | (x == 1), experiment.tie, 1.0)

    engine.Run = Visiting if method == "mep" else Watched
    if experiment.tie != 1:
        module.input_gradient = tied
    try:
        module.main(cfg)
    except Enough:
        pass
    finally:
        engine.Run = before
        if gradient:
            module.input_gradient = gradient
    return differences, start["files"]


if __name__ == "__main__":
    main(__doc__, METHODS, REPLACED, theirs=theirs, ours=ours)
