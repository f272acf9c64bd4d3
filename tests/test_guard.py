"""Catastrophic overfitting is seen, and only where it is; what is done about it survives a kill; so does a loss that is not finite."""
from __future__ import annotations

import copy
import gc
import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import engine
from engine import data, evaluate, guard
from engine.errors import Misuse
from engine.finite import Finite
from engine.guard import Reading, overfitted
from engine.kept import state_of
from experiments import detector

HEALTHY = [(40 + i, 36 + i) for i in range(8)]


def readings(pairs, n=1000) -> list[Reading]:
    return [Reading(fgsm, pgd10, n) for fgsm, pgd10 in pairs]


COLLAPSES = {
    "PGD falls to nothing, FGSM soars": [(75, 3)],
    "FGSM stays": [(47, 20)],
    "it has only begun": [(46, 32)],
    "from little robustness": [(16, 14), (17, 15), (30, 1)],
}
SOUND = {
    "both fall, with the learning rate": [(30, 26)],
    "the gap grows, PGD does not fall": [(60, 44)],
    "the gap grows slowly": [(48 + i, 43) for i in range(12)],
    "noise": [(46, 40), (44, 42), (49, 43)],
    "robustness wears off slowly": [(48 - i / 2, 43 - i / 2) for i in range(60)],
}


@pytest.mark.parametrize("case", COLLAPSES)
def test_a_collapse_is_seen_at_once(case):
    before = [] if case == "from little robustness" else HEALTHY
    found = overfitted(readings([*before, *COLLAPSES[case]]))
    assert found[-1] and not any(found[:-1])
    assert not overfitted(readings([*before, *COLLAPSES[case]], n=25))[-1] or case.startswith("PGD"), "25 images cannot tell"


@pytest.mark.parametrize("case", SOUND)
def test_what_is_no_collapse_is_not_taken_for_one(case):
    assert not any(overfitted(readings([*HEALTHY, *SOUND[case]])))


def test_a_collapse_that_lasts_does_not_become_the_usual():
    assert overfitted(readings([*HEALTHY, *[(80, 2)] * 50]))[-50:] == [True] * 50
    assert overfitted(readings([*HEALTHY, *[(80, 2)] * 50, (47, 42)]))[-1] is False


def test_robustness_that_never_comes():
    """A gap that is there while a run learns tells nothing; one that is there when PGD accuracy has stopped growing does."""
    learning = [(20 + 3 * i, 2 + i) for i in range(10)]
    assert not any(overfitted(readings(learning)))
    stuck = overfitted(readings([*learning, *[(60, 11)] * guard.PATIENCE]))
    assert stuck[-1] and not any(stuck[:-1])


@pytest.mark.parametrize(("changes", "seen"), [
    ({}, True), ({"clean": 28}, False), ({"pgd10": 2.5}, False), ({"n": 25}, False), ({"train": float("nan")}, False), ({"clean": float("nan")}, False),
])
def test_only_the_training_attack_is_answered(changes, seen):
    """FGSM itself finds no more than PGD-10 does: a network may read the label off the training attack's perturbation alone."""
    learning = [Reading(4, 3, 500, 15, 12), Reading(6, 3, 500, 21, 16)]
    lost = Reading(fgsm=1, pgd10=0, n=500, clean=12, train=42)._replace(**changes)
    assert overfitted([*learning, lost, lost, lost]) == [False] * 3 + [seen] * 2, "once may be BatchNorm's averages, which lag behind at first"
    assert not any(overfitted([*learning, lost, *learning, lost, *learning]))


def test_training_images_learnt_by_heart_are_no_collapse():
    assert not any(overfitted([Reading(40, 36, 1000, 55, 60 + i) for i in range(40)]))


FELL = {"vfsat-seed2": [14]}  # the alarms of runs that hold in the end: its radius began anew in epoch 13, and PGD-10 fell from 20 % to 6 %
LOGS = [path for demo in ("demo-cifar", "demo-cifar-all") for path in sorted((Path(guard.__file__).parents[1] / "results" / demo).glob("*.json"))]


