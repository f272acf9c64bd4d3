"""Where two methods meet: settings in which one is another, run through their scripts, and a setting beside each in which it is not.

Runs of two scripts with one seed have the same initial weights, batches and noise, so that their weights can be compared
update by update. `parted` says after which update they differ first; None is never.
"""
from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine
import models
import train_fgsm_ckpt
import train_fgsm_rs
import train_free_at
import train_gradsum
import train_lbgat
import train_liet
import train_mart
import train_n_fgsm
import train_pgd_at
from engine import data, random_streams, record
from utils import eval_mode, inside_image

EXACT, ROUNDING = dict(rtol=0, atol=0), dict(rtol=0, atol=1e-9)
EPSILON, BATCHES = 24, 3  # 20 images in batches of 8: the last one has 4
TINY = dict(dataset="digits", train_size=20, val_size=4, batch_size=8, epochs=2, width=4, measure="pgd10", device="cpu", epsilon=EPSILON,
            lr_schedule="constant", lr=0.1)  # the digits' own schedule begins with a rate of zero, at which everything is equal


pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Trained:
    """The parameters of a network, and BatchNorm's averages, before the first update and after each."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    averages: list[dict[str, Tensor]] = field(default_factory=list)

    def look_at(self, network: nn.Module) -> None:
        for kept, values in ((self.weights, network.named_parameters()), (self.averages, network.named_buffers())):
            kept.append({name.removeprefix("network."): value.detach().clone() for name, value in values})


def parted(a: Trained, b: Trained, what: str = "weights", rounding: bool = False) -> int | None:
    """The first update after which the two differ by a bit, or by more than float64's rounding."""
    for update, (one, other) in enumerate(zip(getattr(a, what), getattr(b, what), strict=True)):
        for name, value in one.items():
            if not torch.allclose(value, other[name], **ROUNDING if rounding else EXACT):
                return update
    return None


def same(a: Trained, b: Trained) -> bool:
    """Bit for bit, with BatchNorm's averages."""
    return parted(a, b) is None and parted(a, b, "averages") is None


@pytest.fixture
def train(tmp_path) -> Callable[..., Trained]:
    """A function that trains a method; `start` are the first weights, `of` is the kept network that is looked at."""
    runs: list[Trained] = []

    def trained(method: str, start: dict[str, Tensor] | None = None, of: str = "classifier", **flags: Any) -> Trained:
        script, found = importlib.import_module(f"train_{method}"), Trained()
        runs.append(found)
        begin, batches, update = engine.Run.__init__, engine.Run.batches, engine.Run.update

        def begun(run, *arguments, **more):
            begin(run, *arguments, **more)
            if start is not None:
                run.network.load_state_dict(start)

        def yielded(run):
            for batch in batches(run):
                if not found.weights:
                    found.look_at(run._kept[of])
                yield batch

        def updated(run, loss, optimizer=None, **more):
            update(run, loss, optimizer, **more)
            if optimizer in (None, run.optimizer):
                found.look_at(run._kept[of])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.Run, "__init__", begun)
            patch.setattr(engine.Run, "batches", yielded)
            patch.setattr(engine.Run, "update", updated)
            script.main(script.Config(**TINY | dict(out_dir=str(tmp_path / f"run{len(runs)}")) | flags))
        return found

    return trained


@contextmanager
def replaced(holder: Any, name: str, by: Callable[[Any], Any]):
    """Inside, `holder.name` is what `by` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, by(getattr(holder, name)))
        yield


def in_order(_) -> Callable[..., Tensor]:
    """For torch.randperm: every epoch has the images in their own order."""
    return lambda n, **more: torch.arange(n)


def first_draw(noise) -> Callable[..., Tensor]:
    """For Run.uniform and Run.normal: noise for images is the batch's first, whatever a script drew before it."""
    def drawn(run, x):
        if x.ndim == 4:
            random_streams.noise_generator(run._generator, run.cfg.seed, run._position.epoch * len(run._data) + run._position.batch)
        return noise(run, x)
    return drawn


def still(build) -> Callable[..., nn.Module]:
    """For models.build: BatchNorm's averages never move."""
    def built(*arguments, **more):
        network = build(*arguments, **more)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.0
        return network
    return built


