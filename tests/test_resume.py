"""A run that was stopped, in whatever way and at whatever instant, ends bit for bit like one that was not."""
from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import engine
from engine import checkpoint, data, evaluate, record
from engine.errors import Failure, Misuse

BATCHES, EPOCHS = 7, 2  # of conftest.TINY: 200 images in batches of 32


class Stopped(Exception):
    """Stands for whatever may go wrong in a batch."""


def read(out_dir: Path) -> dict:
    """Everything that a run leaves, apart from what is never the same twice."""
    result = json.loads((out_dir / "result.json").read_text())
    config = json.loads((out_dir / "config.json").read_text())
    return {
        **{name: torch.load(out_dir / f"{name}.pth", weights_only=True) for name in ("best", "last", "state")},
        "log": [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()],
        "config": config,
        "result": {key: result[key] for key in ("method", "config", "seed", "updates", "checkpoints")},
    }


@contextmanager
def at_update(step: int, event: Callable[[], None]) -> Iterator[None]:
    """Inside, something happens in the middle of a batch: before the classifier's update number `step`."""
    update = engine.Run.update

    def watched(run, loss, optimizer=None, **more):
        if run._position.step == step and optimizer in (None, run.optimizer):
            event()
        update(run, loss, optimizer, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Run, "update", watched)
        yield
    end_of_process()


def end_of_process() -> None:
    """With a process go its signal handlers and its locks; here a run that was stopped must be let go."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()


def stop() -> None:
    raise Stopped


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


MIDDLE, LAST_OF_EPOCH, LAST_OF_RUN = BATCHES + 3, BATCHES - 1, EPOCHS * BATCHES - 1
STOPS = {  # one after another
    "SIGTERM in an epoch's last batch": (LAST_OF_EPOCH, terminate, ()),
    "an exception in the second epoch": (MIDDLE, stop, ("--save-every", 0)),
    "SIGTERM in the second epoch": (MIDDLE + 2, terminate, ()),
}
RARE_STOPS = {
    "an exception before anything was saved": (1, stop, ()),
    "SIGTERM in the run's last batch": (LAST_OF_RUN, terminate, ()),
}


def test_a_stopped_run_ends_like_one_that_was_not(train_script, tiny, differences):
    command = (train_script, "--ema", 0.9)
    whole, parts = tiny.train(*command), tiny.directory / "parts"
    for how, (step, event, flags) in STOPS.items():
        with at_update(step, event), suppress(Stopped):
            tiny.train(*command, *flags, out_dir=parts)
        assert not (parts / "result.json").exists(), f"not stopped: {how}"
    tiny.train(*command, out_dir=parts)
    assert differences(read(whole), read(parts)) == []


@pytest.mark.parametrize("how", RARE_STOPS)
@pytest.mark.parametrize("lr_schedule", ["multistep", "onecycle"])
def test_a_run_stopped_at_either_end(how, lr_schedule, tiny, differences):
    step, event, flags = RARE_STOPS[how]
    stop_and_go_on(tiny, ("train_fgsm_rs", "--lr-schedule", lr_schedule, *flags), step, event, differences)


def stop_and_go_on(tiny, command: tuple, step: int, event: Callable[[], None], differences) -> None:
    whole, parts = tiny.train(*command), tiny.directory / "parts"
    with at_update(step, event), suppress(Stopped):
        tiny.train(*command, out_dir=parts)
    assert (parts / "result.json").exists() == (step == LAST_OF_RUN), "it was not stopped where it should"
    tiny.train(*command, out_dir=parts)
    assert differences(read(whole), read(parts)) == []


def test_a_run_of_single_batches_ends_like_one_run(tiny, differences):
    """--time-limit 0 does one batch a time; each says how to go on, exits with 0, and holds the state of that batch."""
    whole, parts = tiny.train("train_fgsm_sdi", "--k", 3), tiny.directory / "parts"
    command = ("train_fgsm_sdi", *tiny.flags, "--k", 3, "--out-dir", parts, "--time-limit", 0)
    for step in range(1, EPOCHS * BATCHES):
        result = tiny.command(*command)
        assert result.status == 0
        assert "run the same command again to continue" in result.out and str(parts) in result.out
        assert not (parts / "result.json").exists()
        assert torch.load(parts / "state.pth", weights_only=True)["position"]["step"] == step
    assert tiny.command(*command).status == 0
    assert differences(read(whole), read(parts)) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_around_any_file_it_writes_is_whole(when, tiny, monkeypatch, differences):
    """os.replace is where a file changes; a run is stopped before or after each of them in turn."""
    flags = ("train_fgsm_rs", "--train-size", 64, "--ema", 0.9, "--save-every", 0)
    whole, replace = tiny.train(*flags), os.replace
    writes = 0

    def counted(*paths) -> None:
        nonlocal writes, left
        writes, left = writes + 1, left - 1
        if left == 0 and when == "before":
            raise Stopped
        replace(*paths)
        if left == 0:
            raise Stopped

    left = -1
    monkeypatch.setattr(os, "replace", counted)
    tiny.train(*flags)
    total = writes
    assert total >= 2 * 4 + 2  # per epoch last, best, log and state; config and result
    for number in range(1, total + 1):
        parts, left = tiny.directory / f"killed{number}", number
        with pytest.raises(Stopped):
            tiny.train(*flags, out_dir=parts)
        end_of_process()
        for path in parts.glob("*.pth"):
            torch.load(path, weights_only=True)
        for path in parts.glob("*.json"):
            json.loads(path.read_text())
        for path in parts.glob("*.jsonl"):
            list(map(json.loads, path.read_text().splitlines()))
        left = -1
        tiny.train(*flags, out_dir=parts)
        assert differences(read(whole), read(parts)) == [], f"killed {when} write {number}"


KILLED = """
import io, os, runpy, sys, time
import torch
import engine
mode, marker = sys.argv[1:3]
sys.argv = sys.argv[3:]
save, update, seen = torch.save, engine.Run.update, []

