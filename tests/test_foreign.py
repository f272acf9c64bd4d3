"""The reader of checkpoints against files made the way the published scripts save theirs.

The keys and shapes are those of the published classes (fixtures/published_keys.json), the values random. Wide
ResNets are made narrow (width 1) except once: the names are the same, and the full one is 190 MB.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import subprocess
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import models
from engine import data, foreign
from engine.errors import Misuse

KEYS = json.loads((Path(__file__).parent / "fixtures" / "published_keys.json").read_text())
RESNET, RESNET_C100 = "FGSM-SDI/models/resnet.py", "FGSM-SDI/Cifar100_models/resnet.py"
PREACT_A, PREACT_TINY = "FGSM-SDI/models/preact_resnet.py", "FGSM-SDI/ImageNet_models/preact_resnet.py"
PREACT_B, PREACT_C = "fast_adversarial/CIFAR10/preact_resnet.py", "understanding-fast-adv-training/models.py"
PREACT_34 = "Improving-Single-Step-Adversarial-Training-By-Local-Smoothing/models.py 34, Tiny"
CNN1 = f"{PREACT_C} CNN 1 x 4"
WIDE = "FGSM-SDI/models/wide_resnet.py"
NARROW, NARROW_PLAIN = "wideresnet34-10-subblock width 1", "wideresnet34-10 width 1"
RESNET50, NARROW_50 = "torchvision resnet50", "torchvision resnet50 width_per_group 8"

AC, BD = ("preactresnet18a", "preactresnet18c"), ("preactresnet18b", "preactresnet18d")
RESNETS = ("resnet18", "resnet18-nuat")
SUBBLOCK, PLAIN = ("wideresnet34-10-subblock",), ("wideresnet34-10",)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def shapes(manifest: str) -> dict[str, tuple[int, ...]]:
    if manifest in (NARROW, NARROW_PLAIN):
        net = models.build(manifest.split()[0], width=1)
        return {key: tuple(value.shape) for key, value in bare(net).items()}
    if manifest in (RESNET50, NARROW_50):
        with torch.device("meta"):
            width = 64 if manifest == RESNET50 else 8
            net = torchvision.models.ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=width)
        return {key: tuple(value.shape) for key, value in net.state_dict().items()}
    once = (key for key in KEYS[manifest] if not key.startswith("model_preact_hl1."))
    return {key: tuple(KEYS[manifest][key]) for key in once}


def bare(net: nn.Module) -> dict[str, Tensor]:
    """The weights without the normalisation, which the published classes do not have."""
    return {key: value for key, value in net.state_dict().items() if not key.startswith("normalize.")}


def cast(state: dict, dtype: torch.dtype) -> OrderedDict:
    return OrderedDict((k, v.to(dtype) if v.is_floating_point() else v) for k, v in state.items())


@cache
def _weights(manifest: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(manifest).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(391)
        elif key.endswith("running_var") or len(shape) == 1 and key.endswith("weight"):
            state[key] = torch.rand(shape, generator=generator) + 0.5
        else:
            fan_in = max(1, int(np.prod(shape[1:])))
            state[key] = torch.randn(shape, generator=generator) * fan_in**-0.5
    return state


def weights(manifest: str, seed: int = 0) -> OrderedDict:
    """What state_dict() of the published class returns, with random values."""
    return OrderedDict(_weights(manifest, seed))


def prefixed(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def parallel(state: dict) -> OrderedDict:
    return prefixed("module.", state)


def optimizer() -> dict:
    parameter = nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    sgd.step()
    return sgd.state_dict()


def cyclic_schedule() -> dict:
    """As torch 1.x saved it: with a bound method, hence with the whole scheduler and its optimizer."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CyclicLR(sgd, 0.0, 0.1, step_size_up=5)
    return {"last_epoch": 3, "scale_fn": schedule._triangular_scale_fn, "base_lrs": [0.0]}


class RecordManager:
    """MAIR pickles an object of its own beside the weights."""

    def __init__(self):
        self.records, self.log = OrderedDict(Epoch=[1, 2]), ["line"]


def with_duplicates(state: dict) -> OrderedDict:
    """GradAlign's class registers its first layers a second time."""
    first = {"model_preact_hl1.1.": "conv1.", "model_preact_hl1.2.": "layer1.0.bn1."}
    first["model_preact_hl1.0."] = "_model.0."  # of the CNN
    manifest = CNN1 if "_model.0.weight" in state else PREACT_C
    duplicates = {key: state[original + key.removeprefix(again)] for again, original in first.items()
                  for key in KEYS[manifest] if key.startswith(again)}
    assert len(duplicates) == (2 if manifest == CNN1 else 6)
    return OrderedDict(state) | duplicates


def pair(mean: tuple, std: tuple, names: tuple[str, str], shape: tuple) -> dict:
    return {name: torch.tensor(values).reshape(shape) for name, values in zip(names, (mean, std))}


