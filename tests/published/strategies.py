"""Do our LAS-AT, LIET, FGSM-UAP and FGSM-RS-CS compute what the authors' published code computes? As compare.py does it.

    python tests/published/strategies.py las-at --checkout DIR        https://github.com/jiaxiaojunQAQ/LAS-AT
    python tests/published/strategies.py las-trades --checkout DIR    the same
    python tests/published/strategies.py las-awp --checkout DIR       the same
    python tests/published/strategies.py liet --checkout DIR          https://github.com/fzjcdt/FastAT_Benchmark
    python tests/published/strategies.py fgsm-uap --checkout DIR      the same
    python tests/published/strategies.py fgsm-rs-cs --checkout DIR    the same

DIR is a copy of the authors' repository. Their script is executed from there, unchanged, in a process of its own, where
only what surrounds it is replaced (`REPLACED`). Ours is `main(cfg)` on the real engine, watched from outside: it takes the
published initial weights, hands over its batches, noise and sampled actions, and at the end of every batch compares all
that either side remembers, the published local variables included. The classifier is a small ResNet on both sides:
the networks are compared with the published classes elsewhere. Everything is float64, one thread each, on the CPU.

Where the two are known to differ, one run has ours as it is, and another has ours changed to theirs in just that
(`CHANGES`): what then remains is the rest of the difference.

Writes results/fidelity/<method>.json, as compare.py. One to three minutes a method.
"""
from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from compare import BATCH, SHORT, Differences, Enough, Method, images, main, prefixed, receive, snapshot
from strategy_keys import renamed
from theirs import Losses, Nothing, executed, initial_state, of_ours, stub

ACTIONS = {"Attack_epsilon": "radii", "Attack_iters": "steps", "Attack_step_size": "step_sizes", "Attack_beta_size": "betas"}
"""What train_las_at.py calls the published heads."""

REPLACED = {
    "all": [
        "Tensor.cuda and Module.cuda return what they are given; torch.cuda.is_available says no",
        "the default dtype is float64; Tensor.float casts to it, on our side too",
        "the training loader yields the batches of our run",
        "random numbers, while an epoch is under way, are those of our run: uniform_(-b, b) gives b times our U(-1, 1) noise",
        "what is printed is thrown away; files go to a temporary folder",
        "the classifier is a ResNet8 of width 8 instead of a ResNet18 or WideResNet, on our side too",
    ],
    "las": [
        "Categorical.sample gives the actions that our run has sampled; the probabilities of both sides are compared",
        "the strategy network is the published ResNet18; in runs with small_strategy_network it is a ResNet8 of width 16 on both sides",
        "the range arguments get the lists of the published README; tensorboardX is a stub",
    ],
    "las-at": ["the test loader is empty, the evaluation functions return zeros"],
    "las-trades": ["the test loader is empty, the evaluation functions return zeros", "torch.randn gives our N(0, 1) noise"],
    "las-awp": [
        "the name ResNet18_Strategy, which the script calls and nothing defines, is that of ResNet18_StrategyNet",
        "the mean is 0 and the deviation 1, so that it does not matter that the reward's networks see images that are not normalised",
        "the data set is one black image; the class Batches gives our batches for training, one random image for evaluation",
    ],
    "fastat": [
        "main.run_experiment is called with the published configs/cifar10, apart from the arguments listed with each run",
        "yaml is a stub that reads the flat files, torchattacks an empty one; validation returns zeros",
        "main.get_data_loaders gives our batches and no test loader, main.get_model the small network",
    ],
    "liet": ["torch.rand and torch.rand_like give our numbers; ours are drawn in another order, which is put right"],
    "fgsm-uap": ["our universal perturbation starts from the published one"],
    "fgsm-rs-cs": ["torch.FloatTensor makes a tensor of the default dtype"],
}

CHANGES = {
    "clean pass": "after every update a clean forward pass in training mode, which moves BatchNorm's averages",
    "early rate": "the learning rates of one update later",
    "twice decayed": "the reward's copy takes a tenth of the rate at the classifier's milestones themselves",
    "late average": "the weight average starts from the weights after the first update",
}
"""What a run may have changed in ours to see whether it is the whole of a difference: experiments, not our code."""


