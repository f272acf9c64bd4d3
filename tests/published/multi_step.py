"""Do our scripts compute what the authors' published code computes? The methods with regularisers, many steps or two networks.

    python tests/published/multi_step.py METHOD --checkout DIR

    nuat               https://github.com/val-iisc/NuAT
    gat                https://github.com/val-iisc/GAMA-GAT
    trades             https://github.com/yaodongyu/TRADES
    mart               https://github.com/YisenWang/MART
    awp, trades-awp    https://github.com/csdongxian/AWP
    fat                https://github.com/zjfheart/Friendly-Adversarial-Training
    gairat             https://github.com/zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training
    lbgat              https://github.com/dvlab-research/LBGAT

DIR is a copy of the authors' repository. As in compare.py their training script is executed from DIR in a process of its own
and ours is `main(cfg)` on the real engine; both are given the same weights, batches and noise, everything is float64, one
thread each, on the CPU. What surrounds the published script is replaced (`REPLACED`), and here that includes the network: a
narrow resnet8 of ours on both sides, because the networks are compared with the published classes elsewhere.

All that either side remembers is compared after every batch, when everything that a batch leaves behind is in place. Their
evaluation between two epochs runs too, on two random images, but for the long ones of FAT and GAIRAT.

Writes results/fidelity/<method>.json, with the fields of compare.py's. At most three minutes a method.
"""
from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from compare import BATCH, SHORT, Differences, Enough, Method, images, main, prefixed, receive, snapshot
from theirs import Losses, Nothing, executed, initial_state, of_ours, stub
from torch.optim.optimizer import register_optimizer_step_post_hook

ARCH, WIDTH = "resnet8", 8
ATTACK_STEPS = 10  # of those attacks that have several: everybody's default

REPLACED = {
    "all": [
        f"the network classes give a {ARCH} of ours with {WIDTH} channels in its first stage, and ours is that too",
        "torch.cuda.is_available is False; Tensor.cuda and Module.cuda return what they are given",
        "the default dtype is float64; Tensor.float casts to it",
        "the data sets of torchvision are empty; the first loader made yields the batches of our run, and a batch of two random "
        "images where no gradient is recorded, which is their evaluation; any other loader yields such a batch",
        "while an epoch is under way, random numbers are made of our run's U(-1, 1) or N(0, 1) noise u: Tensor.uniform_(-b, b) and "
        "numpy.random.uniform(-b, b) give b u, torch.rand_like gives (1 - u) / 2, torch.randn gives u",
        "what is printed is thrown away; files go to a temporary folder",
    ],
    "nuat": [
        "torch.autograd.gradcheck.zero_gradients, which torch no longer has, does nothing: every image it is given is a new tensor",
        "torch.set_default_tensor_type, which asks for a GPU, does nothing; ResNet.py, which the script executes, is an empty file",
        "torch.optim.lr_scheduler.CyclicLR does nothing: learning rate and momentum stay as SGD was given them",
        "what follows the training loop is not reached",
    ],
    "gat": [
        "torch.autograd.gradcheck.zero_gradients, which torch no longer has, does nothing: every image it is given is a new tensor",
        "torch.set_default_tensor_type, which asks for a GPU, does nothing; ResNet.py, which the script executes, is an empty file",
        "tensorboardX is a stub",
        "what follows the training loop is not reached",
    ],
    "trades-awp": ["matplotlib and the progress bar are stubs", "the accuracies for the log, by a view that torch no longer allows, are zero"],
    "fat": [
        "matplotlib is a stub",
        "torch.randn in earlystop gives our noise of the images that are still moving there, found by their clean images",
        "the evaluation functions, several PGDs after every epoch, return zeros",
    ],
    "gairat": ["matplotlib is a stub", "the evaluation functions return zeros"],
}


