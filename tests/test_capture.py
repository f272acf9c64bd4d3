"""A recorded step does in every replay what the plain step would have done: shown on the CPU, by a recorder that is as literal as a CUDA graph.

Like a graph it keeps addresses and plain numbers, whatever they were when it recorded, and refuses what would make a GPU wait.
"""
from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import engine
import models
from attacks import input_gradient
from engine import capture, kept

NOT_RECORDED = {  # no step of one shape: images leave FAT's attack; LAS-AT looks whether any image is left; a singular value decomposition waits
    "train_fat", "train_las_at", "train_nuat",
}
DECISIONS = {  # flags for which a short run takes every turn that a method has
    "train_fgsm_sdi": ("--k", "3"), "train_fgsm_ep": ("--reset", "2"), "train_fgsm_mep": ("--reset", "2"), "train_awp": ("--warmup", "2"),
    "train_liet": ("--refresh", "3"), "train_fgsm_rs_cs": ("--stride", "1"), "train_free_at": ("--replays", "2"), "train_gairat": ("--begin", "0.5"),
}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh"}


class Recorder:
    """What `engine.capture.Graph` is, on the CPU."""

    def __init__(self, device: torch.device, generators: list[torch.Generator]) -> None:
        self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        written = Operations()
        with written:
            work()
        with torch._C._AutoDispatchBelowAutograd():  # where the operations were seen
            for undo in reversed(written.undo):  # a graph records without doing
                undo()

        def replay() -> None:
            self.replays += 1
            with torch._C._AutoDispatchBelowAutograd():
                for function, arguments, keywords, results in written.operations:
                    for old, new in zip(results, tree_flatten(function(*arguments, **keywords))[0]):
                        if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                            old.copy_(new)
        return replay