@pytest.mark.parametrize("path", [path for path in LOGS if not path.name.startswith("standard")], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_of_the_measured_runs_those_that_end_at_nothing_are_seen(path):
    run = json.loads(path.read_text())
    n = run["run"]["checkpoints"]["last"]["pgd10"]["n"]
    seen = overfitted([Reading(row["val_fgsm"], row["val_pgd10"], n, row["val_clean"], row["train_accuracy"]) for row in run["log"]])
    alarmed = [row["epoch"] for row, alarm in zip(run["log"], seen) if alarm]
    assert alarmed if run["log"][-1]["val_pgd10"] < 1 else alarmed == FELL.get(path.stem, [])


def test_the_detector_never_looks_ahead():
    numbers = random.Random(0)
    walk = [Reading(50 + numbers.gauss(0, 12), 30 + numbers.gauss(0, 12), 1000, 30 + numbers.gauss(0, 20), 600 + numbers.gauss(0, 300)) for _ in range(60)]
    whole = overfitted(walk)
    assert 5 < sum(whole) < 55 and whole != overfitted([reading._replace(train=0.0) for reading in walk])
    assert all(overfitted(walk[:k]) == whole[:k] for k in range(60))


# ---- in a run ----------------------------------------------------------------------------------------------------

COMMAND = ("train_fgsm_rs", "--epochs", 3, "--train-size", 96, "--width", 4)


@contextmanager
def collapsing(where, rolled_back_helps=True):
    """Inside, the detector finds what `where`, a function of (readings, whether noise is on), says, at whatever it is shown."""
    judge = guard.Guard._judge
    with pytest.MonkeyPatch.context() as patch:
        def judged(self, run, reading):
            patch.setattr(guard, "overfitted", lambda seen: [False] * (len(seen) - 1) + [
                where(seen, run) and not (self.rollbacks and rolled_back_helps)])
            return judge(self, run, reading)
        patch.setattr(guard.Guard, "_judge", judged)
        yield patch


def second_epoch(seen, run) -> bool:
    return len(seen) == 2


def state(out_dir, name="state"):
    return torch.load(out_dir / f"{name}.pth", weights_only=True)


def rows(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def result(out_dir) -> dict:
    return json.loads((out_dir / "result.json").read_text())


@pytest.fixture
def often(monkeypatch):
    """Looks and tests after every batch."""
    monkeypatch.setattr(guard, "LOOK", 1)
    monkeypatch.setattr(guard, "TEST_EVERY", 1)


def test_weights_do_not_depend_on_the_guard(tiny, often, differences, monkeypatch):
    off = state(tiny.train(*COMMAND, "--co-guard", "off"))
    for mode in ("warn", "rollback"):
        assert differences(off["kept"], state(tiny.train(*COMMAND, "--co-guard", mode))["kept"]) == []
    verdicts = evaluate.verdicts
    tests = []

    def careless(network, *arguments, columns, **more):
        found = verdicts(network, *arguments, columns=columns, **more)
        tests.append(columns)
        network.eval()  # and leaves it so
        return found

    monkeypatch.setattr(evaluate, "verdicts", careless)
    spoilt = state(tiny.train(*COMMAND, "--co-guard", "warn"))
    assert tests.count(("fgsm", "pgd10", "clean")) == 3 * 2  # an epoch's last batch is left to its evaluation
    assert differences(off["kept"], spoilt["kept"])


def test_the_training_loss_asks_for_a_test(tiny, monkeypatch):
    """A loss that falls at once does, one that falls slowly does not, and it is asked for once."""
    monkeypatch.setattr(guard, "LOOK", 1)
    tests, factor = [], {"slow": lambda step: 0.97 ** step, "sudden": lambda step: 0.4 if step >= 10 else 1.0}
    test, update = guard.Guard._test, engine.Run.update
    monkeypatch.setattr(guard.Guard, "_test", lambda self, run: tests.append(run.step) or test(self, run))
    for how, asked in {"slow": [], "sudden": [11]}.items():
        monkeypatch.setattr(engine.Run, "update", lambda run, loss, **more: update(run, (loss - loss.detach() + factor[how](run._position.step)), **more))
        tiny.train("train_fgsm_rs", "--width", 4, "--epochs", 3)
        assert tests == asked
        tests.clear()


def test_warn_says_it_once_and_writes_it_down(tiny):
    with collapsing(lambda seen, run: len(seen) in (2, 3)):
        ended = tiny.command(*COMMAND[:1], *tiny.flags, *COMMAND[1:], "--out-dir", tiny.directory / "run")
    assert ended.status == 0 and ended.out.count("warning: catastrophic overfitting at epoch 2, update 6: accuracy on") == 1
    alarm, = result(tiny.directory / "run")["alarms"]
    assert (alarm["epoch"], alarm["update"], alarm["n"], alarm["action"]) == (2, 6, 40, "warn")
    log = rows(tiny.directory / "run")
    assert [row["overfitted"] for row in log] == [False, True, True] and log[1]["alarms"] == [alarm] and "alarms" not in log[2]
    for column, key in {"fgsm": "val_fgsm", "pgd10": "val_pgd10", "clean": "val_clean", "train": "train_accuracy"}.items():
        assert log[1][key] == alarm[column]


@pytest.mark.parametrize("when", ["after an epoch", "inside one"])
def test_stop_saves_and_ends_with_one_sentence(when, tiny, often):
    inside = when == "inside one"
    out_dir = tiny.directory / "run"
    flags = (*tiny.flags, *COMMAND[1:], "--out-dir", out_dir, "--co-guard")
    with collapsing(lambda seen, run: run.epoch == 1 and run.batch == (2 if inside else 3)):
        ended = tiny.command(COMMAND[0], *flags, "stop")
    step = 5 if inside else 6
    assert ended.status == 1 and ended.err.count("\n") == 1
    assert all(part in ended.err for part in (f"epoch 2, update {step}", "% under PGD-10, ", "under the training attack", "; the run is saved", str(out_dir), "--co-guard rollback", "--co-guard warn"))
    assert state(out_dir)["position"]["step"] == step and not (out_dir / "result.json").exists()
    assert len(rows(out_dir)) == (1 if inside else 2)
    assert tiny.command(COMMAND[0], *flags, "warn").status == 0, "who wants to can go on"
    alarm = result(out_dir)["alarms"][0]
    assert alarm["action"] == "stop" and 0 <= alarm["clean"] <= 100 and 0 <= alarm["train"] <= 100
    assert (alarm["train"] * (64 if inside else 96) / 100) % 1 == pytest.approx(0, abs=1e-9), "of the epoch's images so far"


@pytest.mark.parametrize("when", ["after an epoch", "inside one"])
def test_a_rollback_restores_everything_and_goes_on_with_noise(when, tiny, often, differences, monkeypatch):
    inside, seen = when == "inside one", []
    alarm = (lambda seen, run: (run.epoch, run.batch) == (1, 2)) if inside else second_epoch
    restore = engine.Run._restore

    def watched(run):
        restore(run)
        kept = {name: state_of(kept) for name, kept in run._kept.items()}
        seen.append((copy.deepcopy(kept), run.epoch, run.batch, run.step))

    first = tiny.train(*COMMAND, "--epochs", 1, "--lr-schedule", "constant", "--co-guard", "off", "--ema", 0.9)
    monkeypatch.setattr(engine.Run, "_restore", watched)
    with collapsing(alarm):
        again = tiny.train(*COMMAND, "--lr-schedule", "constant", "--co-guard", "rollback", "--ema", 0.9)
    (kept, epoch, batch, step), = seen[1:]
    assert (epoch, batch, step) == (1, 0, 3)
    assert differences(state(first)["kept"], kept) == []
    done = result(again)
    assert done["rollbacks"] == 1 and done["seconds"]["rolled_back"] > 0 and done["alarms"][0]["action"] == "rollback"
    assert [row["epoch"] for row in rows(again)] == [1, 2, 3] and rows(again)[1]["alarms"] == done["alarms"]
    plain = tiny.train(*COMMAND, "--lr-schedule", "constant", "--co-guard", "off", "--ema", 0.9)
    assert differences(rows(plain)[0], rows(again)[0], ignore={"overfitted", "seconds", "images_per_second"}) == ["/overfitted: only in one"]
    assert differences(state(plain)["kept"], state(again)["kept"]), "the noise changed nothing"


def test_noise_after_a_rollback(tiny, tmp_path):
    run = engine.Run(engine.Config(dataset="digits", width=4, device="cpu", out_dir=str(tmp_path), val_size=10))
    x = torch.rand(64, 1, 8, 8)
    run._global_batch, run._labels = 64, torch.zeros(64)
    assert run._guard.noised(run, x) is x
    for rollbacks in (1, 2):
        run._guard.rollbacks = rollbacks
        noised = run._guard.noised(run, x)
        inside = (noised > 0) & (noised < 1)
        assert noised.min() >= 0 and noised.max() <= 1
        assert 0.9 * rollbacks * run.cfg.eps < (noised - x)[inside].abs().max() <= rollbacks * run.cfg.eps + 1e-6


def test_a_rollback_killed_around_any_file_it_writes(tiny, monkeypatch, differences):
    """A run is stopped before each file that it replaces in turn; the last good state is among them."""
    flags = ("train_fgsm_rs", "--epochs", 3, "--train-size", 64, "--width", 4, "--co-guard", "rollback", "--save-every", 0)
    replace, names = os.replace, []

    class Stopped(Exception):
        pass

    def counted(source, target) -> None:
        names.append(os.path.basename(target))
        if len(names) == at:
            raise Stopped
        replace(source, target)

    at = 0
    monkeypatch.setattr(os, "replace", counted)
    with collapsing(second_epoch):
        whole = tiny.train(*flags)
        written = list(names)
        assert written.count("good.pth") == 1 + 1 + 1 + 1 + 1  # at the start, after three epochs, after the rollback
        for at in range(written.index("good.pth"), len(written)):
            names.clear()
            parts = tiny.directory / f"killed{at}"
            with pytest.raises(Stopped):
                tiny.train(*flags, out_dir=parts)
            gc.collect()  # with a process go its locks
            at_was, at = at, 0
            tiny.train(*flags, out_dir=parts)
            for name in ("state", "good"):
                ours, theirs = state(whole, name), state(parts, name)
                found = differences([ours[key] for key in ("kept", "position", "history", "guard", "sums")],
                                    [theirs[key] for key in ("kept", "position", "history", "guard", "sums")])
                assert found == [], f"killed before write {at_was}, {written[at_was - 1]}: {name}.pth"
            assert differences(rows(whole), rows(parts)) == [] and result(whole)["alarms"] == result(parts)["alarms"]


def test_rollbacks_are_bounded(tiny):
    out_dir = tiny.directory / "run"
    with collapsing(second_epoch, rolled_back_helps=False):
        ended = tiny.command(COMMAND[0], *tiny.flags, *COMMAND[1:], "--out-dir", out_dir, "--co-guard", "rollback")
    assert ended.status == 1 and f"{guard.ROLLBACKS} rollbacks did not help" in ended.err
    saved = state(out_dir)["guard"]
    assert saved["rollbacks"] == guard.ROLLBACKS and [alarm["action"] for alarm in saved["alarms"]] == ["rollback"] * 3 + ["stop"]


def test_a_collapse_in_the_first_epoch_goes_back_to_the_start(tiny):
    with collapsing(lambda seen, run: len(seen) == 1):
        assert result(tiny.train(*COMMAND, "--co-guard", "rollback"))["rollbacks"] == 1


def test_nothing_to_go_back_to_is_said(tiny):
    out_dir = tiny.directory / "run"
    flags = (*tiny.flags, *COMMAND[1:], "--out-dir", out_dir, "--save-every", 0)
    assert tiny.command(COMMAND[0], *flags, "--time-limit", 0).status == 0
    with collapsing(lambda seen, run: len(seen) == 1):
        ended = tiny.command(COMMAND[0], *flags, "--co-guard", "rollback")
    assert ended.status == 1 and "good.pth" in ended.err and "--resume never" in ended.err


def test_after_stop_a_rollback_is_possible(tiny):
    out_dir = tiny.directory / "run"
    flags = (*tiny.flags, *COMMAND[1:], "--out-dir", out_dir, "--co-guard")
    with collapsing(lambda seen, run: len(seen) >= 2):
        assert tiny.command(COMMAND[0], *flags, "stop").status == 1
        assert tiny.command(COMMAND[0], *flags, "rollback").status == 0
    assert [(alarm["epoch"], alarm["action"]) for alarm in result(out_dir)["alarms"]] == [(2, "stop"), (3, "rollback")]


def test_a_rollback_puts_back_best_too(tiny, monkeypatch):
    """What became the best after the last healthy epoch, a weight average perhaps, is not what result.json will say."""
    out_dir, found = tiny.directory / "run", []
    flags = (*tiny.flags, *COMMAND[1:], "--out-dir", out_dir, "--co-guard")
    roll_back = guard.Guard._roll_back

    def watched(self, run, sentence):
        roll_back(self, run, sentence)
        found.append((state(out_dir, "best")["epoch"], run._journal.best["epoch"]))

    monkeypatch.setattr(guard.Guard, "_roll_back", watched)
    with collapsing(lambda seen, run: len(seen) >= 2):
        assert tiny.command(COMMAND[0], *flags, "stop").status == 1
        torch.save(state(out_dir, "best") | {"epoch": 2}, out_dir / "collapsed.pth")
        os.replace(out_dir / "collapsed.pth", out_dir / "best.pth")
        assert tiny.command(COMMAND[0], *flags, "rollback").status == 0
    assert found == [(1, 1)]
    assert state(out_dir, "best")["epoch"] == result(out_dir)["checkpoints"]["best"]["epoch"]


def test_a_test_is_of_so_many_images_and_so_often(tiny, monkeypatch):
    """Few of the held-out images, and after every so many training images although nothing is suspicious."""
    for name, value in {"LOOK": 1, "TEST_IMAGES": 16, "TEST_EVERY": 64, "LOSS_FALL": 0.0}.items():
        monkeypatch.setattr(guard, name, value)
    seen, test = [], guard.Guard._test
    monkeypatch.setattr(guard.Guard, "_test", lambda self, run: seen.append((run.step, test(self, run))) or seen[-1][1])
    tiny.train("train_fgsm_rs", "--width", 4)
    assert [step for step, _ in seen] == [2, 4, 6, 9, 11, 13], "200 images in batches of 32, two epochs"
    assert {reading.n for _, reading in seen} == {16}


def test_stop_needs_fgsm_and_warn_does_without():
    flags = dict(dataset="digits", measure="clean,pgd10")
    for mode in ("stop", "rollback"):
        with pytest.raises(Misuse, match=rf"--co-guard {mode}"):
            engine.Config(co_guard=mode, **flags)
    assert guard.Guard(engine.Config(**flags).co_guard, ("clean", "pgd10")).mode == "off"


REAL = ("train_fgsm_rs", "--init", "zero", "--dataset", "digits", "--epsilon", 76.5, "--epochs", 40, "--augment", "none", "--device", "cpu")


def test_fgsm_without_a_random_start_is_stopped(tiny):
    """The digits at a radius at which FGSM-AT learns to fool FGSM."""
    ended = tiny.command(*REAL, "--co-guard", "stop", "--out-dir", tiny.directory / "run")
    last = rows(tiny.directory / "run")[-1]
    assert ended.status == 1 and last["overfitted"] and 5 < last["epoch"] < 40
    assert last["val_fgsm"] > 2 * last["val_pgd10"] and f"epoch {last['epoch']}" in ended.err


@pytest.mark.slow
def test_a_rollback_rescues_it(tiny):
    runs = {}
    for mode in ("warn", "rollback"):
        out_dir = tiny.directory / mode
        assert tiny.command(*REAL, "--co-guard", mode, "--out-dir", out_dir).status == 0
        runs[mode] = result(out_dir)
    assert runs["warn"]["alarms"] and runs["warn"]["rollbacks"] == 0
    assert runs["rollback"]["rollbacks"] >= 1
    last = {mode: run["checkpoints"]["last"]["pgd10"] for mode, run in runs.items()}
    assert last["rollback"]["interval"][0] > last["warn"]["value"]


# ---- an update that is not finite --------------------------------------------------------------------------------


@contextmanager
def bad_updates(*steps, of_classifier=True):
    """Inside, these updates, of the classifier or of another network, have a loss that is nan, and what led to it is in BatchNorm's averages."""
    update = engine.Run.update

    def spoilt(run, loss, optimizer=None, **more):
        if run._position.step in steps and (optimizer is None) == of_classifier:
            for name, buffer in run.network.named_buffers():
                if buffer.is_floating_point():
                    buffer.data.fill_(float("nan"))  # not noticed by the backward pass
            loss = loss * float("nan")
        update(run, loss, optimizer, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Run, "update", spoilt)
        yield patch


@contextmanager
def deferred(patch, whether):
    """Whether the CPU pretends to be a device that must not be waited for."""
    prepare = engine.Run.keep

    def keep(run, **objects):
        run._finite.deferred = whether
        prepare(run, **objects)
    patch.setattr(engine.Run, "keep", keep)
    yield


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("of_classifier", [True, False])  # the generator's optimizer is of another kind
@pytest.mark.parametrize("bad", [0, 9])
def test_a_skipped_update_leaves_no_trace(bad, of_classifier, waits, tiny):
    with bad_updates(bad, of_classifier=of_classifier) as patch, deferred(patch, not waits):
        out_dir = tiny.train("train_fgsm_sdi", "--k", 1, "--on-nonfinite", "skip", "--ema", 0.9)
    for kept in state(out_dir)["kept"].values():
        for value in tensors(kept):
            assert torch.isfinite(value).all()
    assert [row["skipped_updates"] for row in rows(out_dir)] == ([1, 0] if bad == 0 else [0, 1])
    assert result(out_dir)["skipped_updates"] == 1
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows(out_dir))


def tensors(kept):
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, (dict, list)):
        for item in kept.values() if isinstance(kept, dict) else kept:
            yield from tensors(item)


