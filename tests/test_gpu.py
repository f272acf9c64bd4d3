"""What only a GPU can show; skipped where there is none: `python -m pytest tests/test_gpu.py` is the first thing to run on one."""
from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import engine
import test_FGSM_SDI
from engine import capture, evaluate, images, nvjpeg
from tests.test_capture import DECISIONS, FLAGS, GUARDS, NOT_RECORDED, compare, guarded, whole_and_interrupted
from tests.test_card import trained
from tests.test_evaluation_compiled import BATCH, COLUMNS, autoattack, plain_columns
from tests.test_evaluation_compiled import images as digits
from tests.test_resume import BATCHES, stop_and_go_on, terminate

DEVICE = "cuda"
ON = ("--device", DEVICE, "--deterministic")
ALIKE = {"rtol": 1e-7, "atol": 1e-8}  # other kernels add in another order

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.xdist_group("gpu")]


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn on the CPU for either device: their generators are different ones."""
    begin = engine.Run.__init__

    def begun(run: engine.Run, *arguments: object, **named: object) -> None:
        begin(run, *arguments, **named)
        run._generator = torch.Generator()
    monkeypatch.setattr(engine.Run, "__init__", begun)
    monkeypatch.setattr(engine.Run, "_noise", lambda run, x, fill: fill(torch.empty((run._global_batch, *x.shape[1:]))).to(x.device))
    monkeypatch.setattr(engine.Run, "random", lambda run, *size: torch.rand(size, generator=run._generator).to(run.device))


@pytest.fixture
def float32_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step's learning rate is a float32; so is the plain one's here, as their difference would move a sign somewhere."""
    exact = engine.Run._rates_of
    monkeypatch.setattr(engine.Run, "_rates_of", lambda run, step: tuple(torch.tensor(exact(run, step), dtype=torch.float32).tolist()))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile records, and compiles nothing."""
    monkeypatch.setattr(capture, "Compiled", lambda network: network)


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


# ---- training ---------------------------------------------------------------------------------------------------------------------

def test_a_gpu_computes_what_a_cpu_does(train_script, tiny, float64, same_noise):
    runs = [tiny.train(train_script, *DECISIONS.get(train_script, ()), "--device", device) for device in (DEVICE, "cpu")]
    assert result(runs[0])["device"] != result(runs[1])["device"]
    compare(*runs, rtol=1e-6, atol=1e-9)


def test_recorded_and_plain_runs_agree(train_script, tiny, float64, uncompiled, float32_rates):
    """CUDA's own graphs: a short last batch, momentum that moves, and every turn of the method."""
    runs = [tiny.train(train_script, *FLAGS, *DECISIONS.get(train_script, ()), *ON, *more) for more in (("--compile",), ())]
    compare(*runs, **ALIKE)
    assert (result(runs[0])["seconds"]["compilation"] > 0) == (train_script not in NOT_RECORDED)


@pytest.mark.parametrize("script", ["train_fgsm_sdi", "train_pgd_at", "train_awp", "train_nuat", "train_free_at", "train_fgsm_bp"])
def test_compiled_and_plain_runs_agree(script, tiny, float64, float32_rates):
    """Inductor's kernels, recorded where the method can be."""
    torch._dynamo.reset()
    compare(*(tiny.train(script, *FLAGS, *DECISIONS.get(script, ()), *ON, *more) for more in (("--compile",), ())), **ALIKE)


