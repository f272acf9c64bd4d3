"""Kills at random moments, full and closed disks, damaged and hostile files, odd clocks and odd flags: docs/reliability.md.

python -m tests.test_faults kills 200 processes, writes results/faults/kills.json, and puts its counts into docs/reliability.md.
"""
from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "hypothesis"))  # else it writes into the tree

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attacks
import engine
import test_FGSM_SDI as evaluation
import train_fgsm_rs
from engine import checkpoint, config, data, evaluate, foreign, random_streams, record
from engine.errors import Failure, Misuse, one_sentence

ROOT, PAGE = record.ROOT, record.ROOT / "docs" / "reliability.md"
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FLAGS = ("--dataset", "digits", "--arch", "resnet8", "--width", "4", "--train-size", "64", "--val-size", "40", "--batch-size", "16",
         "--epochs", "3", "--device", "cpu", "--save-every", "0")
UPDATES = 12  # of FLAGS
NEVER_TWICE = {"seconds", "images_per_second"}
repeatable = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def train(out_dir: Path, *flags: Any) -> None:
    train_fgsm_rs.main(train_fgsm_rs.Config.parse("", [*FLAGS, *map(str, flags), "--out-dir", str(out_dir)]))


def measure(path: Path, out_dir: Path, *flags: Any) -> None:
    """Evaluates 64 digits; what stands in for AutoAttack's four attacks is PGD, of more and more steps."""
    def quick(model, x, y, *, attack, eps, **_):
        delta = attacks.pgd(model, x, y, eps=eps, alpha=eps / 4, steps=5 * (1 + attacks.AUTOATTACK.index(attack)))
        return x + delta, attacks.predict(model, x + delta) == y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "auto_attack", quick)
        evaluation.main(evaluation.parse(["--model-path", str(path), "--out-dir", str(out_dir), "--n-ex", "64", "--card-n", "0",
                                          "--attacks", "clean,fgsm,pgd10,aa", "--device", "cpu", *map(str, flags)]))


def plain(value: Any) -> Any:
    """Comparable by ==, without what no two runs have in common."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in NEVER_TWICE}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def trained(out_dir: Path) -> Any:
    """What a run computed: weights, state, log and result."""
    state, result = checkpoint.load(out_dir / "state.pth"), json.loads((out_dir / "result.json").read_text())
    return plain([checkpoint.load(out_dir / "best.pth"), checkpoint.load(out_dir / "last.pth"),
                  {name: state[name] for name in ("position", "kept", "history", "best", "sums", "rng", "guard", "finite")},
                  (out_dir / "log.jsonl").read_text().count("\n"), result["checkpoints"], result["updates"]])


def measured(out_dir: Path) -> Any:
    """What an evaluation found: verdicts and metrics."""
    with np.load(out_dir / "verdicts.npz") as file:
        return [{name: file[name].tolist() for name in file}, json.loads((out_dir / "evaluation.json").read_text())["metrics"]]


def damaged(directory: Path) -> list[str]:
    """The files that do not load whole. One that was still being written, and is none yet, does not count."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".pth": checkpoint.load, ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".npz": lambda path: dict(np.load(path)), ".part": lambda path: None, "": lambda path: None}
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        try:
            readers[path.suffix](path)
        except Exception as error:
            found.append(f"{path.name}: {error!r}")
    return found


# ---- kills -------------------------------------------------------------------------------------------------------------

PHASES = ("starting", "training", "evaluation", "saving")