@dataclass(kw_only=True)
class Experiment:
    """One run of both sides: the published script's arguments, our flags, and what is special."""

    says: str
    published: dict[str, Any]
    ours: dict[str, Any]
    per_epoch: int
    steps: int
    plain: bool = True  # our engine without channels-last memory and fused SGD
    saturated: bool = True  # images with pixels at exactly 0 and 1
    small: bool = False  # the strategy network too
    changes: tuple[str, ...] = ()


def las(*actions: str, published: dict[str, Any], ours: dict[str, Any], **special: Any) -> Experiment:
    """Actions: radii, steps, step sizes and betas, as in our flags; the published script wants lists."""
    flags = dict(zip(ACTIONS.values(), actions))
    names = dict(zip(("epsilon_types", "attack_iters_types", "step_size_types", "beta_types"), flags.values()))
    lists = {name: list(range(int(text.split("-")[0]), int(text.split("-")[1]) + 1)) for name, text in names.items()}
    return Experiment(published=lists | dict(model="ResNet18") | published, ours=flags | ours, **special)


def las_at(rate: float, strategy_rate: float, **special: Any) -> Experiment:
    return las("3-15", "3-14", "1-5", published=dict(epochs=2, target_model_lr=rate, policy_model_lr=strategy_rate, interval_num=2),
               ours=dict(epochs=2, lr=rate, strategy_lr=strategy_rate, interval=2), **special)


def las_trades(rate: float, strategy_rate: float, interval: int, schedule: str = "multistep", **special: Any) -> Experiment:
    return las("5-9", "7-14", "2-4", "5-9", published=dict(
        epochs=2, target_model_lr=rate, target_model_lr_scheduler=schedule, policy_model_lr=strategy_rate, interval_num=interval,
    ), ours=dict(base="trades", epochs=2, lr=rate, lr_schedule=schedule, strategy_lr=strategy_rate, interval=interval), **special)


def las_awp(rate: float, strategy_rate: float, epochs: int, **special: Any) -> Experiment:
    return las("7-15", "8-16", "2-5", published=dict(epochs=epochs, lr_max=rate, policy_model_lr=strategy_rate),
               ours=dict(base="awp", epochs=epochs, lr=rate, strategy_lr=strategy_rate), per_epoch=4, **special)


def fastat(rate: float, published: dict[str, Any], ours: dict[str, Any], epochs: int = 5, **special: Any) -> Experiment:
    settings = dict(per_epoch=5, steps=25, changes=("late average",)) | special
    return Experiment(published=dict(total_epoch=epochs, lr=rate) | published,
                      ours=dict(epochs=epochs, lr=rate, lr_schedule="onecycle", ema=0.9995) | ours, **settings)


