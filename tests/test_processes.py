"""Several processes against one: every method ends where one process does, and a killed run goes on with any number of them."""
from __future__ import annotations

import copy
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine
import models
from engine import distributed, record
from engine.batchnorm import GlobalBatchNorm2d, make_global
from experiments import processes

DRIVER = '''
"""What each process of a test does: trains all methods, or one that is killed, or goes on with one."""
import contextlib, os, signal, sys
from pathlib import Path
import torch
import engine, models, train_fgsm_ga, train_las_at
from engine import distributed
from experiments import processes
from models.normalize import Normalize
from models.resnet import ResNet

what, directory, *labels = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
# Three BatchNorms, because most of the time goes into waiting for their sums.
models.build = lambda name, *, classes, channels, **_: ResNet(
    normalize=Normalize((0.0,), (1.0,)), classes=classes, channels=channels, width=4, blocks=(1, 0, 0, 0))
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
distributed.start(torch.device("cpu"))


class wrong:
    """Inside, attributes are something else."""

    def __init__(self, *attributes):
        self.attributes = attributes

    def __enter__(self):
        self.before = [(holder, name, vars(holder)[name]) for holder, name, _ in self.attributes]
        for attribute in self.attributes:
            setattr(*attribute)

    def __exit__(self, *_):
        for attribute in self.before:
            setattr(*attribute)


def alone(run, part):
    return part


def align_some(out_dir):
    """GradAlign where some images have no gradient, so that the mean is not over all."""
    cosine = train_fgsm_ga.cosine
    with wrong((train_fgsm_ga, "cosine", lambda a, b: cosine(a, b).masked_fill(a.flatten(1).sum(1) > 0, torch.nan))):
        processes.train("fgsm_ga", out_dir)


def reward_fully(out_dir):
    """LAS-AT whose strategy network's gradient is as long as the reward is high: scaled down to 1, it hardly depends on it."""
    update = engine.Run.update
    with wrong((engine.Run, "update", lambda run, *arguments, max_norm=None, **named: update(run, *arguments, **named))):
        processes.train("las_at --reward cross-entropy", out_dir, strategy_lr=0.01)


def train_wrongly(directory):
    own = property(lambda run: torch.arange(len(run._labels)))
    with wrong((engine.Run, "gathered", alone), (engine.Run, "positions", own)):
        align_some(directory / "alone fgsm_ga of some")
        for label in ("nuat", "gradsum", "fgsm_rs_cs", "fgsm_uap", "gairat", "fgsm_mep"):
            processes.train(label, directory / f"alone {label}")
    gathered = engine.Run.gathered
    with wrong((engine.Run, "gathered", lambda run, part: gathered(run, part / (run.share or 1)))):
        for label in ("gradsum", "fgsm_uap", "fgsm_mep"):
            processes.train(label, directory / f"unweighted {label}")
    descended = train_las_at.descended
    with wrong((train_las_at, "descended", lambda *arguments: descended(*arguments[:-1]))):
        reward_fully(directory / "alone las_at unclipped")
    with wrong((distributed._Sum, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))):
        processes.train("standard", directory / "underived standard")
    with wrong((distributed._Sum, "backward", staticmethod(lambda ctx, gradient: (distributed._Sum.apply(gradient, ctx.share), None)))):
        processes.train("standard", directory / "unweighted standard")
    processes.train("standard", directory / "process standard", batchnorm="process")


def stopped_before(step, how):
    update = engine.Run.update

    def stopping(run, *arguments, **named):
        if run._position.step == step:
            how(run)
        update(run, *arguments, **named)

    return wrong((engine.Run, "update", stopping))


def killed(run):
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def asked(run):
    run._asked_to_stop = True


def second_asked(run):
    if distributed.rank() == 1:  # a signal, or a clock, may ask one process only
        run._asked_to_stop = True


def stop_and_go_on(directory):
    """PGD-AT whose processes have BatchNorms of their own, stopped and going on, and undisturbed."""
    options = dict(batchnorm="process", attack_bn="eval")
    with stopped_before(2, second_asked), contextlib.suppress(SystemExit):
        processes.train("pgd_at", directory / "stopped", **options)
    position = torch.load(directory / "stopped" / "state.pth", weights_only=True)["position"]["step"]
    assert position < 10 and not (directory / "stopped" / "result.json").exists(), position
    processes.train("pgd_at", directory / "stopped", **options)
    processes.train("pgd_at", directory / "whole", **options)


with distributed.leaving():
    if what == "all":
        processes.train_all(directory / str(distributed.world_size()))
        align_some(directory / str(distributed.world_size()) / "fgsm_ga of some")
        reward_fully(directory / str(distributed.world_size()) / "las_at unclipped")
        processes.train("fgsm_rs", directory / str(distributed.world_size()) / "fgsm_rs averaged", ema=0.9)
        if distributed.world_size() > 1:
            train_wrongly(directory / "wrong")
            stop_and_go_on(directory)
    elif what == "killed":
        with stopped_before(6, killed):
            processes.train(labels[0], directory, save_every=0)
    elif what == "asked":
        with stopped_before(6, asked):
            processes.train(labels[0], directory)
    else:
        for name in labels[1:]:
            processes.train(labels[0], directory / name, resume="must")
'''
pytestmark = pytest.mark.xdist_group("processes")  # with --dist loadgroup one worker does the trainings that they share
REMEMBERING = "fgsm_mep"  # the method with the largest state


