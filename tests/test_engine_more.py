"""The engine's later parts: decays and peaks by flag, clipping and leaves, shapes and positions, growing optimizers, memories of two processes."""
from __future__ import annotations

import copy
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import models
import train_awp
import train_las_at
import train_lbgat
import utils
from engine import checkpoint, distributed, record
from engine.config import Config, numbers
from engine.errors import Failure, Misuse
from engine.networks import Classifier
from engine.schedule import SCHEDULES


def configuration(out_dir: Path, kind: type[Config] = Config, **more: Any) -> Config:
    flags = dict(dataset="digits", train_size=21, val_size=4, batch_size=8, epochs=2, width=4, measure="pgd10", device="cpu",
                 lr_schedule="constant", lr=0.1)
    return kind(out_dir=str(out_dir), **flags | more)


def learn(run: engine.Run, x: Tensor, y: Tensor, **more: Any) -> None:
    run.update(F.cross_entropy(run.model(x), y), **more)


def factors(cfg: Config, per_epoch: int) -> list[float]:
    """The learning rate of every update as a fraction of the peak."""
    schedule, total = cfg.schedule(), cfg.epochs * per_epoch
    return [schedule(step, total, per_epoch).lr for step in range(total)]


# ---- flags of the schedules ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("2,4,8", [2, 4, 8]), ("3-5", [3, 4, 5]), ("7-7", [7]), ("7", [7]), ("2.5,0.5", [2.5, 0.5]), ("0-2", [0, 1, 2]), ("1e-3,0", [1e-3, 0]), ("8,8", [8, 8]), (" 2, 4", [2, 4])])
def test_numbers(text, expected):
    assert numbers("radii", text) == expected == engine.numbers("radii", text)


@pytest.mark.parametrize("text", ["", "-1", "1,-1", "inf", "1,nan", "5-3", "a", "1,,2", "1;2", "1-2-3", "1.5-3", "2-", "nan"])
def test_what_is_no_list_of_numbers_is_named(text):
    with pytest.raises(Misuse, match=r"^--radii .*numbers that are not negative.*2,4,8 or 3-5"):
        numbers("radii", text)


@pytest.mark.parametrize("epochs, milestones, at", [
    (10, "3,5", [3, 5]), (10, "3-5", [3, 4, 5]), (7, "6", [6]), (110, "100,105", [100, 105]), (90, "30,60", [30, 60])])