def argument(position: int, kept: list[Tensor]) -> Callable[[Any], Any]:
    """For a function: keeps a copy of one argument of every call."""
    def by(function):
        def called(*arguments, **more):
            kept.append(arguments[position].detach().clone())
            return function(*arguments, **more)
        return called
    return by


def given(position: int, values: list[Tensor]) -> Callable[[Any], Any]:
    """For a function: the calls get `values`, in turn, for one argument."""
    following = iter(values)

    def by(function):
        return lambda *arguments: function(*arguments[:position], next(following), *arguments[position + 1:])
    return by


def test_runs_that_are_compared_are_not_all_alike(train):
    """What the other tests rely on: `parted` finds a difference, and initial weights and batches depend on the seed alone."""
    one = train("standard")
    assert len(one.weights) == 2 * BATCHES + 1 and parted(one, one) is None
    assert parted(one, train("fgsm_rs")) == 1 and parted(one, train("standard", seed=1)) == 0
    moved = copy.deepcopy(one)
    next(iter(moved.weights[4].values())).flatten()[0] += 1e-12
    assert parted(one, moved) == 4 and parted(one, moved, rounding=True) is None


# ---- one step ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("init, alpha", [("zero", 1.0), ("uniform", 1.25)])
def test_pgd_at_of_one_step_is_fgsm(init, alpha, train):
    flags = dict(init=init, alpha=alpha * EPSILON)
    fgsm = train("fgsm_rs", **flags)
    assert same(fgsm, train("pgd_at", steps=1, **flags))
    assert parted(fgsm, train("pgd_at", steps=2, **flags)) == 1
    assert parted(fgsm, train("pgd_at", steps=1, attack_bn="eval", **flags)) == 1


def test_n_fgsm_without_noise_is_fgsm_at(train):
    """From zero a step of epsilon ends in the ball: FGSM-AT's clip is idle there, and acts on longer steps, which N-FGSM leaves."""
    zero = train("fgsm_rs", init="zero", alpha=EPSILON)
    assert same(zero, train("n_fgsm", k=0))
    assert parted(zero, train("n_fgsm", k=1)) == 1
    longer = dict(alpha=1.25 * EPSILON)
    assert same(zero, train("fgsm_rs", init="zero", **longer)) and parted(zero, train("n_fgsm", k=0, **longer)) == 1


@contextmanager
def clipped_at(most: float | None, norms: list[float]):
    """Inside, gradients are clipped at another norm (None: at their script's), and their norms gathered."""
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(parameters, max_norm):
        norms.append(float(clip(parameters, max_norm if most is None else most)))

    with replaced(torch.nn.utils, "clip_grad_norm_", lambda _: clipped):
        yield


def test_vfsat_with_one_radius_is_fgsm_at(train):
    """Its clipping at 20 must be idle, as it is here."""
    zero, norms = train("fgsm_rs", init="zero"), []
    with clipped_at(None, norms):
        assert same(zero, train("vfsat", radii=str(EPSILON)))
    assert len(norms) == 2 * BATCHES and 0 < max(norms) < 20
    with clipped_at(max(norms) / 2, []):
        assert parted(zero, train("vfsat", radii=str(EPSILON))) <= 1 + norms.index(max(norms))
    assert parted(zero, train("vfsat", radii=f"{EPSILON},{EPSILON / 2}")) == BATCHES + 1, "the second epoch has its own radius"


@pytest.mark.parametrize("method, weight", [("gradsum", "gradsum_lambda"), ("fgsm_ga", "ga_lambda")])
def test_a_gradient_penalty_of_weight_zero_leaves_fgsm_at(method, weight, train):
    """Their attacks see BatchNorm in training mode, so that the averages, which see more passes, do not reach the weights."""
    zero, norms = train("fgsm_rs", init="zero"), []
    with clipped_at(None, norms):
        without = train(method, **{weight: 0.0})
    assert parted(zero, without) is None and parted(zero, without, "averages") == 1
    assert max(norms, default=0) < 20
    assert parted(zero, train(method, **{weight: 1.0})) == 1