def half_a_save(content, file):
    seen.append(content)
    if len(seen) < 9 or mode != "save":
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    wait()

def half_an_epoch(run, *arguments, **named):
    if run._position.step == 10 and mode == "epoch":
        wait()
    update(run, *arguments, **named)

def wait():
    open(marker, "w").close()
    time.sleep(600)

torch.save, engine.Run.update = half_a_save, half_an_epoch
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("mode", ["save", "epoch"])
def test_a_process_killed_outright_goes_on(mode, tiny, differences):
    flags = ("--save-every", 0, "--ema", 0.9)
    whole, parts, marker = tiny.train("train_fgsm_rs", *flags), tiny.directory / "parts", tiny.directory / "marker"
    command = [sys.executable, "-c", KILLED, mode, marker, tiny.root / "train_fgsm_rs.py", *tiny.flags, *flags, "--out-dir", parts]
    environment = {**os.environ, "PYTHONPATH": str(tiny.root)}
    process = subprocess.Popen([str(word) for word in command], cwd=tiny.directory, env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not marker.exists():
            assert process.poll() is None and time.monotonic() < until, "it never came to the point where it is killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert bool(list(parts.glob("*.part"))) == (mode == "save")
    for path in parts.glob("*.pth"):
        torch.load(path, weights_only=True)
    assert torch.load(parts / "state.pth", weights_only=True)["position"]["step"] > 0
    tiny.train("train_fgsm_rs", *flags, out_dir=parts)
    assert differences(read(whole), read(parts)) == []
    assert not list(parts.glob("*.part"))


def test_save_every_0_saves_every_batch(tiny, monkeypatch):
    steps, save = [], checkpoint.save

    def counted(content, path):
        if path.name == "state.pth":
            steps.append(content["position"]["step"])
        save(content, path)

    monkeypatch.setattr(checkpoint, "save", counted)
    tiny.train("train_fgsm_rs", "--save-every", 0)
    assert steps == list(range(1, EPOCHS * BATCHES + 1))
    steps.clear()
    tiny.train("train_fgsm_rs", "--save-every", 60)
    assert steps == [BATCHES, 2 * BATCHES]


# ---- --resume ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("resume, saved, updates", [
    ("auto", False, EPOCHS * BATCHES), ("auto", True, EPOCHS * BATCHES - MIDDLE),
    ("must", True, EPOCHS * BATCHES - MIDDLE), ("never", False, EPOCHS * BATCHES), ("never", True, EPOCHS * BATCHES),
])
def test_what_resume_does(resume, saved, updates, tiny, monkeypatch, differences):
    flags, out_dir, update, done = ("train_pgd_at", "--steps", 2), tiny.directory / "run", engine.Run.update, []
    whole = tiny.train(*flags)
    if saved:
        with at_update(MIDDLE, stop), pytest.raises(Stopped):
            tiny.train(*flags, "--save-every", 0, out_dir=out_dir)

    def counted(run, *arguments, **named):
        done.append(run._position.step)
        update(run, *arguments, **named)

    monkeypatch.setattr(engine.Run, "update", counted)
    tiny.train(*flags, "--resume", resume, out_dir=out_dir)
    assert len(done) == updates
    assert differences(read(whole), read(out_dir)) == []