@dataclass(kw_only=True)
class Experiment:
    """One run of both sides: the published script's arguments, our flags, and what is special."""

    says: str
    published: dict[str, Any]
    ours: dict[str, Any]
    per_epoch: int = 6
    last: int = SHORT  # images in an epoch's last batch
    steps: int = 24
    untracked: tuple[int, ...] = ()  # passes of the published classifier, counted from 1 in every batch, that leave BatchNorm's averages alone
    training: bool = False  # whether the published classifier is put into training mode before every batch
    plain: bool = False  # our engine without channels-last memory and fused SGD
    saturated: bool = True  # images with pixels at exactly 0 and 1

    @property
    def n(self) -> int:
        return BATCH * (self.per_epoch - 1) + self.last


# ---- the runs --------------------------------------------------------------------------------------------------------

BALL = dict(epsilon=7.905, alpha=1.785)  # 0.031 and 0.007, as these repositories have it
CONSTANT = dict(lr_schedule="constant")
ONE = dict(per_epoch=1, last=BATCH)  # batch an epoch, where the run must be many epochs long


def _nuat() -> dict[str, Experiment]:
    shared = dict(published={"-EXP_NAME": "run", "-b_size": BATCH, "-lr_factor": 1}, ours=dict(epochs=100, lr=0.1, **CONSTANT))
    return {
        "first epochs": Experiment(says="the weight of the norm grows epoch by epoch", **shared),
        "whole": Experiment(says="ninety-five epochs of two batches: the weight stops growing after ninety", per_epoch=2, steps=190, **shared),
    }


def _gat() -> dict[str, Experiment]:
    shared = dict(published={"-EXP_NAME": "run", "-b_size": BATCH}, ours=dict(epochs=100, lr=0.1, lr_schedule="multistep", milestones="71,86"))
    return {
        "first epochs": Experiment(says="the weight is 10", **shared),
        "whole": Experiment(says="ninety epochs of two batches: the learning rate falls after 71 and 86, and the weight is then 40; our engine in "
                            "plain layout", per_epoch=2, steps=180, plain=True, **shared),
    }


def _trades() -> dict[str, Experiment]:
    ours = dict(epochs=76, lr=0.1, weight_decay=2e-4, **BALL, **CONSTANT)
    return {
        "beta 6": Experiment(says="as published", published={"--batch-size": BATCH}, ours=ours),
        "inside": Experiment(says="no pixel at 0 or 1", published={"--batch-size": BATCH}, ours=ours, saturated=False, steps=12),
    }


def _mart() -> dict[str, Experiment]:
    ours = dict(epochs=120, lr=0.01, weight_decay=3.5e-3, **BALL, **CONSTANT)
    return {
        "beta 5": Experiment(says="as published for ResNet18", published={"--batch-size": BATCH}, ours=ours),
        "inside": Experiment(says="no pixel at 0 or 1", published={"--batch-size": BATCH}, ours=ours, saturated=False, steps=12),
    }


def _awp() -> dict[str, Experiment]:
    shared = dict(published={"--batch-size": BATCH}, ours=dict(epochs=200, lr=0.1, base="pgd", normalise="dataset", **CONSTANT))
    return {
        "as published, one epoch": Experiment(
            says="BatchNorm's averages alone differ: the attack's eleventh pass and one of the clean images after the update move theirs too",
            per_epoch=13, steps=12, **shared),
        "as published, crossing an epoch": Experiment(
            says="their first batch after an evaluation is crafted in evaluation mode: from step 4 on all differs", steps=6, per_epoch=3, **shared),
        "without the three": Experiment(
            says="BatchNorm's averages kept from these two passes, and no batch crafted in evaluation mode: the whole of the difference",
            untracked=(11, 13), training=True, **shared),
    }


def _trades_awp() -> dict[str, Experiment]:
    return {"warm-up": Experiment(
        says="without, and then with perturbed weights; their warm-up counts the epochs from 1, so that their 3 is our 2",
        published={"--batch-size": BATCH, "--arch": "ResNet18", "--awp-warmup": 3},
        ours=dict(epochs=200, lr=0.1, base="trades", warmup=2, **CONSTANT))}