@contextmanager
def bad_images(epoch, batch):
    """Inside, all pixels of that batch are nan, and so is everything that is made of them."""
    epochs = data.Batches.epoch

    def spoilt(batches, number, first, dtype):
        for i, (x, *rest) in enumerate(epochs(batches, number, first, dtype), first):
            yield x * float("nan") if (number, i) == (epoch, batch) else x, *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Batches, "epoch", spoilt)
        yield


BASES = [("train_awp", "--base", "trades", "--warmup", "0"), *(("train_las_at", "--base", base) for base in ("trades", "awp")),
         ("train_fgsm_mep", "--align")]


def heals(tiny, script, *flags):
    with bad_images(0, 2):
        out_dir = tiny.train(script, "--width", 4, "--measure", "fgsm,pgd10", "--on-nonfinite", "skip", *flags)
    assert [row["skipped_updates"] for row in rows(out_dir)] == [1, 0]
    for name, kept in state(out_dir)["kept"].items():
        assert all(torch.isfinite(value).all() for value in tensors(kept)), name


def test_after_one_batch_of_nan_every_script_goes_on(train_script, tiny):
    heals(tiny, train_script, *{"train_free_at": ("--replays", 1)}.get(train_script, ()))  # seven updates may leave out one


@pytest.mark.parametrize("script, flags", [(script, flags) for script, *flags in BASES], ids=lambda value: "".join(value))
def test_after_one_batch_of_nan_every_base_goes_on(script, flags, tiny):
    heals(tiny, script, *flags)