CIFAR, CKPT = foreign.NORMALISATIONS["cifar10"], foreign.NORMALISATIONS["cifar10-ckpt"]


@dataclass(frozen=True)
class Row:
    """One way in which published weights are saved.

    save: from a state_dict to what the script hands to torch.save; archs: all that the file can be;
    normalise: what it was trained with; carried: the file says so itself; options: of models.build.
    """

    manifest: str
    save: Callable[[OrderedDict], Any]
    archs: tuple[str, ...]
    normalise: str = "none"
    container: str = "raw"
    prefix: str = ""
    carried: bool = False
    legacy: bool = False
    classes: int = 10
    options: tuple[tuple[str, int], ...] = ()


ROWS = {
    "FGSM-SDI": Row(RESNET, dict, RESNETS),
    "FGSM-SDI, CIFAR-100": Row(RESNET_C100, dict, RESNETS, classes=100),
    "FGSM-SDI, released": Row(RESNET, parallel, RESNETS, prefix="module."),
    "FGSM-SDI, Tiny ImageNet": Row(
        PREACT_TINY, parallel, AC, prefix="module.", classes=200, options=(("image_size", 64),)),
    "FGSM-SDI, GradAlign baseline": Row(
        PREACT_A, lambda s: {"best": s, "last": weights(PREACT_A, 1)}, AC, container="best"),
    "FGSM-PGI": Row(RESNET, parallel, RESNETS, prefix="module."),
    "LAS-AT, best": Row(
        NARROW, lambda s: {"net": s, "best_acc": 0.57, "best_clean_acc": 0.86, "epoch": 100}, SUBBLOCK,
        container="net", options=(("width", 1),)),
    "LAS-AT, last, several GPUs": Row(
        NARROW, lambda s: {"net": parallel(s), "acc": np.float64(57.6), "epoch": 109}, SUBBLOCK,
        container="net", prefix="module.", options=(("width", 1),)),
    "LAS-AWP": Row(
        NARROW, lambda s: {"state_dict": parallel(s), "test_robust_acc": torch.tensor(0.6), "test_acc": 0.87},
        SUBBLOCK, "cifar10", container="state_dict", prefix="module.", options=(("width", 1),)),
    "fast_adversarial": Row(
        PREACT_B, lambda s: cast(s, torch.float16), BD, "cifar10", legacy=True),
    "GradAlign": Row(
        PREACT_C, lambda s: {"last": with_duplicates(weights(PREACT_C, 1)), "best": with_duplicates(s)}, AC,
        container="best"),
    "VFSAT": Row(
        PREACT_C, lambda s: {"last": weights(PREACT_C, 1), "best": with_duplicates(s),
                             "best_test": weights(PREACT_C, 2)}, AC, container="best"),
    "VFSAT, Tiny ImageNet": Row(
        PREACT_34, lambda s: {"last": with_duplicates(s), "best": parallel(with_duplicates(s)),
                              "best_test": parallel(with_duplicates(s))}, ("preactresnet34",),
        container="best", prefix="module.", classes=200, options=(("image_size", 64),)),
    "GradAlign, one layer": Row(
        CNN1, lambda s: {"last": weights(CNN1, 1), "best": with_duplicates(s)}, ("cnn1",), container="best"),
    "fast_adversarial and Free AT, ImageNet": Row(
        NARROW_50, lambda s: {"epoch": 15, "arch": "resnet50", "state_dict": parallel(s),
                              "best_prec1": torch.tensor(55.4), "optimizer": optimizer()}, ("resnet50",),
        "imagenet", container="state_dict", prefix="module.", legacy=True, classes=1000,
        options=(("width", 8),)),
    "CKPT": Row(
        PREACT_A, lambda s: pair(*CKPT, ("0.mean", "0.std"), (3,)) | prefixed("1.", s), AC, "cifar10-ckpt",
        prefix="1.", carried=True),
    "Rice, best": Row(
        PREACT_B, lambda s: {"state_dict": parallel(s), "test_robust_acc": 0.5, "test_acc": np.float64(0.8)},
        BD, "cifar10", container="state_dict", prefix="module."),
    "Rice, each epoch; AWP": Row(PREACT_B, parallel, BD, "cifar10", prefix="module.", legacy=True),
    "TRADES, MART": Row(NARROW, dict, SUBBLOCK, options=(("width", 1),), legacy=True),
    "MART, ResNet18": Row(RESNET, dict, RESNETS),
    "FAT, GAIRAT": Row(
        RESNET, lambda s: {"epoch": 120, "state_dict": parallel(s), "test_pgd20_acc": np.float64(48.1),
                           "optimizer": optimizer()}, RESNETS, container="state_dict", prefix="module."),
    "NuAT": Row(
        RESNET, lambda s: {"epoch": 9, "state_dict": s, "optimizer": optimizer(),
                           "scheduler": cyclic_schedule()}, RESNETS, container="state_dict", legacy=True),
    "NuAT, averaged; GAT": Row(RESNET, dict, RESNETS, legacy=True),
    "N-FGSM": Row(PREACT_B, dict, BD, "cifar10"),
    "MAIR": Row(
        PREACT_A, lambda s: {"accumulated_epoch": 3, "recordmanager": RecordManager(), "rmodel": {
            "n_classes": torch.tensor(10), **pair(*CIFAR, ("mean", "std"), (3,)), **prefixed("model.", s)}},
        AC, "cifar10", container="rmodel", prefix="model.", carried=True),
    "MAIR, normalising, several GPUs": Row(
        PREACT_A, lambda s: {"rmodel": {
            "n_classes": torch.tensor(10), **prefixed("model.module.1.", s),
            **prefixed("model.module.", pair(*CIFAR, ("0.mean", "0.std"), (3,)))}},
        AC, "cifar10", container="rmodel", prefix="model.module.1.", carried=True),
    "LBGAT": Row(NARROW_PLAIN, parallel, PLAIN, prefix="module.", options=(("width", 1),)),
    "RobustBench, with buffers": Row(
        PREACT_C, lambda s: {"state_dict": parallel(s | pair(*CIFAR, ("mu", "sigma"), (1, 3, 1, 1)))}, AC,
        "cifar10", container="state_dict", prefix="module.", carried=True),
    "torch.compile": Row(
        RESNET, lambda s: {"model": prefixed("_orig_mod.", s)}, RESNETS,
        container="model", prefix="_orig_mod."),
}