def test_gradsum_draws_no_noise_before_its_attack(train):
    """At weight 0 the noise of the penalty cannot matter, at 1 it does: the limit above says nothing of it."""
    with replaced(train_gradsum, "gradient_norm", lambda norm: lambda model, x, target, eta, **more: norm(model, x, target, 0 * eta, **more)):
        without_noise = {weight: train("gradsum", gradsum_lambda=weight) for weight in (0.0, 1.0)}
    assert parted(without_noise[0.0], train("gradsum", gradsum_lambda=0.0)) is None
    assert parted(without_noise[1.0], train("gradsum", gradsum_lambda=1.0)) == 1


# ---- FGSM-CKPT -----------------------------------------------------------------------------------------------------

def learnt(train: Callable[..., Trained]) -> dict[str, Tensor]:
    """Weights that classify the images correctly: 60 updates of standard training."""
    standard = train("free_at", replays=60, epsilon=0, epochs=1, batch_size=20, augment="none")
    return standard.weights[-1] | standard.averages[-1]


@pytest.mark.parametrize("c", [1, 3])
def test_fgsm_ckpt_with_one_checkpoint_perturbs_like_fgsm_rs(c, train):
    """On the images that are classified correctly at the noisy point, with BatchNorm in evaluation mode; the others stay clean.

    Whole runs are equal only while no image is misclassified there, and FGSM-RS's own attack has BatchNorm in training mode.
    """
    found: list[tuple[Tensor, ...]] = []
    expected = []

    def directed(model, x, target, eta, eps, alpha):
        with eval_mode(model):
            start = inside_image(eta, x)
            step = train_fgsm_rs.perturb(model, x, target, eta, eps, alpha)
            correct = model(x + start).argmax(1) == target.argmax(1)
        expected.append((step, correct, train_fgsm_rs.perturb(copy.deepcopy(model).train(), x, target, eta, eps, alpha)))
        return direction(model, x, target, eta, eps, alpha)

    def shortened(*arguments):
        found.append(shorten(*arguments))
        return found[-1]

    direction, shorten = train_fgsm_ckpt.direction, train_fgsm_ckpt.shorten
    with replaced(train_fgsm_ckpt, "direction", lambda _: directed), replaced(train_fgsm_ckpt, "shorten", lambda _: shortened):
        train("fgsm_ckpt", learnt(train), c=c, epsilon=60)
    delta, (step, correct, step_in_training_mode) = torch.cat(found), map(torch.cat, zip(*expected))
    assert correct.any() and (~correct).any()
    assert (delta[~correct] == 0).all() and (step[~correct] != 0).flatten(1).any(1).all()
    assert torch.allclose(delta[correct], step[correct], **ROUNDING) == (c == 1)
    assert not torch.allclose(delta[correct], step_in_training_mode[correct], **ROUNDING)


def test_fgsm_ckpt_with_one_checkpoint_is_fgsm_rs_while_nothing_is_misclassified(train):
    """From weights that have learnt the images, in small steps, and with FGSM-RS's attack in evaluation mode by patching."""
    start = learnt(train)
    near = dict(epsilon=4, lr=1e-3, augment="none")

    def evaluating(perturb):
        def perturbed(model, *arguments):
            with eval_mode(model):
                return perturb(model, *arguments)
        return perturbed

    fgsm = train("fgsm_rs", start, **near)
    with replaced(train_fgsm_rs, "perturb", evaluating):
        evaluated, fresh = train("fgsm_rs", start, **near), train("fgsm_rs", **near)
    ckpt = train("fgsm_ckpt", start, c=1, **near)
    assert parted(evaluated, ckpt, rounding=True) is None and parted(evaluated, ckpt, "averages", rounding=True) is None
    assert parted(fgsm, ckpt, rounding=True) == 1, "BatchNorm in training mode"
    assert parted(fresh, train("fgsm_ckpt", c=1, **near), rounding=True) == 1, "from weights that have learnt nothing"
    wide = near | dict(epsilon=80)
    with replaced(train_fgsm_rs, "perturb", evaluating):
        assert parted(train("fgsm_rs", start, **wide), train("fgsm_ckpt", start, c=1, **wide), rounding=True) == 1, "noise that fools"


