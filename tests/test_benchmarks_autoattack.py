"""What counts AutoAttack's passes counts those that torch computes, and its comparison sees verdicts that differ."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
from benchmarks import autoattack
from tests.test_sharded import shortly

N, STEPS, QUERIES, BEFORE = 6, 5, 50, 8  # images; what `shortly` leaves; the package's forward passes before an attack: checks and the clean verdict
PREDICTED = {  # forward passes and gradients for an image that does not fall: of nine targets, where there are any
    "apgd-ce": (BEFORE + STEPS + 3, STEPS + 1), "apgd-t": (BEFORE + 9 * (STEPS + 2) + 2, 9 * (STEPS + 1)),
    "fab-t": (BEFORE + 9 * (2 * STEPS + 3) + 2, 9 * STEPS), "square": (BEFORE + QUERIES + 4, 0)}


class Convolutions(TorchDispatchMode):
    """Images in the network's convolution, below autograd: forward, backward to the image and to the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.images = np.zeros(3, dtype=int)

    def __torch_dispatch__(self, operation: Any, classes: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation is torch.ops.aten.convolution.default:
            self.images += len(arguments[0]) * np.array([1, 0, 0])
        if operation is torch.ops.aten.convolution_backward.default:
            self.images += len(arguments[0]) * np.array([0, *arguments[-1][:2]])
        return operation(*arguments, **(named or {}))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def cost(network: nn.Module, attack: str, eps: float, freeze: bool = True) -> tuple[dict[str, Any], list[float]]:
    """What the benchmark says of a short attack; and passes, image gradients and weight gradients per image that torch computed."""
    x = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with shortly(), Convolutions() as done:
        row, still = autoattack.cost(network, x, attacks.predict(network, x), attack, eps, freeze)
    assert row["standing"] == int(still.sum())
    return row, list((done.images - [N, 0, 0]) / N)  # less those of `predict`


def counted(row: dict[str, Any]) -> list[float]:
    return [row["forward"], row["input_gradients"], row["weight_gradients"]]


@pytest.mark.parametrize("attack", attacks.AUTOATTACK)
def test_an_image_that_stands_costs_what_the_package_s_code_says(network, attack):
    """docs/performance.md has the same sums with 100 steps and 5,000 queries."""
    row, done = cost(network, attack, eps=1e-6)
    assert row["standing"] == N and row["filling"] == 1
    assert counted(row) == done == [*PREDICTED[attack], 0]


def test_images_that_fall_cost_less(network):
    row, done = cost(network, "apgd-t", eps=0.05)
    assert 0 < row["standing"] < N and row["filling"] < 1
    assert counted(row) == pytest.approx(done) and all(found < most for found, most in zip(done, PREDICTED["apgd-t"]))


def test_fab_on_a_network_that_is_not_frozen_computes_every_weight_s_gradient(network):
    row, done = cost(network, "fab-t", eps=1e-6, freeze=False)
    assert counted(row) == done == [*PREDICTED["fab-t"], PREDICTED["fab-t"][1]]
    assert all(p.requires_grad and p.grad is None for p in network.parameters()), "left as it was"


def test_a_gradient_is_counted_once_a_pass_and_with_its_own_batch(network):
    """One image tensor in two passes gets one gradient from both; a pass without a gradient comes between."""
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    with autoattack.Passes().watching(network) as passes:
        torch.autograd.grad(F.cross_entropy(network(x) + network(x), torch.arange(4)), x)
        assert (passes.batches, passes.input_gradients, passes.weight_gradients) == ([4, 4], 8, 0)
        attacks.predict(network, x[:3])
        network(x[:2]).sum().backward()
        assert (passes.batches, passes.input_gradients, passes.weight_gradients) == ([4, 4, 3, 2], 10, 2)
    network(x).sum().backward()
    assert len(passes.batches) == 4 and passes.input_gradients == 10 and passes.weight_gradients == 2, "nothing is watched any more"


def test_verdicts_that_differ_are_counted_though_the_accuracy_is_the_same():
    verdicts = {"aa": np.array([True, False, True]), "cw": np.array([True, True, True])}
    evaluation = {"processor_seconds": 1.0, "metrics": {"aa": {"value": 66.7}, "cw": {"value": 100.0}}}
    other = verdicts | {"aa": np.array([True, True, False])}
    assert autoattack.compared(evaluation, verdicts, other)["columns"] == {"aa": {"accuracy": 66.7, "differ": 2}, "cw": {"accuracy": 100.0, "differ": 0}}


def test_the_costs_follow_autoattack_s_order_on_what_stands(network, monkeypatch):
    """After the first attack half of the images stand, and FAB on the network that is not frozen changes nothing."""
    monkeypatch.setattr(autoattack, "cost", lambda model, x, y, attack, eps, freeze=True: (
        {"attack": attack, "frozen": freeze, "images": len(x)}, torch.arange(len(x)) % 2 == 0))
    x = torch.rand(16, 1, 8, 8)
    rows = list(autoattack.costs(network, x, attacks.predict(network, x), 0.1))
    assert [tuple(row.values()) for row in rows] == [
        ("apgd-ce", True, 16), ("apgd-t", True, 8), ("fab-t", True, 4), ("fab-t", False, 4), ("square", True, 2)]
    y = attacks.predict(network, x)
    y[:6] = (y[:6] + 1) % 10
    assert next(autoattack.costs(network, x, y, 0.1))["images"] == 10, "an image that is wrong anyway is not attacked"