@pytest.mark.parametrize("per_epoch", [1, 3, 391])
def test_milestones_are_the_beginnings_of_epochs(epochs, milestones, at, per_epoch, tmp_path):
    cfg = configuration(tmp_path, lr_schedule="multistep", epochs=epochs, milestones=milestones)
    assert factors(cfg, per_epoch) == [0.1 ** sum(step // per_epoch >= epoch for epoch in at) for step in range(epochs * per_epoch)]


def test_any_milestone_of_any_run_falls_on_its_epoch(tmp_path):
    """The schedule takes fractions of the run: rounding must give the epoch back."""
    for epochs in range(2, 201):
        rates = configuration(tmp_path, lr_schedule="multistep", epochs=epochs, milestones=f"1-{epochs - 1}").schedule()
        for per_epoch in (1, 7, 391):
            for epoch in (1, (epochs + 1) // 2, epochs - 1):
                before, at = (rates(step, epochs * per_epoch, per_epoch).lr for step in (epoch * per_epoch - 1, epoch * per_epoch))
                assert at == pytest.approx(before / 10, rel=1e-9, abs=0), (epochs, per_epoch, epoch)


def test_milestones_reach_the_log_and_no_other_schedule(tmp_path):
    for schedule, rates in (("multistep", [0.1, 0.01, 0.001]), ("constant", [0.1, 0.1, 0.1])):
        run = engine.Run(configuration(tmp_path / schedule, epochs=3, lr_schedule=schedule, milestones="1,2"))
        for x, y, _ in run.batches():
            learn(run, x, y)
        log = [json.loads(line) for line in (tmp_path / schedule / "log.jsonl").read_text().splitlines()]
        assert [row["lr"] for row in log] == pytest.approx(rates, rel=1e-12)


def test_milestones_that_are_none_are_named(tmp_path):
    for milestones in ("x", "5,-1"):
        with pytest.raises(Misuse, match="--milestones"):
            configuration(tmp_path, milestones=milestones)
    assert Config.parse("", []).milestones is None


@pytest.mark.parametrize("epochs", [90, 24])
def test_imagenet_decays_at_thirds_of_the_run(epochs, tmp_path):
    cfg = Config.parse("", ["--dataset", "imagenet", "--epochs", str(epochs)])
    assert factors(cfg, 1) == [0.1 ** (3 * epoch // epochs) for epoch in range(epochs)]


def test_a_method_has_decays_of_its_own_and_milestones_go_before_them(tmp_path):
    @dataclasses.dataclass
    class Early(Config):
        DECAYS: ClassVar[tuple[float, ...]] = (0.25, 0.5)

    plain, early, given = (configuration(tmp_path, kind, lr_schedule="multistep", epochs=8, **more) for kind, more in (
        (Config, {}), (Early, {}), (Early, dict(milestones="7"))))
    assert factors(early, 3) == [1.0] * 6 + [0.1] * 6 + [0.1 ** 2] * 12
    assert factors(given, 3) == [1.0] * 21 + [0.1] * 3
    assert factors(plain, 3) == [0.1 ** sum(step >= round(24 * part) for part in (100 / 110, 105 / 110)) for step in range(24)]
    assert set(factors(dataclasses.replace(early, lr_schedule="constant"), 3)) == {1.0}
    assert [list(cfg.decays) for cfg in (plain, early, given)] == [[100 / 110, 105 / 110], [0.25, 0.5], [7 / 8]]


@pytest.mark.parametrize("base, at", [("pgd", [99, 104]), ("trades", [82.5, 99]), ("awp", [55, 82.5])])
def test_las_ats_decays_follow_its_base(base, at, tmp_path):
    cfg = configuration(tmp_path, train_las_at.Config, base=base, lr_schedule="multistep", epochs=110)
    assert factors(cfg, 2) == [0.1 ** sum(step >= 2 * epoch for epoch in at) for step in range(220)]
    assert train_las_at.Config.DECAYS == Config.DECAYS, "of this configuration alone"
    assert train_las_at.Config(**dataclasses.asdict(cfg)) == cfg


@pytest.mark.parametrize("top", [0.1, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("epochs, per_epoch", [(20, 1), (40, 5)])
def test_cyclic_has_its_peak_where_it_is_told(top, epochs, per_epoch, tmp_path):
    """Against torch's, whose ways up and down may differ in length."""
    cfg, total = configuration(tmp_path, lr_schedule="cyclic", cyclic_top=top, epochs=epochs), epochs * per_epoch
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
    up = round(top * total)
    theirs = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0, max_lr=1, step_size_up=up, step_size_down=total - up)
    schedule = cfg.schedule()
    for step in range(total):
        lr, momentum = schedule(step, total, per_epoch)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        assert momentum == pytest.approx(optimizer.param_groups[0]["momentum"], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert max(range(total), key=factors(cfg, per_epoch).__getitem__) == up


def test_cyclic_top_has_bounds_and_a_default(tmp_path):
    for top in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(Misuse, match="--cyclic-top"):
            configuration(tmp_path, cyclic_top=top)
    cfg = configuration(tmp_path, lr_schedule="cyclic")
    assert [cfg.schedule()(step, 12, 3) for step in range(12)] == [SCHEDULES["cyclic"](step, 12, 3) for step in range(12)]
    assert factors(configuration(tmp_path, lr_schedule="constant", cyclic_top=0.2), 3) == [1.0] * 6


def test_the_momentum_cycles_unless_told_otherwise(tmp_path):
    for cycles, expected in ((True, 0.8), (False, 0.9)):
        run = engine.Run(configuration(tmp_path / str(cycles), lr_schedule="cyclic", cycle_momentum=cycles))
        assert run._rates_of(run.total // 2)[1] == pytest.approx(expected)


@pytest.mark.parametrize("flag, seconds, wanted", [("time_limit", 59, 0), ("time_limit", 61, 2), ("save_every", 59, 0), ("save_every", 61, 1)])
def test_limits_are_minutes(flag, seconds, wanted, tmp_path):
    run = engine.Run(configuration(tmp_path, **{flag: 1}))
    batches = run.batches()
    next(batches)
    if flag == "time_limit":
        assert run._deadline == run._began + 60
        run._deadline = time.perf_counter() + 60 - seconds  # however long it took to come here
    else:
        run._last_save -= seconds
    assert run._wanted() == wanted
    batches.close()


def test_deterministic_kernels_are_asked_for(tmp_path):
    for wanted in (False, True):
        engine.Run(configuration(tmp_path / str(wanted), deterministic=wanted))
        assert torch.are_deterministic_algorithms_enabled() == wanted


# ---- what a script reads -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lr_schedule", sorted(SCHEDULES))
def test_lr_is_the_next_updates(lr_schedule, tmp_path):
    run, seen = engine.Run(configuration(tmp_path, lr_schedule=lr_schedule, epochs=5, train_size=16), updates_per_batch=2), []
    for x, y, _ in run.batches():
        for _ in range(2):
            seen.append(run.lr)
            assert run.lr == seen[-1], "reading it changes nothing"
            learn(run, x, y)
            assert run.optimizer.param_groups[0]["lr"] == seen[-1]
    assert len(seen) == 20 and seen == [run.cfg.lr * run._schedule(step, 20, 4).lr for step in range(20)]


def test_shape_is_that_of_an_image(tmp_path):
    run = engine.Run(configuration(tmp_path))
    for x, y, _ in run.batches():
        assert run.shape == x.shape[1:] == (1, 8, 8)
        learn(run, x, y)
    colourful = engine.Run(configuration(tmp_path / "other"))
    colourful.dataset = dataclasses.replace(colourful.dataset, x_train=torch.zeros(3, 16, 16, 3).numpy())
    assert colourful.shape == (3, 16, 16), "channels first"


def part_of(rank: int, world: int):
    """`distributed.shard` as it is in one of several processes."""
    return lambda n: slice(-(-n * rank // world), -(-n * (rank + 1) // world))


def seen_by(out_dir: Path, **more: Any) -> list[dict[str, Any]]:
    """Per batch what a run yields and draws."""
    run, found = engine.Run(configuration(out_dir, **more)), []
    for x, y, index in run.batches():
        uniform = run.uniform(x)
        found.append(dict(x=x, index=index, positions=run.positions, uniform=uniform, random=run.random(3, 2), later=run.random(4),
                          normal=run.normal(x)))
        if len(x):
            learn(run, x, y)
        else:  # in a real run the other processes' gradients come here
            run._position.step += 1
            run._sums["seen"] += 1
    return found


@pytest.mark.parametrize("train_size", [21, 17])
def test_positions_and_random_numbers_in_two_shards(train_size, tmp_path, monkeypatch):
    """The last batch has 5 images, which are shared as 3 and 2, or a single one."""
    whole = seen_by(tmp_path / "whole", train_size=train_size)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "shard", part_of(rank, 2))
        parts.append(seen_by(tmp_path / f"rank{rank}", train_size=train_size))
    last = train_size % 8
    assert [len(batch["x"]) for batch in whole] == 2 * [8, 8, last]
    for one, first, second in zip(whole, *parts, strict=True):
        assert one["positions"].tolist() == list(range(len(one["x"]))) == first["positions"].tolist() + second["positions"].tolist()
        for name in ("x", "index", "uniform", "normal"):
            assert torch.equal(torch.cat([first[name], second[name]]), one[name])
            assert torch.equal(one[name][second["positions"]], second[name])
        for name in ("random", "later"):
            assert torch.equal(first[name], one[name]) and torch.equal(second[name], one[name]), "the same in every process"
    assert [len(batch["positions"]) for batch in parts[1]] == 2 * [4, 4, last // 2]


def test_random_is_a_function_of_seed_and_batch(tmp_path):
    numbers_of = [batch["random"] for batch in seen_by(tmp_path / "one")]
    learnt = engine.Run.update

    def drawing(run, *arguments, **more):
        run.random(run.step + 1), run.uniform(torch.rand(run._global_batch, 2))
        learnt(run, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:  # what is drawn after it, of whatever, does not matter to later batches
        patch.setattr(engine.Run, "update", drawing)
        again = [batch["random"] for batch in seen_by(tmp_path / "two")]
    other = [batch["random"] for batch in seen_by(tmp_path / "three", seed=1)]
    assert all(torch.equal(a, b) for a, b in zip(numbers_of, again, strict=True))
    assert len({tuple(drawn.flatten().tolist()) for drawn in numbers_of + other}) == 12, "no two batches draw alike"
    drawn = torch.cat([drawn.flatten() for drawn in numbers_of])
    assert drawn.shape == (36,) and 0 <= drawn.min() < 0.2 and 0.8 < drawn.max() < 1


def test_another_classifier_is_like_the_first(tmp_path):
    alone = engine.Run(configuration(tmp_path / "alone")).network.state_dict()
    run = engine.Run(configuration(tmp_path / "two"))
    twin, other = run.classifier(run.cfg.arch, run.cfg.width), run.classifier("cnn1")
    for made in (twin, other):
        assert isinstance(made, Classifier) and made.training and all(layer.training for layer in made.modules())
        assert made(torch.rand(3, *run.shape)).shape == (3, run.classes)
    assert all(torch.equal(value, alone[name]) for name, value in run.network.state_dict().items()), "weights of the first are drawn before"
    assert [p.shape for p in twin.network.parameters()] == [p.shape for p in run.network.parameters()]
    assert not torch.equal(next(twin.parameters()), next(run.model.parameters()))
    assert type(other.network) is type(models.build("cnn1", channels=1, image_size=8))
    with pytest.raises(Misuse, match="the other network resnet9"):
        run.classifier("resnet9")


# ---- updates -------------------------------------------------------------------------------------------------------

def test_the_leafs_gradient_is_autograds_own(tmp_path):
    """From the same pass, and the weights never know of it."""
    runs = [engine.Run(configuration(tmp_path / name)) for name in ("with", "without")]
    for (x, y, _), (x_again, *_) in zip(*(run.batches() for run in runs), strict=True):
        assert torch.equal(x, x_again)
        noisy = (x + 0.1).requires_grad_()
        loss = F.cross_entropy(runs[0].model(noisy), y)
        expected, = torch.autograd.grad(loss, noisy, retain_graph=True)
        passes = []
        hook = noisy.register_hook(passes.append)
        runs[0].update(loss, leaf=noisy)
        hook.remove()
        assert torch.equal(noisy.grad, expected) and noisy.grad.abs().max() > 0 and len(passes) == 1
        learn(runs[1], x + 0.1, y)
        for one, other in zip(runs[0].network.parameters(), runs[1].network.parameters()):
            assert torch.equal(one, other)


def test_no_leaf_gets_no_gradient(tmp_path):
    run = engine.Run(configuration(tmp_path, epochs=1))
    for x, y, _ in run.batches():
        noisy = x.clone().requires_grad_()
        learn(run, noisy, y)
        assert noisy.grad is None


def test_a_largest_norm_of_zero_is_none(tmp_path):
    runs = [engine.Run(configuration(tmp_path / str(most), epochs=1, max_grad_norm=most)) for most in (0.0, None)]
    for (x, y, _), _ in zip(*(run.batches() for run in runs)):
        for run in runs:
            learn(run, x, y)
        assert all(torch.equal(*pair) for pair in zip(*(run.network.parameters() for run in runs)))


@pytest.mark.parametrize("by", ["flag", "argument"])
@pytest.mark.parametrize("most", [0.05, 1e6])
def test_clipping_is_torchs(most, by, tmp_path):
    """Against a copy that torch clips and descends; far above the norm it changes no bit."""
    run = engine.Run(configuration(tmp_path, weight_decay=0.01, max_grad_norm=most if by == "flag" else None))
    copied = copy.deepcopy(run.network)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    norms = []
    for x, y, _ in run.batches():
        learn(run, x, y, **({} if by == "flag" else {"max_norm": most}))
        optimizer.zero_grad()
        F.cross_entropy(copied.train()(x.contiguous(memory_format=torch.channels_last)), y).backward()
        gradients = torch.cat([p.grad.flatten() for p in copied.parameters()])
        norms.append(float(gradients.norm()))
        if most < 1:
            for p in copied.parameters():
                p.grad.mul_(min(1, most / norms[-1]))
        optimizer.step()
        for ours, theirs in zip(run.network.parameters(), copied.parameters()):
            assert torch.equal(ours, theirs) if most > 1 else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        left = torch.cat([p.grad.flatten() for p in run.network.parameters()]).norm()
        assert float(left) == pytest.approx(min(most, norms[-1]), rel=1e-4)
    assert min(norms) > 0.05


def test_clipping_is_of_that_optimizer_alone_and_leaves_the_leaf(tmp_path):
    run = engine.Run(configuration(tmp_path, epochs=1))
    weight = nn.Parameter(torch.full((4,), 3.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for x, y, _ in run.batches():
        assert optimizer.param_groups[0]["lr"] == 1.0
        before, leaf = weight.detach().clone(), torch.ones(4, requires_grad=True)
        run.update((weight * leaf).sum() * 10, optimizer, max_norm=1.0, leaf=leaf)
        assert torch.allclose(before - weight.detach(), torch.full((4,), 0.5)), "a gradient of 10 four times has the norm 20"
        assert torch.equal(leaf.grad, 10 * before)
        learn(run, x, y)


def test_clipping_lets_no_loss_through_that_is_not_finite(tmp_path):
    run = engine.Run(configuration(tmp_path))
    before = [p.detach().clone() for p in run.network.parameters()]
    with pytest.raises(Failure, match="not finite at update 0"):
        for x, y, _ in run.batches():
            run.update(F.cross_entropy(run.model(x), y) * float("nan"), max_norm=1.0)
    assert all(torch.equal(p, value) for p, value in zip(run.network.parameters(), before))


# ---- growing optimizers --------------------------------------------------------------------------------------------

def two_networks(out_dir: Path, stop_at: int | None = None) -> list[Tensor]:
    """A run whose optimizer gets a second network after it was made; returns that network as the first batch found it."""
    run, found = engine.Run(configuration(out_dir, save_every=0.0)), []
    other = run.classifier("cnn1")
    run.optimizer.add_param_group({"params": list(other.parameters())})
    run.keep(other=other)
    fresh = [p.detach().clone() for p in other.parameters()]
    for x, y, _ in run.batches():
        if not found:
            found = [p.detach().clone() for p in other.parameters()]
        if run.step == stop_at:
            break
        run.update(F.cross_entropy(run.model(x), y) + F.mse_loss(other(x), run.model(x)))
    return [torch.stack([a.norm(), b.norm()]) for a, b in zip(fresh, found)]


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_optimizer_that_grew_after_the_run_was_made_resumes_bitwise(stop_at, tmp_path, differences):
    """What is saved has more groups than the optimizer has when the run is made: it is taken up when all is there."""
    two_networks(tmp_path / "whole")
    two_networks(tmp_path / "parts", stop_at)
    saved = torch.load(tmp_path / "parts/state.pth", weights_only=True)
    assert saved["position"]["step"] == stop_at and len(saved["kept"]["optimizer"]["param_groups"]) == 2
    momenta = {len(saved["kept"]["optimizer"]["param_groups"][group]["params"]) for group in range(2)}
    assert len(saved["kept"]["optimizer"]["state"]) == sum(momenta), "momenta of both networks"
    norms = two_networks(tmp_path / "parts")
    assert any(fresh != found for fresh, found in norms), "restored once the batches begin, not before"
    whole, parts = (torch.load(tmp_path / name / "state.pth", weights_only=True) for name in ("whole", "parts"))
    for name in ("kept", "history", "position", "sums", "best"):
        assert differences(whole[name], parts[name]) == []


def test_an_optimizer_that_no_longer_grows_is_refused(tmp_path):
    two_networks(tmp_path, 1)
    run = engine.Run(configuration(tmp_path, save_every=0.0))
    run.keep(other=run.classifier("cnn1"))
    with pytest.raises(Misuse, match="'optimizer' does not fit"):
        next(run.batches())


@pytest.mark.parametrize("script, base", [(train_awp, "pgd"), (train_awp, "trades"), (train_las_at, "awp")])
def test_the_weight_average_is_of_weights_that_are_back(script, base, tmp_path, monkeypatch):
    """AWP updates them while they are perturbed."""
    found = []

    class Watched(engine.Run):
        def batches(self):
            expected = {name: value.double().clone() for name, value in self.network.state_dict().items()}
            for batch in super().batches():
                yield batch
                for name, value in self.network.state_dict().items():
                    expected[name] = 0.8 * expected[name] + 0.2 * value if value.is_floating_point() else value.clone()
            found.append((expected, self.average.state_dict()))

    monkeypatch.setattr(engine, "Run", Watched)
    script.main(configuration(tmp_path, kind=script.Config, base=base, ema=0.8, train_size=100, steps="2" if base == "awp" else 2, gamma=0.1,
                              **({"strategy_width": 4} if base == "awp" else {"warmup": 0})))
    (expected, average), = found
    for name, value in average.items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6), name


def test_lbgat_of_single_batches_ends_like_one_run(tmp_path, differences):
    flags = dict(kind=train_lbgat.Config, steps=2, train_size=12, lr_schedule="cyclic")
    train_lbgat.main(configuration(tmp_path / "whole", **flags))
    for _ in range(3):
        with pytest.raises(SystemExit) as stopped:
            train_lbgat.main(configuration(tmp_path / "parts", time_limit=0.0, **flags))
        assert stopped.value.code == 0
    train_lbgat.main(configuration(tmp_path / "parts", time_limit=0.0, **flags))
    for name in ("state", "best", "last"):
        whole, parts = (torch.load(tmp_path / directory / f"{name}.pth", weights_only=True) for directory in ("whole", "parts"))
        assert differences(whole, parts) == []


# ---- several processes ---------------------------------------------------------------------------------------------

DRIVER = '''
"""What a process finds of its part of everything; one process finds all of it."""
import importlib, sys
from pathlib import Path
import torch
import torch.nn.functional as F
import engine
from engine import distributed
from engine.memory import Memory

directory = Path(sys.argv[1])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
distributed.start(torch.device("cpu"))
rank, world = distributed.rank(), distributed.world_size()
found = {"world": world}
FLAGS = dict(dataset="digits", val_size=4, batch_size=8, epochs=2, measure="pgd10", device="cpu", lr_schedule="constant", lr=0.1, arch="cnn1")

for n in (1, 2, 5, 8):
    for dtype in (torch.float64, torch.float32, torch.half, torch.int64, torch.uint8):
        items = torch.arange(6 * n).reshape(n, 2, 3).to(dtype) + 1
        if dtype.is_floating_point:
            items = items / 4 - 2
        part = items[distributed.shard(n)]
        gathered = distributed.gathered(part, n)
        found[f"gathered {n} {dtype}"] = gathered.dtype == dtype and torch.equal(gathered, items) and (world > 1 or gathered is part)

for n in (5, 1):
    rows = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([7, 2, 9, 0, 4])[:n]
    gather = lambda part: distributed.gathered(part, n)
    for dtype in (torch.float64, torch.half):
        memory = Memory(10, (1, 4, 4), dtype=dtype, device=torch.device("cpu"), scale=8.0, gather=gather)
        mine = index[distributed.shard(n)]
        memory[mine] = rows[mine]
        found[f"memory {n} {dtype}"] = memory.values.clone()
        found[f"read {n} {dtype}"] = torch.equal(memory[mine], (rows[mine] * 8).to(dtype).double() / 8)


def custom(name, train_size, aligned):
    run = engine.Run(engine.Config(out_dir=str(directory / f"{name}-{world}"), train_size=train_size, **FLAGS))
    slots, images, drawn = run.memory("slots", per_image=False), run.memory("images", aligned=aligned), []
    for x, y, index in run.batches():
        noise, number = run.uniform(x), run.random(3)
        assert len(run.positions) == len(x)
        slots[run.positions], images[index] = noise, x
        noisy = (x + 0.1 * noise).requires_grad_()
        run.update(F.cross_entropy(run.model(noisy), y), max_norm=0.05, leaf=noisy)
        norm = torch.cat([p.grad.flatten() for p in run.network.parameters()]).norm()
        drawn.append({"random": number, "positions": run.positions, "index": index, "norm": norm, "leaf": noisy.grad.clone() * len(x),
                      "slots": slots.values.clone(), "images": images.values.clone()})
    found[name] = drawn
    found[f"{name} weights"] = {key: value.clone() for key, value in run.network.state_dict().items()}


for train_size, aligned in ((21, True), (17, False)):  # the last batch has 5 images, or a single one
    custom(f"custom {train_size}", train_size, aligned)

for method, train_size, more in (("fgsm_ep", 21, {}), ("fgsm_bp", 17, {}), ("free_at", 17, {"replays": 2})):
    script = importlib.import_module(f"train_{method}")
    out_dir = directory / f"{method}-{train_size}-{world}"
    script.main(script.Config(out_dir=str(out_dir), train_size=train_size, epsilon=24, **FLAGS | more))
    distributed.barrier()
    found[f"{method} {train_size}"] = torch.load(out_dir / "state.pth", weights_only=True)["kept"]

with distributed.leaving():
    torch.save(found, directory / f"found-{world}-{rank}.pth")
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[tuple[dict, list[dict]]]:
    """What one process finds, and what each of two does."""
    directory = tmp_path_factory.mktemp("processes")
    driver = directory / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(driver), str(directory)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(record.ROOT), "OMP_NUM_THREADS": "1"}, cwd=directory,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(f"two processes wait for each other for ever:\n{process.communicate()[0][-2000:]}")
    assert process.returncode == 0, output[-4000:]
    before = torch.get_default_dtype(), sys.argv, torch.get_num_threads()
    try:
        sys.argv = [str(driver), str(directory)]
        runpy.run_path(str(driver))
    finally:
        torch.set_default_dtype(before[0])
        sys.argv = before[1]
        torch.set_num_threads(before[2])
    one, *two = (torch.load(directory / f"found-{name}.pth", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert (one["world"], two[0]["world"], two[1]["world"]) == (1, 2, 2)
    return one, two


def test_processes_put_their_parts_together(found):
    """Of one item, of an odd and of an even number; also of halves, indices and bytes."""
    one, two = found
    for each in (one, *two):
        names = [name for name in each if name.startswith("gathered")]
        assert len(names) == 20 and all(each[name] for name in names), [name for name in names if not each[name]]


@pytest.mark.parametrize("n", [5, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.half])
def test_processes_write_one_memory(n, dtype, found):
    """Five rows, shared as 3 and 2, or one, of which the second process has nothing: both hold all that was written."""
    one, two = found
    written, rows = [7, 2, 9, 0, 4][:n], torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for each in (one, *two):
        values = each[f"memory {n} {dtype}"]
        assert each[f"read {n} {dtype}"] and values.dtype == dtype
        for row in range(10):
            assert torch.equal(values[row], (8 * rows[row]).to(dtype) if row in written else torch.zeros(1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("name", ["custom 21", "custom 17"])
def test_what_two_processes_remember_is_what_one_does(name, found):
    """After every batch, of a short last one too; positions and random numbers as one process has them."""
    one, two = found
    for alone, first, second in zip(one[name], *(each[name] for each in two), strict=True):
        for memory in ("slots", "images"):
            assert torch.equal(first[memory], alone[memory]) and torch.equal(second[memory], alone[memory])
        assert torch.equal(first["random"], alone["random"]) and torch.equal(second["random"], alone["random"])
        for part in ("positions", "index"):
            assert torch.equal(torch.cat([first[part], second[part]]), alone[part])
        leaves = torch.cat([first["leaf"], second["leaf"]])
        assert torch.allclose(leaves, alone["leaf"], rtol=1e-9, atol=1e-12), "each leaf has the gradient of its own process's mean"
    assert not torch.equal(one[name][0]["random"], one[name][1]["random"])
    last = one[name][-1]
    assert (last["slots"].flatten(1).abs().sum(1) > 0).all() and len(last["index"]) == int(name.split()[1]) % 8


@pytest.mark.parametrize("name", ["custom 21", "custom 17"])
def test_two_processes_clip_the_gradient_that_they_share(name, found):
    one, two = found
    for alone, first, second in zip(one[name], *(each[name] for each in two), strict=True):
        assert float(alone["norm"]) == pytest.approx(0.05, rel=1e-4)
        assert float(first["norm"]) == pytest.approx(float(alone["norm"]), rel=1e-9) and torch.equal(first["norm"], second["norm"])
    for key, value in one[f"{name} weights"].items():
        assert all(torch.allclose(each[f"{name} weights"][key], value, rtol=1e-9, atol=1e-12) for each in two), key


@pytest.mark.parametrize("name", ["fgsm_ep 21", "fgsm_bp 17", "free_at 17"])
def test_scripts_that_remember_compute_with_two_processes_what_one_does(name, found):
    one, two = found

    def close(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
        return not isinstance(a, Tensor) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    for each in two:
        assert each[name].keys() == one[name].keys()
        assert {key: close(value, each[name][key]) for key, value in one[name].items()} == dict.fromkeys(one[name], True)


def test_alone_a_process_gathers_its_own_tensor():
    part = torch.ones(3)
    assert distributed.gathered(part, 3) is part


# ---- utils ---------------------------------------------------------------------------------------------------------

def test_divergence_is_the_sum_sample_by_sample(float64):
    logits, reference = 3 * torch.randn(5, 4), 3 * torch.randn(5, 4)
    found = utils.divergence(logits, reference)
    assert found.shape == (5,)
    for value, z, r in zip(found.tolist(), logits.tolist(), reference.tolist()):
        q, p = ([torch.tensor(v).exp() / torch.tensor(row).exp().sum() for v in row] for row in (z, r))
        assert value == pytest.approx(sum(float(b * (b / a).log()) for a, b in zip(q, p)), rel=1e-12)
        assert value > 0
    assert torch.allclose(found.mean(), F.kl_div(F.log_softmax(logits, 1), F.softmax(reference, 1), reduction="batchmean"))
    assert not torch.allclose(found, utils.divergence(reference, logits)), "it is not symmetric"
    assert utils.divergence(logits, logits + 1).abs().max() < 1e-12


@pytest.mark.parametrize("argument", [0, 1])
def test_divergence_has_gradients_in_both_arguments(argument, float64):
    """Central differences over every entry; the samples do not mix."""
    values = [3 * torch.randn(3, 4), 3 * torch.randn(3, 4)]
    values[argument].requires_grad_()
    gradient, = torch.autograd.grad(utils.divergence(*values).sum(), values[argument])
    h = 1e-6
    for sample in range(3):
        for entry in range(4):
            ends = []
            for sign in (1, -1):
                moved = [value.detach().clone() for value in values]
                moved[argument][sample, entry] += sign * h
                ends.append(utils.divergence(*moved))
            difference = (ends[0] - ends[1]) / (2 * h)
            assert float(difference[sample]) == pytest.approx(float(gradient[sample, entry]), rel=1e-6, abs=1e-8)
            assert difference[torch.arange(3) != sample].abs().max() == 0
    assert gradient.abs().max() > 0.1


def test_divergence_stays_finite_where_a_probability_is_zero():
    """One class has it all where its logit is 104 and more above the others, in single precision: that is no reason for nan."""
    logits, reference = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True), torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    found = utils.divergence(logits, reference)
    assert torch.isfinite(found).all() and found[0] == 0 and float(found[1].detach()) == pytest.approx(0.693147, rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(found.sum(), (logits, reference)))


class Layers(nn.Module):
    """Layers that track, one that does not, one that was told not to, and one in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.untracking, self.resting, self.last = nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2), nn.BatchNorm1d(2)
        self.resting.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.resting(self.untracking(self.bn(self.convolution(x)))).mean((2, 3)))


def state_of(network: nn.Module) -> tuple:
    return ({name: value.clone() for name, value in network.state_dict().items()}, [layer.training for layer in network.modules()],
            [getattr(layer, "track_running_stats", None) for layer in network.modules()])


@pytest.mark.parametrize("fails", [False, True])
def test_untracked_leaves_no_trace(fails, differences):
    torch.manual_seed(0)
    network, x = Layers(), torch.randn(6, 1, 5, 5)
    for _ in range(3):
        network(x + 1)
    before, twin = state_of(network), copy.deepcopy(network)
    expected = twin(x)
    try:
        with utils.untracked(network) as inside:
            assert inside is network
            assert torch.equal(network(x), expected), "the batch's own statistics normalise, as in training"
            assert [layer.training for layer in network.modules()] == before[1]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert differences(before, state_of(network)) == [] and differences(before, state_of(twin)) != []
    network(x)
    assert differences(state_of(network), state_of(twin)) == [], "afterwards it tracks again"


def test_untracked_in_evaluation_mode_uses_what_was_tracked(differences):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.randn(6, 1, 5, 5)
    network(x + 1)
    network.eval()
    before, expected = state_of(network), network(x)
    with utils.untracked(network), utils.untracked(network):
        assert torch.equal(network(x), expected)
        with utils.eval_mode(network):
            network(x)
    assert differences(before, state_of(network)) == []


def test_untracked_passes_gradients(float64):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    x = torch.randn(6, 1, 5, 5)
    expected = torch.autograd.grad(network(x).square().mean() + network(x).sum(), list(network.parameters()))
    with utils.untracked(network):
        found = torch.autograd.grad(network(x).square().mean() + network(x).sum(), list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


# ---- what a new method may get wrong ---------------------------------------------------------------------------------

def test_more_updates_than_the_schedule_counts_on_end_the_run(tmp_path):
    """The rate would go on beyond the schedule's end, where cyclic's is negative."""
    def train(**more: Any) -> None:
        run = engine.Run(configuration(tmp_path / str(more)), **more)
        for x, y, _ in run.batches():
            for _ in range(2):
                learn(run, x, y)

    with pytest.raises(Failure, match=r"2 times in a batch, .* counts on 1: say engine.Run\(cfg, updates_per_batch=2\)"):
        train()
    train(updates_per_batch=2)


def test_a_flag_without_a_help_is_named():
    @dataclasses.dataclass(kw_only=True)
    class Mine(Config):
        beta: float = 6.0

    with pytest.raises(TypeError, match=r"Mine.beta has no help: write it as engine.flag"):
        Mine(dataset="digits")


def test_a_copy_of_a_script_needs_a_name_of_its_own(tiny):
    """Otherwise it goes on with the runs of the one that it was copied from."""
    text = (record.ROOT / "train_fgsm_rs.py").read_text()
    for name in ("train_fgsm_rs.py", "mine.py"):
        (tiny.directory / name).write_text(text)
    (tiny.directory / "train_mine.py").write_text(text.replace('"fgsm-rs"', '"mine"'))
    tiny.root = tiny.directory
    result = tiny.command("mine", "--help")
    assert result.status == 2 and "METHOD = 'fgsm-rs' in mine.py is the name of train_fgsm_rs.py" in result.err
    for name in ("train_fgsm_rs", "train_mine"):
        assert tiny.command(name, "--help").status == 0


def test_a_script_that_was_changed_is_warned_of(tiny, capsys):
    directory = tiny.train("train_fgsm_rs", "--epochs", 1)
    command = ("train_fgsm_rs", *tiny.flags, "--epochs", 1, "--out-dir", directory)
    assert "by another version of this script" not in tiny.command(*command).err
    state = torch.load(directory / "state.pth", weights_only=True)
    torch.save(state | {"script": "another"}, directory / "state.pth")
    assert "warning: " in (said := tiny.command(*command).err) and "by another version of this script" in said


# ---- kills and processes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before", [0, 1])
def test_a_best_network_that_was_undone_gives_way(before, tmp_path, monkeypatch):
    """A kill between best.pth and state.pth: the epoch is done again, and need not end as it did where kernels are not deterministic."""
    accuracies, save = iter([50, 60, 40, 40]), checkpoint.save

    def killed(content: dict, path: Path) -> None:
        if path.name == "state.pth" and content["position"]["epoch"] == before + 1 and not content["position"]["batch"]:
            raise KeyboardInterrupt
        save(content, path)

    def train() -> None:
        run = engine.Run(configuration(tmp_path))
        run._accuracies = lambda network: {"val_pgd10": float(next(accuracies))}
        for x, y, _ in run.batches():
            learn(run, x, y)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        train()
    undone = torch.load(tmp_path / "best.pth", weights_only=True)
    assert undone["epoch"] == before + 1
    train()
    best, said = torch.load(tmp_path / "best.pth", weights_only=True), json.loads((tmp_path / "result.json").read_text())["checkpoints"]["best"]
    assert (best["epoch"], said["pgd10"]["value"]) == (said["epoch"], [60, 50][before]) and said["epoch"] == 1
    assert checkpoint.digest(best["state_dict"]) == said["sha256"]
    assert not list(tmp_path.glob("best-before*"))


@pytest.mark.parametrize("ending, status", [(None, 0), (SystemExit(0), 0), (SystemExit(2), 2), (RuntimeError("of torch"), 1), (KeyError("a"), 1)], ids=str)
def test_a_process_that_fails_takes_no_leave(ending, status, monkeypatch, capsys):
    """NCCL's leave waits for the others, which wait for this process."""
    events: list[Any] = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: events.append("leave"))
    monkeypatch.setattr(os, "_exit", events.append)
    with distributed.leaving():
        if ending is not None:
            raise ending
    assert events == ["leave"] * (status == 0) + [status]
    assert ("Traceback" in capsys.readouterr().err) == (status == 1)


def test_processes_with_other_images_are_refused(tmp_path, monkeypatch):
    device = torch.device("cpu")
    assert distributed.agree(b"this", device)
    monkeypatch.setattr(distributed, "maximum", lambda value, device: max(value, -value))
    assert not distributed.agree(b"this", device)
    monkeypatch.undo()
    for answers, sentence in (([True, False], "training images of digits .* for all processes"), ([False], "not all processes find the same .*state.pth")):
        monkeypatch.setattr(distributed, "agree", lambda *_, left=iter(answers): next(left))
        with pytest.raises(Failure, match=sentence):
            engine.Run(configuration(tmp_path))


def test_a_method_in_a_notebook_has_no_file(monkeypatch):
    assert record.digest_of_script(Config) == record.digest_of_script(Config) != record.digest_of_script(Failure)

    def typed(kind: type) -> str:
        raise OSError("source code not available")

    monkeypatch.setattr(record.inspect, "getfile", typed)
    assert record.digest_of_script(Config) is None


def test_a_result_is_written_where_one_process_alone_misses_it(tmp_path, monkeypatch):
    """The first one writes it while another looks: all must come to the barrier behind."""
    for x, y, _ in (run := engine.Run(configuration(tmp_path))).batches():
        learn(run, x, y)
    finished, barriers = engine.Run(configuration(tmp_path)), []
    monkeypatch.setattr(distributed, "maximum", lambda value, device: 1)
    monkeypatch.setattr(distributed, "barrier", lambda: barriers.append(1))
    assert list(finished.batches()) == [] and barriers, "it comes to the end of the run, though it sees the file"


@pytest.mark.parametrize("error", [None, OSError(38, "Function not implemented"), BlockingIOError()], ids=str)
def test_a_disk_without_locks_is_warned_of(error, tmp_path, monkeypatch, capsys):
    def flock(*_: Any) -> None:
        if error:
            raise error

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    if isinstance(error, BlockingIOError):
        with pytest.raises(Misuse, match="another run"):
            checkpoint.lock(tmp_path)
        return
    checkpoint.lock(tmp_path).close()
    assert ("cannot be locked (Function not implemented)" in capsys.readouterr().err) == bool(error)


def test_a_lock_ends_with_its_process_though_a_worker_lives_on(tmp_path):
    held = checkpoint.lock(tmp_path)
    (told, tell), (asked, ask) = os.pipe(), os.pipe()
    if not (worker := os.fork()):
        os.write(tell, b"x")
        os.read(asked, 1)  # lives on
        os._exit(0)
    try:
        os.read(told, 1)
        held.close()
        checkpoint.lock(tmp_path).close()
    finally:
        os.write(ask, b"x")
        assert os.waitpid(worker, 0)[1] == 0