class Lives:
    """Runs pieces of work in forks of this process, which has torch imported, and kills them at random moments.

    Args:
        seed: of the moments.
        wrong: changes something in a fork that must not be changed: what the checks have to notice.
    """

    def __init__(self, seed: int, wrong: Callable[[pytest.MonkeyPatch], None] = lambda patch: None) -> None:
        self.random, self.wrong = random.Random(seed), wrong
        self.shared = mmap.mmap(-1, 2)  # the phase, and the updates made
        self.kills: Counter[str] = Counter()
        self.lost = 0  # the most updates that a kill made undone
        self.most = {"run": 0.5, "evaluation": 0.5}  # seconds

    def life(self, work: Callable[[], None], most: float) -> bool:
        """One life of at most `most` seconds; returns whether it ended by itself."""
        self.shared[0] = 0
        pid = os.fork()
        if pid == 0:
            self._child(work)
        until, done = time.monotonic() + self.random.uniform(0, most), 0
        while not done and time.monotonic() < until:
            time.sleep(0.002)
            done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            self.kills[PHASES[self.shared[0]]] += 1
            return False
        assert os.WEXITSTATUS(status) == 0, "it could not go on where a kill had left it"
        return True

    def until_done(self, kind: str, work: Callable[[], None], directory: Path) -> None:
        """Life after life, until one ends by itself; the directory is whole after each.

        A kill lets the next lives be longer and an end shorter, so that whatever the machine's load there are some kills an end.
        """
        self.shared[1] = 0
        while not self.life(work, self.most[kind]):
            self.most[kind] *= 1.1
            assert damaged(directory) == []
            state = directory / "state.pth"
            self.lost = max(self.lost, self.shared[1] - (checkpoint.load(state)["position"]["step"] if state.is_file() else 0))
        self.most[kind] *= 0.7

    def _child(self, work: Callable[[], None]) -> None:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            with pytest.MonkeyPatch.context() as patch:
                self._watch(patch)
                self.wrong(patch)
                work()
                status = 0
        finally:
            os._exit(status)

    def _watch(self, patch: pytest.MonkeyPatch) -> None:
        """Says in which phase the process is, and keeps git out of it."""
        shared, update = self.shared, engine.Run.update

        def during(phase: str, function: Callable) -> Callable:
            def watched(*arguments: Any, **named: Any) -> Any:
                before, shared[0] = shared[0], PHASES.index(phase)
                result = function(*arguments, **named)
                shared[0] = before
                return result
            return watched

        def counted(run: engine.Run, *arguments: Any, **named: Any) -> None:
            shared[0] = PHASES.index("training")
            update(run, *arguments, **named)
            shared[1] = run._position.step

        patch.setattr(record, "source", lambda *_: {"commit": None, "dirty": True})
        patch.setattr(engine.Run, "update", counted)
        for module, name, phase in ((evaluate, "verdicts", "evaluation"), (evaluate, "auto_attack", "evaluation"),
                                    (checkpoint, "save", "saving"), (record, "write_text", "saving")):
            patch.setattr(module, name, during(phase, getattr(module, name)))


def kill(at_least: int, folder: Path, seed: int = 0, wrong: Callable[[pytest.MonkeyPatch], None] = lambda patch: None) -> dict[str, Any]:
    """Trains and evaluates, over and over, until so many processes were killed; everything must end as if none was.

    Returns:
        Where the kills fell, how many runs and evaluations ended as they should, and the most updates one kill made undone.
    """
    lives, runs = Lives(seed, wrong), 0
    train(folder / "whole")
    train(folder / "learnt", "--train-size", 1200, "--epochs", 4, "--batch-size", 32, "--epsilon", 20, "--save-every", 5)
    learnt = folder / "learnt" / "best.pth"  # right on enough images for verdicts that could differ
    measure(learnt, folder / "learnt evaluated")
    standing = measured(folder / "learnt evaluated")[0]
    assert sum(standing["clean"]) > sum(standing["pgd10"]) > 5
    while sum(lives.kills.values()) < at_least:
        out_dir, evaluated, runs = folder / f"run{runs}", folder / f"evaluated{runs}", runs + 1
        lives.until_done("run", lambda: train(out_dir), out_dir)
        assert trained(out_dir) == trained(folder / "whole")
        lives.until_done("evaluation", lambda: measure(learnt, evaluated), evaluated)
        assert measured(evaluated) == measured(folder / "learnt evaluated")
        assert not list(out_dir.glob("*.part")) + list(evaluated.glob("*.part"))
        shutil.rmtree(out_dir)
        shutil.rmtree(evaluated)
    return {"kills": {phase: lives.kills[phase] for phase in PHASES}, "runs": runs, "evaluations": runs, "most_updates_lost": lives.lost}


def kill_apart(at_least: int, folder: Path, seed: int = 0, wrong: Callable[[pytest.MonkeyPatch], None] | None = None) -> dict[str, Any]:
    """`kill` from a process of its own: the threads of autograd that a compiled network of another test starts do not survive a fork.

    Raises:
        AssertionError: with what the process said.
    """
    program = ("import json, sys, torch; from pathlib import Path; from tests import test_faults; torch.set_num_threads(1); "
               f"print(json.dumps(test_faults.kill({at_least}, Path(sys.argv[1]), {seed}{f', test_faults.{wrong.__name__}' if wrong else ''})))")
    alone = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # CUDA does not survive a fork either
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, text=True, capture_output=True, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch imported")
def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    found = kill_apart(12, tmp_path)
    assert sum(found["kills"].values()) >= 12 and found["most_updates_lost"] <= 1


