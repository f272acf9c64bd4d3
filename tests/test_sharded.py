"""An evaluation by several processes against one by one: the same verdicts, whoever goes on where another was interrupted."""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attacks
import test_FGSM_SDI
from engine import data, distributed, evaluate, foreign
from engine.data import to_images
from engine.errors import Misuse, one_sentence
from experiments import processes

pytestmark = pytest.mark.xdist_group("sharded")
N, BATCH, PLAIN = 81, 30, ("clean", "fgsm", "pgd5", "pgd10", "cw")  # an odd number, and batches that are not full
STEPS = dict(zip(attacks.AUTOATTACK, (1, 2, 4, 8)))  # of what stands in for each attack


# ---- what every process does ----------------------------------------------------------------------------------------

class Double(nn.Module):
    """In single precision a gradient may be so small that its sign is the batch's: then verdicts are those of how images are dealt out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


@contextmanager
def exactly(before: Callable[[str, int], Any] = lambda attack, n: None) -> Iterator[pytest.MonkeyPatch]:
    """Inside, verdicts depend on nothing but the image: in double precision, and AutoAttack's attacks are short ones of PGD without noise, saved
    after every batch. The other processes' warn of something.

    Args:
        before: called with each attack's name and the number of its images, for every batch.
    """
    load = foreign.load

    def loaded(*arguments: Any, **named: Any) -> tuple[nn.Module, dict]:
        network, report = load(*arguments, **named)
        return Double(network), report

    def short(model: nn.Module, x: Tensor, y: Tensor, *, attack: str, eps: float, log: Callable[[str], None], **_: Any) -> tuple[Tensor, Tensor]:
        before(attack, len(x))
        if distributed.rank():
            log(f"warning: of process {distributed.rank()}")
        x_adv = (x + attacks.pgd(model, x, y, eps=eps, alpha=eps / 4, steps=STEPS[attack])).clamp(0, 1)
        return x_adv, attacks.predict(model, x_adv) == y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "load", loaded)
        patch.setattr(attacks, "auto_attack", short)
        patch.setattr(evaluate, "SAVE_EVERY", -1)
        yield patch


@contextmanager
def shortly() -> Iterator[None]:
    """Inside, AutoAttack's own attacks have few iterations."""
    import pyautoattack

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 5
            self.square.n_queries = 50

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyautoattack, "AutoAttack", Short)
        yield


def evaluated(model: Path, out_dir: Path, *flags: Any) -> dict:
    return test_FGSM_SDI.main(test_FGSM_SDI.parse(list(map(str, (
        "--model-path", model, "--out-dir", out_dir, "--n-ex", N, "--batch-size", BATCH, "--card-n", 0, "--device", "cpu",
        "--attacks", ",".join((*PLAIN, "apgd", "aa")), *flags)))))


def interrupted_at(name: str, how: Callable[[], Any], batch: int = 0) -> Callable[[str, int], Any]:
    left = iter([None] * batch)
    return lambda attack, n: next(left, how) and how() if attack == name else None


def leave() -> None:
    raise KeyboardInterrupt


def die() -> None:
    if distributed.rank() == 1:
        time.sleep(2)  # until the first process waits for this one
        os.kill(os.getpid(), signal.SIGKILL)


def work(what: str, model: Path, directory: Path) -> None:
    """By one process or several; leaves evaluations in `directory`."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), seldom=True)
    if what == "killed":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the loss is noticed
        with exactly(interrupted_at("fab-t", die)):
            evaluated(model, directory / "killed")
    if what == "all":
        dealt: list[tuple[str, int]] = []
        with exactly(lambda *call: dealt.append(call)):
            evaluated(model, directory / "exact")
            (directory / f"dealt{distributed.rank()}.json").write_text(json.dumps(dealt))
            evaluated(model, directory / "one, then two", "--attacks", "aa")
            evaluated(model, directory / "few", "--n-ex", 1, "--attacks", "clean,pgd10,aa")
        with exactly() as patch:
            collected = distributed.gather
            patch.setattr(distributed, "gather", lambda rows: collected(rows).flip(0))
            evaluated(model, directory / "disordered", "--attacks", "aa")
        with shortly():
            evaluated(model, directory / "autoattack", "--attacks", "clean,aa")


# ---- one process, and two --------------------------------------------------------------------------------------------

def launched(what: str, model: Path, directory: Path) -> tuple[int, str]:
    """Two processes' status and output."""
    return processes.outcome(processes.torchrun("-m", "tests.test_sharded", what, str(model), str(directory)), 300)


@pytest.fixture(scope="module")
def both(digits_run, tmp_path_factory) -> tuple[Path, Path]:
    """What one process left, and what two did."""
    model, one, two = digits_run / "best.pth", tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.raises(KeyboardInterrupt), exactly(interrupted_at("fab-t", leave, batch=1)):
        evaluated(model, two / "one, then two", "--attacks", "aa")
    work("all", model, one)
    status, output = launched("all", model, two)
    assert status == 0, output[-4000:]
    assert output.count("written to") == 5, "the first process alone speaks"
    assert f"continuing from {two / 'one, then two' / 'autoattack.pth'}: clean, apgd-ce, apgd-t done" in output
    assert f"fab-t: {BATCH} of" not in output, "which one process had done"
    return one, two


def verdicts(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "verdicts.npz") as file:
        return dict(file)


def same(a: Path, b: Path) -> bool:
    """Whether two evaluations have the same verdicts and the same adversarial images."""
    left, right = verdicts(a), verdicts(b)
    states = [torch.load(path / "autoattack.pth", weights_only=True) for path in (a, b)]
    return (all(np.array_equal(left[column], right[column]) for column in left.keys() & right.keys())
            and states[0]["identity"] == states[1]["identity"]
            and all(torch.equal(states[0]["standing"][name], states[1]["standing"][name]) for name in ("clean", *attacks.AUTOATTACK))
            and torch.allclose(states[0]["x_adv"], states[1]["x_adv"], rtol=0, atol=1e-6))


