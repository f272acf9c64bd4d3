"""No tensor is made anywhere but beside the images: shown without a GPU, by a default device on which nothing has a value."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attacks
import engine
from tests.test_capture import DECISIONS
from tests.test_card import trained

ELSEWHERE = "meta"


@pytest.fixture
def default_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a script has a batch: what it or the engine then makes without saying where cannot be used together with the batch."""
    plainly, adam = engine.Run._epoch, torch.optim.Adam._init_group

    def watched(run: engine.Run) -> Iterator:
        for batch in plainly(run):
            with torch.device(ELSEWHERE):
                yield batch
    monkeypatch.setattr(engine.Run, "_epoch", watched)

    def counted(*arguments: object) -> object:  # torch 2.6 makes Adam's count of steps on the default device
        with torch.device("cpu"):
            return adam(*arguments)
    monkeypatch.setattr(torch.optim.Adam, "_init_group", counted)


def test_a_batch_stays_on_its_device(train_script, tiny, default_elsewhere):
    tiny.train(train_script, *DECISIONS.get(train_script, ()), "--train-size", "72", "--ema", "0.9", "--on-nonfinite", "skip")


@pytest.mark.parametrize("make", [lambda x: torch.zeros(x.shape), lambda x: torch.arange(8.0), lambda x: torch.rand(1, 1, 8, 8)])
def test_a_tensor_made_elsewhere_is_noticed(make, tmp_path, default_elsewhere):
    cfg = engine.Config(dataset="digits", train_size=64, val_size=40, batch_size=32, epochs=1, device="cpu", out_dir=str(tmp_path))
    run = engine.Run(cfg)
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        for x, y, _ in run.batches():
            run.update(F.cross_entropy(run.model(x + make(x)), y))


@pytest.mark.parametrize("attack", [
    lambda model, x, y: attacks.fgsm(model, x, y, eps=0.1),
    lambda model, x, y: attacks.pgd(model, x, y, eps=0.1, alpha=0.025, steps=3),
    lambda model, x, y: attacks.pgd(model, x, y, eps=0.1, alpha=0.025, steps=3, start=0.1 * x, loss=attacks.margin),
])
def test_an_attack_stays_on_the_images_device(attack):
    model, x = trained(), torch.rand(20, 1, 8, 8)
    y = attacks.predict(model, x)
    with torch.device(ELSEWHERE):
        delta: Tensor = attack(model, x, y)
    assert delta.device == x.device and 0 < delta.abs().max() <= 0.1
