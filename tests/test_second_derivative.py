"""The forms of the penalties' gradient (benchmarks/second_derivative.py): how right each one is, and what it costs in operations."""
from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import train_fgsm_ga
import train_gradsum
from benchmarks import second_derivative as forms

DEVICE = torch.device("cpu")
RIGHT64, RIGHT32 = 1e-5, 1e-3
"""Largest relative error in float64, and largest one minus cosine in fp32, of a form that may take the double backward's place."""


@pytest.fixture(scope="module")
def subject():
    torch.set_num_threads(1)
    return forms.subject("resnet8", 8, 4, 3, DEVICE)


@pytest.fixture(scope="module", params=forms.PENALTIES)
def given(request, subject):
    """What the forms are called with in each precision, and the right answer."""
    arguments = {precision: forms.arguments_at(precision, request.param, *subject) for precision in forms.STEPS}
    return arguments, forms.double_backward(*arguments["float64"])


def test_the_penalties_are_the_scripts(subject):
    x = subject[1].double()
    model, noisy, y, _ = forms.arguments_at("float64", "misalignment", *subject)
    clean = forms.input_gradient(model, x, y)
    weights = list(model.parameters())
    for name, theirs in (("misalignment", lambda: train_fgsm_ga.misalignment(model, x, y, clean, noisy - x)),
                         ("gradient norm", lambda: train_gradsum.gradient_norm(model, x, y, noisy - x))):
        arguments = forms.arguments_at("float64", name, *subject)
        assert arguments[3](forms.input_gradient(model, noisy, y)).item() == pytest.approx(theirs().item(), rel=1e-12)
        ours = forms.double_backward(*arguments)
        assert forms.compared(ours, torch.autograd.grad(theirs(), weights, materialize_grads=True))["error"] < 1e-12


def test_the_networks_averages_stay(subject, given):
    network, model = subject[0], given[0]["float64"][0].network
    forms.difference(1e-6)(*given[0]["float64"])
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(network.buffers(), model.buffers()))
    assert all(layer.track_running_stats for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("form, right", [
    (forms.forward_over_reverse, True), (forms.difference(1e-9), True), (forms.difference(1e-6, forms.Pieces(keep=True)), True),
    (forms.difference(1e-2), False),  # ReLUs go on and off on the way
    (forms.difference(1e-3, forms.Pieces(keep=True), sides=(1, 0)), False),  # an error of first order
    (forms.difference(1e-6, forms.Pieces(keep=True), sides=(1, 1 - 1e-7)), False)])  # rounding, over a small difference
def test_float64(given, form, right):
    arguments, exact = given
    assert (forms.compared(form(*arguments["float64"]), exact)["error"] < RIGHT64) == right


def test_fp32(given):
    arguments, exact = given

    def distance(form) -> float:
        return forms.compared(form(*arguments["fp32"]), exact)["one_minus_cosine"]

    assert distance(forms.double_backward) < RIGHT32 and distance(forms.forward_over_reverse) < RIGHT32
    assert distance(forms.difference(3e-4, forms.Pieces(keep=True))) < RIGHT32
    assert distance(forms.difference(1e-1, forms.Pieces(keep=True))) > RIGHT32
    assert distance(lambda *a: forms.weight_gradients(*a[:3])) > RIGHT32, "the loss's own gradient is another one"
    row = forms.swept(forms.Pieces(keep=False), arguments, exact)
    assert row["fp32"]["one_minus_cosine"] > RIGHT32, "whatever its step"
    crossed = [found["crossed"] for found in row["steps"]["fp32"]]
    assert crossed == sorted(crossed, reverse=True) and crossed[0] > 10 * crossed[-1] and row["float64"]["crossed"] == 0


def test_pieces_count_and_keep():
    x, pieces = torch.tensor([-1.0, -0.5, 0.5, 1.0]), forms.Pieces(keep=False)
    kept = forms.Pieces(keep=True)
    for each in (pieces, kept):
        with each.first():
            assert F.relu(x).tolist() == [0, 0, 0.5, 1]
    found = []
    for shift in (0.75, -0.75):
        for each in (pieces, kept):
            with each.again():
                found.append(F.relu(x + shift).tolist())
    assert found == [[0, 0.25, 1.25, 1.75], [0, 0, 1.25, 1.75], [0, 0, 0, 0.25], [0, 0, -0.25, 0.25]]
    assert pieces.crossed_part == 2 / 8


def test_the_compiled_form_is_the_same(subject):
    arguments = forms.arguments_at("float64", "misalignment", *subject)
    form = forms.compiled_double_backward("aot_eager")  # the same graph, without minutes of C++
    assert forms.compared(form(*arguments), forms.double_backward(*arguments))["error"] < RIGHT64


@pytest.mark.parametrize("name, form", [("double backward", forms.double_backward), ("central difference", forms.difference(1e-4)),
                                        ("central difference in one linear piece", forms.difference(1e-4, forms.Pieces(keep=True)))])
def test_operations_are_as_predicted(given, name, form):
    predicted = forms.PREDICTED[name]
    assert abs(forms.passes(form, given[0]["fp32"]) - predicted) < 0.3

    def wasteful(*arguments):
        forms.weight_gradients(*arguments[:3])
        form(*arguments)
    assert abs(forms.passes(wasteful, given[0]["fp32"]) - predicted) > 2


def test_peak_memory_is_what_a_call_needs():
    begin, most = forms.memory(DEVICE)
    block = torch.ones(16, 2**20)
    begin()
    little = most()
    if little is None:
        pytest.skip("this system does not tell a process's peak memory")
    torch.ones(8, 2**20)
    assert little < 8 * 2**20 < 30 * 2**20 < most() < 60 * 2**20, "32 MiB, and not the 64 MiB that were there before"
    assert block.sum() == 16 * 2**20


def test_the_benchmark_writes_what_it_found(tmp_path, capsys, monkeypatch):
    def impossible(*_):
        raise RuntimeError("not implemented\nfor this device")
    monkeypatch.setattr(forms, "forward_over_reverse", impossible)
    forms.main(["--archs", "resnet8", "--width", "4", "--batch-size", "2", "--updates", "1", "--repeats", "1", "--compiled", "none",
                "--device", "cpu", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"commit", "dirty", "versions", "device", "precision"} <= found.keys() and found["width"] == 4
    assert 0 < found["loss"]["resnet8"]["fp32"]["error"] < 1e-3 < found["loss"]["resnet8"]["bf16"]["error"]
    for rows in found["rows"]["resnet8"].values():
        assert rows.keys() == {name for name in forms.PREDICTED if "compiled" not in name}
        assert rows["double backward"]["milliseconds"] > 0 and rows["double backward"]["fp32"]["one_minus_cosine"] < RIGHT32
        assert rows["forward over reverse"] == {"failed": "RuntimeError: not implemented"}
        steps = rows["central difference"]["steps"]["fp32"]
        assert rows["central difference"]["fp32"]["error"] == min(step["error"] for step in steps)
