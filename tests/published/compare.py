"""Do our scripts compute what the authors' published code computes? Their own loop and ours, step by step.

    python tests/published/compare.py sdi --checkout DIR     https://github.com/jiaxiaojunQAQ/FGSM-SDI
    python tests/published/compare.py rs  --checkout DIR     https://github.com/locuslab/fast_adversarial
    python tests/published/compare.py ga  --checkout DIR     https://github.com/tml-epfl/understanding-fast-adv-training

DIR is a copy of the authors' repository. Nothing of it is part of this one: their training script is executed from DIR,
unchanged, in a process of its own, where only what surrounds it is replaced (`REPLACED`). Ours is `main(cfg)` of the
training script on the real engine, watched through a subclass of `engine.Run` that changes no number: it takes the
published initial weights, hands every batch and every noise tensor of ours to the other process, and after every
update of the classifier compares all that either side remembers. Everything is float64, one thread each, on the CPU.

Rounding is not the subject. Where it would be amplified (eight images a batch at the recipe's learning rate multiply
any difference by ten at every step), the run is repeated with the two things switched off in which our engine only
reorders sums, channels-last memory and fused SGD; and without these at a smaller learning rate.

Writes results/fidelity/<method>.json: per run and quantity the largest difference over all steps and when it occurred.
A relative difference is max |ours - theirs| over a tensor divided by max |theirs| over that tensor.
Two minutes a run, about a quarter of an hour a method.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from theirs import ROOT, Losses, Nothing, alone, executed, initial_state, stub
from torch.optim.optimizer import register_optimizer_step_post_hook

BATCH = 8
SHORT = 3  # images in an epoch's last batch

REPLACED = {
    "all": [
        "Tensor.cuda and Module.cuda return what they are given, and torch.cuda.is_available says no; torch is seeded with 0 beforehand",
        "the default dtype is float64; Tensor.float casts to it, torch.cuda.FloatTensor makes it",
        "the training loader yields the batches of our run; the test loader is empty",
        "Tensor.uniform_(-b, b), while an epoch is under way, gives b times the U(-1, 1) noise of our run",
        "the evaluation functions return zeros; what is printed is thrown away; files go to a temporary folder",
    ],
    "sdi": ["the argument `attacker`, which the script reads and never defines, is supplied", "tensorboardX is a stub"],
    "rs": ["apex.amp is a stub: initialize returns what it is given, scale_loss the loss",
           "the loader's normalisation, by the script's own mean and deviation, is done in float64"],
    "ga": ["apex.amp is a stub", "the loader keeps the short last batch, which the script's own drops (drop_last)",
           "epoch 0, one batch without an update, runs on random numbers of its own; the weights and BatchNorm buffers "
           "after it are the initial ones of the comparison"],
}


@dataclass(kw_only=True)
class Experiment:
    """One run of both sides: the published script's arguments, our flags, and what is special."""

    says: str
    published: dict[str, Any]
    ours: dict[str, Any]
    per_epoch: int = 23
    steps: int = 45
    plain: bool = False  # our engine without channels-last memory and fused SGD
    saturated: bool = False  # images with pixels at exactly 0 and 1
    identity: bool = False  # the published mean and deviation are replaced by 0 and 1
    old_ties: bool = False  # the published torch.max and torch.min have the derivative at ties that they had before torch 1.9
    tie: float = 1.0  # what our gradient at saturated pixels is multiplied by: an experiment, not our code
    warm_up: int = 0  # published epochs before the first one with updates


@dataclass
class Method:
    url: str
    commit: str
    digest: str  # of the published files that are executed, at that commit
    script: str
    module: str
    experiments: dict[str, Experiment]
    networks: dict[str, str] = field(default_factory=dict)  # what of the published code makes the classifier, and a teacher, where a file asks for that