def saved(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def built(state: dict, arch: str, normalise: str = "none", **options: Any) -> nn.Module:
    """The reference: the network as `models` builds it, with these weights."""
    net = models.build(arch, normalise=foreign.NORMALISATIONS[normalise], **options)
    layer = {key: value for key, value in net.state_dict().items() if key.startswith("normalize.")}
    net.load_state_dict(cast(state, torch.float32) | layer)
    return net.eval()


def images(n: int = 2, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


# What is published ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ROWS)
def test_every_published_format_loads_with_the_logits_of_the_network_built_directly(name, tmp_path):
    row = ROWS[name]
    state = weights(row.manifest)
    path = saved(tmp_path / "file.pth", row.save(state), row.legacy)

    unwrapped, origin = foreign.unwrap(foreign.read(path))
    found = foreign.candidates(unwrapped, arch=origin.arch)
    assert (origin.container, origin.prefix) == (row.container, row.prefix)
    assert tuple(dict.fromkeys(candidate.arch for candidate in found)) == row.archs
    tried = tuple(dict.fromkeys(candidate.normalise for candidate in found))
    assert tried == ((row.normalise,) if row.carried else foreign.TRIED.get(row.classes, foreign.TRIED[None]))

    options = dict(row.options) | {"classes": row.classes}
    expected = cast(state, torch.float16) if name == "fast_adversarial" else state
    x = images(size=options.get("image_size", 32))
    net, report = foreign.load(path, model=row.archs[-1], normalise=None if row.carried else row.normalise)
    with torch.no_grad():
        assert torch.equal(net(x), built(expected, row.archs[-1], row.normalise, **options)(x))
    assert not net.training and report["arch"] == row.archs[-1] and report["classes"] == row.classes
    assert report["normalise"] == row.normalise and report["width"] == options.get("width")
    json.dumps(report)


def test_a_full_size_wide_resnet_of_trades(tmp_path):
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes(WIDE).items()}
    net, report = foreign.load(saved(tmp_path / "model-wideres-epoch76.pt", state), normalise="none")
    assert report["arch"] == "wideresnet34-10-subblock" and report["width"] is None
    assert sum(p.numel() for p in net.parameters()) == 48_262_586


def test_tiny_imagenets_two_last_layers_are_told_apart(tmp_path):
    """FGSM-SDI's sees 2 x 2 positions, the FastAT Benchmark's all of them pooled; either name of the latter's network builds the same."""
    torch.manual_seed(0)
    theirs, ours = (models.build(arch, classes=200, width=4, image_size=64).eval() for arch in ("preactresnet18-gap", "preactresnet18a"))
    path = saved(tmp_path / "best.pth", bare(theirs))
    found = foreign.candidates(foreign.unwrap(foreign.read(path))[0])
    assert tuple(dict.fromkeys(candidate.arch for candidate in found)) == AC
    x = images(size=64)
    for name in ("preactresnet18a", "preactresnet18-gap"):
        with torch.no_grad():
            assert torch.equal(foreign.load(path, model=name, normalise="none")[0](x), theirs(x))
    with pytest.raises(Misuse, match="not those of preactresnet18-gap"):
        foreign.load(saved(tmp_path / "sdi.pth", bare(ours)), model="preactresnet18-gap")


def test_never_called_block_is_left_out_when_the_plain_network_is_asked_for(tmp_path):
    path = saved(tmp_path / "trades.pt", weights(NARROW))
    net, report = foreign.load(path, model="wideresnet34-10", normalise="none")
    assert report["arch"] == "wideresnet34-10" and any("sub_block1" in note for note in report["notes"])
    whole = built(weights(NARROW), "wideresnet34-10-subblock", width=1)
    with torch.no_grad():
        assert torch.equal(net(images()), whole(images()))
    assert foreign.load(path, model="WideResNet", normalise="none")[1]["arch"] == "wideresnet34-10-subblock"


def test_a_full_size_resnet50(tmp_path):
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes(RESNET50).items()}
    content = {"epoch": 15, "arch": "resnet50", "state_dict": parallel(state), "best_prec1": torch.tensor(60)}
    net, report = foreign.load(saved(tmp_path / "checkpoint.pth.tar", content), normalise="imagenet")
    assert report["arch"] == "resnet50" and report["width"] is None and report["classes"] == 1000
    assert sum(p.numel() for p in net.parameters()) == 25_557_032