@pytest.mark.parametrize("waits", [True, False])
def test_a_first_update_that_is_skipped_leaves_no_momentum(waits, tmp_path, monkeypatch):
    """The buffers that SGD makes for it are never filled by it, and are not asked again whether they were."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **more: empty_like(*given, **more).fill_(7))
    run = engine.Run(engine.Config(dataset="digits", width=4, device="cpu", out_dir=str(tmp_path), on_nonfinite="skip"))
    run._finite.deferred = not waits
    x, y, _ = next(run.batches())
    run.update(torch.nn.functional.cross_entropy(run.model(x), y) * float("nan"))
    buffers = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    assert buffers and all((buffer == 0).all() for buffer in buffers)


def test_after_a_rollback_a_skipped_update_puts_back_what_was_restored(tmp_path):
    """Not BatchNorm's averages of the network that had collapsed."""
    buffers = [torch.tensor([1.0, 2.0])]
    finite = Finite(True, 100, torch.device("cpu"), deferred=True, last_save=tmp_path / "state.pth")
    finite.watch(buffers)
    buffers[0].fill_(7)  # as a restored state is: in place
    finite.remember()
    buffers[0].fill_(float("nan"))
    finite.repair(torch.tensor(False))
    assert buffers[0].tolist() == [7, 7]