@pytest.mark.slow
def test_killed_two_hundred_times_nothing_is_lost(tmp_path):
    found = kill_apart(200, tmp_path, seed=1)
    assert found["most_updates_lost"] <= 1 and all(found["kills"][phase] >= 10 for phase in PHASES), found


def written_in_place(patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        with open(path, "wb") as file:
            file.write(content.getvalue()[:len(content.getvalue()) // 2])
            file.flush()
            time.sleep(0.02)
            file.write(content.getvalue()[len(content.getvalue()) // 2:])

    patch.setattr(record, "replacing", replacing)


def another_noise_after_each_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(random_streams, "noise_generator", lambda generator, seed, step: generator.manual_seed(os.getpid()))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [written_in_place, another_noise_after_each_start])
def test_the_kills_notice_a_run_that_is_not_safe(wrong, tmp_path):
    with pytest.raises(AssertionError, match="AssertionError"):  # of the process's own
        kill_apart(40, tmp_path, wrong=wrong)


def kills_shown(run: dict[str, Any]) -> str:
    """The sentence of docs/reliability.md."""
    kills = run["kills"]
    return (f"{sum(kills.values())} processes were killed: {kills['training']} in training, {kills['saving']} in saving, {kills['evaluation']} in "
            f"evaluation and {kills['starting']} before their first batch. All {run['runs']} runs and {run['evaluations']} evaluations ended bit for "
            f"bit as without a kill, no file was ever damaged, and no kill made more than {run['most_updates_lost']} update undone "
            f"(`--save-every 0`; commit {(run['commit'] or 'unknown')[:9]}{', with changes' if run['dirty'] else ''}, {run['device']}).")


def page_with(sentence: str) -> str:
    return re.sub(r"(?s)(<!-- kills -->\n).*?(\n<!-- /kills -->)", lambda found: found[1] + sentence + found[2], PAGE.read_text())


def test_the_page_shows_what_was_measured():
    path = ROOT / "results" / "faults" / "kills.json"
    if not path.is_file():
        pytest.skip("not measured yet: python -m tests.test_faults")
    assert PAGE.read_text() == page_with(kills_shown(json.loads(path.read_text())))


# ---- signals -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to, and beside it its evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    measure(folder / "best.pth", folder.with_name("evaluated"))
    return folder


@contextlib.contextmanager
def signalled(number: int, module: Any, name: str, call: int) -> Iterator[None]:
    """Inside, this process gets a signal during the call of that number of a function."""
    function, calls = getattr(module, name), 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, interrupted)
            yield
    finally:
        signal.signal(signal.SIGINT, before)
        assert calls >= call, "it never came to the point where it is interrupted"


def ended(work: Callable[..., None], *arguments: Any) -> int:
    """The exit status of some work, errors made into sentences."""
    try:
        with one_sentence():
            work(*arguments)
    except SystemExit as left:
        return left.code or 0
    return 0


DURING = {"a batch": (attacks, "input_gradient", 6), "a save": (torch, "save", 7), "an epoch's evaluation": (evaluate, "verdicts", 2)}


@pytest.mark.parametrize("during", ["a save", "an epoch's evaluation"])
def test_sigterm_saves_exits_with_0_and_goes_on(during, whole, tmp_path, capsys):
    with signalled(signal.SIGTERM, *DURING[during]):
        assert ended(train, tmp_path) == 0
    said = capsys.readouterr().out
    assert "run the same command again to continue" in said and not (tmp_path / "result.json").exists() and damaged(tmp_path) == []
    step = checkpoint.load(tmp_path / "state.pth")["position"]["step"]
    assert f"at epoch {step // 4 + 1}, batch {step % 4}" in said and 0 < step < UPDATES
    train(tmp_path)
    assert trained(tmp_path) == trained(whole)


@pytest.mark.parametrize("during", DURING)
def test_ctrl_c_ends_with_130_and_goes_on_from_the_last_save(during, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_fgsm_rs, "input_gradient", lambda *arguments, **named: attacks.input_gradient(*arguments, **named))
    with signalled(signal.SIGINT, *DURING[during]):
        assert ended(train, tmp_path) == 130
    assert capsys.readouterr().err == "error: interrupted; run the same command again to continue from the last save\n"
    assert damaged(tmp_path) == [] and not list(tmp_path.glob("*.part")) and (tmp_path / "state.pth").is_file()
    train(tmp_path)
    assert trained(tmp_path) == trained(whole)


def test_an_interrupted_evaluation_goes_on(whole, tmp_path, capsys):
    with signalled(signal.SIGINT, attacks, "pgd", 6):  # in the second of AutoAttack's attacks
        assert ended(measure, whole / "best.pth", tmp_path) == 130
    assert damaged(tmp_path) == []
    measure(whole / "best.pth", tmp_path)
    assert "continuing from" in capsys.readouterr().out
    assert measured(tmp_path) == measured(whole.with_name("evaluated"))


# ---- disks -------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize("name", ["config.json", "last.pth", "best.pth", "log.jsonl", "state.pth", "result.json",
                                  "autoattack.pth", "verdicts.npz", "evaluation.json"])
def test_a_full_disk_leaves_every_file_whole(name, whole, tmp_path, capsys):
    """Each file in turn begins to be written on /dev/full, which takes not one byte."""
    evaluating = name in ("autoattack.pth", "verdicts.npz", "evaluation.json")
    work = (measure, whole / "best.pth", tmp_path) if evaluating else (train, tmp_path)
    unfinished = tmp_path / f"{name}.part"
    unfinished.symlink_to("/dev/full")
    assert ended(*work) == 1
    assert "no room left on the disk" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert damaged(tmp_path) == [] and not os.path.lexists(unfinished) and not (tmp_path / name).exists()
    assert ended(*work) == 0  # with room again
    assert measured(tmp_path) == measured(whole.with_name("evaluated")) if evaluating else trained(tmp_path) == trained(whole)


@contextlib.contextmanager
def read_only() -> Iterator[Path]:
    """A directory that this process cannot write to: as root it becomes nobody for so long."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        nobody = os.geteuid() == 0
        try:
            if nobody:
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                Path(name, "file").touch()
            yield Path(name)
        finally:
            if nobody:
                os.seteuid(0)
            os.chmod(name, 0o755)


@pytest.mark.parametrize("what", ["run", "run in it", "evaluation", "data set"])
def test_a_read_only_directory_is_named(what, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.sets, "downloaded", lambda name, path: {"x_train": np.zeros(3)})
    monkeypatch.setattr(foreign, "read", lambda path, content=foreign.read(whole / "best.pth"): content)  # which nobody may not
    digits = data.load("digits", ".")  # scikit-learn's file may lie where nobody else may read
    monkeypatch.setattr(data, "load", lambda name, *more, load=data.load: digits if name == "digits" else load(name, *more))
    with read_only() as directory:
        assert ended(*{"run": (train, directory), "run in it": (train, directory / "run"),
                       "evaluation": (measure, whole / "best.pth", directory / "evaluated"),
                       "data set": (data.load, "cifar10", directory)}[what]) == 1
        assert list(directory.iterdir()) == []
    said = capsys.readouterr().err
    assert said.startswith(f"error: {directory}") and "Permission denied; change its permissions, or choose another" in said and said.count("\n") == 1


# ---- damaged and hostile files -----------------------------------------------------------------------------------------

class Code:
    """An object whose pickle is a call: it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def flips(whole: bytes, n: int, seed: int = 0) -> Iterator[bytes]:
    """Copies with one flipped bit, evenly over the file, and as many that end too early."""
    for position in np.linspace(0, len(whole) - 1, n).astype(int) - np.random.default_rng(seed).integers(0, len(whole) // n, n):
        position = max(0, int(position))
        yield whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1:]
        yield whole[:position]


def test_a_flipped_bit_in_a_runs_state_is_noticed(whole, tmp_path, capsys):
    content, path = (whole / "state.pth").read_bytes(), tmp_path / "state.pth"
    sound, noticed, believed = plain(checkpoint.load(whole / "state.pth")), 0, 0
    for damage in flips(content, 60):
        path.write_bytes(damage)
        try:
            assert plain(checkpoint.load(path)) == sound, "it was read, and is not what was written"
        except AssertionError:
            raise
        except Exception:
            noticed += 1
            with contextlib.suppress(Exception):
                believed += plain(torch.load(path, weights_only=True)) != sound
    assert noticed > 90
    assert believed > 10, "torch alone would not have noticed: what is tested above is our checksums"
    assert ended(train, tmp_path) == 2
    assert "state.pth is damaged" in (said := capsys.readouterr().err) and "--resume never" in said


def test_a_flipped_bit_in_autoattacks_file_starts_it_anew(whole, tmp_path, capsys):
    evaluated = whole.with_name("evaluated")
    content, state = (evaluated / "autoattack.pth").read_bytes(), checkpoint.load(evaluated / "autoattack.pth")
    verdicts = state["standing"]["square"].numpy().tobytes()
    position = content.rindex(verdicts)
    (tmp_path / "autoattack.pth").write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1:])
    assert plain(torch.load(tmp_path / "autoattack.pth", weights_only=True)) != plain(state), "a verdict that torch alone would believe"
    measure(whole / "best.pth", tmp_path)
    assert "is damaged; starting anew" in capsys.readouterr().out
    assert measured(tmp_path) == measured(evaluated)