def test_another_depth_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        net = torchvision.models.resnet101(num_classes=10)
    state = {key: torch.zeros(()).expand(value.shape) for key, value in net.state_dict().items()}
    with pytest.raises(Misuse, match=r"closest is resnet50: .*layer3\.6\."):
        foreign.load(saved(tmp_path / "checkpoint.pth.tar", state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_are_noted(dtype, tmp_path):
    state = cast(weights(NARROW_PLAIN), dtype)
    net, report = foreign.load(saved(tmp_path / "half.pth", state), normalise="none")
    assert all(torch.equal(value, cast(state, torch.float32)[key]) for key, value in bare(net).items())
    unwrapped, _ = foreign.unwrap(state)
    assert {value.dtype for value in unwrapped.values()} == {torch.float32, torch.int64}
    assert any(str(dtype).removeprefix("torch.") in note for note in report["notes"])


def test_files_from_before_batches_were_counted(tmp_path):
    state = {key: value for key, value in weights(RESNET).items() if "num_batches" not in key}
    net, _ = foreign.load(saved(tmp_path / "old.pth", state), model="resnet18", normalise="none")
    with torch.no_grad():
        assert torch.equal(net(images()), built(weights(RESNET), "resnet18")(images()))


def test_parameters_and_tensors_with_a_gradient_are_weights_like_any_other(tmp_path):
    state = {key: nn.Parameter(value) if value.is_floating_point() else value
             for key, value in weights(NARROW_PLAIN).items()}
    content = {"net": state, "seen": {1, 2}, "args": argparse.Namespace(lr=0.1)}  # for the restricted reader
    for legacy in (False, True):
        container = foreign.read(saved(tmp_path / "parameters.pth", content, legacy))
        assert container["seen"] == {1, 2}
        unwrapped, _ = foreign.unwrap(container)
        assert all(type(value) is Tensor and not value.requires_grad for value in unwrapped.values())
        assert all(torch.equal(value, state[key]) for key, value in unwrapped.items())


def test_best_and_last(tmp_path):
    content = {"last": weights(PREACT_C, 1), "best": weights(PREACT_C, 2)}
    container = foreign.read(saved(tmp_path / "both.pth", content))
    for which in content:
        unwrapped, origin = foreign.unwrap(container, which)
        assert origin.container == which
        assert torch.equal(unwrapped["linear.bias"], content[which]["linear.bias"])
    with pytest.raises(Misuse, match="ask for one of best, last"):
        foreign.unwrap(container, "best_test")
    with pytest.raises(Misuse, match="allowed are best, last, best_test"):
        foreign.unwrap(container, "first")


# Our own ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, options, normalise", [
    ("preactresnet18", {"width": 8}, None),
    ("preactresnet18c", {"width": 8, "classes": 100}, foreign.NORMALISATIONS["cifar100"]),
    ("preactresnet18d", {"width": 8, "classes": 200, "image_size": 64}, None),
    ("resnet18", {"width": 4}, foreign.NORMALISATIONS["cifar10"]),
    ("resnet18-nuat", {"width": 4}, None),
    ("resnet8", {"channels": 1, "image_size": 8}, ((0.3054,), (0.3760,))),
    ("wideresnet34-20", {"width": 1}, None),
    ("preactresnet18-gap", {"width": 4, "classes": 200, "image_size": 64}, None),
    ("preactresnet34", {"width": 4, "classes": 200, "image_size": 64}, None),
    ("resnet50", {"width": 8, "channels": 1, "classes": 20}, None),
    ("cnn1", {"channels": 1, "image_size": 8}, ((0.3054,), (0.3760,))),
    ("cnn4", {"width": 5, "image_size": 28}, foreign.NORMALISATIONS["cifar10"]),
])
def test_our_own_checkpoints_are_unambiguous(arch, options, normalise, tmp_path):
    net = models.build(arch, normalise=normalise, **options).eval()
    content = {"state_dict": net.state_dict(), "arch": arch, "classes": 10, "channels": 3, "width": None,
               "image_size": 32, "epoch": 3, "method": "fgsm_sdi", "dataset": "cifar10", "seed": 0} | options
    path = saved(tmp_path / "best.pth", content)
    loaded, report = foreign.load(path)
    candidate, = report["candidates"]
    assert candidate["arch"] == arch and candidate["accuracy"] is None
    assert report["arch"] == arch and report["notes"] == []
    x = images(channels=options.get("channels", 3), size=options.get("image_size", 32))
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def test_flags_overrule_our_own_checkpoints_and_say_so(tmp_path):
    net = models.build("preactresnet18a", width=4, normalise=CIFAR)
    content = {"state_dict": net.state_dict(), "arch": "preactresnet18a", "width": 4}
    path = saved(tmp_path / "best.pth", content)
    loaded, report = foreign.load(path, model="preactresnet18c", normalise="none")
    with torch.no_grad():
        assert torch.equal(loaded(images()), built(bare(net), "preactresnet18c", width=4)(images()))
    assert (report["arch"], report["normalise"], len(report["notes"])) == ("preactresnet18c", "none", 2)
    report = foreign.load(path, model="PreActResNet18")[1]  # a family: within it the file decides
    assert report["arch"] == "preactresnet18a" and report["notes"] == []


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    path = saved(tmp_path / "file.pth", weights(NARROW_PLAIN))
    before = torch.get_rng_state()
    foreign.load(path, images=images(4), labels=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before)