# ---- memories ------------------------------------------------------------------------------------------------------

ONE_BATCH = dict(train_size=8, epochs=3)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_fgsm_ep_is_fgsm_bp_on_a_single_batch_in_a_fixed_order(augment, train):
    """The images' places in the batch are then their numbers. Both remember in the crop's pixels, so that crops do not part them."""
    one = ONE_BATCH | dict(augment=augment)
    with replaced(torch, "randperm", in_order):
        bp = train("fgsm_bp", **one)
        assert same(bp, train("fgsm_ep", **one))
        aligned = train("fgsm_ep", align=True, **one)
        assert (parted(bp, aligned), parted(bp, aligned, "averages")) == ((None, None) if augment == "none" else (2, 2))
        assert parted(bp, train("fgsm_ep", reset=1, **one)) == 2
        assert parted(bp, train("fgsm_ep", init="zero", **one)) == 1
        two = one | dict(train_size=16)
        assert parted(train("fgsm_bp", **two), train("fgsm_ep", **two)) == 2, "the second batch starts at the first one's end"
    assert parted(train("fgsm_bp", **one), train("fgsm_ep", **one)) == 2, "in the second epoch the order is another one"


@pytest.mark.parametrize("accumulate", ["normalised", "sign"])
def test_fgsm_mep_without_momentum_is_fgsm_ep(accumulate, train):
    """With any regulariser: what is remembered then is the step that was trained on. Momentum needs two epochs to tell."""
    flags = dict(epochs=3, accumulate=accumulate)
    ep = train("fgsm_ep", epochs=3)
    assert same(ep, train("fgsm_mep", mu=0.0, **flags))
    assert parted(ep, train("fgsm_mep", mu=0.9, **flags)) == (2 * BATCHES + 1 if accumulate == "normalised" else None)
    assert same(train("fgsm_ep", epochs=3, pgi_lambda=0.0), train("fgsm_mep", mu=0.0, pgi_lambda=0.0, **flags))
    anew = train("fgsm_ep", epochs=3, reset=1)
    assert same(anew, train("fgsm_mep", mu=0.9, reset=1, **flags)), "a memory that never lasts has no momentum"
    assert parted(ep, anew) == BATCHES + 1


def test_a_momentum_of_signs_below_one_half_is_none(train):
    """The past weighs mu + mu^2 + ... <= 1 together and never outvotes the last sign: the paper's FGSM-MEP is FGSM-EP at its mu of 0.3.

    But for pixels without a gradient. Above one half the past can win, with two signs against one: from the fourth epoch on.
    """
    ep, flags = train("fgsm_ep", epochs=5), dict(epochs=5, accumulate="sign")
    assert same(ep, train("fgsm_mep", mu=0.3, **flags)) and same(ep, train("fgsm_mep", mu=0.49, **flags))
    assert parted(ep, train("fgsm_mep", mu=0.9, **flags)) == 3 * BATCHES + 1
    assert parted(ep, train("fgsm_mep", mu=0.3, epochs=5)) == 2 * BATCHES + 1, "normalised gradients differ in size"


@pytest.mark.parametrize("method", ["fgsm_ep", "fgsm_mep"])
def test_a_prior_that_is_always_zero_leaves_fgsm_at(method, train):
    """Without a regulariser, which at zero compares x with x + delta, and otherwise from the first update on matters."""
    zero = train("fgsm_rs", init="zero", label_factor=0.6)
    flags = dict(init="zero", reset=1)
    assert same(zero, train(method, pgi_lambda=0.0, **flags))
    assert parted(zero, train(method, **flags)) == 1
    assert parted(zero, train(method, pgi_lambda=0.0, init="zero")) == BATCHES + 1, "a memory that lasts"


def test_fgsm_uap_of_radius_zero_is_fgsm_ep_of_zero_memory(train):
    flags = dict(label_factor=0.6, uap_epsilon=0.0)
    assert same(train("fgsm_ep", init="zero", reset=1), train("fgsm_uap", **flags))
    zero = train("fgsm_rs", init="zero", label_factor=0.6)
    assert same(zero, train("fgsm_uap", uap_lambda=0.0, **flags))
    assert parted(zero, train("fgsm_uap", uap_lambda=0.0, label_factor=0.6)) == 1


