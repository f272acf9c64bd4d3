"""Evaluation with the compiled network: the same verdicts, few graphs, no gradient of a weight, and no success that the plain one denies."""
from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from functorch.compile import make_boxed_func
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
from engine import checkpoint, data, evaluate
from engine.errors import Failure, Misuse
from tests.test_card import trained
from tests.test_sharded import shortly

EPS, N, BATCH = 38 / 255, 40, 32  # batches of 32 and 8
SETTINGS = dict(eps=EPS, seed=0, batch_size=BATCH)
COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "cw")


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Module:
    return copy.deepcopy(trained()).eval()


@functools.cache
def images(n: int = N) -> tuple[Tensor, Tensor]:
    dataset = data.load("digits", ".")
    return torch.from_numpy(dataset.x_test[:n]), torch.from_numpy(dataset.y_test[:n])


def compiled(model: nn.Module, backend: str | Callable = "aot_eager") -> evaluate.CompiledSearch:
    return evaluate.CompiledSearch(model, *images(BATCH), backend=backend)


def plain_columns(model: nn.Module, search: nn.Module | None = None) -> dict[str, Tensor]:
    return evaluate.verdicts(model, *images(), columns=COLUMNS, alpha=EPS / 4, search=search, **SETTINGS)


def autoattack(model: nn.Module, path: Path, search: nn.Module | None = None, columns: tuple[str, ...] = ("apgd",)) -> dict[str, Tensor]:
    with shortly():
        found = evaluate.auto_attack(model, *images(), columns=columns, path=path, log=lambda line: None, search=search, **SETTINGS)
    return found | {"x_adv": torch.load(path, weights_only=True)["x_adv"]}


def test_the_verdicts_are_the_plain_network_s_in_eight_graphs(model, tmp_path):
    """PGD's survivors become ever fewer, and FAB and Square ask without a gradient."""
    sizes: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        sizes.extend(len(value) for value in inputs if isinstance(value, Tensor) and value.shape[1:] == (1, 8, 8))
        return lookup_backend("aot_eager")(graph, inputs)

    before = plain_columns(model) | autoattack(model, tmp_path / "plain.pth", None, ("apgd", "aa"))
    search = compiled(model, counting)
    after = plain_columns(model, search) | autoattack(model, tmp_path / "compiled.pth", search, ("apgd", "aa"))
    assert 4 < len(sizes) <= 8 and set(sizes) <= {8, 16, 24, 32}, "with a gradient and without, of four sizes"
    assert before["clean"].sum() > before["apgd"].sum() >= before["aa"].sum() > 0, "attacks that find something"
    disagreement = {column: (before[column] != after[column]).sum().item() for column in (*COLUMNS, "apgd", "aa")}
    assert max(disagreement.values()) <= 1, "but for rounding, the same"
    assert (before["x_adv"] - after["x_adv"]).abs().flatten(1).amax(1).gt(1e-5).sum() <= 5


@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_attack_computes_no_gradient_of_a_weight(frozen, model):
    """In the traced backward pass; of a network that is not frozen it has them."""
    masks: list[list[bool]] = []

    def recorded(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        masks.extend(node.args[-1] for node in graph.graph.nodes if node.target == torch.ops.aten.convolution_backward.default)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=recorded)
    search = compiled(model, backend) if frozen else torch.compile(model, backend=backend)
    x, y = images(BATCH)
    points = data.to_images(x).requires_grad_()
    torch.autograd.grad(nn.functional.cross_entropy(search(points), y), points)
    assert len(masks) >= sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) and all(mask[0] for mask in masks)
    assert any(mask[1] for mask in masks) != frozen


class Weights(TorchDispatchMode):
    """Counts the convolutions whose weights' gradient was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function is torch.ops.aten.convolution_backward.default and arguments[-1][1]
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("attack", attacks.AUTOATTACK)
def test_autoattack_computes_no_gradient_of_a_weight(attack, model, monkeypatch):
    """FAB calls backward(), which would leave one in every weight's .grad."""
    x, y = images(8)

    def counted() -> int:
        with shortly(), Weights() as weights:
            attacks.auto_attack(model, data.to_images(x), y, attack=attack, eps=EPS, seed=0, batch_size=8)
        return weights.count

    assert counted() == 0 and all(p.grad is None and p.requires_grad for p in model.parameters())
    monkeypatch.setattr(attacks, "frozen", lambda module: torch.enable_grad())
    assert (counted() > 0) == (attack == "fab-t")