def test_code_in_a_run_s_own_files_never_runs(whole, tmp_path, capsys):
    marker, run, evaluated = tmp_path / "marker", tmp_path / "run", tmp_path / "evaluated"
    shutil.copytree(whole, run)
    torch.save(checkpoint.load(run / "state.pth") | {"best": Code(marker)}, run / "state.pth")
    assert ended(train, run) == 2 and "state.pth" in (said := capsys.readouterr().err) and said.count("\n") == 1
    evaluated.mkdir()
    torch.save(checkpoint.load(whole.with_name("evaluated") / "autoattack.pth") | {"more": Code(marker)}, evaluated / "autoattack.pth")
    measure(whole / "best.pth", evaluated)
    assert "starting anew" in capsys.readouterr().out
    torch.save(checkpoint.load(whole / "best.pth") | {"more": Code(marker)}, tmp_path / "best.pth")
    measure(tmp_path / "best.pth", tmp_path / "again", "--attacks", "clean")
    assert not marker.exists()
    torch.load(run / "state.pth", weights_only=False)
    assert marker.exists(), "the code is live: what is tested above are the readers"


def small_set(**changed: np.ndarray) -> bytes:
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    np.savez(file, **{"x_train": x, "y_train": np.arange(20) % 10, "x_test": x, "y_test": np.arange(20) % 10} | changed)
    return file.getvalue()