def test_both_ways_of_noticing_skip_alike(tiny, differences):
    found = []
    for waits in (True, False):
        with bad_updates(0, 9) as patch, deferred(patch, not waits):
            found.append(state(tiny.train("train_fgsm_rs", "--on-nonfinite", "skip", "--width", 4))["kept"])
    assert differences(*found) == []


def test_without_bad_updates_skip_is_as_stop(tiny, differences):
    stop, skip = (state(tiny.train("train_fgsm_rs", "--width", 4, "--on-nonfinite", policy))["kept"] for policy in ("stop", "skip"))
    assert differences(stop, skip) == []


@pytest.mark.parametrize("waits", [True, False])
def test_too_many_end_the_run(waits, tiny):
    """An epoch of seven updates may leave out one."""
    with bad_updates(2, 4) as patch, deferred(patch, not waits):
        ended = tiny.command("train_fgsm_rs", *tiny.flags, "--width", 4, "--on-nonfinite", "skip", "--out-dir", tiny.directory / "run")
    assert ended.status == 1 and "not finite at update 4 (epoch 1); 2 updates of this epoch were not finite" in ended.err


def test_a_resumed_run_goes_on_counting(tiny, differences):
    flags = (*tiny.flags, "--width", 4, "--on-nonfinite", "skip", "--out-dir")
    with bad_updates(2, 8):
        whole = tiny.train("train_fgsm_rs", "--width", 4, "--on-nonfinite", "skip")
        for _ in range(13):
            assert tiny.command("train_fgsm_rs", *flags, tiny.directory / "parts", "--time-limit", 0).status == 0
        assert tiny.command("train_fgsm_rs", *flags, tiny.directory / "parts").status == 0
    assert differences(state(whole)["kept"], state(tiny.directory / "parts")["kept"]) == []
    assert differences(rows(whole), rows(tiny.directory / "parts")) == []