# What the file does not say ---------------------------------------------------------------------------------

def trained(arch: str, normalise: str) -> tuple[dict, Tensor, Tensor]:
    """Weights (their head centred, so that predictions vary), images, and this network's own labels."""
    state, x = _narrow(arch), images(64, size=16)
    with torch.no_grad():
        logits = built(state, arch, normalise, width=8)(x)
    state = OrderedDict(state) | {"linear.bias": state["linear.bias"] - logits.mean(0)}
    return state, x, (logits - logits.mean(0)).argmax(1)


@cache
def _narrow(arch: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    net = models.build(arch, width=8)
    for module in net.modules():  # trained networks have running averages that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return bare(net)


@pytest.mark.parametrize("arch, normalise", [
    ("preactresnet18a", "none"), ("preactresnet18c", "none"), ("preactresnet18b", "cifar10"),
    ("preactresnet18d", "imagenet"), ("resnet18", "none"), ("resnet18-nuat", "none"), ("resnet18", "svhn-nfgsm"),
])
def test_clean_accuracy_tells_what_the_keys_do_not(arch, normalise, tmp_path):
    state, x, y = trained(arch, normalise)
    net, report = foreign.load(saved(tmp_path / "file.pth", parallel(state)), images=x, labels=y)
    assert (report["arch"], report["normalise"]) == (arch, normalise)
    with torch.no_grad():
        assert torch.equal(net(x), built(state, arch, normalise, width=8)(x))
    accuracies = {(row["arch"], row["normalise"]): row["accuracy"] for row in report["candidates"]}
    assert len(accuracies) == 2 * len(foreign.TRIED[10]) and accuracies.pop((arch, normalise)) == 100
    assert max(accuracies.values()) < 100 and f"{2 * len(foreign.TRIED[10])} candidates on 64 training images" in report["reason"]
    json.dumps(report)


def test_flags_narrow_what_is_measured(tmp_path):
    state, x, y = trained("preactresnet18b", "cifar10")
    path = saved(tmp_path / "model.pth", state)
    report = foreign.load(path, model="PreActResNest18", normalise="cifar10", images=x, labels=y)[1]
    assert [row["arch"] for row in report["candidates"]] == list(BD) and report["arch"] == "preactresnet18b"
    report = foreign.load(path, model="PREACTRESNET18D", images=x, labels=y)[1]
    assert report["arch"] == "preactresnet18d" and len(report["candidates"]) == len(foreign.TRIED[10])
    report = foreign.load(path, model="preactresnet18d", normalise="CIFAR10")[1]
    assert report["arch"] == "preactresnet18d" and report["candidates"][0]["accuracy"] is None


def test_a_normalisation_by_its_numbers(tmp_path):
    path = saved(tmp_path / "model.pth", _narrow("preactresnet18a"))
    net, report = foreign.load(path, model="preactresnet18a", normalise="0.5,0.5,0.5/0.25,0.2,1")
    assert (report["normalise"], report["mean"], report["std"]) == ("its own", [0.5, 0.5, 0.5], [0.25, 0.2, 1])
    x = images(2)
    plain, _ = foreign.load(path, model="preactresnet18a", normalise="none")
    with torch.no_grad():
        assert torch.allclose(net(x), plain((x - 0.5) / torch.tensor([0.25, 0.2, 1]).view(3, 1, 1)), atol=1e-5)
    for wrong in ("0.5/0.5", "0,0,0/1,1,0", "0,0,0/1,1", "a,b,c/1,1,1", "0,0,0/1,1,nan", "/", "1/2/3"):
        with pytest.raises(Misuse, match="3 means, a slash"):
            foreign.load(path, model="preactresnet18a", normalise=wrong)


def test_the_published_means_and_deviations():
    table = foreign.NORMALISATIONS
    assert table["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    assert table["cifar10-ckpt"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert table["cifar100"] == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert table["svhn-nfgsm"] == ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744))
    assert table["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = data.load("digits", ".").x_train / 255
    assert (x.mean(), x.std()) == pytest.approx([value for value, in table["digits"]], abs=1e-4), "the only training images at hand"
    for names in foreign.TRIED.values():
        assert names[0] == "none" and set(names) <= table.keys()


def test_without_images_an_ambiguous_file_asks_for_the_flags(tmp_path):
    path = saved(tmp_path / "model.pth", _narrow("preactresnet18a"))
    with pytest.raises(Misuse, match=r"--model \(preactresnet18a or preactresnet18c\) and --normalise \("):
        foreign.load(path)
    with pytest.raises(Misuse, match=r"pass --normalise \(none") as caught:
        foreign.load(path, model="preactresnet18a")
    assert "--model" not in str(caught.value)


def test_doubts_are_noted(tmp_path):
    state, x, _ = trained("resnet18", "none")
    constant = state | {"linear.weight": torch.zeros_like(state["linear.weight"])}
    report = foreign.load(saved(tmp_path / "tie.pth", constant), images=x, labels=torch.arange(64) % 10)[1]
    assert any("0.00 points behind" in doubt for doubt in report["doubts"])
    assert any("near chance" in doubt for doubt in report["doubts"])
    assert report["arch"] == "resnet18" and report["normalise"] == "none"  # the first wins a tie
    pair = [foreign.Candidate("resnet18", 10, 3, 8, 32, (), name, (0.0,) * 3, (1.0,) * 3) for name in ("none", "cifar10")]
    for second, doubted in ((99.9, 1), (98.0, 0)):
        assert len(foreign._justified(pair, [100.0, second], pair[0], 1000)[1]) == doubted, "where all are right, too"


@pytest.mark.parametrize("x, y, words", [
    (images(4, channels=1), torch.zeros(4, dtype=torch.int64), "3 channels"),
    (images(4), torch.full((4,), 43), "10 classes"),
    (images(4), torch.zeros(3, dtype=torch.int64), "labels"),
])
def test_images_of_another_data_set_are_refused(x, y, words, tmp_path):
    with pytest.raises(Misuse, match=words):
        foreign.load(saved(tmp_path / "model.pth", _narrow("resnet18")), images=x, labels=y)


# What does not fit ------------------------------------------------------------------------------------------

def refusal(path: Path, **options: Any) -> str:
    """The sentence with which a file is refused: one, and it names the file."""
    with pytest.raises(Misuse) as caught:
        foreign.load(path, **options)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def test_another_architecture_is_refused_by_its_keys(tmp_path):
    path = saved(tmp_path / "resnet.pth", weights(RESNET))
    sentence = refusal(path, model="preactresnet18b", normalise="none")
    assert "preactresnet18b" in sentence and "bn.weight" in sentence and "bn1.weight" in sentence
    assert sum(key in sentence for key in shapes(RESNET) | shapes(PREACT_B)) <= 5
    assert "resnet8, preactresnet18" in refusal(path, model="resnet19")
    assert "cifar10, cifar100" in refusal(path, model="resnet18", normalise="mnist")


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("layer3.1.bn2.bias"), "layer3.1.bn2.bias"),
    (lambda s: s.update({"layer5.weight": torch.zeros(3)}), "layer5.weight"),
    (lambda s: s.update({"layer2.0.conv1.weight": torch.zeros(128, 64, 1, 1)}),
     "layer2.0.conv1.weight is (128, 64, 1, 1) instead of (128, 64, 3, 3)"),
    (lambda s: s.update({"conv1.weight": torch.zeros(0, 0, 3, 3)}), "conv1.weight has shape (0, 0, 3, 3)"),
    (lambda s: s.update({"linear.weight": torch.zeros(0, 512)}), "linear.weight has shape (0, 512)"),
    (lambda s: s.update({"linear.weight": torch.zeros(()).expand(10**12, 512)}), "linear.weight has shape"),
    (lambda s: s.update({"conv1.weight": torch.zeros(()).expand(2**27)}), "conv1.weight"),
    (lambda s: s.update({"linear.bias": torch.zeros(11)}), "linear.bias is (11,) instead of (10,)"),
    (lambda s: s.update({"bn1.running_mean": torch.full((64,), torch.nan)}), "bn1.running_mean"),
    (lambda s: s.update({"linear.weight": torch.full((10, 512), torch.inf)}), "linear.weight"),
    (lambda s: s.update({"epoch": 7}), "epoch"),
    (lambda s: s.update({"bn1.bias": torch.zeros(64).to_sparse()}), "bn1.bias"),
    (lambda s: s.update(pair((0.5,) * 3, (0.0,) * 3, ("mu", "sigma"), (3,))), "mu and sigma"),
    (lambda s: s.update(pair(*CIFAR, ("mu", "sigma"), (3,)) | pair(*CIFAR, ("mean", "std"), (3,))), "twice"),
    (lambda s: s.update(pair((0.5,), (0.5,), ("mu", "sigma"), (1,))), "1 channels"),
])
def test_one_wrong_entry_is_refused_by_name(change, named, tmp_path):
    state = weights(RESNET)
    change(state)
    assert named in refusal(saved(tmp_path / "file.pth", state), model="resnet18")