def _sdi(rate: float, **special: Any) -> dict[str, Any]:
    """66 updates in all, so that the published milestones, 60 and 63, are whole numbers."""
    arguments = dict(epochs=3, lr_schedule="multistep", lr=rate)
    return dict(published=arguments, ours=arguments, per_epoch=22, steps=66, saturated=True, **special)


def _cyclic(rate: float, ours: dict[str, Any], **special: Any) -> dict[str, Any]:
    shared = dict(epochs=2, lr_schedule="cyclic")
    return dict(published=shared | dict(lr_max=rate), ours=shared | dict(lr=rate) | ours, **special)


def _ga(**special: Any) -> dict[str, Any]:
    """The published `piecewise` schedule is constant in its first half: three epochs of six."""
    return dict(
        published=dict(epochs=6, lr_schedule="piecewise", lr_max=1e-3, attack="fgsm", attack_init="zero", grad_align_cos_lambda=0.2),
        ours=dict(epochs=6, lr_schedule="constant", lr=1e-3, ga_lambda=0.2, arch="preactresnet18c"), warm_up=1, **special)


METHODS = {
    "sdi": Method(
        "https://github.com/jiaxiaojunQAQ/FGSM-SDI", "d54cac68b52d4a11ff54817ca3d904f1a3b02b42",
        "d1c832aa6b1e794e51a3203ad571e946829f713f087a334325f158987344d29d", "FGSM_SDI.py", "train_fgsm_sdi", {
            "multistep": Experiment(says="the recipe's rate, our engine in plain layout", **_sdi(0.1, plain=True)),
            "multistep, small rate": Experiment(says="our engine as it is", **_sdi(0.01)),
            "cyclic": Experiment(says="the recipe's rate, our engine in plain layout", **_cyclic(0.2, {}, plain=True, saturated=True)),
            "cyclic, small rate": Experiment(says="our engine as it is", **_cyclic(0.02, {}, saturated=True)),
        }),
    "rs": Method(
        "https://github.com/locuslab/fast_adversarial", "54f728755e71857b632882ba6d6cef22f56e2172",
        "b35c53936efb2c722b8a9d8d18dfe248063baa4e38511bcc0468ffd0ba128d46", "CIFAR10/train_fgsm.py", "train_fgsm_rs", {
            "normalised": Experiment(
                says="as published: their images, radius and step are divided by the deviation; our network begins with that",
                **_cyclic(0.2, dict(arch="preactresnet18b", normalise="dataset"))),
            "identity": Experiment(
                says="their mean replaced by 0 and their deviation by 1, our --normalise none; our engine in plain layout",
                **_cyclic(0.2, dict(arch="preactresnet18b"), identity=True, plain=True)),
            "identity, small rate": Experiment(
                says="our engine as it is", **_cyclic(0.02, dict(arch="preactresnet18b"), identity=True)),
            "saturated": Experiment(
                says="as published, at a small rate, and images with pixels at 0 and 1",
                **_cyclic(0.02, dict(arch="preactresnet18b", normalise="dataset"), saturated=True)),
        }),
    "ga": Method(
        "https://github.com/tml-epfl/understanding-fast-adv-training", "ceed49440bfc35a676375b783eaba5940e583bcc",
        "0906320371c411ff18017934d4755a7668b0d787d5269d8c94bb88c6aac59a15", "train.py", "train_fgsm_ga", {
            "constant": Experiment(says="no pixel at 0 or 1", **_ga()),
            "saturated": Experiment(
                says="pixels at 0 and 1: the published clamp(x + delta, 0, 1) halves their gradient, ours does not",
                **_ga(saturated=True, steps=5)),
            "saturated, ours halved": Experiment(
                says="with our gradient at x halved at these pixels: the whole of the difference", **_ga(saturated=True, tie=0.5)),
            "saturated, before torch 1.9": Experiment(
                says="torch.max and torch.min with their derivative at ties in the authors' torch 1.4: no gradient, hence no perturbation, there",
                **_ga(saturated=True, old_ties=True, steps=5)),
            "saturated, before torch 1.9, ours zero": Experiment(
                says="with our gradient at x zero at these pixels: the whole of the difference", **_ga(saturated=True, old_ties=True, tie=0.0)),
        }),
}