def launched(count: int, directory: Path, what: str, *arguments: Any) -> tuple[int, str]:
    """The driver's status and output, by one process (this one) or several."""
    driver = directory / "driver.py"
    driver.write_text(DRIVER)
    words = [str(driver), what, *map(str, arguments)]
    if count > 1:
        return processes.outcome(processes.torchrun(*words, count=count), 400)
    before, status = (torch.get_default_dtype(), torch.get_num_threads()), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", models.build)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(driver))
        except SystemExit as end:
            status = end.code or 0
        finally:
            torch.set_default_dtype(before[0])
            torch.set_num_threads(before[1])
    return status, ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Where one process (1) and two (2) trained every method, and two some methods wrongly (wrong)."""
    directory = tmp_path_factory.mktemp("processes")
    for count in (2, 1):
        status, output = launched(count, directory, "all", directory)
        assert status == 0, output[-4000:]
    return directory


def test_two_processes_end_where_one_does(trained):
    """Every method and base, ten updates; a batch is shared as four and three images, the last of an epoch as one and none."""
    found = {label: processes.compared(trained / "1" / label, trained / "2" / label) for label in [*processes.RUNS, "fgsm_ga of some", "las_at unclipped", "fgsm_rs averaged"]}
    assert {name.split("train_")[1] for name, _ in processes.RUNS.values()} == {path.stem[6:] for path in record.ROOT.glob("train_*.py")}
    assert {label: run["updates"] for label, run in found.items()} == {label: 20 if label == "free_at" else 10 for label in found}
    far = {label: run for label, run in found.items() if max(*run["kept"].values(), run["log"]) > 1e-9}
    assert not far


def test_what_is_computed_by_each_process_alone_is_noticed(trained):
    """A sum over the processes left out, not weighted or not derived, of every quantity that couples the batch."""
    found = {path.name: processes.compared(trained / "1" / path.name.partition(" ")[2], path) for path in (trained / "wrong").iterdir()}
    assert len(found) == 14
    unnoticed = {name: run["kept"] for name, run in found.items() if max(run["kept"].values()) < 1e-6}
    assert not unnoticed


def test_processes_agree_to_stop_and_go_on_exactly(trained, differences):
    """Though one alone was asked; and each process's BatchNorm is that of the file again."""
    states = [torch.load(trained / name / "state.pth", weights_only=True) for name in ("whole", "stopped")]
    assert differences(*(state["kept"] for state in states)) == []
    assert differences(*(state["history"] for state in states)) == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """What a run of two processes left, the second of which was killed after six updates."""
    directory = tmp_path_factory.mktemp("killed")
    status, output = launched(2, directory, "killed", directory / "run", REMEMBERING)
    assert status == 1 and "process 0 of 2 has lost another one" in output and "SIGKILL" in output, output[-4000:]
    cause = output.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "exitcode  : -9" in cause, "torchrun names the process that was killed"
    assert torch.load(directory / "run" / "state.pth", weights_only=True)["position"]["step"] == 6
    return directory / "run"