def made(finite: Finite, pattern: str) -> str:
    """+ for an update that is made, - for one that is not, of updates that are finite (.) or not (x)."""
    return "".join("-+"[int(finite.admit(torch.tensor(sign == "."), step))] for step, sign in enumerate(pattern))


def test_the_bounds():
    def finite(skips: bool, updates: int) -> Finite:
        return Finite(skips, updates, torch.device("cpu"), deferred=True, last_save=Path("state.pth"))

    assert made(finite(False, 1000), "..x..") == "++---"
    few = finite(True, 150)
    assert made(few, ".x.x.x..") == "+-+-+---" and int(few.fatal) == 5
    many = finite(True, 5000)
    assert made(many, "x" * 9 + "." + "x" * 10 + ".") == "-" * 9 + "+" + "-" * 11 and int(many.fatal) == 19


TWO = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import engine
from engine import distributed, guard
guard.LOOK, guard.TEST_EVERY = 2, 1
judge, update = guard.Guard._judge, engine.Run.update

def judged(self, run, reading):
    assert reading.n == 40  # of both processes
    guard.overfitted = lambda seen: [False] * (len(seen) - 1) + [(run.epoch, run.batch) == (1, 2) and not self.rollbacks]
    return judge(self, run, reading)

def spoilt(run, loss, **more):
    update(run, loss * float("nan") if run._position.step == 1 and distributed.rank() == 1 else loss, **more)

