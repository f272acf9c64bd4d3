"""What a method's step computes, counted: no attack computes a weight's gradient, and nothing is computed twice. And that the clocks run."""
from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
import models
import train_fgsm_sdi
from benchmarks import cpu_step, throughput

FLAGS = ("--dataset", "digits", "--arch", "resnet8", "--width", "8", "--train-size", "64", "--val-size", "16")


@pytest.fixture(autouse=True)
def engine_as_it_was(monkeypatch):
    monkeypatch.setattr(engine, "Run", engine.Run)  # put back after the test


@functools.cache
def passes() -> dict[str, float]:
    """Operations per image of a forward pass, and of backward passes to the image alone, to the weights alone, and to both."""
    network, x, y = models.build("resnet8", classes=10, channels=1, width=8, image_size=8), torch.rand(4, 1, 8, 8, requires_grad=True), torch.arange(4)
    weights = list(network.parameters())

    def count(function) -> float:
        with throughput.Counted() as counted:
            function()
        return counted.operations / len(x)

    found = {"forward": count(lambda: network(x.detach()))}
    for name, inputs, image in (("image", [x], x), ("weights", weights, x.detach()), ("both", [x, *weights], x)):
        for p in weights:
            p.requires_grad_(name != "image")
        loss = F.cross_entropy(network(image), y)
        found[name] = count(lambda: torch.autograd.grad(loss, inputs))
    return found


def counted(script: str, *flags: str) -> float:
    return throughput.floors((script, *FLAGS, *flags))["operations_per_image"]


def test_the_pieces_are_what_they_should_be():
    """A backward pass to the image costs a forward pass; so does one to the weights but for what leads to the image alone."""
    p = passes()
    assert p["image"] == pytest.approx(p["forward"], rel=0.02) and 1.8 * p["forward"] < p["weights"] < p["both"] == pytest.approx(2 * p["forward"], rel=0.02)


@pytest.mark.parametrize("script, flags, attack_passes", [
    ("train_standard.py", (), 0), ("train_fgsm_rs.py", (), 1), ("train_n_fgsm.py", (), 1), ("train_vfsat.py", (), 1), ("train_pgd_at.py", (), 10),
    ("train_pgd_at.py", ("--steps", "3"), 3), ("train_fgsm_bp.py", (), 1)])
def test_a_step_is_its_attacks_passes_and_one_update(script, flags, attack_passes):
    """FGSM-RS: 2 + 3 forward passes' worth, PGD-10: 20 + 3; a weight gradient in an attack would be seen as one more each."""
    p = passes()
    update = p["forward"] + p["weights"]
    extra = p["forward"] if script == "train_fgsm_bp.py" else 0  # its regulariser sees the image that it starts from, in the weights' graph
    expected = update + attack_passes * (p["forward"] + p["image"])
    found = counted(script, *flags)
    if extra:
        assert expected <= found <= expected + extra + p["weights"]
    else:
        assert found == expected
    assert found != expected + p["weights"] - p["image"]


def test_free_at_gets_both_gradients_from_one_pass():
    p = passes()
    assert counted("train_free_at.py", "--replays", "2") == pytest.approx(2 * (p["forward"] + p["both"]), rel=1e-9)


def test_fgsm_sdi_is_two_attack_passes_an_update_and_the_generator():
    p = passes()
    more = counted("train_fgsm_sdi.py") - (3 * p["forward"] + 2 * p["image"] + p["weights"])
    generator = 2 * 64 * 9 * (2 + 64 + 64 + 1) * 8 * 8  # multiply and add: 2 in, two convolutions of 64, 1 out, on 8 x 8 pixels
    assert more == generator, "forward only: its gradients are for its own steps"


def test_bytes_do_not_count_the_weights_for_every_image(monkeypatch):
    at_128 = throughput.floors(("train_fgsm_rs.py", *FLAGS))["bytes_per_image"]
    monkeypatch.setattr(throughput, "BATCH", 4)
    assert throughput.floors(("train_fgsm_rs.py", *FLAGS))["bytes_per_image"] > 1.1 * at_128