def test_resume_must_needs_something_to_resume(tiny):
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", tiny.directory / "nothing", "--resume", "must")
    assert result.status == 2 and "--resume must" in result.err and "state.pth" in result.err


CHANGED = {"lr": 0.1, "batch_size": 16, "epochs": 3, "seed": 1, "epsilon": 10, "train_size": 100, "weight_decay": 0, "ema": 0.5,
           "label_factor": 0.9, "padding": "reflect", "select_on": "test", "measure": "pgd10", "init": "zero", "alpha": 1}


def test_a_changed_flag_is_refused_by_name(tiny):
    out_dir = tiny.train("train_fgsm_rs")
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    for name, value in CHANGED.items():
        result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir, "--" + name.replace("_", "-"), value)
        assert result.status == 2
        assert name in result.err.replace("-", "_") and str(value) in result.err and "--resume never" in result.err
        assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_another_method_is_refused_by_name(tiny):
    out_dir = tiny.train("train_fgsm_rs")
    result = tiny.command("train_fgsm_sdi", *tiny.flags, "--out-dir", out_dir)
    assert result.status == 2 and result.err.count("\n") == 1 and "--resume never" in result.err


def test_a_run_that_begins_anew_leaves_no_snapshots_of_the_old_one(tiny):
    out_dir = tiny.train("train_fgsm_rs", "--snapshots", "1,2")
    assert {path.name for path in out_dir.glob("state-*.pth")} == {"state-1.pth", "state-2.pth"}
    tiny.train("train_fgsm_rs", "--snapshots", "2", "--resume", "never", out_dir=out_dir)
    assert {path.name for path in out_dir.glob("state-*.pth")} == {"state-2.pth"}


def test_which_flags_may_change():
    assert checkpoint.MAY_CHANGE == {"data_dir", "out_dir", "resume", "save_every", "time_limit", "tensorboard", "device", "workers", "snapshots", "co_guard", "on_nonfinite"}


def test_another_precision_is_refused_and_its_name_may_change(tiny):
    """--precision auto is bf16 on one machine and fp32 on the next."""
    out_dir = tiny.directory / "run"
    with at_update(MIDDLE, terminate):
        tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir)
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir, "--precision", "bf16")
    assert result.status == 2 and "trained in fp32" in result.err and "bf16" in result.err and "--resume never" in result.err
    assert tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir, "--precision", "fp32").status == 0
    assert "earlier_machines" not in json.loads((out_dir / "result.json").read_text())


def test_a_result_names_the_machines_of_all_its_parts(tiny, monkeypatch):
    out_dir, processor = tiny.directory / "run", record._processor()
    for name in ("a slow one", processor):
        monkeypatch.setattr(record, "_processor", lambda name=name: name)
        with at_update(MIDDLE, terminate) if name != processor else suppress():
            assert tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir).status == 0
    result = json.loads((out_dir / "result.json").read_text())
    assert result["device"] == processor
    assert result["earlier_machines"] == [{"device": "a slow one", "torch": torch.__version__, "precision": "fp32", "processes": 1}]


def test_other_data_are_refused(tiny, monkeypatch):
    """Fewer images would have no batch where the run stopped, and more would give it another schedule."""
    out_dir = tiny.directory / "run"
    with at_update(MIDDLE, terminate):
        tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir)
    load = data.load

    def other(*arguments, **more):
        found = load(*arguments, **more)
        return dataclasses.replace(found, x_train=found.x_train[1:], y_train=found.y_train[1:])

    monkeypatch.setattr(data, "load", other)
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir)
    assert result.status == 2 and "--data-dir" in result.err and "other training images" in result.err