guard.Guard._judge, engine.Run.update = judged, spoilt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_decide_alike(tiny):
    """A rollback in the middle of an epoch, and an update left out for what only the second process saw; else they would wait for ever."""
    (tiny.directory / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tiny.directory / "two.py", "train_fgsm_rs.py",
               *tiny.flags, *COMMAND[1:], "--co-guard", "rollback", "--on-nonfinite", "skip", "--out-dir", tiny.directory / "run"]
    done = subprocess.run([str(word) for word in command], cwd=tiny.root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = result(tiny.directory / "run")
    assert (found["processes"], found["rollbacks"], found["skipped_updates"]) == (2, 1, 1)
    assert all(torch.isfinite(value).all() for value in tensors(state(tiny.directory / "run")["kept"]))


# ---- the published curves ----------------------------------------------------------------------------------------


def curve(method: str, pairs, dataset="cifar10", seed=0) -> dict:
    return {"dataset": dataset, "method": method, "seed": seed,
            "model_fgsm_acc_list": [fgsm / 100 for fgsm, _ in pairs], "model_pgd_acc_list": [pgd10 / 100 for _, pgd10 in pairs],
            "model_val_acc_list": [0.6 for _ in pairs], "train_acc_list": [0.6 for _ in pairs]}


def test_the_report_counts_as_it_says(tmp_path, capsys):
    collapse, early, sound = [*HEALTHY, (75, 3)], [*HEALTHY, (52, 30), (75, 3), *HEALTHY[-1:]], [*HEALTHY, (48, 44)]
    unlabelled = [*HEALTHY, (60, 25)]  # below what it was, not below half of it
    path = tmp_path / "curves.json"
    path.write_text(json.dumps([curve("a", collapse), curve("b", early), curve("c", sound), curve("d", unlabelled), curve("e", sound)]))
    detector.main(["--curves", str(path), "--out", str(tmp_path / "out" / "report.json")])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    calibration, held_out = found["parts"]["calibration"], found["parts"]["held out"]
    assert calibration["methods"] == ["a", "c", "e"] and held_out["methods"] == ["b", "d"]
    assert (calibration["collapsed"], calibration["found"], calibration["false_alarms"], calibration["lead"]) == (1, 1, [], [0])
    assert (held_out["collapsed"], held_out["found"], held_out["false_alarms"], held_out["lead"]) == (1, 1, ["cifar10 d seed 0"], [1])
    assert held_out["recover"] == ["cifar10 b seed 0"] and {"commit", "dirty"} <= found.keys()
    assert detector.table(found) in capsys.readouterr().out


def test_a_late_alarm_is_a_miss():
    run = detector.judged(curve("a", [*HEALTHY, (75, 3)]))
    assert detector.summary([run])["found"] == 1 and detector.summary([run | {"first_alarm": run["labelled"] + 1}])["found"] == 0


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '[{"dataset": "cifar10"}]', '[{"dataset": "mnist"}]'])
def test_curves_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "curves.json").write_text(content)
    with pytest.raises(Misuse, match="--curves"):
        detector.read(tmp_path / "curves.json")