def test_the_published_loaders_traps_do_not_exist(tmp_path):
    """They cut 7 characters off every key and load without strict: any file becomes a random network."""
    state = weights(RESNET)
    some = OrderedDict(state) | parallel({"conv1.weight": state["conv1.weight"]})
    some.pop("conv1.weight")
    inside = OrderedDict((key.replace("layer1.", "layer1.module."), value) for key, value in state.items())
    for content in (prefixed("encoder.", state), prefixed("modul3.", state), some, inside, {"net": some}):
        path = saved(tmp_path / "file.pth", content)
        assert "conv1.weight" in refusal(path, model="resnet18", normalise="none")
    plain, _ = foreign.unwrap(foreign.read(saved(tmp_path / "file.pth", state)))
    assert list(plain) == list(state)


@pytest.mark.parametrize("content, words", [
    ({}, "nothing"), ({"optimizer": {"lr": 0.1}, "epoch": 3}, "optimizer, epoch"), ([torch.zeros(2)], "list"),
    (torch.zeros(2), "Tensor"), ({"state_dict": {}}, "no weights"), ({3: torch.zeros(2)}, "its weights, 3"),
    ({"net": {"net": {"net": {"net": {"net": {}}}}}}, "no weights"),
])
def test_files_without_weights_are_refused(content, words, tmp_path):
    assert words in refusal(saved(tmp_path / "file.pth", content))