def test_free_at_with_one_replay_trains_once_on_what_the_batch_before_left(train):
    """One pass a batch; its first update is standard training's, all of them at epsilon 0."""
    standard, calls = train("standard"), []

    def perturbing(perturb):
        def perturbed(delta, *arguments):
            calls.append((delta, perturb(delta, *arguments)))
            return calls[-1][1]
        return perturbed

    with replaced(train_free_at, "perturb", perturbing):
        free = train("free_at", replays=1)
    carried = torch.zeros(8, 1, 8, 8)
    for before, after in calls:
        assert torch.equal(before, carried[:len(before)]) and not torch.equal(before, after)
        carried[:len(after)] = after
    assert [len(before) for before, _ in calls] == [8, 8, 4] * 2
    assert [int(averages["bn1.num_batches_tracked"]) for averages in free.averages] == list(range(2 * BATCHES + 1))
    assert same(standard, train("free_at", replays=1, epsilon=0))
    assert parted(standard, free) == 2


def test_replays_of_a_single_batch_are_epochs(train):
    few, many = dict(train_size=8, replays=3, epochs=2), dict(train_size=8, replays=1, epochs=6)
    with replaced(torch, "randperm", in_order):
        for schedule in ("constant", "cyclic", "multistep"):
            fixed = dict(augment="none", lr_schedule=schedule)
            assert same(train("free_at", **few, **fixed), train("free_at", **many, **fixed))
        assert parted(train("free_at", **few), train("free_at", **many)) == 2, "a crop is another one in the next epoch"
        few["train_size"] = many["train_size"] = 16
        assert parted(train("free_at", augment="none", **few), train("free_at", augment="none", **many)) == 2, "two batches"


# ---- the FastAT Benchmark's ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("epsilon, limit, position", [(8, "fgsm_rs", 3), (8.5, "n_fgsm", 3)])
def test_liet_from_nothing_but_noise(epsilon, limit, position, train):
    """With hard labels and no divergence it is FGSM-RS with steps of epsilon; beyond 8/255, where nothing is clipped, N-FGSM.

    LIET draws its noise after other numbers and may turn its sign: the limit gets LIET's start by patching.
    """
    flags = dict(epsilon=epsilon, liet_lambda=0.0, label_factor=1.0, least_noise=1.0, most_noise=1.0)
    modules, starts = {"fgsm_rs": train_fgsm_rs, "n_fgsm": train_n_fgsm}, []
    with replaced(train_liet, "perturb", argument(3, starts)):
        liet = train("liet", **flags)
    wide = epsilon / 255 * (1 if limit == "fgsm_rs" else 2)
    assert 0.9 * wide < max(start.abs().max() for start in starts) <= wide

    def from_there(method):
        with replaced(modules[method], "perturb", given(position, starts)):
            return train(method, epsilon=epsilon, alpha=epsilon)

    assert same(liet, from_there(limit))
    assert parted(liet, from_there("n_fgsm" if limit == "fgsm_rs" else "fgsm_rs")) == 1
    for other in (dict(liet_lambda=10.0), dict(label_factor=0.9), dict(least_noise=0.0, most_noise=0.0)):
        assert parted(liet, train("liet", **flags | other)) == 1


def test_fgsm_rs_cs_without_its_pull_is_n_fgsm_with_noise_of_one_ball(train):
    """Both take the image for the noisy one and leave the ball; but for rounding, and BatchNorm's averages, which see three passes."""
    flags = dict(epochs=3, label_factor=0.7, attack_factor=0.7)
    n_fgsm = train("n_fgsm", k=1, epochs=3, label_factor=0.7)
    for unpulled in (dict(stride=1, cs_weight=0.0), dict(stride=0, gamma=1e9), dict(stride=0, cs_weight=0.0), dict(stride=2)):
        rs_cs = train("fgsm_rs_cs", **flags, **unpulled)
        assert parted(n_fgsm, rs_cs, rounding=True) is None and parted(n_fgsm, rs_cs, "averages", rounding=True) == 1
    assert parted(n_fgsm, train("fgsm_rs_cs", **flags | dict(attack_factor=0.1)), rounding=True) == 1
    assert parted(n_fgsm, train("fgsm_rs_cs", stride=0, gamma=0.0, **flags), rounding=True) == BATCHES + 1
    assert parted(n_fgsm, train("fgsm_rs", alpha=EPSILON, epochs=3, label_factor=0.7), rounding=True) == 1