def _fat() -> dict[str, Experiment]:
    ours = dict(epochs=120, weight_decay=2e-4, lr_schedule="multistep", milestones="59,89", **BALL)
    runs = {f"tau {tau}": Experiment(
        says="the same tau in all epochs", published={"--net": "resnet18", "--dynamictau": "", "--tau": tau},
        ours=ours | dict(tau=tau, lr=0.1), steps=12) for tau in (0, 1, 2)}
    return runs | {"dynamic": Experiment(
        says="tau is 1 from the 51st and 2 from the 91st epoch on; the learning rate falls before the 60th and the 90th",
        published={"--net": "resnet18", "--lr": 0.001}, ours=ours | dict(lr=0.001), steps=96, **ONE)}


def _gairat() -> dict[str, Experiment]:
    published = {"--net": "resnet18", "--lr-schedule": "onedrop", "--lr-drop-epoch": 1000}
    ours = dict(epochs=120, weight_decay=2e-4, **BALL, **CONSTANT)
    runs = {name: Experiment(
        says="weights from the third epoch on",
        published=published | {"--begin_epoch": 3, "--Lambda_max": -1.0, "--weight_assignment_function": name},
        ours=ours | dict(begin=3 / 120, weights=name.lower(), lr=0.1), steps=18) for name in ("Tanh", "Sigmoid", "Discrete")}
    return runs | {"from 60": Experiment(
        says="as published, weights from the 60th epoch on", published=published | {"--lr-max": 0.001}, ours=ours | dict(lr=0.001), steps=66, **ONE)}


def _lbgat() -> dict[str, Experiment]:
    # The rate is theirs in the first epoch, whatever is asked for.
    published = {"--batch-size": BATCH, "--lr": 0.02, "-mark": "run", "-teacher_model": "ResNet18_cifar", "-num_classes": 10}
    ours = dict(epochs=100, lr=0.02, weight_decay=2e-4, teacher=ARCH, **BALL, **CONSTANT)
    return {f"beta {beta}": Experiment(
        says=f"the papers' LBGAT{beta}", published=published | {"--beta": beta}, ours=ours | dict(beta=beta), steps=20) for beta in (0, 6)}


METHODS = {
    "nuat": Method(
        "https://github.com/val-iisc/NuAT", "89622905a8f25554b4a25dc52a1d36c764f136f4",
        "594133bf3729d727b4cf7fed1481cbadcc48d75e6c3a253cec417e9615920da2",
        "CIFAR10/NuAT_cifar10.py", "train_nuat", _nuat(), {"classifier": "ResNet18"}),
    "gat": Method(
        "https://github.com/val-iisc/GAMA-GAT", "6b69e890d6fd9ab332332f5232eb3f2b6f60e0a3",
        "2b9a3d9c08796d3cf3fc847034388f4d0280d6e4d565af53b19ce235c4550f0a",
        "CIFAR10/GAT_cifar10.py", "train_gat", _gat(), {"classifier": "ResNet18"}),
    "trades": Method(
        "https://github.com/yaodongyu/TRADES", "6e8e11b7c281371c2f027ffadfbaea80361f09de",
        "c41f22bc7e437182233354ca248037d5a1126764f259cff01e18186c7ab6c0f4",
        "train_trades_cifar10.py", "train_trades", _trades(), {"classifier": "models.wideresnet.WideResNet"}),
    "mart": Method(
        "https://github.com/YisenWang/MART", "2d83e17b381dd2ee52223695e517bf6d5ff09c2c",
        "5c33d4f0662240505d20f8cbdbec958e06287e8daeb075aac127dc50f29eb3eb",
        "train_resnet.py", "train_mart", _mart(), {"classifier": "resnet.ResNet18"}),
    "awp": Method(
        "https://github.com/csdongxian/AWP", "a7acf5d842fccf1bbb4b91644352ce157d370a26",
        "7e18adfa2519240218d00c23cede699e960d84785f37b3681a30bd3428c4c554",
        "AT_AWP/train_cifar10.py", "train_awp", _awp(), {"classifier": "preactresnet.PreActResNet18"}),
    "trades-awp": Method(
        "https://github.com/csdongxian/AWP", "a7acf5d842fccf1bbb4b91644352ce157d370a26",
        "e4187b5913316cf585b5363b45e2c9121470acdff019d133dc28adddcb1a4657",
        "trades_AWP/train_trades_cifar.py", "train_awp", _trades_awp(), {"classifier": "models.ResNet18"}),
    "fat": Method(
        "https://github.com/zjfheart/Friendly-Adversarial-Training", "80a064074891775146bca8c4d8a6b99c1499285a",
        "d86a36b3762fe561c689033ec101339cfd1286f720d60706791c3fa5692846d7",
        "FAT.py", "train_fat", _fat(), {"classifier": "models.ResNet18"}),
    "gairat": Method(
        "https://github.com/zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training", "16813b5b08449ed60af8835c8f1e3b1960ce2ff3",
        "ef1980c60c8771c78544315f0f25c079e22178ebdbe91cd4c2ea274033b7cbc7",
        "GAIRAT.py", "train_gairat", _gairat(), {"classifier": "models.ResNet18"}),
    "lbgat": Method(
        "https://github.com/dvlab-research/LBGAT", "f7f33f0ea7d2b1ee89741144604b29624057f44a",
        "310136ee756bc1d8972f194c932a23ce34863c0d30f640302a907d8d54fe5e41",
        "train_lbgat_cifar100.py", "train_lbgat", _lbgat(), {"classifier": "models.nets.WideResNet", "teacher": "models.nets.ResNet18_cifar"}),
}