@pytest.mark.parametrize("name", ["exact", "one, then two", "few"])
def test_two_processes_find_what_one_does(name, both):
    """`one, then two`: one process was interrupted after a batch of the third attack, and two went on. `few`: an image, and nothing for the second process."""
    assert same(both[0] / name, both[1] / name)
    content = [json.loads((directory / name / "evaluation.json").read_text()) for directory in both]
    assert [evaluation["processes"] for evaluation in content] == [1, 2]
    assert content[0]["metrics"] == content[1]["metrics"]
    if name == "exact":
        assert "of process 1" not in content[0]["warnings"] and "of process 1" in content[1]["warnings"], "whichever process is warned, it is written down"
        values = [metric["value"] for metric in content[0]["metrics"].values()]
        assert list(content[0]["metrics"]) == [*PLAIN, "apgd", "aa"] and min(values) < values[0] - 20, "attacks that find something"


def test_adversarial_images_of_other_images_are_noticed(both):
    assert not same(both[0] / "exact", both[1] / "disordered")


def test_survivors_are_dealt_out_anew_before_every_batch(both):
    dealt = [[tuple(call) for call in json.loads((both[1] / f"dealt{rank}.json").read_text())] for rank in (0, 1)]
    standing = torch.load(both[1] / "exact" / "autoattack.pth", weights_only=True)["standing"]
    before = dict(zip(STEPS, (standing[name].nonzero().squeeze(1) for name in ("clean", *attacks.AUTOATTACK[:-1]))))
    batches = [(name, len(batch)) for name, which in before.items() for batch in which.split(2 * BATCH)]
    assert dealt[0][:len(batches)] == [(name, -(-n // 2)) for name, n in batches]
    assert dealt[1][:len(batches)] == [(name, n // 2) for name, n in batches]
    half = -(-N // 2)
    assert any(int((which < half).sum()) != -(-len(which) // 2) for which in before.values()), "where each had kept its first images, it would show"


def test_autoattack_of_two_processes_is_about_that_of_one(both):
    """Its noise depends on how images are batched: within the change of verdicts that another seed would bring."""
    one, two = (verdicts(directory / "autoattack") for directory in both)
    assert np.array_equal(one["clean"], two["clean"])
    assert abs(one["aa"].mean() - two["aa"].mean()) <= 0.05 and (one["aa"] != two["aa"]).mean() <= 0.1
    model, _ = foreign.load(Path(json.loads((both[1] / "autoattack" / "evaluation.json").read_text())["model_path"]), **on_digits())
    state = torch.load(both[1] / "autoattack" / "autoattack.pth", weights_only=True)
    x, y = images()
    with torch.no_grad():
        assert np.array_equal((model(state["x_adv"]).argmax(1) == y).numpy(), two["aa"]), "an adversarial image for every verdict"
    assert (state["x_adv"] - to_images(x)).abs().max() <= 38 / 255 + 1e-6


def test_one_of_two_processes_is_killed_and_one_goes_on(both, digits_run, tmp_path):
    status, output = launched("killed", digits_run / "best.pth", tmp_path)
    assert status == 1 and "process 0 of 2 has lost another one" in output, output[-4000:]
    cause = output.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "exitcode  : -9" in cause, "torchrun names the process that was killed"
    assert not (tmp_path / "killed" / "evaluation.json").exists() and not list((tmp_path / "killed").glob("*.part"))
    repeated: dict[str, int] = {}
    with exactly(repeated.__setitem__):
        evaluated(digits_run / "best.pth", tmp_path / "killed")
    assert list(repeated) == ["fab-t", "square"]
    assert same(tmp_path / "killed", both[0] / "exact")


# ---- its parts -------------------------------------------------------------------------------------------------------

def images() -> tuple[Tensor, Tensor]:
    dataset = data.load("digits", ".")
    return torch.from_numpy(dataset.x_test[:N]), torch.from_numpy(dataset.y_test[:N])


def on_digits() -> dict[str, Any]:
    x, y = images()
    return dict(model=None, normalise=None, which="best", device=torch.device("cpu"), images=to_images(x), labels=y)


def test_a_part_s_random_starts_are_those_of_the_whole(digits_run):
    """For the images from the 38th on; and where it is not said that others stand before them, other starts find other images."""
    model = Double(foreign.load(digits_run / "best.pth", **on_digits())[0])
    x, y = images()

    columns = ("clean", "fgsm", "pgd5", "cw")

    def measured(first: int, said: int) -> dict[str, Tensor]:
        return evaluate.verdicts(model, x[first:], y[first:], columns=columns, eps=38 / 255, alpha=38 / 255 / 4, seed=0, batch_size=20, first=said)

    whole, part, wrong = measured(0, 0), measured(37, 37), measured(37, 0)
    assert all(torch.equal(whole[column][37:], part[column]) for column in columns)
    assert any(not torch.equal(whole[column][37:], wrong[column]) for column in columns)
    nothing = measured(N, N)
    assert nothing.keys() == whole.keys() and all(len(verdict) == 0 for verdict in nothing.values())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in dict(RANK="2", LOCAL_RANK="2", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Misuse, match="--nproc_per_node 3: every process needs a GPU, and this machine has 2"):
        distributed.start(torch.device("cuda"))


if __name__ == "__main__":
    with distributed.leaving(), one_sentence():
        work(sys.argv[1], *map(Path, sys.argv[2:]))