LAS = "https://github.com/jiaxiaojunQAQ/LAS-AT", "ee756b7ef7f8f7ca3843d0d4f5659e655ee3242e"
FASTAT = "https://github.com/fzjcdt/FastAT_Benchmark", "b99c0de60e57128254234f2d79719b74792a4037"
CLASSIFIER = dict(name="resnet8", width=8)
SMALL = dict(width=16, blocks=(1, 1, 1, 0))  # the small strategy network
START = "the average as it is: the published one holds references to the weights at first, and so starts after the first update"
METHODS = {
    "las-at": Method(
        *LAS, "ad13243ff0b49e55767e934bc2a33970d04f816b9b07199004465ed1ed98a90a", "LAS_PGD_AT/LAS_AT_train_cifar10.py", "train_las_at", {
        "recipe": las_at(0.1, 1e-4, says="the recipe's rates", per_epoch=9, steps=17, small=True),
        "large network": las_at(0.1, 0.05, says="the published strategy network, learning fast", per_epoch=8, steps=10),
        "small rate": las_at(
            0.02, 0.05, says="our engine as it is, with their rate of the reward's copy at the milestones", per_epoch=8, steps=16,
            small=True, plain=False, changes=("twice decayed",)),
    }),
    "las-trades": Method(
        *LAS, "2c39cf16f26a94ca82d949b49ec8bb3d3670e7ecdfd1323653c686532529a269", "LAS_Trades/LAS_Trades_train_cifar10.py", "train_las_at", {
        "interval 2": las_trades(0.1, 1e-4, 2, says="the recipe's rates, the published strategy network", per_epoch=8, steps=10),
        "interval 2, small rate": las_trades(0.02, 0.05, 2, "cyclic", says="our engine as it is", per_epoch=8, steps=16, small=True, plain=False),
        "interval 1": las_trades(
            0.1, 0.05, 1, says="the recipe's interval, the strategy network learning fast, with their rate of the reward's copy at the milestones",
            per_epoch=8, steps=16, small=True, changes=("twice decayed",)),
    }),
    "las-awp": Method(
        *LAS, "ecbf98251d24f7bf85b0fe942ad181e1259dda1c4f542a86d2b7cf9391024369", "LAS_AWP/LAS_AWP_train_cifar10.py", "train_las_at", {
        "as it is": las_awp(0.1, 1e-4, 8, says="the recipe's rates, ours as it is", steps=5, small=True),
        "clean pass": las_awp(
            0.1, 1e-4, 8, says="with their clean pass: the whole of the difference; the published strategy network", steps=6, changes=("clean pass",)),
        "milestones": las_awp(
            0.1, 1e-4, 4, says="this, up to the first update at whose rate the two differ", steps=8, small=True, changes=("clean pass",)),
        "milestones, their rates": las_awp(
            0.1, 0.05, 4, says="with it and the rate of one update later; the strategy network learning fast",
            steps=14, small=True, changes=("clean pass", "early rate")),
    }),
    "liet": Method(
        *FASTAT, "aca8af50e9d1455e2620f58bd7c58c616b2933e7764c945fd345a01a38f2a288", "main.py", "train_liet", {
        "epsilon 8": fastat(0.1, {"li_update": 3}, {"refresh": 3}, says="the recipe's rate"),
        "epsilon 16": fastat(0.1, {"li_update": 3, "eps": 16 / 255}, {"refresh": 3, "epsilon": 16.0}, says="beyond 8/255"),
        "small rate": fastat(0.01, {"li_update": 3}, {"refresh": 3}, says="our engine as it is", plain=False),
        "average": fastat(0.1, {}, {}, says=START, steps=5, changes=()),
    }),
    "fgsm-uap": Method(
        *FASTAT, "1cd4789bf2f006c83862521d8f04921147e717e97b14a6f259b2206823cd096e", "main.py", "train_fgsm_uap", {
        "recipe": fastat(0.1, {}, {}, says="the recipe's rate"),
        "small rate": fastat(0.01, {}, {}, says="our engine as it is", plain=False),
        "the attack's gradient": fastat(0.1, {}, {"momentum_of": "attack"}, says="--momentum-of attack is not what is published", steps=5),
        "average": fastat(0.1, {}, {}, says=START, steps=5, changes=()),
    }),
    "fgsm-rs-cs": Method(
        *FASTAT, "c23aa3642a0c923f96e5cafabaaed56187d8cfb9d34c870e9728c7b1e62a0bbf", "main.py", "train_fgsm_rs_cs", {
        "recipe": fastat(0.1, {"decay_arr": [0, 6]}, {}, epochs=6, steps=30, says="the recipe's rate and gamma"),
        "gamma 0.2": fastat(
            0.1, {"decay_arr": [0, 6], "gamma": 0.2}, {"gamma": 0.2}, epochs=6, steps=30, says="a gamma that no batch leaves: nothing pulls"),
        "small rate": fastat(0.01, {"decay_arr": [0, 6]}, {}, epochs=6, steps=30, says="our engine as it is", plain=False),
        "average": fastat(0.1, {"decay_arr": [0, 6]}, {}, epochs=6, says=START, steps=5, changes=()),
    }),
}


# ---- both sides ------------------------------------------------------------------------------------------------------