# ---- both sides ------------------------------------------------------------------------------------------------------

def remembered(networks: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, loss: float) -> dict[str, Any]:
    """All that the networks and their one optimizer remember."""
    found: dict[str, Any] = {}
    for kind, network in networks.items():
        own = set(network.parameters())
        group, = (group for group in optimizer.param_groups if group["params"][0] in own)
        state = {parameter: values for parameter, values in optimizer.state.items() if parameter in own}
        found |= prefixed(kind, snapshot(network, types.SimpleNamespace(param_groups=[group], state=state)))
    return found | {"classifier loss": {"": np.array(loss)}}


# ---- the published side, in a process of its own ---------------------------------------------------------------------

class Feed:
    """The published training loader: what our run hands over, batch by batch."""

    def __init__(self, pipe: Any, experiment: Experiment, begin: Callable[[], None], before: Callable[[], None], after: Callable[[], None]) -> None:
        self.pipe, self.per_epoch, self.dataset = pipe, experiment.per_epoch, range(experiment.n)
        self.begin: Callable[[], None] | None = begin  # called once, before the first batch
        self.before, self.after = before, after  # called before and after every batch
        self.x: torch.Tensor | None = None  # of the batch under way
        self.moving: list[int] = []  # how many of its images were still moving whenever noise was drawn for these alone

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not torch.is_grad_enabled():
            yield from Anything()
            return
        if self.begin:
            self.begin()
            self.begin = None
        for _ in range(self.per_epoch):
            x, y = self.receive("batch")
            self.x, self.moving = torch.from_numpy(x), []
            self.before()
            yield self.x, torch.from_numpy(y)
            self.after()
        self.x = None

    def receive(self, kind: str) -> Any:
        sent, value = self.pipe.recv()
        assert sent == kind, f"ours is at a {sent}, theirs at a {kind}"
        return value

    def noise(self, kind: str, shape: tuple[int, ...], moving: torch.Tensor | None = None) -> torch.Tensor:
        """Our noise; of the images `moving` alone where these are given."""
        noise = torch.from_numpy(self.receive(kind))
        if moving is not None:
            noise = noise[[int((self.x == image).flatten(1).all(1).nonzero()) for image in moving]]
            self.moving.append(len(moving))
        assert noise.shape == tuple(shape), (noise.shape, shape)
        return noise


class Anything:
    """A loader of one batch of two random images."""

    dataset = range(2)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.rand(2, 3, 32, 32), torch.randint(10, (2,))


class NoImages(Nothing):
    """A data set of torchvision's, with one black image."""

    data, targets = np.zeros((1, 32, 32, 3), np.uint8), [0]

    def __len__(self) -> int:
        return 0