def test_one_process_goes_on_where_two_were_killed(killed, trained, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    assert launched(1, tmp_path, "resumed", tmp_path, REMEMBERING, "run")[0] == 0
    found = processes.compared(trained / "1" / REMEMBERING, tmp_path / "run")
    assert max(*found["kept"].values(), found["log"]) < 1e-9 and found["updates"] == 10


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped_or_two_were_killed(killed, trained, tmp_path, differences):
    """With as many as before the run ends bit for bit like one that was never killed."""
    shutil.copytree(killed, tmp_path / "two")
    launched(1, tmp_path, "asked", tmp_path / "one", REMEMBERING)
    assert torch.load(tmp_path / "one" / "state.pth", weights_only=True)["position"]["step"] == 7
    status, output = launched(2, tmp_path, "resumed", tmp_path, REMEMBERING, "one", "two")
    assert status == 0, output[-4000:]
    states = [torch.load(path / "state.pth", weights_only=True) for path in (trained / "2" / REMEMBERING, tmp_path / "two")]
    assert differences(*(state["kept"] for state in states)) == []
    assert differences(*(state["history"] for state in states)) == []
    found = processes.compared(trained / "1" / REMEMBERING, tmp_path / "one")
    assert max(*found["kept"].values(), found["log"]) < 1e-9


def test_a_save_that_only_another_process_finds_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "maximum", lambda value, device: 1)
    with pytest.raises(engine.Failure, match="does not find .*state.pth"):
        engine.Run(engine.Config(dataset="digits", device="cpu", out_dir=str(tmp_path)))


# ---- BatchNorm -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "untracked"])
def test_global_batchnorm_alone_is_torchs(mode, affine, differences):
    """Outputs, averages, first and second derivatives; in float64."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3, affine=affine, momentum=0.3).double().train(mode != "eval")
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    ours = copy.deepcopy(theirs)
    make_global(nn.Sequential(ours))
    assert type(ours) is GlobalBatchNorm2d and list(ours.state_dict()) == list(theirs.state_dict())
    x, weight = torch.randn(5, 3, 4, 4, dtype=torch.double) * 3 + 2, torch.randn(5, 3, 4, 4, dtype=torch.double)

    def found(layer: nn.Module) -> list[Tensor]:
        layer.track_running_stats = mode != "untracked"
        here = x.clone().requires_grad_()
        out = layer(here)
        gradient, = torch.autograd.grad((out.tanh() * weight).sum(), here, create_graph=True)
        return [out, gradient, *torch.autograd.grad(gradient.square().sum(), [here, *layer.parameters()]), *layer.buffers()]

    for a, b in zip(found(ours), found(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    assert mode == "train" or differences(ours.state_dict(), theirs.state_dict()) == []


def test_global_batchnorm_of_half_precision_is_computed_in_full():
    """Values whose squares bf16 cannot tell apart; only the output is rounded."""
    ours = GlobalBatchNorm2d(1)
    x = (100 + torch.arange(32.0).reshape(8, 1, 2, 2) / 2).bfloat16()
    out = ours(x)
    assert out.dtype == torch.bfloat16 and ours.running_mean.dtype == torch.float32
    assert torch.equal(out, nn.BatchNorm2d(1)(x.float()).bfloat16())


def test_one_process_has_torchs_batchnorm(tmp_path):
    run = engine.Run(engine.Config(dataset="digits", device="cpu", out_dir=str(tmp_path), batchnorm="global"))
    assert {type(layer) for layer in run.network.modules() if isinstance(layer, nn.BatchNorm2d)} == {nn.BatchNorm2d}