def arrays(named: Any) -> dict[str, np.ndarray]:
    """Copies of tensors by name, without our first layer's."""
    pairs = ((name.removeprefix("module."), value) for name, value in named)
    return {name: value.detach().numpy().copy() for name, value in pairs if not name.startswith("normalize.")}


def state(network: torch.nn.Module) -> dict[str, Any]:
    """What a network remembers, apart from its optimizer."""
    return {"weights": arrays(network.named_parameters()), "buffers": arrays(network.named_buffers())}


def averaged(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A weight average. Left out is how many batches were seen, of which the published average is no whole number."""
    return {"average": arrays((name, value) for name, value in values.items() if not name.endswith("num_batches_tracked"))}


def single(**values: Any) -> dict[str, Any]:
    """Quantities that have no parts."""
    plain = {name: value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.array(value) for name, value in values.items()}
    return {name.replace("_", " "): {"": value} for name, value in plain.items()}


def our_names(values: dict[str, Any]) -> dict[str, Any]:
    """By our names what goes by the published strategy network's, or by those of `Small`; without the head of the one method."""
    ours = renamed({name.removeprefix("network."): value for name, value in values.items()}, ACTIONS)
    return {name: value for name, value in ours.items() if not name.startswith("heads.method.")}


class Small(torch.nn.Module):
    """Our strategy network, small, and answering as the published one does."""

    def __init__(self, build: Callable, args: Any) -> None:
        super().__init__()
        options = {"method": args.attack_types, "radii": args.epsilon_types, "steps": args.attack_iters_types, "step_sizes": args.step_size_types}
        if hasattr(args, "beta_types"):
            options["betas"] = args.beta_types
        self.network = build({name: len(values) for name, values in options.items()}, **SMALL)
        self.saved_log_probs: list[Any] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(x).values())


# ---- the published side, in a process of its own ---------------------------------------------------------------------