def test_a_container_that_holds_itself_is_refused(tmp_path):
    content: dict = {}
    content["net"] = content
    assert "no weights" in refusal(saved(tmp_path / "file.pth", content))


def test_a_generator_is_no_classifier(tmp_path):
    assert "scale_last" in refusal(saved(tmp_path / "generator.pth", weights("FGSM-SDI/attacker.py")))


def test_a_false_name_in_the_file_is_refused_and_can_be_overruled(tmp_path):
    net = models.build("resnet18", width=4)
    path = saved(tmp_path / "best.pth", {"state_dict": net.state_dict(), "arch": "resnet8", "width": 10**30})
    assert "not those of resnet8" in refusal(path)
    assert foreign.load(path, model="resnet18")[1]["width"] == 4
    path = saved(tmp_path / "odd.pth", {"state_dict": net.state_dict(), "arch": torch.zeros(2)})
    assert foreign.load(path, model="resnet18")[1]["classes"] == 10


# Nothing is executed ----------------------------------------------------------------------------------------

class Payload:
    """An object whose pickle is a call."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Never called, but pickle wants what it calls to be callable."""


def payloads(marker: Path) -> dict[str, Any]:
    """Ways to create `marker`. Every one of them works where the file is trusted; see the test of that."""
    python = f"open({str(marker)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Payload(eval, python), inner)
    import copyreg
    import functools
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, python),
        "exec": Payload(exec, python),
        "Popen": Payload(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Payload(Payload(getattr, Payload(__import__, "os"), "system"), f"touch {marker}"),
        "partial": Payload(Payload(functools.partial, os.system), f"touch {marker}"),
        "open": Payload(open, str(marker), "w"),
        "storage": Payload(torch.storage._load_from_bytes, inner.getvalue()),
        "pickle": Payload(pickle.loads, pickle.dumps(Payload(eval, python))),
        "state": Payload(copyreg._reconstructor, Setter, object, None, state=python),
        "map": Payload(list, Payload(map, eval, [python])),
    }


class Setter:
    def __setstate__(self, state: str) -> None:
        eval(state)


NAMES = list(payloads(Path("marker")))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_file_runs(name, legacy, tmp_path):
    marker = tmp_path / "marker"
    payload = payloads(marker)[name]
    state = weights(NARROW_PLAIN)

    content = {"scheduler": [payload, {"x": payload}], "state_dict": state}
    beside = saved(tmp_path / "beside.pth", content, legacy)
    net, report = foreign.load(beside, normalise="none")  # the good weights beside it are read
    assert torch.equal(net.fc.bias, state["fc.bias"]) and not marker.exists()
    among = state | {"x": payload}
    for content in (payload, [payload], {"net": payload}, {"net": among}, among):
        refusal(saved(tmp_path / "bad.pth", content, legacy))
        assert not marker.exists()

    torch.load(beside, weights_only=False)  # the payload is live: what is tested above is the reader
    assert marker.exists()


