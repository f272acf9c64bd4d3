"""What happens between two batches: data, noise, updates, the weight average, the files, and several processes."""
from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import engine
import models
from engine import checkpoint, config, data, distributed, evaluate, guard, record
from engine.errors import Failure
from experiments import processes

SIZE, COUNT, PAD = 8, 45, 2


# ---- data ----------------------------------------------------------------------------------------------------------

def pictures(count: int = COUNT, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images in which no two crops are alike, and a label for each."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, SIZE, SIZE, channels), dtype=np.uint8), np.arange(count) % 10


def batches(batch_size: int = 16, **more: Any) -> data.Batches:
    return data.Batches(*pictures(), **dict(batch_size=batch_size, seed=3, pad=PAD, flip=True) | more)


def by_image(sequence) -> dict[int, Tensor]:
    return {int(i): image for x, _, index in sequence for i, image in zip(index, x)}


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_every_image_is_a_shift_or_a_mirrored_shift_of_itself(padding):
    """Against every shift there is, cut out with loops."""
    x, labels = pictures()
    mode = {"zero": "constant", "reflect": "reflect"}[padding]
    shifts = Counter()
    for epoch in range(4):
        for images, y, index in batches(padding=padding).epoch(epoch):
            assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
            for image, label, i in zip(images, y, index.tolist()):
                assert label == labels[i]
                padded = np.pad(x[i], ((PAD, PAD), (PAD, PAD), (0, 0)), mode=mode)
                found = []
                for row in range(2 * PAD + 1):
                    for column in range(2 * PAD + 1):
                        cut = padded[row:row + SIZE, column:column + SIZE].astype(np.float32) / 255
                        for mirrored in (False, True):
                            candidate = torch.from_numpy((cut[:, ::-1] if mirrored else cut).copy()).permute(2, 0, 1)
                            if torch.equal(image, candidate):
                                found.append((row, column, mirrored))
                assert len(found) == 1
                shifts[found[0]] += 1
    assert len(shifts) == 2 * (2 * PAD + 1) ** 2, "some shifts never happen"
    mirrored = sum(count for shift, count in shifts.items() if shift[2])
    assert 0.35 < mirrored / (4 * COUNT) < 0.65


def test_without_pad_and_flip_images_are_as_they_are():
    x, _ = pictures()
    for images, _, index in batches(pad=0, flip=False).epoch(1):
        assert torch.equal(images, data.to_images(torch.from_numpy(x[index.numpy()])))


@pytest.mark.parametrize("more", [dict(batch_size=1), dict(batch_size=COUNT), dict(batch_size=7)], ids=str)
def test_what_happens_to_an_image_does_not_depend_on_the_batch(more):
    order = [index.tolist() for _, _, index in batches().epoch(5)]
    others = [index.tolist() for _, _, index in batches(**more).epoch(5)]
    assert sum(order, []) == sum(others, [])
    assert same(by_image(batches().epoch(5)), by_image(batches(**more).epoch(5)))


def test_an_epoch_begun_in_the_middle_goes_on_alike():
    whole, rest = list(batches().epoch(2)), list(batches().epoch(2, first=1))
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(a, b) for pair in zip(whole[1:], rest) for a, b in zip(*pair))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch_out(world):
    parts = [list(batches(shard=lambda n, r=r: slice(n * r // world, n * (r + 1) // world)).epoch(1)) for r in range(world)]
    for whole, *pieces in zip(batches().epoch(1), *parts):
        for tensor, *shares in zip(whole, *pieces):
            assert torch.equal(tensor, torch.cat(shares))


@pytest.mark.parametrize("batch_size", [1, 16, COUNT, 100])
def test_every_image_comes_once_an_epoch(batch_size):
    for epoch in range(3):
        index = torch.cat([index for _, _, index in batches(batch_size).epoch(epoch)])
        assert sorted(index.tolist()) == list(range(COUNT))
        assert len(batches(batch_size)) == len(list(batches(batch_size).epoch(epoch)))


def test_epochs_and_seeds_differ_and_repeat():
    first = by_image(batches().epoch(0))
    assert same(first, by_image(batches().epoch(0)))
    for other in (batches().epoch(1), batches(seed=4).epoch(0)):
        assert not same(first, by_image(other))
    orders = {tuple(next(iter(batches(COUNT, seed=seed).epoch(epoch)))[2].tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_held_out_images_never_train():
    dataset = data.load("digits", ".")
    x, y, x_val, y_val = dataset.split(None, 137)
    assert len(x) == 1300 and len(x_val) == 137 and len(dataset.x_test) == 360
    assert np.array_equal(np.concatenate([x, x_val]), dataset.x_train) and np.array_equal(np.concatenate([y, y_val]), dataset.y_train)
    few, _, held_out, _ = dataset.split(50, 137)
    assert np.array_equal(few, x[:50]) and np.array_equal(held_out, x_val), "--train-size must not move what is held out"


# ---- noise ---------------------------------------------------------------------------------------------------------

def configuration(out_dir: Path, **more: Any) -> engine.Config:
    flags = dict(dataset="digits", train_size=70, val_size=20, batch_size=16, epochs=2, device="cpu")
    return engine.Config(out_dir=str(out_dir), **flags | more)


def learn(run: engine.Run, x: Tensor, y: Tensor) -> None:
    logits = run.model(x)
    run.update(F.cross_entropy(logits, y), logits=logits)


def noises(out_dir: Path, kind: str = "uniform", stop_at: int = -1, twice: bool = False, **more: Any) -> dict[int, Tensor]:
    """Per step the noise that a run draws."""
    run, drawn = engine.Run(configuration(out_dir, **more)), {}
    for x, y, _ in run.batches():
        if run.step == stop_at:
            break
        drawn[run.step] = getattr(run, kind)(x)
        if twice:
            assert not torch.equal(drawn[run.step], getattr(run, kind)(x))
        learn(run, x, y)
    return drawn


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_is_a_function_of_seed_and_step(kind, tmp_path):
    whole = noises(tmp_path / "whole", kind, twice=True)
    assert len(whole) == 10 and whole[4].shape == (6, 1, 8, 8), "the last batch of 70 images in sixteens has 6"
    stopped = noises(tmp_path / "parts", kind, stop_at=7, save_every=0.0)
    resumed = noises(tmp_path / "parts", kind, twice=True)  # how often it is drawn from does not matter to later steps
    assert same(whole, stopped | resumed) and stopped.keys() | resumed.keys() == whole.keys()
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[0], whole[5])
    other = noises(tmp_path / "other", kind, seed=1)
    assert not any(torch.equal(whole[step], other[step]) for step in whole)
    values = torch.cat([noise.flatten() for noise in whole.values()])
    if kind == "uniform":
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() < 1 and abs(values.mean()) < 0.03
    else:
        assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03 and values.abs().max() > 3


def test_noise_is_sliced_by_the_position_in_the_global_batch(tmp_path, monkeypatch):
    whole = noises(tmp_path / "whole")
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "shard", lambda n, rank=rank: slice(n * rank // 3, n * (rank + 1) // 3))
        shares.append(noises(tmp_path / f"rank{rank}"))
    assert all(torch.equal(whole[step], torch.cat([share[step] for share in shares])) for step in whole)


def test_shards_are_contiguous_and_even(monkeypatch):
    for world in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        for n in (0, 1, 7, 8, 128):
            sizes, items = [], []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda: rank)
                items += range(n)[distributed.shard(n)]
                sizes.append(len(range(n)[distributed.shard(n)]))
            assert items == list(range(n)) and max(sizes) - min(sizes) <= 1


# ---- updates -------------------------------------------------------------------------------------------------------

def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_update_computes_gradients_of_its_optimizer_alone(tmp_path):
    run = engine.Run(configuration(tmp_path))
    generator = models.PerturbationGenerator(run.channels)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    run.keep(generator=generator, optimizer2=optimizer)
    for x, y, _ in run.batches():
        sign = torch.ones_like(x)
        before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        gradients = {name: p.grad for name, p in run.network.named_parameters()}
        step, progress, rate = run.step, run.progress, run.optimizer.param_groups[0]["lr"]
        run.update(-F.cross_entropy(run.model(x + generator(x, sign)), y), optimizer)
        for name, p in run.network.named_parameters():
            assert torch.equal(p, before[name]) and p.grad is gradients[name]
        assert (run.step, run.progress, run.optimizer.param_groups[0]["lr"]) == (step, progress, rate)
        assert optimizer.param_groups[0]["lr"] == 1e-3, "another optimizer keeps its own rate"

        before = [p.detach().clone() for p in generator.parameters()]
        gradients = [p.grad for p in generator.parameters()]
        learn_from = run.model(x + generator(x, sign))
        run.update(F.cross_entropy(learn_from, y))
        for p, value, gradient in zip(generator.parameters(), before, gradients):
            assert torch.equal(p, value) and p.grad is gradient
        assert run.step == step + 1
        if run.step == 3:
            break


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_a_parameter_that_the_loss_does_not_see_stays(kind, tmp_path):
    """Not even weight decay or momentum moves it."""
    run = engine.Run(configuration(tmp_path))
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = kind([used, unused], lr=0.1, weight_decay=0.1)
    for x, y, _ in run.batches():
        run.update((used ** 2).mean(), optimizer)
        learn(run, x, y)
    assert torch.equal(unused.detach(), torch.ones(3)) and (used < 1).all()


def test_an_update_is_the_textbook_step(tmp_path):
    """SGD with momentum and weight decay at the schedule's rate, against loops over the formula."""
    run = engine.Run(configuration(tmp_path, lr_schedule="constant", lr=0.1, epochs=1))
    parameters = [p.detach().clone() for p in run.network.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    for x, y, _ in run.batches():
        loss = F.cross_entropy(run.model(x), y)
        gradients = torch.autograd.grad(loss, list(run.network.parameters()), retain_graph=True)
        run.update(loss)
        for p, m, g, now in zip(parameters, momenta, gradients, run.network.parameters()):
            m.mul_(0.9).add_(g + 5e-4 * p)
            p.sub_(0.1 * m)
            assert torch.allclose(p, now, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(bad, tmp_path):
    run = engine.Run(configuration(tmp_path, save_every=0.0))
    with pytest.raises(Failure, match=r"not finite at update 6 \(epoch 2\).*state.pth.*--lr"):
        for x, y, _ in run.batches():
            before = copied(run.network)
            logits = run.model(x)
            after_forward = copied(run.network)  # BatchNorm's averages moved
            loss = F.cross_entropy(logits, y)
            run.update(loss * bad if run.step == 6 else loss, logits=logits)
    assert all(torch.equal(p, after_forward[name]) for name, p in run.network.named_parameters())
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    assert saved["position"] == {"epoch": 1, "batch": 1, "step": 6}
    assert all(torch.equal(value, before[name]) for name, value in saved["kept"]["classifier"].items())


@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("reading", ["the end of the epoch", "a save"])
def test_a_device_that_does_not_wait_reports_it_at_the_next_reading(bad_step, reading, tmp_path):
    """As on a GPU: until somebody reads, the updates from the bad one on change nothing."""
    run = engine.Run(configuration(tmp_path, ema=0.5, lr_schedule="constant"))
    run._finite.deferred = True
    read_after = 4 if reading == "a save" else 5
    seen = 0
    with pytest.raises(Failure, match=rf"not finite at update {bad_step} \(epoch 1\)"):
        for x, y, _ in run.batches():
            loss = F.cross_entropy(run.model(x), y)
            before = [p.detach().clone() for p in run.network.parameters()]
            momenta = [m.clone() for m in run_momenta(run)]
            run.update(loss * float("nan") if seen == bad_step else loss)
            moved = [not torch.equal(a, b) for a, b in zip(before, run.network.parameters())]
            assert all(moved) if seen < bad_step else not any(moved)
            if seen >= bad_step > 0:  # a buffer that a left-out update makes holds nothing yet, and nobody comes to use it
                assert momenta and all(torch.equal(a, b) for a, b in zip(momenta, run_momenta(run)))
            seen += 1
            if reading == "a save" and seen == 4:
                run._last_save = -float("inf")  # a save is due
    assert seen == read_after
    assert not (tmp_path / "state.pth").exists() and not (tmp_path / "best.pth").exists()


def run_momenta(run: engine.Run) -> list[Tensor]:
    return [state["momentum_buffer"] for state in run.optimizer.state.values() if state.get("momentum_buffer") is not None]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_a_bad_loss_does_not_reach_another_optimizer_either(kind, tmp_path):
    """FGSM-SDI's generator: a step with a gradient of zero would still apply its momentum and its weight decay."""
    run = engine.Run(configuration(tmp_path))
    run._finite.deferred = True
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1, weight_decay=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    with pytest.raises(Failure, match="not finite at update 2"):
        for x, y, _ in run.batches():
            before = weight.detach().clone()
            run.update((weight ** 2).mean() * (float("nan") if run.step == 2 else 1), optimizer)
            assert torch.equal(before, weight.detach()) == (run.step >= 2)
            learn(run, x, y)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_weight_average_is_the_formula(decay, tmp_path):
    run = engine.Run(configuration(tmp_path, ema=decay, train_size=200))
    expected = {name: value.double() for name, value in copied(run.network).items()}
    assert all(torch.equal(value, run.average.state_dict()[name]) for name, value in copied(run.network).items())
    for x, y, _ in run.batches():
        learn(run, x, y)
        for name, value in run.network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
    for name, value in run.average.state_dict().items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6), name
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert saved["weights"] == "ema" and all(torch.equal(saved["state_dict"][n], v) for n, v in run.average.state_dict().items())


def test_the_schedule_and_progress_count_declared_updates(tmp_path):
    """Free-AT updates several times a batch: the schedule ends with the run, not before."""
    run = engine.Run(configuration(tmp_path), updates_per_batch=3)
    rates = []
    for x, y, _ in run.batches():
        for _ in range(3):
            assert run.progress == pytest.approx(run.step / (2 * 5 * 3))
            learn(run, x, y)
            rates.append(run.optimizer.param_groups[0]["lr"])
    assert run.progress == 1 and len(rates) == 30
    assert rates == pytest.approx([0.2 * (1 - abs(2 * step / 30 - 1)) for step in range(30)])


# ---- files ---------------------------------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, type(None))


def kinds(content: Any) -> set[str]:
    """The types in a nested structure, apart from containers."""
    if isinstance(content, dict):
        return {type(key).__name__ for key in content if not isinstance(key, (str, int))}.union(*map(kinds, content.values()))
    if isinstance(content, (list, tuple)):
        return set().union(*map(kinds, content))
    return set() if isinstance(content, (Tensor, *PLAIN)) else {type(content).__name__}


RESULT_FIELDS = {"method", "dataset", "arch", "config", "seed", "commit", "dirty", "versions", "device", "precision", "tf32",
                 "seconds", "peak_memory_bytes", "images_per_second", "checkpoints", "evaluation"}


def test_what_is_written_agrees(train_script, tiny):
    out_dir = tiny.train(train_script, "--ema", 0.8, "--epochs", 4, "--measure", "clean,fgsm,pgd10,pgd20", "--save-every", 0)
    agrees(out_dir, train_script, averaged=True)

    files = {name: torch.load(out_dir / f"{name}.pth", map_location="cpu", weights_only=True) for name in ("best", "last", "state")}
    assert {name: kinds(content) for name, content in files.items()} == dict.fromkeys(files, set()), "tensors and plain values alone"
    for name in ("best", "last"):
        content = files[name]
        assert content.keys() == {"state_dict", "method", "dataset", "arch", "width", "classes", "channels", "image_size",
                                  "epsilon", "epoch", "weights", "seed"}
        network = models.build(content["arch"], classes=content["classes"], channels=content["channels"], width=content["width"],
                               image_size=content["image_size"])
        network.load_state_dict(content["state_dict"])
        assert all(value.device.type == "cpu" for value in content["state_dict"].values())
    assert sorted(path.name for path in out_dir.iterdir()) == [
        ".lock", "best.pth", "config.json", "last.pth", "log.jsonl", "result.json", "state.pth"]


@pytest.mark.parametrize("script", ["train_fgsm_rs", "train_las_at"])
def test_what_is_written_without_an_average_agrees(script, tiny):
    agrees(tiny.train(script, "--epochs", 4, "--measure", "clean,fgsm,pgd10,pgd20"), script, averaged=False)


def agrees(out_dir: Path, train_script: str, averaged: bool) -> None:
    """What result.json, config.json, log.jsonl and the weights of a run of four epochs say fits together."""
    result, configured = (json.loads((out_dir / f"{name}.json").read_text()) for name in ("result", "config"))
    log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    script = importlib.import_module(train_script)

    assert RESULT_FIELDS <= result.keys()
    assert {"torch", "cuda", "pyautoattack"} <= result["versions"].keys() and result["versions"]["torch"] == torch.__version__
    assert {"training", "evaluation", "preparation"} <= result["seconds"].keys()
    assert result["seconds"].pop("compilation") == 0 and all(seconds > 0 for seconds in result["seconds"].values())
    assert result["precision"] == "fp32" and result["peak_memory_bytes"] > 1e8 and "CPU" in result["device"]
    assert result["method"] == configured.pop("method") == script.Config.METHOD
    assert script.Config(**configured) == script.Config(**result["config"]), "enough to run it again"
    assert result["seed"] == configured["seed"] and result["arch"] == "resnet8" and result["dataset"] == "digits"
    assert result["images_per_second"] == pytest.approx(4 * 200 / result["seconds"]["training"])

    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert log[-1]["seconds"] == pytest.approx(result["seconds"]["training"])
    score = [max(row["val_pgd10"], row.get("val_pgd10_ema", 0)) for row in log]
    best = max(range(4), key=lambda i: (score[i], i))  # the later of equals
    for name, epoch in {"best": best + 1, "last": 4}.items():
        measured, saved = result["checkpoints"][name], torch.load(out_dir / f"{name}.pth", weights_only=True)
        assert measured["epoch"] == saved["epoch"] == epoch and measured["weights"] == saved["weights"]
        assert saved["weights"] == (log[epoch - 1]["weights"] if name == "best" else "ema" if averaged else "raw")
        suffix = "_ema" if saved["weights"] == "ema" else ""
        for column in ("clean", "fgsm", "pgd10", "pgd20"):
            metric = measured[column]
            assert metric["n"] == 40 and metric["value"] == log[epoch - 1][f"val_{column}{suffix}"]
            assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    for row in log:
        assert {"epoch", "lr", "momentum", "loss", "train_accuracy", "images_per_second", "seconds", "weights"} <= row.keys()
        assert row["loss"] > 0 and 0 <= row["train_accuracy"] <= 100


def test_half_precision_costs_digits_and_not_the_method(train_script, tiny):
    """bf16 on the CPU: everything that is kept stays fp32, but memories of images; the losses are those of fp32 to bf16's three digits."""
    runs = [tiny.train(train_script, "--precision", precision, "--epochs", 1, "--train-size", 72) for precision in ("bf16", "fp32")]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    half, single = (json.loads((run / "log.jsonl").read_text()) for run in runs)
    assert [result["precision"] for result in results] == ["bf16", "fp32"]
    assert 0 < abs(half["loss"] - single["loss"]) < 0.05 * abs(single["loss"])
    state = torch.load(runs[0] / "state.pth", weights_only=True)["kept"]
    halves = {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dtype == torch.half}
    assert {value.dtype for value in state["classifier"].values() if value.is_floating_point()} == {torch.float32}
    assert halves == {"train_fgsm_ep": {"previous"}, "train_fgsm_mep": {"prior", "momenta"}}.get(train_script, set())


def test_a_row_of_the_log_is_what_was_measured(tmp_path):
    """Loss and accuracy are means over the epoch's images, of an uneven last batch too; held-out accuracy is of last.pth."""
    run = engine.Run(configuration(tmp_path, epochs=1))
    losses, correct = 0.0, 0
    for x, y, _ in run.batches():
        logits = run.model(x)
        loss = F.cross_entropy(logits, y)
        losses, correct = losses + loss.item() * len(y), correct + (logits.argmax(1) == y).sum().item()
        run.update(loss, logits=logits)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["loss"] == pytest.approx(losses / 70) and row["train_accuracy"] == pytest.approx(100 * correct / 70)
    assert row["val_clean"] == pytest.approx(clean_accuracy(tmp_path / "last.pth", held_out=20))


def clean_accuracy(path: Path, held_out: int) -> float:
    saved, dataset = torch.load(path, weights_only=True), data.load("digits", ".")
    network = models.build(saved["arch"], channels=1, width=saved["width"]).to(torch.get_default_dtype())
    network.load_state_dict(saved["state_dict"])
    x, y = (torch.from_numpy(array[-held_out:]) for array in (dataset.x_train, dataset.y_train))
    found = evaluate.verdicts(network.eval(), x, y, columns=("clean",), eps=0, alpha=0, seed=0, batch_size=64)
    return 100 * found["clean"].double().mean().item()


def test_the_configuration_that_was_written_runs_again(tiny, differences):
    first = tiny.train("train_fgsm_sdi", "--k", 3, "--lr-schedule", "multistep", "--padding", "reflect", "--seed", 7)
    configured = json.loads((first / "config.json").read_text())
    script = importlib.import_module(f"train_{configured.pop('method').replace('-', '_')}")
    script.main(script.Config(**configured | {"out_dir": str(tiny.directory / "second")}))
    states = [torch.load(path / "last.pth", weights_only=True) for path in (first, tiny.directory / "second")]
    assert differences(*states) == []


def test_tensorboard_holds_the_log(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out_dir = tiny.train("train_fgsm_rs", "--tensorboard")
    events = EventAccumulator(str(out_dir)).Reload()
    log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in log])
    assert [event.step for event in events.Scalars("val_pgd10")] == [1, 2]


def git(directory: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    return subprocess.run(["git", *settings, *arguments], cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def no_git_variables(monkeypatch):
    """A hook of git's runs its commands, and these tests perhaps, with variables that point at its own repository."""
    for name in [name for name in os.environ if name.startswith("GIT_")] + ["SOURCE_COMMIT"]:
        monkeypatch.delenv(name, raising=False)


def test_an_epochs_accuracies_are_of_these_networks_with_these_settings(tmp_path, monkeypatch):
    seen, verdicts = [], evaluate.verdicts

    def watched(network, *images, **more):
        seen.append((network, more["eps"], more["alpha"], more["seed"]))
        return verdicts(network, *images, **more)

    monkeypatch.setattr(evaluate, "verdicts", watched)
    run = engine.Run(configuration(tmp_path, ema=0.5, seed=3, epsilon=24.0, precision="bf16"))
    for x, y, _ in run.batches():
        learn(run, x, y)
    assert [network for network, *_ in seen] == 2 * [run.network, run.average], "the bare networks, and so in fp32"
    assert all(settings == pytest.approx([24 / 255, 6 / 255, 3]) for _, *settings in seen)


def test_evaluation_is_not_training_time(tmp_path, monkeypatch):
    now, verdicts = [0.0], evaluate.verdicts

    def slow(*arguments, **more):
        now[0] += 7
        return verdicts(*arguments, **more)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(evaluate, "verdicts", slow)
    monkeypatch.setattr(guard, "LOOK", 1)
    monkeypatch.setattr(guard, "TEST_EVERY", 1)
    run = engine.Run(configuration(tmp_path))
    for x, y, _ in run.batches():
        now[0] += 1
        learn(run, x, y)
    seconds = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert (seconds["training"], seconds["evaluation"]) == (10, 7 * 2 * 5), "an epoch has five batches, the guard looks after all but the last"


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")


@needs_git
def test_a_result_says_its_commit_and_whether_the_tree_was_dirty(no_git_variables, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path.resolve())
    assert record.source() == {"commit": None, "dirty": True}, "neither git nor SOURCE_COMMIT"
    (tmp_path / "file").write_text("a")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert record.source() == {"commit": head, "dirty": False}
    with monkeypatch.context() as somebody_elses:  # as in a container that does not run as the files' owner
        somebody_elses.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        assert record.source() == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert record.source() == {"commit": head, "dirty": True}
    git(tmp_path, "checkout", "file")
    (tmp_path / "nohup.out").write_text("")
    assert record.source() == {"commit": head, "dirty": False}, "it computes nothing"
    (tmp_path / "new.py").write_text("")
    assert record.source() == {"commit": head, "dirty": True}, "a file that git does not know"
    monkeypatch.setenv("SOURCE_COMMIT", "abc")
    assert record.source()["commit"] == head, "git knows better than the environment"


@needs_git
@pytest.mark.parametrize("value, expected", [
    ("abc", {"commit": "abc", "dirty": False}), (None, {"commit": None, "dirty": True}), ("", {"commit": None, "dirty": True}),
])
def test_an_exported_tree_says_its_commit_by_the_environment(value, expected, no_git_variables, tmp_path, monkeypatch):
    """Also where it lies inside somebody else's repository."""
    git(tmp_path, "init")
    (tmp_path / "export").mkdir()
    monkeypatch.setattr(record, "ROOT", (tmp_path / "export").resolve())
    if value is not None:
        monkeypatch.setenv("SOURCE_COMMIT", value)
    assert {key: value or None if key == "commit" else value for key, value in record.source().items()} == expected


@pytest.mark.parametrize("k, n, low, high", [  # Wilson 1927, as published calculators give it
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (50, 100, 0.4038, 0.5962), (1, 20, 0.0089, 0.2361),
    (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662),  # the last two: Newcombe 1998, table I
])
def test_wilsons_interval(k, n, low, high):
    assert record.wilson(k, n) == pytest.approx((low, high), abs=6e-5)
    metric = record.percent(torch.arange(n) < k)
    assert metric["value"] == pytest.approx(100 * k / n) and metric["n"] == n
    assert metric["interval"] == pytest.approx([100 * low, 100 * high], abs=6e-3)


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    record.write_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pth"
    checkpoint.save({"position": 1}, path)

    def broken(content: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"position": 2}, path)
    assert checkpoint.load_state(path) == {"position": 1} and [p.name for p in tmp_path.iterdir()] == ["state.pth"]


# ---- flags ---------------------------------------------------------------------------------------------------------

def test_help_lists_every_flag_with_its_help(train_script):
    script = importlib.import_module(train_script)
    text = config.parser(script.Config, script.__doc__).format_help()
    usage, shared, own = (re.split(r"shared by all methods:|of this method:", text) + [""])[:3]  # standard training has none of its own
    assert "".join(script.__doc__.split()) in "".join(usage.split())
    of_all = {field.name for field in dataclasses.fields(engine.Config)}
    for field in dataclasses.fields(script.Config):
        part, other = (shared, own) if field.name in of_all else (own, shared)
        flag = re.compile(rf"^  {config.spelled(field.name)}\b", re.MULTILINE)
        assert flag.search(part) and not flag.search(other), f"{field.name}: shared flags first, then the method's"
        explained = config._metadata(script.Config, field)["help"]
        assert len(explained) > 4 and "".join(explained.split()) in "".join(part.split()), field.name


BOUNDS = {"epochs": 1, "batch_size": 1, "lr": 0, "weight_decay": 0, "epsilon": 0, "width": 1, "train_size": 1, "val_size": 0, "image_size": 8,
          "workers": 0, "seed": 0, "save_every": 0, "time_limit": 0}
OWN_BOUNDS = {
    "awp": {"alpha": 0, "steps": 1, "beta": 0, "gamma": 0, "warmup": 0}, "fat": {"alpha": 0, "steps": 1}, "fgsm_ckpt": {"alpha": 0, "c": 1},
    "fgsm_ep": {"alpha": 0, "reset": 0}, "fgsm_mep": {"alpha": 0, "reset": 0}, "fgsm_rs_cs": {"alpha": 0, "gamma": 0}, "fgsm_sdi": {"alpha": 0, "k": 1},
    "free_at": {"replays": 1}, "gairat": {"alpha": 0, "steps": 2}, "las_at": {"interval": 1, "gamma": 0}, "lbgat": {"alpha": 0, "steps": 1, "beta": 0},
    "liet": {"alpha": 0, "refresh": 1}, "mart": {"alpha": 0, "steps": 1, "beta": 0}, "n_fgsm": {"alpha": 0, "k": 0}, "pgd_at": {"alpha": 0, "steps": 1},
    "standard": {}, "trades": {"alpha": 0, "steps": 1, "beta": 0}, "vfsat": {},
}


def test_a_flag_below_its_bound_is_refused_by_name(train_script):
    """And the bound itself is not, save for another reason."""
    script = importlib.import_module(train_script)
    for name, low in (BOUNDS | OWN_BOUNDS.get(train_script.removeprefix("train_"), {"alpha": 0})).items():
        with pytest.raises(engine.Misuse, match=rf"^{config.spelled(name)} {low - 1}: must be at least {low}$"):
            script.Config(dataset="imagenet", **{name: low - 1})
        try:
            script.Config(dataset="imagenet", **{name: low})
        except engine.Misuse as error:
            assert "at least" not in str(error)


def test_help_ends_the_command_well(train_script, tiny):
    result = tiny.command(train_script, "--help")
    assert result.status == 0 and "--epsilon" in result.out and result.err == ""


def test_flags_are_spelled_with_dashes_or_underscores(train_script):
    script = importlib.import_module(train_script)
    words = {"--batch_size": "17", "--out_dir": "a_b-c", "--lr-schedule": "constant", "--label_factor": "0.5", "--weight_decay": "0.25"}
    dashed = [part for name, value in words.items() for part in (name.replace("_", "-"), value)]
    underscored = [part for name, value in words.items() for part in (name.replace("-", "_").replace("__", "--", 1), value)]
    joined = [f"{name.replace('-', '_').replace('__', '--', 1)}={value}" for name, value in words.items()]
    configurations = [script.Config.parse("", argv) for argv in (dashed, underscored, joined)]
    assert configurations[0] == configurations[1] == configurations[2]
    assert (configurations[0].batch_size, configurations[0].out_dir) == (17, "a_b-c")


PAPER = dict(arch="resnet18", epochs=110, batch_size=128, lr=0.1, lr_schedule="multistep", weight_decay=5e-4, epsilon=8.0, val_size=1000)


@pytest.mark.parametrize("dataset, expected", [
    ("cifar10", PAPER), ("cifar100", PAPER), ("digits", dict(arch="resnet8", lr_schedule="cyclic", val_size=137))])
def test_recipes_of_the_data_sets(dataset, expected):
    cfg = engine.Config.parse("", ["--dataset", dataset])
    assert {name: getattr(cfg, name) for name in expected} == expected
    given = engine.Config.parse("", ["--dataset", dataset, "--epochs", "7", "--lr", "0.01", "--epsilon", "4"])
    assert (given.epochs, given.lr, given.epsilon, given.eps) == (7, 0.01, 4, 4 / 255)
    assert given.batch_size == cfg.batch_size and given.arch == cfg.arch, "what is not given keeps the recipe's value"


def test_defaults_that_do_not_depend_on_the_data_set():
    cfg = engine.Config.parse("", [])
    assert (cfg.dataset, cfg.data_dir, cfg.select_on, cfg.seed, cfg.device) == ("cifar10", "data/", "val", 0, "auto")
    assert (cfg.resume, cfg.ema, cfg.label_factor, cfg.precision) == ("auto", 0, 1, "auto")


# ---- several processes ---------------------------------------------------------------------------------------------

def test_processes_measure_the_weights_that_they_save(tmp_path):
    """BatchNorm's averages are a process's own in training; what is logged must be of those in the file."""
    status, output = processes.outcome(processes.torchrun(
        str(record.ROOT / "train_fgsm_rs.py"), "--dataset", "digits", "--device", "cpu", "--epochs", "2", "--train-size", "400", "--batch-size", "8",
        "--val-size", "300", "--epsilon", "10", "--out-dir", str(tmp_path)), 180)
    assert status == 0, output[-4000:]
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["val_clean"] == pytest.approx(clean_accuracy(tmp_path / "last.pth", held_out=300))
    assert json.loads((tmp_path / "result.json").read_text())["processes"] == 2