def test_a_damaged_data_file_is_refused_wherever_the_damage_is(tmp_path):
    """Above all the headers, of zip and of numpy, from which any exception may come."""
    sound, path, noticed = small_set(), tmp_path / "cifar10.npz", 0
    for damage in flips(sound, 250):
        path.write_bytes(damage)
        try:
            loaded = data.load("cifar10", tmp_path)
        except Misuse as error:
            assert "cifar10.npz" in str(error) and "move it away" in str(error)
            noticed += 1
        else:  # a date, say
            assert all(np.array_equal(getattr(loaded, name), array) for name, array in np.load(io.BytesIO(sound)).items())
    assert noticed > 300


def test_code_in_a_data_file_never_runs(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "cifar10.npz").write_bytes(small_set(y_test=np.array([Code(marker)] * 20, dtype=object)))
    with pytest.raises(Misuse, match="cifar10.npz is damaged .*allow_pickle"):
        data.load("cifar10", tmp_path)
    assert not marker.exists()
    np.load(tmp_path / "cifar10.npz", allow_pickle=True)["y_test"]
    assert marker.exists()


def test_a_data_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "cifar10.npz").write_bytes(small_set())

    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "cifar10.npz"))

    monkeypatch.setattr(np, "load", closed)
    with pytest.raises(PermissionError):
        data.load("cifar10", tmp_path)


def first(kept: dict[str, Any]) -> str:
    return next(name for name, value in kept["classifier"].items() if value.dim() == 4)