# ---- several steps -------------------------------------------------------------------------------------------------

EVALUATING = dict(attack_bn="eval")


def test_fat_that_never_lets_go_is_pgd_at(train):
    """Patience for as many steps as there are is enough, one less is not: images are misclassified all along."""
    pgd = train("pgd_at", **EVALUATING)
    for tau in (10, 10**6):
        assert same(pgd, train("fat", tau=tau, omega=0.0))
    assert parted(pgd, train("fat", tau=9, omega=0.0)) == 1
    assert parted(pgd, train("fat", tau=10)) == 1, "its noise"


def test_gairat_before_it_begins_is_pgd_at(train):
    """And later where the shift is so large that all weights are one."""
    pgd = train("pgd_at", **EVALUATING, label_factor=0.8)
    for flags in (dict(begin=1.1), dict(begin=0.0, gair_lambda=1e3)):
        plain = train("gairat", label_factor=0.8, **flags)
        assert parted(pgd, plain, rounding=True) is None and parted(pgd, plain, "averages", rounding=True) is None
    assert parted(pgd, train("gairat", label_factor=0.8, begin=0.0), rounding=True) == 1
    assert parted(pgd, train("gairat", label_factor=0.8, begin=1.0), rounding=True) > BATCHES, "a batch of equal weights may come first"


ONE_ACTION = dict(radii="8", steps="10", step_sizes="2")


@contextmanager
def aligned_noise():
    """LAS-AT draws its actions first: every run's noise for images is made the batch's first."""
    with replaced(engine.Run, "uniform", first_draw), replaced(engine.Run, "normal", first_draw):
        yield


@pytest.mark.parametrize("interval", [1000, 1])
def test_las_at_with_one_action_is_pgd_at(interval, train):
    """Whether its strategy network learns or not, as that leaves the classifier alone. It attacks the hard label, which is PGD-AT's at factor 1."""
    flags = ONE_ACTION | dict(interval=interval)
    with aligned_noise():
        pgd = train("pgd_at", **EVALUATING)
        las = train("las_at", label_factor=1.0, **flags)
        assert parted(pgd, las, rounding=True) is None and parted(pgd, las, "averages", rounding=True) is None
        if interval > 1:
            for other in (dict(radii="7"), dict(steps="9"), dict(step_sizes="3"), dict(radii="4,12")):
                assert parted(pgd, train("las_at", label_factor=1.0, **flags | other), rounding=True) == 1, other
    assert parted(pgd, train("las_at", label_factor=1.0, **flags), rounding=True) == 1, "the noise as it is drawn"


def test_las_at_attacks_the_hard_label_and_trains_on_the_soft_one(train):
    with aligned_noise():
        las = train("las_at", label_factor=0.7, interval=1000, **ONE_ACTION)
        assert parted(train("pgd_at", label_factor=0.7, **EVALUATING), las, rounding=True) == 1

        def hard(perturb):
            return lambda model, x, target, *more: perturb(model, x, target.argmax(1), *more)

        with replaced(train_pgd_at, "perturb", hard):
            pgd = train("pgd_at", label_factor=0.7, **EVALUATING)
    assert parted(pgd, las, rounding=True) is None


def test_las_awp_with_one_action_is_awp(train):
    with aligned_noise():
        las = train("las_at", base="awp", interval=1, **ONE_ACTION)
        assert parted(train("awp", **EVALUATING), las, rounding=True) is None
        assert parted(train("awp", gamma=0.02, **EVALUATING), las, rounding=True) == 1
        for_pgd = train("las_at", base="awp", gamma=0.0, interval=1000, **ONE_ACTION)
        assert parted(train("pgd_at", **EVALUATING), for_pgd, rounding=True) is None