def test_headers_of_old_files_are_read_by_the_restricted_reader_too(tmp_path):
    marker = tmp_path / "marker"
    good = io.BytesIO()
    torch.save(weights(NARROW_PLAIN), good, _use_new_zipfile_serialization=False)
    for evil in (pickle.dumps(Payload(os.system, f"touch {marker}"), protocol=2),
                 f"(S'touch {marker}'\nios\nsystem\n.".encode(),  # the opcodes of protocol 0
                 f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()):
        for content in (evil, evil + good.getvalue(), good.getvalue()[:12] + evil, good.getvalue() + evil):
            path = tmp_path / "old.pth"
            path.write_bytes(content)
            try:
                foreign.load(path, normalise="none")
            except Misuse:
                pass
            assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()


def test_hooks_on_tensors_are_dropped(tmp_path):
    marker = tmp_path / "marker"
    state = weights(NARROW_PLAIN)
    hook = OrderedDict({0: Payload(os.system, f"touch {marker}")})

    class Hooked:
        def __reduce__(self):
            rebuild, (storage, offset, size, stride, *_) = state["fc.bias"].__reduce_ex__(2)
            return rebuild, (storage, offset, size, stride, True, hook)

    unwrapped, _ = foreign.unwrap(foreign.read(saved(tmp_path / "hooks.pth", state | {"fc.bias": Hooked()})))
    assert torch.equal(unwrapped["fc.bias"], state["fc.bias"]) and not unwrapped["fc.bias"]._backward_hooks
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_modules_are_refused_with_the_remedy(legacy, tmp_path):
    net = models.build("resnet8")
    for content in (net, nn.DataParallel(net), {"net": net, "acc": 0.5}, {"net": nn.DataParallel(net)}):
        sentence = refusal(saved(tmp_path / "module.pth", content, legacy))
        assert "state_dict()" in sentence and ("ResNet" in sentence or "DataParallel" in sentence)


def test_source_code_in_old_files_writes_no_patch(tmp_path, monkeypatch):
    """The old format kept a class's source beside it, and torch offers to write the difference to a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    content = {"net": models.build("resnet8"), "state_dict": weights(NARROW_PLAIN)}
    path = saved(tmp_path / "module.pth", content, legacy=True)
    source = path.read_bytes()
    assert b"class Normalize" in source
    path.write_bytes(source.replace(b"class Normalize", b"class Mormalize"))
    foreign.load(path, normalise="none")
    assert os.listdir(tmp_path) == ["module.pth"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert "TorchScript" in refusal(path)


# Damage -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_cut_short_are_refused(legacy, tmp_path):
    content = {"state_dict": weights(NARROW_PLAIN), "epoch": np.float64(3)}
    whole = saved(tmp_path / "whole.pth", content, legacy).read_bytes()
    path = tmp_path / "part.pth"
    for length in (1, 2, 5, 100, *(len(whole) * k // 16 for k in range(1, 16)), len(whole) - 1):
        path.write_bytes(whole[:length])
        sentence = refusal(path)
        assert "damaged" in sentence and "save it again" in sentence


def flipped(path: Path, whole: bytes, position: int) -> Path:
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1:])
    return path


def test_flipped_bits_are_noticed(tmp_path):
    state = _narrow("resnet8")
    whole = saved(tmp_path / "whole.pth", state).read_bytes()
    noticed, positions = 0, np.random.default_rng(0).permutation(len(whole))[:150].tolist()
    for position in positions + list(range(0, 1200, 7)):
        try:
            unwrapped, _ = foreign.unwrap(foreign.read(flipped(tmp_path / "flipped.pth", whole, position)))
        except Misuse:
            noticed += 1
        else:  # padding, or a date: the weights are what they were
            assert all(torch.equal(value, state[key]) for key, value in unwrapped.items())
    assert noticed > 150


def test_flipped_bits_in_old_files_never_end_in_a_traceback(tmp_path):
    """The old format has no checksum: a flip in a weight cannot be noticed."""
    content = {"state_dict": _narrow("resnet8"), "epoch": np.float64(3)}
    whole = saved(tmp_path / "whole.pth", content, legacy=True).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for position in range(0, 6000, 41):
        try:
            foreign.load(flipped(tmp_path / "flipped.pth", whole, position), normalise="none")
        except Misuse:
            pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**20  # pickle's unpickler in C takes 8 GiB for the flip at 3485


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "file.pth"
    npz, tar = io.BytesIO(), io.BytesIO()
    np.savez(npz, x=np.zeros(3))
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    for content in (b"<html><body>Quota exceeded</body></html>", b'{"a": 1}', npz.getvalue(), tar.getvalue(),
                    pickle.dumps({"a": 1}), bytes(5000), np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        assert "PyTorch" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    assert "No such file" in refusal(tmp_path / "absent.pth")
    assert "directory" in refusal(tmp_path)