class Operations(TorchDispatchMode):
    """Every operation with its arguments and results, and how to undo what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.undo: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        assert function._schema.name not in WAITS, f"{function} makes a GPU wait, or freezes a number"
        flat = tree_flatten((arguments, keywords))[0]
        if function._schema.name.startswith("aten::index"):
            assert not any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in flat[1:]), "a mask as an index makes a GPU wait"
        silent = "batch_norm" in function._schema.name  # moves its averages, and its schema does not say so
        if silent or function._schema.is_mutable or any("Generator" in str(argument.type) for argument in function._schema.arguments):
            for argument in flat:
                if isinstance(argument, torch.Tensor):
                    self.undo.append(lambda argument=argument, before=argument.clone(): argument.copy_(before))
                elif isinstance(argument, torch.Generator):
                    self.undo.append(lambda argument=argument, before=argument.get_state(): argument.set_state(before))
        results = function(*arguments, **keywords)
        self.operations.append((function, arguments, keywords, [r for r in tree_flatten(results)[0]]))
        return results


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """--compile records on the CPU, and compiles nothing."""
    made: list[Recorder] = []

    def recorder(*arguments):
        made.append(Recorder(*arguments))
        return made[-1]
    monkeypatch.setattr(capture, "possible", lambda device: True)
    monkeypatch.setattr(capture, "Graph", recorder)
    monkeypatch.setattr(capture, "Compiled", lambda network: network)
    return made


FLAGS = ("--train-size", "72", "--epochs", "6", "--lr-schedule", "cyclic", "--lr", "0.05", "--ema", "0.9")
TIMES = dict.fromkeys(("seconds", "images_per_second"))


def compare(recorded: Path, plain: Path, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Everything that two runs keep, and their logs."""
    found, wanted = (tree_flatten(torch.load(run / "state.pth", weights_only=True, map_location="cpu")["kept"])[0] for run in (recorded, plain))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)
    for a, b in zip(*([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (recorded, plain))):
        assert a | TIMES | {"loss": 0} == b | TIMES | {"loss": 0}
        assert a["loss"] == pytest.approx(b["loss"], rel=rtol)


def test_recorded_and_plain_runs_agree(train_script, tiny, float64, recorders):
    """With a short last batch, momentum that moves, and every turn of the method."""
    flags = (*FLAGS, *DECISIONS.get(train_script, ()), "--measure", "pgd10", *(["--epochs", "2"] if train_script in NOT_RECORDED else []))
    compare(tiny.train(train_script, *flags, "--compile"), tiny.train(train_script, *flags))
    assert (recorders[0].replays > 8) == (train_script not in NOT_RECORDED)


GUARDS = [("--on-nonfinite", "skip"), ("--co-guard", "rollback")]


@pytest.mark.parametrize("flags", GUARDS)
def test_recorded_runs_are_guarded_alike(flags, tiny, float64, recorders, monkeypatch):
    """A loss that is not finite is left out, and a run is put back, as in the plain form."""
    compare(*guarded(flags, tiny, monkeypatch))


def guarded(flags: tuple[str, ...], tiny, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A recorded run and a plain one in which that happens."""
    if "skip" in flags:
        monkeypatch.setattr("torch.nn.functional.cross_entropy", sometimes_infinite(torch.nn.functional.cross_entropy))
    runs = []
    for more in (("--compile",), ()):
        alarms = iter([False] * 4 + [True] + [False] * 9)
        monkeypatch.setattr("engine.guard.overfitted", lambda readings: [next(alarms)])
        runs.append(tiny.train("train_fgsm_rs", *FLAGS, *flags, *more))
    result = json.loads((runs[0] / "result.json").read_text())
    assert result["skipped_updates"] > 1 if "skip" in flags else result["rollbacks"] == 1
    return runs


def sometimes_infinite(cross_entropy: Callable) -> Callable:
    """A loss that is infinite for some batches, as a function of what is in them."""
    def loss(logits: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
        found = cross_entropy(logits, target, **options)
        return found / (target.double().mul(torch.arange(10, device=target.device)).sum() % 9 > 0) if target.ndim == 2 else found
    return loss


def test_a_recorded_run_is_resumed(tiny, recorders, differences):
    runs = whole_and_interrupted(tiny)
    states = [torch.load(run / "state.pth", weights_only=True) for run in runs]
    compare(*runs)
    assert differences(*(state["position"] for state in states)) == []


def whole_and_interrupted(tiny, *more: str) -> list[Path]:
    """A recorded run, and the same in pieces."""
    flags = ("train_fgsm_sdi", *FLAGS, "--compile", "--k", "3", *more)
    whole = tiny.train(*flags)
    out_dir = tiny.directory / "interrupted"
    tiny.train(*flags, "--time-limit", "0", out_dir=out_dir)
    for _ in range(30):
        if not (out_dir / "result.json").is_file():
            tiny.train(*flags, "--time-limit", "0.02", out_dir=out_dir)
    return [whole, out_dir]


def test_nothing_waits_between_two_recorded_steps(tmp_path, recorders):
    """Batches, augmentation and noise are made without the host's knowing a number of the device; the guard's looks, every 20 batches, do wait."""
    cfg = engine.Config(dataset="digits", train_size=64, val_size=40, batch_size=8, epochs=1, device="cpu", compile=True, out_dir=str(tmp_path), co_guard="off")
    run = engine.Run(cfg)
    run._guard.rollbacks = 1  # its noise too
    step = run.captured(plain(run))
    batches = run.batches()
    step(*next(batches)[:2])
    for _ in range(6):
        with Operations() as seen:
            x, y, _ = next(batches)
        assert len(seen.operations) > 10
        step(x, y)


# ---- what is refused, or would be noticed -----------------------------------------------------------------------------------------


def training(tmp_path: Path, make_step: Callable, call: Callable = lambda step, run, x, y: step(x, y), compile: bool = True) -> torch.Tensor:
    """The weights after a short run of a step of one's own."""
    cfg = engine.Config(dataset="digits", train_size=64, val_size=40, batch_size=16, epochs=3, device="cpu", lr=0.05, compile=compile,
                        out_dir=str(tmp_path / f"{make_step.__name__}{compile}"), co_guard="off")
    run = engine.Run(cfg)
    step = run.captured(make_step(run))
    for x, y, _ in run.batches():
        call(step, run, x, y)
    return torch.cat([p.detach().flatten() for p in run.network.parameters()])


def plain(run):
    def step(x, y):
        run.update(torch.nn.functional.cross_entropy(run.model(x), y))
    return step


def with_a_number(run):
    def step(x, y, weight):
        run.update(weight * torch.nn.functional.cross_entropy(run.model(x), y))
    return step


def from_outside(run):
    return lambda x, y: run.update(run_number[0] * torch.nn.functional.cross_entropy(run.model(x), y))


run_number = [0.0]


def frozen(step, run, x, y):
    run_number[0] = run.progress
    step(x, y)


def test_a_float_is_read_anew_and_a_forgotten_number_would_be_noticed(tmp_path, recorders):
    def given(step, run, x, y):
        step(x, y, run.progress)
    right = [training(tmp_path, with_a_number, given, compile) for compile in (True, False)]
    torch.testing.assert_close(*right)
    wrong = [training(tmp_path, from_outside, frozen, compile) for compile in (True, False)]
    torch.testing.assert_close(right[1], wrong[1])
    assert (wrong[0] - wrong[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["batch", "step", "epoch", "progress", "lr"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_reads_where_the_run_is(name, compile, tmp_path, recorders):
    """Refused in the plain form too, so that a script cannot work without --compile only."""
    def reading(run):
        return lambda x, y: getattr(run, name)
    with pytest.raises(engine.Failure, match="as an argument"):
        training(tmp_path, reading, compile=compile)


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_returns_something(compile, tmp_path, recorders):
    with pytest.raises(engine.Failure, match="returns something"):
        training(tmp_path, lambda run: lambda x, y: x.mean(), compile=compile)


def test_a_step_that_is_given_another_tensor(tmp_path, recorders):
    with pytest.raises(engine.Failure, match="not the batch's"):
        training(tmp_path, plain, lambda step, run, x, y: step(x.clone(), y))


def test_a_step_that_moves_what_is_kept(tmp_path, recorders):
    def moving(run):
        def step(x, y):
            plain(run)(x, y)
            run.network.conv1.weight.data = run.network.conv1.weight.data.clone()
        return step
    with pytest.raises(engine.Failure, match="in place"):
        training(tmp_path, moving)


@pytest.mark.parametrize("wait", [lambda x: x.mean().item(), lambda x: x[x > 0.5], lambda x: x.nonzero(), lambda x: torch.tensor(0.5) * x])
def test_the_recorder_refuses_what_makes_a_gpu_wait(wait):
    with pytest.raises(AssertionError, match="wait"):
        Recorder(torch.device("cpu"), []).record(lambda: wait(torch.rand(4)))


# ---- the compiled network ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def backward_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.Graph]:
    """What --compile compiles, run without inductor's kernels; and the backward passes among it."""
    found: list[torch.fx.Graph] = []

    def seen(module: torch.fx.GraphModule, inputs: object) -> Callable:
        found.append(module.graph)
        return make_boxed_func(module)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda module, inputs: make_boxed_func(module), bw_compiler=seen)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


def asked_for(graph: torch.fx.Graph) -> set[tuple[bool, bool]]:
    """Of which of (input, weight) its convolutions compute the gradient."""
    return {tuple(node.args[10][:2]) for node in graph.nodes if node.target is torch.ops.aten.convolution_backward.default}


def test_a_compiled_attack_computes_no_gradient_of_a_weight(backward_graphs):
    network = models.build("resnet18", classes=10, channels=3, width=4).to(memory_format=torch.channels_last)
    compiled, x, y = capture.Compiled(network), torch.rand(4, 3, 32, 32), torch.arange(4)
    for mode in (True, False):  # two compilations, not four: the second batch needs none
        for _ in range(2):
            input_gradient(compiled.train(mode), x, y)
    assert [asked_for(graph) for graph in backward_graphs] == [{(True, False)}] * 2
    torch.nn.functional.cross_entropy(compiled(x.clone().requires_grad_()), y).backward()  # as where a pass also trains
    assert all(parameter.grad is not None for parameter in network.parameters())
    careless, = torch.autograd.grad(torch.nn.functional.cross_entropy(compiled(x.requires_grad_()), y), x)
    assert asked_for(backward_graphs[-1]) == {(True, True)}, "parameters that are not frozen: their gradients are computed, and thrown away"
    torch.testing.assert_close(careless, input_gradient(network, x, y))


@pytest.mark.parametrize("script", ["train_fgsm_sdi", "train_awp", "train_nuat", pytest.param("train_las_at", marks=pytest.mark.slow)])
def test_compiled_and_plain_runs_agree(script, tiny, float64, backward_graphs):
    flags = ("--train-size", "72", "--epochs", "2", "--lr", "0.05", *DECISIONS.get(script, ()))
    runs = [tiny.train(script, *flags, *more) for more in (("--compile",), ())]
    compare(*runs)
    assert len(backward_graphs) >= 2
    seconds = [json.loads((run / "result.json").read_text())["seconds"]["compilation"] for run in runs]
    assert seconds[1] == 0 and (seconds[0] > 0 or script in NOT_RECORDED)


@pytest.mark.slow
def test_compiled_kernels_and_plain_ones_agree(tiny, float64):
    """Inductor's own, as users have them."""
    torch._dynamo.reset()
    flags = ("--train-size", "72", "--epochs", "2", "--lr", "0.05")
    compare(*[tiny.train("train_fgsm_rs", *flags, *more) for more in (("--compile",), ())])
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_pass_that_another_script_left_on_the_disk(tiny, tmp_path, monkeypatch):
    """Free-AT goes through its backward pass once, FGSM-BP through the same one twice."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for script, *flags in (["train_free_at", "--replays", "2"], ["train_fgsm_bp"]):
        torch._dynamo.reset()
        tiny.train(script, *flags, "--epochs", "1", "--compile", "--co-guard", "off", "--measure", "pgd10")
    torch._dynamo.reset()


def test_a_run_goes_on_recorded_where_it_began_plainly():
    """Several processes record nothing, and one that goes on for them does: how Adam steps is that machine's affair, not the file's."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, recorded = (torch.optim.Adam([weight], lr=rate) for weight, rate in zip(weights, (0.1, 0.2)))
    weights[0].grad = torch.ones(3)
    plain.step()
    capture.make_recordable(recorded)
    kept.restore(recorded, kept.state_of(plain), "optimizer")
    group, = recorded.param_groups
    assert (group["capturable"], group["fused"], group["foreach"], group["lr"]) == (True, True, False, 0.1)
    assert recorded.state[weights[1]]["step"] == 1 and torch.equal(recorded.state[weights[1]]["exp_avg"], plain.state[weights[0]]["exp_avg"])
    kept.restore(plain, kept.state_of(recorded), "optimizer")
    assert not plain.param_groups[0]["capturable"]


def test_compilation_is_not_training_time(recorders, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = engine.Run(engine.Config(dataset="digits", train_size=64, val_size=20, batch_size=16, epochs=2, device="cpu", compile=True, measure="pgd10", co_guard="off",
                                   out_dir=str(tmp_path)))

    @run.captured
    def step(x, y):
        now[0] += 100  # where Python runs it: two batches of warming up, and one of recording
        run.update(torch.nn.functional.cross_entropy(run.model(x), y))

    for x, y, _ in run.batches():
        now[0] += 1
        step(x, y)
    seconds = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert (seconds["training"], seconds["compilation"]) == (2 * 4, 300)