class Mistaken(nn.Module):
    """A network that takes every image for one of another class than `model` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).roll(1, 1)


def test_what_fools_only_the_searching_network_does_not_count(model, tmp_path):
    found = plain_columns(model, Mistaken(model)) | autoattack(model, tmp_path / "a.pth", Mistaken(model))
    assert found["pgd20"].float().mean() > 0.7, "the search ends at once, at a random start"
    assert torch.equal(found["apgd"], found["clean"]) and torch.equal(found["x_adv"], data.to_images(images()[0]))
    assert autoattack(model, tmp_path / "b.pth")["apgd"].sum() < found["apgd"].sum()


@pytest.mark.parametrize("wrong, said", [
    (lambda graph, inputs: lambda *values: [1.01 * value for value in graph(*values)], "logits"),
    (lambda graph, inputs: lambda *values: [torch.nan * value for value in graph(*values)], "logits"),
    (lambda graph, inputs: lambda *values: [value.detach() * 1 + 1.01 * (value - value.detach()) for value in graph(*values)], "gradients"),
], ids=["logits", "nan", "gradients"])
def test_a_wrong_compiler_is_noticed(wrong, said, model):
    with pytest.raises(Failure, match=f"the compiled network's {said} differ .* leave out --compile"):
        compiled(model, wrong)


def test_a_network_that_cannot_be_compiled_is_said(model):
    def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        raise RuntimeError("no compiler")

    with pytest.raises(Failure, match="cannot be compiled here .*no compiler.*: leave out --compile"):
        compiled(model, failing)


def test_the_script_searches_with_the_compiled_network(digits_run, tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "CompiledSearch", functools.partial(evaluate.CompiledSearch, backend="aot_eager"))
    contents = []
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        result = tiny.command("test_FGSM_SDI", "--model-path", digits_run / "best.pth", "--out-dir", tiny.directory / name, "--n-ex", 50,
                              "--card-n", 0, "--attacks", "clean,pgd10", "--device", "cpu", *flags)
        assert result.status == 0, result.err
        contents.append(json.loads((tiny.directory / name / "evaluation.json").read_text()))
    assert [content["compiled"] for content in contents] == [False, True]
    assert "compilation" in contents[1]["seconds"] and contents[0]["batch_size"] == 500
    verdicts = [np.load(tiny.directory / name / "verdicts.npz") for name in ("plain", "compiled")]
    assert all(np.array_equal(verdicts[0][column], verdicts[1][column]) for column in ("clean", "pgd10"))


# ---- the batch size --------------------------------------------------------------------------------------------------

def test_the_batch_size_is_that_of_the_evaluation_to_continue(model, tmp_path):
    def chosen(**other: float) -> int:
        return evaluate.batch_size_for(model, *images(), path=path, **{"eps": SETTINGS["eps"], "seed": SETTINGS["seed"]} | other)

    path = tmp_path / "autoattack.pth"
    assert chosen() == 500
    autoattack(model, path)
    assert chosen() == BATCH
    for other in ({"eps": EPS / 2}, {"seed": 1}):
        with pytest.raises(Misuse, match="of the same network with"):
            chosen(**other)
    with pytest.raises(Misuse, match=f"of the same network with batch_size {BATCH}, where this one has 7,"):
        chosen(asked=7)
    assert chosen(asked=BATCH) == BATCH and evaluate.batch_size_for(model, *images(), path=None, eps=EPS / 2, seed=1, asked=7) == 7
    checkpoint.save({"identity": "of before there was an entry"}, path)
    assert chosen() == 500
    path.write_bytes(b"nonsense")
    assert chosen() == 500
    path.unlink()
    autoattack(model, path)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert chosen() == 500, "another network's"


@pytest.mark.parametrize("most, expected", [(0.3, 1), (1, 1), (63.9, 32), (64, 64), (700.5, 512), (1e9, evaluate.LARGEST_BATCH)])
def test_the_batch_size_of_a_gpu_is_a_power_of_two(most, expected):
    assert evaluate.power_of_two(most) == expected