def test_a_result_names_the_code_of_all_its_parts(tiny, monkeypatch):
    """The tree may change while a run trains, and between its parts."""
    out_dir = tiny.directory / "run"
    for commit, dirty in (("a", True), ("b", False)):
        monkeypatch.setattr(record, "source", lambda commit=commit, dirty=dirty: {"commit": commit, "dirty": dirty})
        with at_update(MIDDLE, terminate if commit == "a" else lambda: monkeypatch.setattr(record, "source", lambda: pytest.fail("asked again"))):
            assert tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir).status == 0
    result = json.loads((out_dir / "result.json").read_text())
    assert (result["commit"], result["dirty"], result["earlier_commits"]) == ("b", True, ["a"])


def test_the_global_random_numbers_go_on(tiny, tmp_path):
    """Of scripts to come: none draws from them once training has begun."""
    def drawn(folder, stop_at=None):
        run, numbers = engine.Run(engine.Config(dataset="digits", width=4, device="cpu", out_dir=str(folder), train_size=96, batch_size=32, epochs=2,
                                                val_size=10, measure="pgd10", save_every=0)), []
        for x, y, _ in run.batches():
            numbers.append(torch.rand(1).item())
            run.update(torch.nn.functional.cross_entropy(run.model(x), y))
            if len(numbers) == stop_at:
                run._asked_to_stop = True
        return numbers

    whole = drawn(tmp_path / "whole")
    with pytest.raises(SystemExit):
        drawn(tmp_path / "parts", stop_at=2)
    end_of_process()
    torch.manual_seed(99)
    parts = drawn(tmp_path / "parts")
    assert parts == whole[2:]


@pytest.mark.parametrize("flags", [("--save-every", 0), ("--time-limit", 30), ("--data-dir", "elsewhere/")])
def test_flags_that_change_nothing_may_change(flags, tiny):
    out_dir = tiny.directory / "run"
    with at_update(MIDDLE, stop), pytest.raises(Stopped):
        tiny.train("train_fgsm_rs", out_dir=out_dir)
    result = tiny.command("train_fgsm_rs", *tiny.flags, *flags, "--out-dir", out_dir)
    assert result.status == 0 and "continuing" in result.out


def test_a_finished_run_is_left_alone(tiny, monkeypatch):
    """Above all its result keeps the commit that trained it, whatever tree the command is given in later."""
    out_dir = tiny.train("train_fgsm_rs")
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    monkeypatch.setattr(engine.Run, "update", lambda *_, **__: pytest.fail("it trained again"))
    monkeypatch.setattr(record, "source", lambda *_: {"commit": "of a later day", "dirty": False})
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir)
    assert result.status == 0 and "finished" in result.out
    after = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    assert [name for name in before if before[name] != after.get(name)] == []


def test_resume_never_forgets_the_old_run_at_once(tiny):
    """Killed before its first save, the new run has nothing; the old one's state and result must not pass for its own."""
    out_dir = tiny.train("train_fgsm_rs")
    with at_update(1, stop), pytest.raises(Stopped):
        tiny.train("train_fgsm_rs", "--resume", "never", "--seed", 5, out_dir=out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    assert config["seed"] == 5
    left = {path.name for path in out_dir.iterdir()} - {".lock", "config.json"}
    assert left == set(), f"of another seed than config.json says: {left}"


# ---- weights depend on training alone --------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ("--measure", "pgd10"), ("--measure", "clean,fgsm,pgd10,pgd50,cw"), ("--select-on", "test"), ("--val-size", 300),
], ids=str)
def test_weights_do_not_depend_on_the_evaluation(flags, tiny, differences):
    states = [torch.load(tiny.train("train_fgsm_sdi", "--k", 3, *more) / "state.pth", weights_only=True) for more in ((), flags)]
    assert differences(states[0]["kept"], states[1]["kept"]) == []
    assert differences(states[0]["rng"], states[1]["rng"]) == []