# ---- both sides ------------------------------------------------------------------------------------------------------

def snapshot(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a network and its optimizer remember, and the rates of the step just done, as numpy arrays by name."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    group, = optimizer.param_groups
    found: dict[str, Any] = {
        "weights": {name: parameter for parameter, name in names.items()},
        "buffers": {name: buffer for name, buffer in network.named_buffers() if not name.startswith("normalize.")},
        "lr": {"": torch.tensor(group["lr"])},
    }
    if "momentum" in group:
        found["momentum"] = {"": torch.tensor(group["momentum"])}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is not None:
                found.setdefault(f"optimizer {key}", {})[names[parameter]] = value
    return {quantity: {name: value.detach().numpy().copy() for name, value in values.items()} for quantity, values in found.items()}


def prefixed(prefix: str, found: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix} {quantity}": values for quantity, values in found.items()}


# ---- the published side, in a process of its own ---------------------------------------------------------------------

class Feed:
    """The published training loader: what our run hands over, batch by batch."""

    def __init__(self, pipe: Any, experiment: Experiment, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.pipe, self.warm_up, self.per_epoch, self.change = pipe, experiment.warm_up, experiment.per_epoch, change
        self.begin: Callable[[], None] | None = None  # called once, before the first batch that is compared
        self.noise: torch.Tensor | None = None
        self.channel = 0
        self.on = False  # while an epoch is under way: the noise is ours then, and steps are watched

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.warm_up:
            self.warm_up -= 1
            for _ in range(self.per_epoch):
                yield torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
            return
        if self.begin:
            self.begin()
            self.begin = None
        self.on = True
        for _ in range(self.per_epoch):
            x, y = self.pipe.recv()
            self.noise, self.channel = None, 0
            yield self.change(torch.from_numpy(x)), torch.from_numpy(y)
        self.on = False

    def draw(self, into: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """b times our noise: all of it at once, or the next channel."""
        assert low == -high
        if self.noise is None:
            self.noise = torch.from_numpy(self.pipe.recv())
        noise = self.noise
        if into.dim() == 3:
            noise, self.channel = noise[:, self.channel], self.channel + 1
        assert noise.shape == into.shape
        return into.copy_(high * noise)


def theirs(method: str, experiment: Experiment, checkout: Path, pipe: Any) -> None:
    """Executes the published script."""
    seen: dict[str, torch.nn.Module] = {}  # their networks, the first one of each kind
    generator_found: dict[str, Any] = {}

    # What surrounds it.
    stub("tensorboardX", SummaryWriter=Nothing)
    parse = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self: types.SimpleNamespace(attacker="generator", **vars(parse(self)))

    utils = importlib.import_module("utils")
    if experiment.identity:
        utils.mu, utils.std = torch.zeros_like(utils.mu), torch.ones_like(utils.std)
        utils.lower_limit, utils.upper_limit = utils.mu, utils.std
    feed = Feed(pipe, experiment, (lambda x: (x - utils.mu) / utils.std) if method == "rs" else lambda x: x)
    utils.evaluate_pgd = utils.evaluate_standard = lambda *a, **k: (0.0, 0.0)
    utils.rob_acc, utils.get_grad_np, utils.avg_cos_np = lambda *a, **k: (0.0, 0.0, None), lambda *a, **k: None, lambda *a, **k: 0.0
    utils.get_loaders = lambda *a, **k: (feed, [])
    if method == "ga":
        importlib.import_module("data").get_loaders = lambda *a, train_set, data_augm, **k: feed if train_set and data_augm else []
    draw = torch.Tensor.uniform_
    torch.Tensor.uniform_ = lambda self, low=0.0, high=1.0, **k: feed.draw(self, low, high) if feed.on else draw(self, low, high, **k)

    if experiment.old_ties:
        torch.max = _old(torch.max, torch.gt)
        torch.min = _old(torch.min, torch.lt)

    # What is watched.
    def record(kind: str, module: str, name: str) -> None:
        network_class = getattr(importlib.import_module(module), name)
        create = network_class.__init__

        def created(self: torch.nn.Module, *a: Any, **k: Any) -> None:
            create(self, *a, **k)
            seen.setdefault(kind, self)
        network_class.__init__ = created

    record("classifier", *{"sdi": ("models.resnet", "ResNet"), "rs": ("preact_resnet", "PreActResNet"), "ga": ("models", "PreActResNet")}[method])
    if method == "sdi":
        record("generator", "attacker", "One_Layer_Attacker")
    losses = Losses()

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal generator_found
        if not feed.on:
            return
        if isinstance(optimizer, torch.optim.Adam):
            generator_found = prefixed("generator", snapshot(seen["generator"], optimizer) | {"loss": {"": np.array(losses.value)}})
        else:
            found = prefixed("classifier", snapshot(seen["classifier"], optimizer) | {"loss": {"": np.array(losses.value)}})
            pipe.send(found | generator_found)
    register_optimizer_step_post_hook(after_step)

    script = checkout / Path(METHODS[method].script).name

    def begin() -> None:
        pipe.send({"initial": {kind: initial_state(network) for kind, network in seen.items()}, "files": executed(checkout, script)})
    feed.begin = begin

    sys.argv = [script.name]
    for name, value in experiment.published.items():
        flag = name if f"--{name}" in script.read_text() else name.replace("_", "-")
        sys.argv += [f"--{flag}", str(value)]
    sys.argv += ["--batch_size" if "--batch_size" in script.read_text() else "--batch-size", str(BATCH)]
    namespace: dict[str, Any] = {"__name__": "published", "__file__": str(script)}
    exec(compile(script.read_text(), script.name, "exec"), namespace)
    if method != "sdi":  # whose script runs on import
        namespace["main"]()


def _old(now: Callable, beats: Callable) -> Callable:
    """torch.max or torch.min of two tensors, whose gradient goes to the second at ties."""
    def chosen(a: torch.Tensor, *b: Any, **k: Any) -> Any:
        return torch.where(beats(a, b[0]), a, b[0]) if b and isinstance(b[0], torch.Tensor) else now(a, *b, **k)
    return chosen


# ---- our side --------------------------------------------------------------------------------------------------------

class Enough(Exception):
    """As many steps as were asked for."""


class Differences:
    """The largest difference per quantity, and the step after which it was found (counted from 1)."""

    def __init__(self) -> None:
        self.largest: dict[str, dict[str, dict[str, float]]] = {}
        self.losses: list[dict[str, float]] = []
        self.notes: dict[str, Any] = {}  # what else the report says of the run, how often the cases occurred that it is to show above all

    def compare(self, step: int, found: dict[str, Any], theirs: dict[str, Any], tell: bool = True) -> None:
        """What both sides remember after update number `step` of the classifier, quantity by quantity."""
        if found.keys() != theirs.keys():
            raise SystemExit(f"only one side has {sorted(found.keys() ^ theirs.keys())}")
        for quantity in theirs:
            self.add(step, quantity, found[quantity], theirs[quantity])
        loss, published = (float(side["classifier loss"][""]) for side in (found, theirs))
        self.losses.append({"ours": loss, "published": published})
        if tell:
            largest = max(entry["relative"]["value"] for entry in self.largest.values())
            print(f"step {step:3d}  loss {loss:.6f}  largest relative difference so far {largest:.2e}", flush=True)

    def add(self, step: int, quantity: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
        theirs = {name: value for name, value in theirs.items() if not name.startswith("model_preact_hl1.")}  # GA's second names
        if ours.keys() != theirs.keys():
            raise SystemExit(f"{quantity}: only one side has {sorted(ours.keys() ^ theirs.keys())}")
        entry = self.largest.setdefault(quantity, {kind: {"value": 0.0, "step": step} for kind in ("absolute", "relative")})
        for name, value in theirs.items():
            difference = float(np.abs(ours[name].astype(np.float64) - value).max())
            size = float(np.abs(value).max())
            for kind, measured in {"absolute": difference, "relative": difference / size if size else float("inf") if difference else 0.0}.items():
                if not measured <= entry[kind]["value"]:
                    entry[kind] = {"value": measured, "step": step, "of": name} if name else {"value": measured, "step": step}


def ours(method: str, experiment: Experiment, data: Path, steps: int, pipe: Any) -> tuple[Differences, dict[str, Any]]:
    """Runs our training script against the process at the other end of `pipe`."""
    import engine

    module = importlib.import_module(METHODS[method].module)
    start = receive(pipe)
    differences = Differences()

    class Watched(engine.Run):
        def __init__(self, *a: Any) -> None:
            super().__init__(*a)
            if experiment.plain:
                self.model.forward = lambda x: self.network(x.contiguous())
                for group in self.optimizer.param_groups:
                    group["fused"] = False

        def keep(self, **objects: Any) -> None:
            super().keep(**objects)
            for name in objects.keys() & start["initial"].keys():
                network = objects[name]
                theirs = {key: torch.from_numpy(value) for key, value in start["initial"][name].items() if not key.startswith("model_preact_hl1.")}
                own = {key: value for key, value in network.state_dict().items() if key.startswith("normalize.")}
                network.load_state_dict(theirs | own)
                if experiment.plain:
                    network.to(memory_format=torch.contiguous_format)
            self.generator = objects.get("generator"), objects.get("generator_optimizer")
            self.generator_found: dict[str, Any] = {}

        def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
            for x, y, index in super().batches():
                pipe.send((x.contiguous().numpy(), y.numpy()))
                yield x.contiguous() if experiment.plain else x, y, index

        def uniform(self, x: torch.Tensor) -> torch.Tensor:
            noise = super().uniform(x)
            pipe.send(noise.contiguous().numpy())
            return noise

        def update(self, loss: torch.Tensor, optimizer: Any = None, **rest: Any) -> None:
            super().update(loss, optimizer, **rest)
            value = {"loss": {"": np.array(loss.item())}}
            if optimizer is not None:
                self.generator_found = prefixed("generator", snapshot(*self.generator) | value)
                return
            found = prefixed("classifier", snapshot(self.network, self.optimizer) | value) | self.generator_found
            differences.compare(self._position.step, found, receive(pipe))
            if self._position.step == steps:
                raise Enough

    n = BATCH * (experiment.per_epoch - 1) + SHORT
    images(n, experiment.saturated, data)
    cfg = module.Config(
        dataset="cifar10", data_dir=str(data), out_dir=str(data / "run"), batch_size=BATCH, augment="none", select_on="test", val_size=0,
        device="cpu", save_every=1e9, **experiment.ours)
    run, gradient = engine.Run, module.input_gradient

    def tied(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gradient(model, x, y) * torch.where((x == 0) | (x == 1), experiment.tie, 1.0)

    engine.Run = Watched
    if experiment.tie != 1:
        module.input_gradient = tied
    try:
        module.main(cfg)
    except Enough:
        pass
    finally:
        engine.Run, module.input_gradient = run, gradient
    return differences, start["files"]


def receive(pipe: Any) -> dict[str, Any]:
    found = pipe.recv()
    if "error" in found:
        raise SystemExit(f"the published side failed:\n{found['error']}")
    return found


def images(n: int, saturated: bool, folder: Path) -> None:
    """Ten coarse patterns under noise, as the engine's own file: training images, and two to evaluate on."""
    random = np.random.default_rng(0)
    labels = random.integers(10, size=n + 2)
    patterns = random.uniform(size=(10, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    values = 255 * (0.5 * patterns[labels] + 0.5 * random.uniform(size=(n + 2, 32, 32, 3)))
    if saturated:
        values = 127.5 + 1.7 * (values - 127.5)
    x = np.clip(np.round(values), *((0, 255) if saturated else (1, 254))).astype(np.uint8)
    np.savez(folder / "cifar10.npz", x_train=x[:n], y_train=labels[:n], x_test=x[n:], y_test=labels[n:])


def compare(method: str, experiment: Experiment, checkout: Path, steps: int,
            theirs: Callable[..., None] = theirs, ours: Callable[..., Any] = ours) -> tuple[dict[str, Any], dict[str, str]]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=alone, args=(theirs, method, experiment, checkout, there), daemon=True)
    process.start()
    there.close()
    with tempfile.TemporaryDirectory() as folder:
        try:
            differences, files = ours(method, experiment, Path(folder), steps, here)
        except (BrokenPipeError, ConnectionResetError):
            receive(here)  # why the published side gave up
            raise
    here.close()
    process.join()
    return {
        "what": experiment.says, "steps": steps, "batches_per_epoch": experiment.per_epoch, "batch_size": BATCH, "last_batch": SHORT,
        "published_arguments": experiment.published, "our_flags": experiment.ours,
        "our_engine_in_plain_layout": experiment.plain, "saturated_pixels": experiment.saturated,
        "loss_of_the_first_step": differences.losses[0], "loss_of_the_last_step": differences.losses[-1],
        "largest_differences": differences.largest, **differences.notes,
    }, files


def main(doc: str = __doc__, methods: dict[str, Method] = METHODS, replaced: dict[str, list[str]] = REPLACED, **sides: Callable[..., Any]) -> None:
    """The command line; another file gives its own methods, and the two `sides` that `compare` runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=methods)
    parser.add_argument("--checkout", type=Path, required=True, help="a copy of the authors' repository")
    parser.add_argument("--steps", type=int, help="stop every run after so many updates of the classifier; nothing is written")
    parser.add_argument("--only", help="one of the method's runs; nothing is written")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "results" / "fidelity", help="where <method>.json goes")
    options = parser.parse_args()
    method = methods[options.method]
    checkout = next((d for d in (options.checkout / Path(method.script).parent, options.checkout) if (d / Path(method.script).name).is_file()), None)
    if checkout is None:
        parser.error(f"--checkout {options.checkout}: there is no {method.script} in it")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    from engine import record

    runs, files = {}, {}
    for name, experiment in method.experiments.items():
        if options.only in (None, name):
            print(f"{options.method}, {name}: {experiment.says}")
            steps = min(options.steps or experiment.steps, experiment.steps)
            began = time.perf_counter()
            runs[name], files = compare(options.method, experiment, checkout.resolve(), steps, **sides)
            print(f"  {runs[name]['steps']} steps in {time.perf_counter() - began:.0f} s")
            for quantity, entry in runs[name]["largest_differences"].items():
                absolute, relative = entry["absolute"]["value"], entry["relative"]["value"]
                print(f"  {quantity:36s} absolute {absolute:.2e}  relative {relative:.2e}  step {entry['relative']['step']}")
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    if digest != method.digest:
        print(f"the published files are not those of commit {method.commit} (digest {digest})")
    if options.only or options.steps:
        return
    provenance = record.provenance(torch.device("cpu"), "fp64", record.source())
    path = options.out_dir / f"{options.method}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write_json({
        "published": {"repository": method.url, "commit": method.commit if digest == method.digest else None,
                      "script": method.script, "files": files},
        "ours": {"script": f"{method.module}.py", "commit": provenance["commit"], "dirty": provenance["dirty"]},
        "torch": torch.__version__, "python": platform.python_version(), "precision": "float64", "threads": 1,
        "replaced_in_the_published_script": replaced["all"] + replaced.get(options.method, []), "runs": runs,
    }, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