class Surroundings:
    """What is around the published script. It is also the script's training loader, and yields what our run hands over."""

    def __init__(self, name: str, experiment: Experiment, checkout: Path, pipe: Any) -> None:
        self.name, self.experiment, self.checkout, self.pipe = name, experiment, checkout, pipe
        self.script = checkout / Path(METHODS[name].script).name
        self.files = [self.script]
        self.seen: dict[str, torch.nn.Module] = {}  # their networks, the first one of each kind
        self.on = False  # while an epoch is under way: random numbers are ours then, and steps are watched
        self.begun = False
        self.copied: Any = None
        self.channels: list[torch.Tensor] = []  # of noise, not yet asked for
        self.ahead: dict[str, torch.Tensor] = {}  # what LIET draws earlier on our side
        self.heads: list[str] = []  # of the strategy network, not yet sampled from
        self.actions: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.experiment.per_epoch

    def __iter__(self) -> Iterator[Any]:
        if not self.begun:
            self._begin(sys._getframe(1).f_locals)
        for _ in range(self.experiment.per_epoch):
            x, y = map(torch.from_numpy, self._receive("batch"))
            self.found: dict[str, Any] = {}
            self.on = True
            yield {"input": x, "target": y} if self.name == "las-awp" else (x, y)
            self.on = False
            self.pipe.send(self._everything(sys._getframe(1).f_locals))

    def _receive(self, kind: str) -> Any:
        what, content = self.pipe.recv()
        if what != kind:
            raise RuntimeError(f"the published script wants {kind}, ours has {what}")
        return content

    def _begin(self, local: dict[str, Any]) -> None:
        self.begun = True
        self.pipe.send({
            "initial": {kind: initial_state(network) for kind, network in self.seen.items()},
            "universal": local["uaps"].numpy() if "uaps" in local else None,
            "files": executed(self.checkout, *self.files)})

    def _everything(self, local: dict[str, Any]) -> dict[str, Any]:
        """What is remembered at the end of a batch, where the script's own variables are `local`."""
        found = prefixed("classifier", state(self.seen["classifier"])) | self.found
        if "strategy" in self.seen:
            found = prefixed("strategy", state(self.seen["strategy"])) | found
            found |= single(perturbed_images=local["X_adv" if self.name == "las-awp" else "adv_examples"])
        if "strategy loss" in found:
            found |= prefixed("copy", state(self.copied)) | single(rewards=[float(local[name]) for name in ("R1", "R2", "R3", "reward")])
        if self.name == "liet":
            found |= single(perturbed_images=local["adv_images"], label_information=local["LI"], weight_of_the_divergence=local["cur_lambda"])
        if self.name == "fgsm-uap":
            found |= single(perturbed_images=local["adv_images"], universal_perturbation=local["uaps"], universal_momentum=local["momentum"])
        if self.name == "fgsm-rs-cs":
            found |= single(perturbed_images=local["data_adv"], noisy_loss=local["loss_normal"], level=local["pre_loss"],
                            sum_of_the_epoch=local["train_normal_loss"])
        if "exp_avg" in local:
            found |= averaged(local["exp_avg"])
        return {quantity: our_names(values) if quantity.startswith("strategy") else values for quantity, values in found.items()}

    # ---- random numbers

    def uniform(self, into: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """b times our noise: of all channels, or of the next one."""
        if low != -high:
            raise RuntimeError(f"noise between {low} and {high}")
        if into.dim() == 4:
            return into.copy_(high * (self.ahead.pop("noise") if self.ahead else self._noise("uniform")))
        self.channels = self.channels or list(self._noise("uniform").unbind(1))
        return into.copy_(high * self.channels.pop(0))

    def _noise(self, kind: str) -> torch.Tensor:
        return torch.from_numpy(self._receive(kind))

    def rand(self, *size: int) -> torch.Tensor:
        """LIET's: the part of the pixels that start at noise, which we draw before the noise, and then the sign."""
        return self.ahead.pop("part") if self.ahead else self._noise("random")

    def rand_like(self, other: torch.Tensor) -> torch.Tensor:
        """LIET's: which pixels start at noise, or how unevenly labels are spread: over the classes themselves, or over a batch's."""
        if other.dim() == 4:
            self.ahead = {"part": self._noise("random"), "noise": self._noise("uniform")}
        kind, numbers = self.pipe.recv()
        return torch.from_numpy(numbers) if kind == "random" else (1 + torch.from_numpy(numbers)) / 2

    def sample(self, distribution: torch.distributions.Categorical, *_: Any) -> torch.Tensor:
        """Our action for the next head, whose probabilities are noted."""
        if not self.heads:
            self.actions = self._receive("actions")
            self.heads = ["method", *self.actions]
        head = self.heads.pop(0)
        if head == "method":
            return torch.zeros(len(distribution.probs), dtype=torch.int64)
        probabilities = self.found.setdefault("probabilities", {})
        probabilities[f"{head} {len(probabilities)}"] = distribution.probs.detach().numpy()
        return torch.from_numpy(self.actions[head])

    # ---- what is replaced and watched

    def run(self) -> None:
        models = of_ours("models")

        def classifier(*_: Any) -> torch.nn.Module:
            network = models.build(**CLASSIFIER)
            self.seen.setdefault("classifier", network)
            return network

        torch.Tensor.uniform_ = self._while_on(torch.Tensor.uniform_, lambda into, low=0.0, high=1.0: self.uniform(into, low, high))
        torch.randn = self._while_on(torch.randn, lambda *a: self._noise("normal"))
        torch.rand = self._while_on(torch.rand, self.rand)
        torch.rand_like = self._while_on(torch.rand_like, self.rand_like)
        torch.distributions.Categorical.sample = lambda distribution, *a: self.sample(distribution)
        self._watch()
        if METHODS[self.name].module == "train_las_at":
            self._las(classifier, models.StrategyNetwork)
        else:
            self._fastat(classifier)

    def _while_on(self, theirs: Callable, ours: Callable) -> Callable:
        return lambda *a, **k: (ours if self.on else theirs)(*a, **k)

    def _watch(self) -> None:
        losses, duplicate = Losses(), copy.deepcopy

        def watched_copy(thing: Any, *a: Any) -> Any:
            made = duplicate(thing, *a)
            if isinstance(made, torch.nn.Module):
                self.copied = made
            return made

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for kind, network in self.seen.items():
                if self.on and next(network.parameters()) is optimizer.param_groups[0]["params"][0]:
                    found = snapshot(network, optimizer) | {"loss": {"": np.array(losses.value)}}
                    self.found |= prefixed(kind, {name: value for name, value in found.items() if name not in ("weights", "buffers")})
        copy.deepcopy = watched_copy
        register_optimizer_step_post_hook(after_step)

    def _las(self, classifier: Callable, build: Callable) -> None:
        """The scripts for las-at and las-trades run on import, that for las-awp has a main."""
        awp = self.name == "las-awp"
        stub("tensorboardX", SummaryWriter=Nothing)
        networks, utils = importlib.import_module("StrategyNet"), importlib.import_module("utils")
        create = getattr(networks, "ResNet18_StrategyNet" if awp else "ResNet18_Strategy")
        importlib.import_module("CIFAR10_models").ResNet18 = classifier
        utils.get_loaders = lambda *a: (self, [])
        utils.evaluate_pgd = utils.evaluate_standard = lambda *a: (0.0, 0.0)

        def strategy(args: Any) -> torch.nn.Module:
            self.seen["strategy"] = Small(build, args) if self.experiment.small else create(args)
            return self.seen["strategy"]
        networks.ResNet18_Strategy = strategy

        text = self.script.read_text()
        sys.argv = [self.script.name, "--batch-size", str(BATCH)]
        for name, value in self.experiment.published.items():
            sys.argv += [f"--{name if f'--{name}' in text else name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        namespace: dict[str, Any] = {"__name__": "published", "__file__": str(self.script)}
        exec(compile(text, self.script.name, "exec"), namespace)
        if awp:
            namespace["mu"], namespace["std"] = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
            namespace["cifar10"] = lambda root: dict.fromkeys(("train", "test"), {"data": np.zeros((1, 32, 32, 3)), "labels": [0]})
            test = [{"input": torch.rand(1, 3, 32, 32), "target": torch.zeros(1, dtype=torch.int64)}]
            namespace["Batches"] = lambda *a, shuffle, **k: self if shuffle else test
            namespace["main"]()

    def _fastat(self, classifier: Callable) -> None:
        stub("yaml", safe_load=lambda file: dict(_flat(line) for line in file if ":" in line))
        stub("torchattacks", PGD=None, FGSM=None)
        torch.FloatTensor = torch.empty
        main = importlib.import_module("main")
        nothing = dict.fromkeys(("val_acc", "fgsm_acc", "pgd_acc"), 0.0)
        importlib.import_module("fast_at.at_base").ATBase._validate_with_weight_average = lambda *a: {
            "model": nothing, "wa_model": nothing, "best_model": "model", "best_pgd_acc": 0.0, "best_val_acc": 0.0}
        main.get_data_loaders, main.get_model = lambda *a: (self, [], None, 10), classifier
        name = self.name.replace("-", "_")
        settings = [self.checkout / "configs" / "cifar10" / f"{part}.yaml" for part in ("common", name)]
        self.files += settings
        main.run_experiment(main.load_config(*settings) | self.experiment.published, name, 0, torch.device("cpu"))


def _flat(line: str) -> tuple[str, Any]:
    """A line of a flat YAML file."""
    name, _, text = line.partition(":")
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(text.strip(), text.strip()))
    except (ValueError, SyntaxError):
        return name, text.strip()


def theirs(name: str, experiment: Experiment, checkout: Path, pipe: Any) -> None:
    """Executes the published script."""
    Surroundings(name, experiment, checkout, pipe).run()


# ---- our side --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replaced(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def ours(name: str, experiment: Experiment, data: Path, steps: int, pipe: Any) -> tuple[Differences, dict[str, str]]:
    """Runs our training script against the process at the other end of `pipe`."""
    import engine
    from engine.networks import Classifier
    from utils import eval_mode

    module = importlib.import_module(METHODS[name].module)
    start = receive(pipe)
    differences = Differences()
    notes = differences.notes
    notes |= {"changed_in_ours": [CHANGES[change] for change in experiment.changes], "small_strategy_network": experiment.small}
    changes, plain = experiment.changes, experiment.plain

    class Plain(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.contiguous())

    class Watched(engine.Run):
        def __init__(self, *a: Any) -> None:
            self.of_step: dict[str, Any] = {}
            super().__init__(*a)
            self.quiet = False
            self.drops = [round(self.total * decay) for decay in self.cfg.DECAYS]
            schedule = self._schedule
            if "early rate" in changes:
                self._schedule = lambda step, *rest: schedule(step + 1, *rest)
            if plain:
                self.model.__class__ = Plain  # of which a copy is plain as well
                for group in self.optimizer.param_groups:
                    group["fused"] = False

        @property
        def lr(self) -> float:
            return super().lr * (0.1 if "twice decayed" in changes and self._position.step in self.drops else 1)

        def keep(self, **objects: Any) -> None:
            super().keep(**objects)
            for kind, kept in objects.items():
                theirs = start["initial"].get("classifier" if kind == "average" else kind)
                if theirs is not None:
                    theirs = {key: torch.from_numpy(value) for key, value in theirs.items()}
                    kept.load_state_dict(our_names(theirs) if kind == "strategy" else theirs)
                if isinstance(kept, torch.nn.Module) and plain:
                    kept.to(memory_format=torch.contiguous_format)
            if "strategy" in objects:
                self.strategy = objects["strategy"], objects["strategy_optimizer"]
            if "universal" in objects:
                objects["universal"].copy_(torch.from_numpy(start["universal"]))

        def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
            for x, y, index in super().batches():
                pipe.send(("batch", (x.contiguous().numpy(), y.numpy())))
                self.losses: dict[str, float] = {}
                self.probabilities: dict[str, np.ndarray] = {}
                yield x.contiguous() if plain else x, y, index
                if "clean pass" in changes:
                    with torch.no_grad():
                        self.model(x)
                self._compare(self._everything(sys._getframe(1).f_locals | self.of_step))

        def captured(self, step: Callable[..., None]) -> Any:
            """And at the step's end its own variables are noted."""
            def ended(frame: Any, event: str, _: Any) -> None:
                if event == "return" and frame.f_code is step.__code__:
                    self.of_step = dict(frame.f_locals)

            def watched(*arguments: Any) -> None:
                sys.setprofile(ended)
                try:
                    step(*arguments)
                finally:
                    sys.setprofile(None)
            return super().captured(watched)

        def _hand_over(self, kind: str, numbers: torch.Tensor) -> torch.Tensor:
            if not self.quiet:
                pipe.send((kind, numbers.contiguous().numpy()))
            return numbers

        def uniform(self, x: torch.Tensor) -> torch.Tensor:
            return self._hand_over("uniform", super().uniform(x))

        def normal(self, x: torch.Tensor) -> torch.Tensor:
            return self._hand_over("normal", super().normal(x))

        def random(self, *size: int) -> torch.Tensor:
            return self._hand_over("random", super().random(*size))

        def choose(self, logits: dict[str, torch.Tensor], uniform: Callable) -> Any:
            """train_las_at.choose; its actions are handed over instead of its noise."""
            self.quiet = True
            action, log_p = choose(logits, uniform)
            self.quiet = False
            pipe.send(("actions", {head: chosen.numpy() for head, chosen in action.items()}))
            for head, values in logits.items():
                self.probabilities[f"{head} {len(self.probabilities)}"] = values.detach().softmax(1).numpy()
            return action, log_p

        def update(self, loss: torch.Tensor, optimizer: Any = None, **rest: Any) -> None:
            super().update(loss, optimizer, **rest)
            self.losses["classifier" if optimizer is None else "strategy"] = loss.item()
            if "late average" in changes and self._position.step == 1:
                self.average.load_state_dict(self.network.state_dict())

        def _everything(self, local: dict[str, Any]) -> dict[str, Any]:
            """What is remembered at the end of a batch, where the script's own variables are `local`."""
            x = local["x"]
            found = prefixed("classifier", snapshot(self.network, self.optimizer)) | single(perturbed_images=(local["noisy"] if name == "fgsm-rs-cs" else x) + local["delta"])
            if "strategy" in start["initial"]:
                found |= prefixed("strategy", state(self.strategy[0])) | {"probabilities": self.probabilities}
            if "strategy" in self.losses:
                rewards = self._rewards(**{what: local[what] for what in ("x", "y", "trained", "robust", "score", "reward")})
                found |= prefixed("strategy", snapshot(*self.strategy)) | prefixed("copy", state(local["trained"].network)) | single(rewards=rewards)
            if name == "liet":
                found |= single(label_information=local["information"], weight_of_the_divergence=local["weight"])
            if name == "fgsm-uap":
                found |= single(universal_perturbation=local["universal"], universal_momentum=local["momentum"])
            if name == "fgsm-rs-cs":
                found |= single(noisy_loss=local["noisy_loss"], level=local["level"], sum_of_the_epoch=local["epoch_sum"])
                self._note_pull(local["noisy_loss"].item() - local["level"].item())
            if self.average is not None:
                found |= averaged(self.average.state_dict())
            return found | prefixed_losses(self.losses)

        def _rewards(self, x: Any, y: Any, trained: Any, robust: Any, score: Any, reward: Any) -> list[float]:
            """R1, R2, R3 and their sum, of which the script itself keeps R3 and the sum; R2 is measured again."""
            with torch.no_grad(), eval_mode(trained):
                second = self.cfg.robust * float((trained(x + robust).argmax(1) == y).to(x.dtype).mean())
            total, third = float(reward), self.cfg.clean * float(score)
            rewards = [total - second - third, second, third, total]
            for what, value in zip(("smallest_rewards", "largest_rewards"), (np.minimum, np.maximum)):
                notes[what] = value(notes.get(what, rewards), rewards).tolist()
            return rewards

        def _note_pull(self, strays: float) -> None:
            pulls = self.cfg.stride < self._position.epoch < self.cfg.epochs - self.cfg.stride
            pulled = "inside_gamma" if abs(strays) <= self.cfg.gamma else "pulled_down" if strays > 0 else "pulled_up"
            what = pulled if pulls else "nothing_may_pull"
            notes[what] = notes.get(what, 0) + 1

        def _compare(self, found: dict[str, Any]) -> None:
            differences.compare(self._position.step, found, receive(pipe))
            if self._position.step == steps:
                raise Enough

    created: list[Watched] = []

    def create(*a: Any) -> Watched:
        created.append(Watched(*a))
        return created[0]

    inside: dict[str, Any] = {}
    if module.__name__ == "train_las_at":
        choose, network = module.choose, module.StrategyNetwork
        inside["choose"] = lambda *a: created[0].choose(*a)
        if experiment.small:
            inside["StrategyNetwork"] = lambda actions, **k: network(actions, **k | SMALL)
    images(BATCH * (experiment.per_epoch - 1) + SHORT, experiment.saturated, data)
    cfg = module.Config(
        dataset="cifar10", data_dir=str(data), out_dir=str(data / "run"), batch_size=BATCH, augment="none", select_on="test", val_size=0,
        device="cpu", save_every=1e9, arch=CLASSIFIER["name"], width=CLASSIFIER["width"], **experiment.ours)
    doubled = {"float": lambda tensor: tensor.to(torch.get_default_dtype())}
    with replaced(engine, {"Run": create}), replaced(module, inside), replaced(torch.Tensor, doubled), contextlib.suppress(Enough):
        module.main(cfg)
    return differences, start["files"]


def prefixed_losses(losses: dict[str, float]) -> dict[str, Any]:
    return {f"{kind} loss": {"": np.array(value)} for kind, value in losses.items()}


if __name__ == "__main__":
    groups = {name: "las" if method.module == "train_las_at" else "fastat" for name, method in METHODS.items()}
    main(__doc__, METHODS, {"all": REPLACED["all"]} | {name: REPLACED[group] + REPLACED[name] for name, group in groups.items()},
         theirs=theirs, ours=ours)