# ---- TRADES and its kin --------------------------------------------------------------------------------------------

def test_awp_of_size_zero_is_pgd_at(train):
    pgd = train("pgd_at", label_factor=0.9)
    flags = dict(label_factor=0.9)
    assert same(pgd, train("awp", gamma=0.0, **flags))
    assert same(train("pgd_at", label_factor=0.9, **EVALUATING), train("awp", gamma=0.0, **EVALUATING, **flags))
    assert parted(pgd, train("awp", **flags)) == 1
    assert same(pgd, train("awp", warmup=2, **flags)) and parted(pgd, train("awp", warmup=1, **flags)) == BATCHES + 1


def test_awp_of_size_zero_on_trades_is_trades_but_for_the_order_of_its_passes(train):
    """The adversarial image comes first, as published. The first update is the same; BatchNorm's averages are not, and the next attack reads them.

    Whole runs are equal where the averages cannot matter: held still, or in a network that has none.
    """
    trades, awp = train("trades"), train("awp", base="trades", gamma=0.0)
    assert parted(trades, awp, rounding=True) == 2 and parted(trades, awp, "averages", rounding=True) == 1
    with replaced(models, "build", still):
        trades = train("trades")
        assert parted(trades, train("awp", base="trades", gamma=0.0), rounding=True) is None
        assert parted(trades, train("awp", base="trades"), rounding=True) == 1
    plain = dict(arch="cnn4")
    assert parted(train("trades", **plain), train("awp", base="trades", gamma=0.0, **plain), rounding=True) is None


def test_las_trades_with_one_action_is_trades_but_for_a_pass(train):
    """TRADES shows BatchNorm the image twice, LAS-TRADES once: from the second update on the attack sees other averages.

    They are moved by the strategy network's reward as well, as published.
    """
    flags = ONE_ACTION | dict(base="trades", interval=1)
    with aligned_noise():
        trades, las = train("trades"), train("las_at", betas="6", **flags | dict(interval=1000))
        assert parted(trades, las, rounding=True) == 2 and parted(trades, las, "averages", rounding=True) == 1
        assert parted(trades, train("las_at", betas="6", **flags), rounding=True) == 1
        with replaced(models, "build", still):
            trades = train("trades")
            assert parted(trades, train("las_at", betas="6", **flags), rounding=True) is None
            assert parted(trades, train("las_at", betas="5", **flags), rounding=True) == 1


@pytest.mark.parametrize("method, without, otherwise, apart", [
    ("trades", dict(beta=0.0), dict(beta=1.0), 1), ("awp", dict(base="trades", beta=0.0, gamma=0.0), dict(base="trades", beta=0.0), 1),
    ("nuat", dict(nuclear=0.0), dict(), BATCHES + 1), ("gat", dict(guidance=0.0), dict(), 1)])
def test_without_the_second_term_the_weights_are_those_of_standard_training(method, without, otherwise, apart, train):
    """The attack reads BatchNorm's averages and nothing reads the attack. The averages see the adversarial images as well.

    NuAT's weight is zero in the first epoch of every run.
    """
    standard = train("standard", label_factor=0.9)
    found = train(method, label_factor=0.9, **without)
    assert parted(standard, found) is None and parted(standard, found, "averages") == 1
    assert parted(standard, train(method, label_factor=0.9, **otherwise)) == apart


def test_nuat_and_gat_begin_alike(train):
    """In the first epoch NuAT's weight is zero, and without weights the two differ in nothing."""
    weighted, nuat, gat = train("nuat"), train("nuat", nuclear=0.0), train("gat", guidance=0.0)
    assert same(nuat, gat)
    assert parted(weighted, gat) == BATCHES + 1 and parted(weighted, gat, "averages") == BATCHES + 2