STATES: dict[str, tuple[Callable[[dict], Any], int, str]] = {
    "NaN in a weight": (lambda s: s["kept"]["classifier"][first(s["kept"])].fill_(torch.nan), 1, "not finite"),
    "a weight of another shape": (lambda s: s["kept"]["classifier"].update({first(s["kept"]): torch.zeros(2, 2)}), 2, "does not fit"),
    "a weight is missing": (lambda s: s["kept"]["classifier"].pop(first(s["kept"])), 2, "does not fit"),
    "no network": (lambda s: s["kept"].pop("classifier"), 2, "another version"),
    "no configuration": (lambda s: s.pop("config"), 2, "has no config"),
    "of an older version": (lambda s: s.pop("guard"), 2, "has no guard"),
    "no state": (lambda s: s.clear(), 2, "not a run's state"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_loads_and_is_wrong(what, whole, tmp_path, capsys):
    change, status, words = STATES[what]
    state = checkpoint.load(whole / "state.pth")
    state["position"] = {"epoch": 2, "batch": 0, "step": 8}
    state["history"].pop()
    change(state)
    checkpoint.save(state, tmp_path / "state.pth")
    before = (tmp_path / "state.pth").read_bytes()
    assert ended(train, tmp_path) == status
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert (tmp_path / "state.pth").read_bytes() == before


@pytest.mark.parametrize("epsilon", ["eight", -8.0, float("nan"), 1e9])
def test_a_checkpoint_with_a_false_radius_is_refused(epsilon, whole, tmp_path, capsys):
    torch.save(torch.load(whole / "best.pth", weights_only=True) | {"epsilon": epsilon}, tmp_path / "odd.pth")
    assert ended(measure, tmp_path / "odd.pth", tmp_path / "e") == 2
    assert f"the radius {epsilon}" in capsys.readouterr().err and not (tmp_path / "e" / "evaluation.json").exists()


@pytest.mark.parametrize("flag, value", [("--seed", -1), ("--seed", 2**64), ("--epsilon", "nan"), ("--pgd-alpha", "inf")])
def test_an_evaluations_flags_have_bounds(flag, value, whole, tmp_path, capsys):
    assert ended(measure, whole / "best.pth", tmp_path, flag, value) == 2
    assert f"{flag} {value}" in capsys.readouterr().err


def test_two_evaluations_in_one_directory_are_refused(whole, tmp_path, capsys):
    held = checkpoint.lock(tmp_path)
    assert ended(measure, whole / "best.pth", tmp_path) == 2
    assert "another run is writing there" in capsys.readouterr().err and {path.name for path in tmp_path.iterdir()} == {".lock"}
    held.close()
    assert ended(measure, whole / "best.pth", tmp_path) == 0


# ---- sizes and clocks --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, status", [
    (("--batch-size", 1, "--train-size", 3), 0), (("--batch-size", 2, "--train-size", 3), 0),  # resnet8 comes down to 2 x 2 pixels
    (("--arch", "resnet18", "--train-size", 17), 2), (("--arch", "resnet18", "--train-size", 18), 0),  # to a single one
])
def test_a_batch_of_one_image(flags, status, tmp_path, capsys):
    assert ended(train, tmp_path, "--epochs", 1, *flags) == status
    said = capsys.readouterr().err
    assert said == "" if status == 0 else "BatchNorm" in said and "--batch-size" in said and said.count("\n") == 1


def test_other_value_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"), one_sentence():
        raise ValueError("a bug")


def test_memory_that_python_lacks_is_one_sentence(capsys):
    def greedy() -> None:
        raise MemoryError

    assert ended(greedy) == 1 and "out of memory" in capsys.readouterr().err


def test_a_clock_that_goes_backwards_changes_nothing(whole, tmp_path, monkeypatch):
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    train(tmp_path, "--time-limit", 10)
    assert time.time() > time.time() and trained(tmp_path) == trained(whole)


