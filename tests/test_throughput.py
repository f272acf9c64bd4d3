"""What a method's step computes, counted: no attack computes a weight's gradient, and nothing is computed twice."""
from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import engine
import models
from benchmarks import throughput

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