def test_lbgats_teacher_is_standard_training_but_for_the_robust_network(train):
    """The distance between their logits trains the teacher too, as published; only without that does it learn by itself.

    By patching: no flag does. It begins at weights of its own, drawn after the robust network's.
    """
    def one_sided(distance):
        return lambda logits, guide: distance(logits, guide.detach())

    flags = dict(of="teacher", label_factor=0.9)
    together = train("lbgat", **flags)
    with replaced(train_lbgat.F, "mse_loss", one_sided):
        alone = train("lbgat", **flags)
    standard = train("standard", alone.weights[0] | alone.averages[0], label_factor=0.9)
    assert same(standard, alone) and parted(standard, together) == 1
    assert parted(standard, train("standard", label_factor=0.9)) == 0


def relative_change(a: Trained, b: Trained) -> float:
    """How far the first updates of two runs lie apart, as a part of their size."""
    moves = [torch.cat([(run.weights[1][name] - run.weights[0][name]).flatten() for name in run.weights[0]]) for run in (a, b)]
    return float((moves[0] - moves[1]).norm() / moves[0].norm())


@pytest.mark.parametrize("classes", [2, 10])
def test_mart_with_two_classes_and_no_divergence_is_pgd_at_at_twice_the_rate(classes, train):
    """With one wrong class the margin -log(1.0001 - p_wrong) is the cross-entropy again, up to the published constant.

    With more it is not, and no flag takes it away. MART starts its attack at 0.001 N(0, 1), here at zero by patching.
    """
    def loaded(load):
        def of_few_classes(*arguments):
            dataset = load(*arguments)
            train, test = dataset.y_train < classes, dataset.y_test < classes
            return dataclasses.replace(dataset, classes=classes, x_train=dataset.x_train[train], y_train=dataset.y_train[train],
                                       x_test=dataset.x_test[test], y_test=dataset.y_test[test])
        return of_few_classes

    shorter = dict(lr=TINY["lr"] / 2, weight_decay=1e-3)
    with replaced(data, "load", loaded), replaced(engine.Run, "normal", lambda _: lambda run, x: torch.zeros_like(x)):
        pgd = train("pgd_at", init="zero", weight_decay=5e-4, **EVALUATING)
        without, otherwise = train("mart", beta=0.0, **shorter), train("mart", **shorter)
    assert relative_change(pgd, without) < 1e-3 if classes == 2 else relative_change(pgd, without) > 0.1
    assert relative_change(pgd, otherwise) > 0.1


def test_mart_perturbs_like_pgd_at_from_its_start(train):
    """From inside the image, with BatchNorm as it is; a start outside it is PGD-AT's alone to clip first."""
    torch.manual_seed(0)
    model = models.build("resnet8", channels=1, width=4).eval()
    x, target, eta = torch.rand(6, 1, 8, 8), torch.eye(10)[:6], 0.05 * torch.randn(6, 1, 8, 8)
    inside = inside_image(eta, x)
    for start, equal in ((inside, True), (eta, False)):
        one = train_mart.perturb(model, x, target, start, 24 / 255, 6 / 255, 3)
        assert torch.equal(one, train_pgd_at.perturb(model, x, target, start, 24 / 255, 6 / 255, 3)) == equal


# ---- no attack -----------------------------------------------------------------------------------------------------

NOT_STANDARD = {
    "lbgat": "its network learns a teacher's logits",
    "mart": "its margin stays",
    "vfsat": "its radii must be above 0",
}
AT_ZERO = {
    "awp": dict(gamma=0.0), "free_at": dict(replays=1), "gairat": dict(begin=1.1), "gradsum": dict(gradsum_lambda=0.0), "liet": dict(label_factor=1.0),
}


@pytest.mark.parametrize("method", sorted({path.stem.removeprefix("train_") for path in record.ROOT.glob("train_*.py")} - NOT_STANDARD.keys()))
def test_at_epsilon_zero_every_method_is_standard_training(method, train):
    """The weights, up to rounding: regularisers compare an image with itself. What is none of the attack's is turned off."""
    options = {"label_factor": 0.9} | AT_ZERO.get(method, {})
    factor = importlib.import_module(f"train_{method}").Config(**TINY | options).label_factor
    standard = train("standard", label_factor=factor)
    assert parted(standard, train(method, epsilon=0, **options), rounding=True) is None
    if method != "standard":
        assert parted(standard, train(method, **options), rounding=True) is not None