def wall_clock(source: str) -> bool:
    """Whether a program asks what time it is, rather than how long something took."""
    nodes = list(ast.walk(ast.parse(source)))
    named = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    imported = {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool((named | imported) & {"time.time", "datetime.now", "datetime.datetime.now", "os.path.getmtime"})


def test_nothing_asks_what_time_it_is():
    assert [path.name for pattern in ("engine/*.py", "*.py", "models/*.py") for path in ROOT.glob(pattern) if wall_clock(path.read_text())] == []
    assert wall_clock("import time\nbegan = time.time()") and wall_clock("from time import time")
    assert not wall_clock("import time\ntime.perf_counter()")


# ---- flags -------------------------------------------------------------------------------------------------------------

def fields(cls: type[engine.Config]) -> dict[str, Any]:
    return {action.dest: action for action in config.parser(cls, "")._actions if action.dest != "help"}


NUMBERS = st.one_of(st.integers(-3, 200), st.integers(-10**30, 10**30), st.floats(), st.floats(0, 1)).map(str)
TEXTS = st.one_of(st.text("0123456789,-.e ", max_size=12), st.sampled_from(
    ["3-5", "1,2", "9-2", "0-99999999999", "pgd10", "clean,fgsm,pgd10", "pgd10,dpg", "resnet8", "uniform", "true", "", "nan", "1e400", "--lr"]))


def words(field: Any) -> st.SearchStrategy[str]:
    """What may be written for a flag, mostly what it is made for."""
    name = field.option_strings[0]
    if field.nargs == 0:
        return st.sampled_from(field.option_strings)
    made_for = st.sampled_from([str(choice) for choice in field.choices]) if field.choices else NUMBERS if field.type in (int, float) else TEXTS
    return st.one_of(made_for, made_for, made_for, NUMBERS, TEXTS).map(lambda value: f"{name}={value}")


def flags_of(cfg: engine.Config) -> list[str]:
    """The command line that asks for a configuration."""
    said = []
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), config.spelled(field.name)
        if isinstance(value, bool):
            said.append(name if value else "--no-" + name[2:])
        elif value is not None:
            said.append(f"{name}={value}")
    return said


def parsed(cls: type[engine.Config], argv: list[str]) -> engine.Config | None:
    """None for misuse; any other exception passes through."""
    try:
        return cls.parse("", argv)
    except Misuse as error:
        assert str(error)
        return None


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_flags_are_a_configuration_or_misuse(script):
    cls, counts = importlib.import_module(script).Config, Counter()
    each = {name: words(field) for name, field in fields(cls).items()}

    @settings(repeatable, max_examples=25)
    @given(st.data())
    def check(drawn: st.DataObject) -> None:
        argv = [drawn.draw(each[name]) for name in drawn.draw(st.lists(st.sampled_from(sorted(each)), max_size=3))]
        cfg = parsed(cls, argv)
        counts[cfg is None] += 1
        if cfg is not None:
            assert cls.parse("", flags_of(cfg)) == cfg

    check()
    assert counts[False], "none was a configuration, so that nothing was compared"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_that_no_one_means_is_misuse_for_every_flag(script):
    cls = importlib.import_module(script).Config
    for name, field in fields(cls).items():
        if field.type in (int, float):
            for value in ("nan", "inf", "1e400") if field.type is float else ("1" * 30,):
                with pytest.raises(Misuse, match=config.spelled(name)):
                    cls(**{name: field.type(value)})


def test_the_property_of_flags_notices_a_wrong_one():
    class Fragile(engine.Config):
        def check(self) -> None:
            super().check()
            1 / self.seed

    class Forgetful(engine.Config):
        def check(self) -> None:
            super().check()
            self.seed += 1

    with pytest.raises(ZeroDivisionError):
        parsed(Fragile, ["--seed=0"])
    cfg = parsed(Forgetful, [])
    assert Forgetful.parse("", flags_of(cfg)) != cfg


# ---- the checkpoint loader ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(whole) -> dict[str, torch.Tensor]:
    return torch.load(whole / "best.pth", weights_only=True)["state_dict"]