def theirs(method: str, experiment: Experiment, folder: Path, pipe: Any) -> None:
    """Executes the published script."""
    build = of_ours("models").build
    seen: dict[str, torch.nn.Module] = {}  # their networks, the first one of each kind
    optimizers: list[torch.optim.Optimizer] = []  # the classifier's, once per update in the batch under way
    passes = 0  # of the classifier in the batch under way
    script = folder / Path(METHODS[method].script).name

    def begin() -> None:
        pipe.send({"initial": {kind: initial_state(network) for kind, network in seen.items()}, "files": executed(folder, script)})

    def before() -> None:
        nonlocal passes
        passes = 0
        if experiment.training:
            seen["classifier"].train()

    def after() -> None:
        optimizer, = optimizers
        optimizers.clear()
        last = feed.moving[-1] if len(feed.moving) == ATTACK_STEPS else 0
        pipe.send(remembered(seen, optimizer, losses.value) | {"stopped": len(feed.x) - last})

    feed = Feed(pipe, experiment, begin, before, after)

    # What surrounds it.
    torch.set_default_tensor_type = lambda kind: None
    sys.modules["torch.autograd.gradcheck"].zero_gradients = lambda image: None
    torch.optim.lr_scheduler.CyclicLR = Nothing
    torchvision.datasets.CIFAR10 = torchvision.datasets.CIFAR100 = NoImages
    loaders = iter([feed])
    torch.utils.data.DataLoader = lambda *a, **k: next(loaders, Anything())
    stub("tensorboardX", SummaryWriter=Nothing)
    stub("matplotlib")
    stub("matplotlib.pyplot")
    stub("progress")
    stub("progress.bar", Bar=Nothing)
    Path("ResNet.py").touch()
    Path("Logs").mkdir()

    uniform_, rand_like, randn, numpy_uniform = torch.Tensor.uniform_, torch.rand_like, torch.randn, np.random.uniform

    def our_uniform_(self: torch.Tensor, low: float = 0.0, high: float = 1.0, **k: Any) -> torch.Tensor:
        if feed.x is None:
            return uniform_(self, low, high, **k)
        assert low == -high
        return self.copy_(high * feed.noise("uniform", self.shape))

    def our_rand_like(x: torch.Tensor) -> torch.Tensor:
        return rand_like(x) if feed.x is None else (1 - feed.noise("uniform", x.shape)) / 2

    def our_randn(*size: Any) -> torch.Tensor:
        if feed.x is None:
            return randn(*size)
        return feed.noise("normal", size[0], sys._getframe(1).f_locals["iter_clean_data"] if method == "fat" else None)

    def our_numpy_uniform(low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        if feed.x is None:
            return numpy_uniform(low, high, size)
        assert low == -high
        return high * feed.noise("uniform", size).numpy()

    torch.Tensor.uniform_, torch.rand_like, torch.randn, np.random.uniform = our_uniform_, our_rand_like, our_randn, our_numpy_uniform

    # What is watched.
    def made(kind: str) -> Callable[..., torch.nn.Module]:
        def make(*a: Any, **k: Any) -> torch.nn.Module:
            network = build(ARCH, width=WIDTH)
            if kind == "classifier" and kind not in seen:
                network.register_forward_pre_hook(before_pass)
            seen.setdefault(kind, network)
            return network
        return make

    def before_pass(network: torch.nn.Module, *_: Any) -> None:
        nonlocal passes
        passes += 1
        for layer in network.modules():
            if hasattr(layer, "track_running_stats"):
                layer.track_running_stats = passes not in experiment.untracked

    namespace: dict[str, Any] = {"__name__": "published", "__file__": str(script)}
    for kind, place in METHODS[method].networks.items():
        where, _, name = place.rpartition(".")
        if where:
            setattr(importlib.import_module(where), name, made(kind))
        else:
            namespace[name] = made(kind)
    if method == "trades-awp":
        importlib.import_module("utils").accuracy = lambda *a, **k: torch.zeros(2)
    if method in ("fat", "gairat"):
        attack = importlib.import_module("attack_generator")
        attack.eval_clean = attack.eval_robust = lambda *a, **k: (0.0, 0.0)
    losses = Losses()

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer.param_groups[0]["params"][0] is next(seen["classifier"].parameters()):
            optimizers.append(optimizer)
    register_optimizer_step_post_hook(after_step)

    sys.argv = [script.name, *(str(word) for item in experiment.published.items() for word in item)]
    exec(compile(script.read_text(), script.name, "exec"), namespace)
    if "main" in namespace:
        namespace["main"]()


# ---- our side --------------------------------------------------------------------------------------------------------

def ours(method: str, experiment: Experiment, data: Path, steps: int, pipe: Any) -> tuple[Differences, dict[str, str]]:
    """Runs our training script against the process at the other end of `pipe`."""
    import engine

    script = importlib.import_module(METHODS[method].module)
    start = receive(pipe)
    differences = Differences()
    stopped: list[int] = []

    def send(kind: str, value: Any) -> None:
        try:
            pipe.send((kind, value))
        except (BrokenPipeError, ConnectionResetError):
            receive(pipe)  # what went wrong there
            raise

    class Watched(engine.Run):
        def __init__(self, *a: Any) -> None:
            self.networks: dict[str, torch.nn.Module] = {}
            super().__init__(*a)
            self._take("classifier", self.model)

        def _take(self, kind: str, model: Any) -> None:
            """The published initial weights, and the plain layout."""
            network = model.network
            own = {key: value for key, value in network.state_dict().items() if key.startswith("normalize.")}
            network.load_state_dict({key: torch.from_numpy(value) for key, value in start["initial"][kind].items()} | own)
            if experiment.plain:
                network.to(memory_format=torch.contiguous_format)
                model.forward = lambda x: network(x.contiguous())
            self.networks[kind] = network

        def keep(self, **objects: Any) -> None:
            super().keep(**objects)
            if "teacher" in objects:
                self._take("teacher", objects["teacher"])

        def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
            if experiment.plain:
                for group in self.optimizer.param_groups:
                    group["fused"] = False
            for x, y, index in super().batches():
                send("batch", (x.contiguous().numpy(), y.numpy()))
                yield x.contiguous() if experiment.plain else x, y, index
                self._compare()

        def uniform(self, x: torch.Tensor) -> torch.Tensor:
            noise = super().uniform(x)
            send("uniform", noise.contiguous().numpy())
            return noise

        def normal(self, x: torch.Tensor) -> torch.Tensor:
            noise = super().normal(x)
            send("normal", noise.contiguous().numpy())
            return noise

        def update(self, loss: torch.Tensor, *a: Any, **k: Any) -> None:
            super().update(loss, *a, **k)
            self.loss = loss.item()

        def _compare(self) -> None:
            found, theirs = remembered(self.networks, self.optimizer, self.loss), receive(pipe)
            stopped.append(theirs.pop("stopped"))
            differences.compare(self._position.step, found, theirs, tell=self._position.step % 10 == 0 or self._position.step == steps)
            if self._position.step == steps:
                raise Enough

    images(experiment.n, experiment.saturated, data)
    cfg = script.Config(
        dataset="cifar10", data_dir=str(data), out_dir=str(data / "run"), batch_size=BATCH, augment="none", select_on="test", val_size=0,
        device="cpu", save_every=1e9, arch=ARCH, width=WIDTH, **experiment.ours)
    run = engine.Run
    engine.Run = Watched
    try:
        script.main(cfg)
    except Enough:
        pass
    finally:
        engine.Run = run
    replaced = [f"pass {number} of the published classifier in every batch leaves BatchNorm's averages alone" for number in experiment.untracked]
    if experiment.training:
        replaced.append("the published classifier is put into training mode when a batch arrives")
    differences.notes |= {
        "steps": len(differences.losses), "last_batch": experiment.last, "network": f"{ARCH}, width {WIDTH}", "replaced_in_this_run": replaced,
        **({"images_that_stopped_early": sum(stopped)} if method == "fat" else {})}
    return differences, start["files"]


if __name__ == "__main__":
    main(__doc__, METHODS, REPLACED, theirs=theirs, ours=ours)