def test_weights_do_not_depend_on_autoattack(tiny, monkeypatch, differences):
    """It reseeds torch; here it is run on the network in training, between two of its batches."""
    states = [torch.load(tiny.train("train_fgsm_sdi", "--k", 3) / "state.pth", weights_only=True)]
    update, attacked = engine.Run.update, []

    def attacking(run, *arguments, **named):
        if run._position.step in (0, 9) and run._position.step not in attacked:
            attacked.append(run._position.step)
            x, y = torch.from_numpy(run.dataset.x_test[:8]), torch.from_numpy(run.dataset.y_test[:8])
            evaluate.auto_attack(run.network, x, y, columns=("apgd",), eps=0.1, seed=run._position.step, batch_size=8,
                                 path=tiny.directory / "autoattack.pth", log=lambda line: None)
        update(run, *arguments, **named)

    monkeypatch.setattr(engine.Run, "update", attacking)
    states.append(torch.load(tiny.train("train_fgsm_sdi", "--k", 3) / "state.pth", weights_only=True))
    assert attacked == [0, 9]
    assert differences(states[0]["kept"], states[1]["kept"]) == []
    assert differences(states[0]["rng"], states[1]["rng"]) == []


# ---- run.keep ----------------------------------------------------------------------------------------------------------

def configuration(out_dir: Path, **more) -> engine.Config:
    flags = dict(dataset="digits", train_size=200, val_size=40, batch_size=32, epochs=2, device="cpu", save_every=0.0)
    return engine.Config(out_dir=str(out_dir), **flags | more)


def count(cfg: engine.Config, *, rebind_at: int = -1, stop_at: int = -1, shape: tuple[int, ...] = (200,), name: str = "memory"):
    """A method with a memory per image: how often it was seen."""
    run = engine.Run(cfg)
    memory = torch.zeros(shape, device=run.device)
    run.keep(**{name: memory})
    for x, y, index in run.batches():
        if run.step == stop_at:
            raise Stopped
        logits = run.model(x)
        run.update(torch.nn.functional.cross_entropy(logits, y), logits=logits)
        if run.step == rebind_at:
            memory = memory + 0
        memory[index] += 1
    return memory


def test_a_tensor_updated_in_place_is_kept_over_a_resume(tmp_path):
    with pytest.raises(Stopped):
        count(configuration(tmp_path), stop_at=MIDDLE)
    end_of_process()
    assert count(configuration(tmp_path)).tolist() == [2.0] * 200
    assert torch.load(tmp_path / "state.pth", weights_only=True)["kept"]["memory"].tolist() == [2.0] * 200


@pytest.mark.parametrize("rebind_at", [1, BATCHES, 2 * BATCHES])
def test_a_tensor_that_was_rebound_ends_the_run(rebind_at, tmp_path):
    with pytest.raises(Failure, match="'memory' was given to run.keep and then rebound"):
        count(configuration(tmp_path), rebind_at=rebind_at)


@pytest.mark.parametrize("changed", [dict(shape=(201,)), dict(name="memories")], ids=str)
def test_kept_objects_that_do_not_fit_are_refused(changed, tmp_path):
    count(configuration(tmp_path, epochs=1))
    with pytest.raises(Misuse, match="memor.*--resume never"):
        count(configuration(tmp_path, epochs=1), **changed)


def test_two_runs_in_one_directory_are_refused(tiny, differences):
    cfg = configuration(tiny.directory / "run")
    run = engine.Run(cfg)
    batches = run.batches()
    next(batches)
    before = {path.name: path.read_bytes() for path in Path(cfg.out_dir).iterdir()}
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", cfg.out_dir)
    assert result.status == 2 and "--out-dir" in result.err and "another run" in result.err
    assert {path.name: path.read_bytes() for path in Path(cfg.out_dir).iterdir()} == before


@pytest.mark.parametrize("ending", ["well", "badly"])
def test_a_run_puts_back_what_it_took(ending, tmp_path):
    """In a notebook, or in a program of several runs, SIGTERM must end the process again, and the directory be free."""
    handler = signal.getsignal(signal.SIGTERM)
    with suppress(Stopped):
        count(configuration(tmp_path), stop_at=3 if ending == "badly" else -1)
    assert signal.getsignal(signal.SIGTERM) == handler
    checkpoint.lock(tmp_path).close()