@pytest.mark.parametrize("flags", GUARDS)
def test_recorded_runs_are_guarded_alike(flags, tiny, float64, uncompiled, float32_rates, monkeypatch):
    compare(*guarded((*flags, *ON), tiny, monkeypatch), **ALIKE)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_not_finite_does_not_reach_the_weights(compile, tmp_path, uncompiled):
    """The GPU is not waited for: the run ends at the next reading, and what it saved before is whole."""
    cfg = engine.Config(dataset="digits", train_size=200, val_size=40, batch_size=32, epochs=3, device=DEVICE, compile=compile, out_dir=str(tmp_path), co_guard="off")
    run = engine.Run(cfg)
    scale, seen = torch.ones((), device=DEVICE), []

    @run.captured
    def step(x: Tensor, y: Tensor) -> None:
        run.update(scale * torch.nn.functional.cross_entropy(run.model(x), y))

    with pytest.raises(engine.Failure, match=r"not finite at update 10 \(epoch 2\)"):
        for x, y, _ in run.batches():
            scale.fill_(float("nan") if run.step == 10 else 1.0)
            seen.append([parameter.detach().clone() for parameter in run.network.parameters()])
            step(x, y)
    assert len(seen) == 2 * BATCHES and all(torch.equal(a, b) for a, b in zip(seen[10], run.network.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(seen[9], seen[10]))
    assert torch.load(tmp_path / "state.pth", weights_only=True)["position"]["step"] == BATCHES


def test_a_stopped_run_ends_like_one_that_was_not(train_script, tiny, differences):
    """Bit for bit, with --deterministic, in bf16."""
    stop_and_go_on(tiny, (train_script, *ON), BATCHES + 3, terminate, differences)


def test_a_recorded_run_is_resumed(tiny, float64, uncompiled):
    compare(*whole_and_interrupted(tiny, *ON), **ALIKE)


@pytest.mark.parametrize("compile", [False, True])
def test_no_batch_waits_for_the_gpu(train_script, compile, tiny, monkeypatch, uncompiled):
    """Between an epoch's first batch and its last, once every turn of the method has been recorded; torch itself tells."""
    if train_script in NOT_RECORDED:
        pytest.skip("it looks at what the GPU found")
    plainly, seen = engine.Run._epoch, []

    def watched(run: engine.Run) -> Iterator:
        for batch in plainly(run):
            if run.epoch > 2:
                torch.cuda.set_sync_debug_mode("error")
                seen.append(run.batch)
            yield batch
            if run.batch == len(run._data) - 1:
                torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(engine.Run, "_epoch", watched)
    flags = (*DECISIONS.get(train_script, ()), "--train-size", 192, "--epochs", 5, "--co-guard", "off", "--device", DEVICE)
    try:
        tiny.train(train_script, *flags, *(["--compile"] if compile else []))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == 2 * list(range(6))


def test_bf16_is_what_a_gpu_trains_in(train_script, tiny):
    half, single = (tiny.train(train_script, "--device", DEVICE, *more) for more in ((), ("--precision", "fp32")))
    assert [result(run)["precision"] for run in (half, single)] == ["bf16", "fp32"]
    losses = [json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"] for run in (half, single)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * abs(losses[1])


# ---- evaluation -------------------------------------------------------------------------------------------------------------------

def test_verdicts_are_those_of_a_cpu(float64):
    models = [copy.deepcopy(trained()).double().to(device) for device in (DEVICE, "cpu")]
    found, wanted = map(plain_columns, models)
    assert found.keys() == wanted.keys() == set(COLUMNS)
    assert all(torch.equal(found[column], wanted[column]) for column in COLUMNS)


def test_verdicts_of_the_compiled_search_are_those_of_the_plain_one():
    torch._dynamo.reset()
    model = copy.deepcopy(trained()).float().to(DEVICE)
    search = evaluate.CompiledSearch(model, *digits(BATCH))
    found, wanted = plain_columns(model, search), plain_columns(model)
    assert all((found[column] != wanted[column]).double().mean() <= 0.05 for column in COLUMNS)


def test_autoattack_is_about_that_of_a_cpu(tmp_path):
    """Its noise is the device's own."""
    found, wanted = (autoattack(copy.deepcopy(trained()).float().to(device), tmp_path / f"{device}.pth")["apgd"].double().mean() for device in (DEVICE, "cpu"))
    assert 0 < wanted < 1 and abs(found - wanted) <= 0.1


def test_the_evaluation_chooses_its_batch_size(digits_run, tmp_path):
    test_FGSM_SDI.main(test_FGSM_SDI.parse([
        "--model-path", str(digits_run / "best.pth"), "--device", DEVICE, "--n-ex", "60", "--attacks", "clean,pgd10,cw", "--out-dir", str(tmp_path)]))
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["batch_size"] in (128, 256, 512, 1024) and content["metrics"]["clean"]["value"] > 90


# ---- images -----------------------------------------------------------------------------------------------------------------------

def test_nvjpeg_decodes_what_pil_does(tmp_path):
    nvjpeg.check(torch.device(DEVICE))
    ruler = np.linspace(0, 255, 96)
    smooth = np.stack([*np.broadcast_arrays(ruler[:80, None], ruler[None]), np.full((80, 96), 90.0)], axis=2).astype(np.uint8)
    paths, files = [], []
    for mode in ("RGB", "L"):
        kept = io.BytesIO()
        Image.fromarray(smooth).convert(mode).save(kept, "JPEG", quality=95)
        paths.append(str(tmp_path / f"{mode}.jpg"))
        Path(paths[-1]).write_bytes(kept.getvalue())
        files.append(torch.frombuffer(bytearray(kept.getvalue()), dtype=torch.uint8))
    for found, path in zip(nvjpeg._decoded(files, torch.device(DEVICE), paths), paths):
        wanted = torch.from_numpy(np.asarray(images.rgb(path)).copy()).permute(2, 0, 1)
        assert found.shape == wanted.shape and (found.cpu().float() - wanted.float()).abs().mean() < 2