def test_a_clock_that_would_time_an_evaluation_refuses():
    """64 images in batches of 32: the third batch belongs to the second epoch."""
    found = throughput.ours(("train_fgsm_rs.py", *FLAGS, "--batch-size", "16", "--device", "cpu"), 3, 1)
    assert found["images_per_second"] > 0 and found["precision"] == "fp32"
    with pytest.raises(engine.Misuse, match="--batches 3"):
        throughput.ours(("train_fgsm_rs.py", *FLAGS, "--batch-size", "32", "--device", "cpu"), 3, 1)
    with pytest.raises(engine.Misuse, match="--batches 3"):
        throughput.ours(("train_fgsm_rs.py", *FLAGS, "--batch-size", "32", "--epochs", "1", "--device", "cpu"), 3, 1)


def test_floors_leave_compilation_out():
    assert counted("train_fgsm_rs.py", "--compile") == counted("train_fgsm_rs.py") > 0


class Pipe:
    """Says go so many times, then stop; keeps what it is told."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.rates = rounds, []

    def recv(self) -> str:
        return "go" if len(self.rates) < self.rounds else "stop"

    def send(self, rate: float) -> None:
        self.rates.append(rate)


def test_the_engine_takes_its_turns(monkeypatch):
    """Rounds of three batches, on whose first one alone the generator learns; nothing but steps is timed."""
    monkeypatch.setattr(cpu_step, "BATCH", 4)
    monkeypatch.setattr(engine.run.data, "load", engine.run.data.load)  # both put back after the test
    monkeypatch.setattr(train_fgsm_sdi, "Config", functools.partial(train_fgsm_sdi.Config, arch="resnet8", width=4))
    learnt, update = [], engine.Run.update

    def watched(self, loss, optimizer=None, **more):
        learnt.append(optimizer is not None)
        update(self, loss, optimizer, **more)
    monkeypatch.setattr(engine.Run, "update", watched)
    monkeypatch.setattr(engine.heldout.HeldOut, "accuracies", lambda *_: pytest.fail("an evaluation was timed"))
    pipe = Pipe(rounds=3)
    with pytest.raises(SystemExit):
        cpu_step.ours(cpu_step.Turns(pipe, batches=2, rounds=3), Path())
    assert len(pipe.rates) == 3 and min(pipe.rates) > 0
    assert learnt == 3 * [True, False, False, False]  # the generator's update, then the classifier's of each of three batches


THEIRS = {"utils.py": """
import torch
from torchvision import datasets, transforms
half = torch.tensor(0.5).cuda()
def get_loaders(folder, batch_size):
    train = datasets.CIFAR10(folder, train=True, transform=transforms.ToTensor(), download=True)
    assert len(datasets.CIFAR10(folder, train=False, download=True)) == 2
    return torch.utils.data.DataLoader(train, batch_size=batch_size), None
def evaluate_pgd(*a): raise RuntimeError("evaluated")
evaluate_standard = evaluate_pgd
""", "FGSM_SDI.py": """
import argparse, torch, utils
from tensorboardX import SummaryWriter
parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", default="nowhere")
parser.add_argument("--out-dir", default="nowhere")
args = parser.parse_args()
SummaryWriter(log_dir=args.out_dir + args.attacker)
seen = []
for epoch in range(2):
    for x, y in utils.get_loaders(args.data_dir, 4)[0]:
        seen += [int(value) for value in 255 * x.cuda()[:, 0, 0, 0]]
        assert seen == list(range(len(seen))), seen
        print(x)
    utils.evaluate_pgd()
torch.save({}, "/nowhere/at/all")
raise ValueError("the end")
"""}


def test_the_published_loop_runs_from_its_own_loader(tmp_path):
    """A script made like the published one: it gets its images, is stopped when it has been timed, and an error of its own is seen."""
    x = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1) * np.ones((1, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=np.arange(20) % 10, x_test=x[:2], y_test=np.arange(2))
    for name, text in THEIRS.items():
        (tmp_path / name).write_text(text)
    found = throughput.apart(throughput.published, tmp_path, tmp_path, 4, 1, "cpu")
    assert found["images_per_second"] > 0 and found["seconds_before"] >= 0 and found["peak_memory_bytes"] > 0, found
    (tmp_path / "FGSM_SDI.py").write_text(THEIRS["FGSM_SDI.py"].replace("for epoch in range(2)", "for epoch in []"))
    assert throughput.apart(throughput.published, tmp_path, tmp_path, 4, 1, "cpu") == {"failed": "ValueError: the end"}