def loaded(content: bytes) -> torch.nn.Module | None:
    """None where the loader refuses; any other exception passes through."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(content)
        file.flush()
        try:
            return foreign.load(file.name, model="resnet8", normalise="none")[0]
        except (Misuse, Failure) as error:
            assert str(error).startswith(file.name)
            return None


def saved(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64,
          torch.float8_e4m3fn]
tensors = st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), st.lists(st.integers(0, 5), max_size=5), st.sampled_from(DTYPES))
leaves = st.one_of(tensors, st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab.", max_size=3), st.binary(max_size=3),
                   st.sampled_from([np.float64(2), np.zeros(2), torch.device("cpu"), torch.float32, torch.zeros(2).to_sparse(),
                                    torch.zeros(2, device="meta")]))
keys = st.one_of(st.sampled_from([*foreign.CONTAINERS, "arch", "mean", "std", "mu", "sigma", "0.mean", "0.std", "epoch"]),
                 st.text("ab.", max_size=3), st.integers(0, 2))
contents = st.recursive(leaves, lambda inner: st.one_of(st.dictionaries(keys, inner, max_size=4), st.lists(inner, max_size=3)), max_leaves=6)


def test_any_content_is_a_network_or_refused(weights):
    names, counts = sorted(weights), Counter()

    @settings(repeatable, max_examples=150)
    @given(contents, st.dictionaries(st.one_of(keys, st.sampled_from(names)), leaves, max_size=2), st.data(), st.sampled_from(["around", "in", "of"]))
    def check(around: Any, beside: dict, change: st.DataObject, where: str) -> None:
        content: Any = around
        if where == "in":  # sound weights in a container with anything beside them
            content = {**beside, "state_dict": weights}
        elif where == "of":  # a weight replaced, cast, cut or left out
            state, name = dict(weights), change.draw(st.sampled_from(names))
            value = state.pop(name)
            likely = [value.to(change.draw(st.sampled_from(DTYPES))), value.flatten(), value.flatten()[:-1], value * torch.nan]
            damage = change.draw(st.sampled_from([*likely, likely[0], change.draw(leaves), None]))
            content = state if damage is None else state | {name: damage}
        network = loaded(saved(content))
        counts[where, network is not None] += 1
        if network is not None:
            assert all(value.isfinite().all() for value in network.state_dict().values())

    check()
    assert counts["in", True] and counts["of", True] and counts["of", False] and not counts["around", True]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_any_damage_is_a_network_or_refused(legacy, weights):
    sound, counts = saved({"state_dict": weights, "epoch": np.float64(3)}, legacy), Counter()
    reference = plain(loaded(sound).state_dict())

    @settings(repeatable, max_examples=100)
    @given(st.lists(st.tuples(st.integers(0, len(sound) - 1), st.binary(max_size=4) | st.none()), min_size=1, max_size=3), st.integers(0, 9))
    def check(changes: list[tuple[int, bytes | None]], cut: int) -> None:
        content = bytearray(sound)
        for position, with_ in changes:
            if with_ is None:
                content[position] ^= 1 << position % 8
            else:
                content[position:position + len(with_)] = with_
        network = loaded(bytes(content[:len(content) - cut * len(sound) // 20]))
        counts[network is not None] += 1
        if network is not None and not legacy:  # which has no checksums
            assert plain(network.state_dict()) == reference

    check()
    assert counts[False]


def test_code_anywhere_in_a_checkpoint_never_runs(weights, tmp_path):
    marker = tmp_path / "marker"

    @settings(repeatable, max_examples=40)
    @given(st.lists(st.one_of(keys, st.sampled_from(["list", "tuple"])), max_size=4), st.booleans(), st.booleans())
    def check(way: list[Any], beside: bool, legacy: bool) -> None:
        content: Any = Code(marker)
        for step in reversed(way):
            content = {"list": [content], "tuple": (content,)}.get(step, {step: content}) if isinstance(step, str) else {step: content}
        loaded(saved({"state_dict": weights, "more": content} if beside else content, legacy))
        assert not marker.exists()

    check()
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists()


# ---- the page ----------------------------------------------------------------------------------------------------------

def unknown_tests(text: str) -> list[str]:
    """The tests that a page names and that do not exist; and its rows that name none."""
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    rows = [row for row in text.splitlines() if row.startswith("|") and not re.match(r"\| (fault|---)", row)]
    return ([f"{file}::{name}" for file, name in named if not re.search(rf"^def {name}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M)]
            + [row for row in rows if "::test_" not in row])


def test_every_fault_of_the_page_has_a_test():
    text = PAGE.read_text()
    assert unknown_tests(text) == [] and text.count("::test_") > 30
    assert unknown_tests("| a fault | an outcome | `test_errors.py::test_of_nothing` |") == ["test_errors::test_of_nothing"]
    assert unknown_tests("| a fault | an outcome | none |") == ["| a fault | an outcome | none |"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = kill(200, Path(folder))
    content = {**found, **record.provenance(torch.device("cpu"), "fp32", record.source())}
    (ROOT / "results" / "faults").mkdir(parents=True, exist_ok=True)
    record.write_json(content, ROOT / "results" / "faults" / "kills.json")
    record.write_text(page_with(kills_shown(content)), PAGE)
    print(kills_shown(content))
