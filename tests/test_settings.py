"""The published settings, written down once more: what a script does without a flag is what its paper or its code did."""
from __future__ import annotations

import importlib

import pytest
import torch

import engine
import train_fgsm_bp
import train_fgsm_ep
import train_fgsm_ga
import train_fgsm_mep
import train_free_at
import train_gat
import train_las_at
import train_lbgat
import train_n_fgsm
import train_nuat
import train_vfsat

SCHEDULE = dict(arch="resnet18", epochs=110, batch_size=128, lr=0.1, lr_schedule="multistep", weight_decay=5e-4, epsilon=8, label_factor=1,
                augment="crop", padding="zero", normalise="none", ema=0, max_grad_norm=None, cycle_momentum=True, cyclic_top=0.5, select_on="val", val_size=1000)
PUBLISHED = {  # on CIFAR-10 at 8/255
    "train_standard": {},
    "train_fgsm_rs": dict(alpha=10, init="uniform"),
    "train_fgsm_sdi": dict(alpha=8, label_factor=0.5, k=20, generator_lr=1e-3, generator_input="both", generator_layout="code", clip_image=False),
    "train_fgsm_ga": dict(alpha=10, ga_lambda=0.2),
    "train_fgsm_ckpt": dict(alpha=10, c=3, correct_at="noisy"),
    "train_fgsm_bp": dict(alpha=8, label_factor=0.6, pgi_lambda=10, reduction="mean", init="corner"),
    "train_fgsm_ep": dict(alpha=8, label_factor=0.6, pgi_lambda=10, reduction="mean", init="corner", align=False, reset=40),
    "train_fgsm_mep": dict(alpha=8, label_factor=0.6, pgi_lambda=10, reduction="mean", init="corner", align=False, mu=0.3, accumulate="normalised", reset=40),
    "train_vfsat": dict(radii="2.0,4.0,6.0,8.0,8.0,8.0,8.0,8.0", max_grad_norm=20),
    "train_gradsum": dict(alpha=8, gradsum_lambda=10, max_grad_norm=20),
    "train_n_fgsm": dict(alpha=8, k=2),
    "train_nuat": dict(alpha=8, nuclear=4.5),
    "train_gat": dict(alpha=8, guidance=10, late_factor=4),
    "train_liet": dict(alpha=8, label_factor=0.4, liet_lambda=100, refresh=20, least_noise=0.1, most_noise=0.5),
    "train_fgsm_uap": dict(alpha=8, label_factor=0.64, uap_epsilon=10, mu=0.3, uap_lambda=10, momentum_of="both"),
    "train_fgsm_rs_cs": dict(alpha=8, label_factor=0.4, attack_factor=0.64, gamma=0.03, cs_weight=1, stride=1),
    "train_free_at": dict(replays=8, divide_epochs=False),
    "train_pgd_at": dict(alpha=2, steps=10, init="uniform", attack_bn="train"),
    "train_trades": dict(alpha=2, steps=10, beta=6),
    "train_mart": dict(alpha=2, steps=10, beta=5),
    "train_awp": dict(alpha=2, steps=10, beta=6, base="pgd", gamma=0.01, warmup=0, attack_bn="train"),
    "train_fat": dict(alpha=2, steps=10, tau=None, omega=0.001),
    "train_gairat": dict(alpha=2, steps=10, gair_lambda=-1, weights="tanh", begin=0.5),
    "train_lbgat": dict(alpha=2, steps=10, beta=0, teacher="resnet18", teacher_width=None),
    "train_las_at": dict(base="pgd", label_factor=0.7, radii="3-15", steps="3-14", step_sizes="1-5", betas="5-9", interval=20, reward="accuracy", robust=4,
                         clean=2, strategy_lr=1e-4, momentum=0, strategy_width=64, gamma=0.01),
}


def test_a_script_without_flags_is_the_published_one(train_script):
    module = importlib.import_module(train_script)
    cfg = module.Config(dataset="cifar10")
    expected = SCHEDULE | PUBLISHED[train_script]
    assert {name: getattr(cfg, name) for name in expected} == expected
    own = module.Config.__dataclass_fields__.keys() - engine.Config.__dataclass_fields__.keys()
    assert own <= PUBLISHED[train_script].keys() - SCHEDULE.keys() or train_script == "train_las_at", "every flag of its own is in the list"
    assert (cfg.CYCLIC_LR == 0.3) == (train_script in ("train_fgsm_ga", "train_fgsm_ckpt"))


@pytest.mark.parametrize("base, dataset, label_factor, interval, robust, clean, momentum", [
    ("pgd", "cifar10", 0.7, 20, 4, 2, 0), ("pgd", "cifar100", 0.6, 20, 4, 2, 0.9), ("pgd", "tiny-imagenet", 0.8, 1, 4, 2, 0),
    ("trades", "cifar10", 1, 1, 8, 4, 0.9), ("trades", "cifar100", 1, 1, 8, 2, 0.9), ("trades", "tiny-imagenet", 1, 1, 8, 2, 0),
    ("awp", "cifar10", 0.7, 1, 1, 1, 0), ("awp", "cifar100", 0.7, 10, 4, 2, 0.9), ("awp", "tiny-imagenet", 0.7, 10, 8, 2, 0),
])
def test_las_ats_nine_scripts(base, dataset, label_factor, interval, robust, clean, momentum):
    cfg = train_las_at.Config(base=base, dataset=dataset)
    assert (cfg.label_factor, cfg.interval, cfg.robust, cfg.clean, cfg.momentum) == (label_factor, interval, robust, clean, momentum)


def test_vfsats_radii_at_16():
    assert train_vfsat.Config(epsilon=16).radii == "2,4,6,8,10,12,14,16,16,16,16,16"


def test_imagenets_and_svhns_recipes():
    imagenet, svhn = (train_free_at.Config(dataset=name) for name in ("imagenet", "svhn"))
    assert (imagenet.arch, imagenet.epochs, imagenet.batch_size, imagenet.lr, imagenet.weight_decay, imagenet.epsilon) == ("resnet50", 90, 256, 0.1, 5e-4, 4)
    assert (svhn.arch, svhn.epochs, svhn.lr_schedule, svhn.lr) == ("preactresnet18c", 30, "cyclic", 0.05)
    assert (imagenet.replays, svhn.replays) == (4, 8) and train_free_at.Config(dataset="imagenet", divide_epochs=True).epochs == 23
    assert train_free_at.Config(dataset="imagenet", replays=3).replays == 3


@pytest.mark.parametrize("dataset, k", [("imagenet", 1), ("cifar100", 2), ("svhn", 2)])
def test_n_fgsms_noise(dataset, k):
    assert train_n_fgsm.Config(dataset=dataset).k == k and train_n_fgsm.Config(dataset=dataset, k=4.0).k == 4


class Stub:
    """As much of a run as the loop of a script whose step is not looked at."""

    def __init__(self, epochs: int, batches: int) -> None:
        self.epochs, self.each, self.calls = epochs, batches, []
        self.classes, self.model, self.x, self.y = 10, None, None, None

    def captured(self, step):
        return lambda *arguments: self.calls.append((self.epoch, self.batch, arguments))

    def batches(self):
        for self.epoch in range(self.epochs):
            for self.batch in range(self.each):
                yield self.x, self.y, None


def test_gats_weight_grows_after_epoch_85_of_100(monkeypatch):
    run = Stub(100, 3)
    monkeypatch.setattr(engine, "Run", lambda cfg: run)
    train_gat.main(train_gat.Config(epochs=100))
    assert [epoch for epoch, batch, (_, _, late, _) in run.calls if late and batch == 0] == list(range(86, 100)), "counted from 0"
    assert [guided for epoch, _, (_, _, _, guided) in run.calls[:3]] == [False, True, False]


def test_nuats_weight_grows_over_nine_tenths_of_the_epochs(monkeypatch):
    weights, run = [], Stub(100, 2)
    run.x, run.y, run.model = torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64), torch.nn.Flatten()
    run.uniform, run.gathered, run.update = torch.zeros_like, lambda rows: rows, lambda *_, **__: None

    def perturb(model, x, target, start, eps, alpha, guide):
        weights.append(guide(x))
        return torch.zeros_like(x)

    monkeypatch.setattr(engine, "Run", lambda cfg: run)
    monkeypatch.setattr(train_nuat, "nuclear_norm", lambda *_: torch.ones(()))
    monkeypatch.setattr(train_nuat, "perturb", perturb)
    train_nuat.main(train_nuat.Config(epochs=100))
    assert weights == pytest.approx([batch * 4.5 * min(epoch / 90, 1) for epoch in range(100) for batch in (0, 1)]), "the attack climbs it in every other batch"


@pytest.mark.parametrize("epsilon, expected", [(1, 1.657), (4, 1.976), (8, 2.5), (12, 3.162), (16, 3.162)])
def test_grad_aligns_weight_on_svhn(epsilon, expected):
    """The authors' script of commands for it, from 1 to 12."""
    assert train_fgsm_ga.Config(dataset="svhn", epsilon=epsilon).ga_lambda == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("kind, flags", [(train_las_at, dict(base=base)) for base in ("pgd", "trades", "awp")] + [
    (train_fgsm_mep, {}), (train_fgsm_ep, {}), (train_fgsm_bp, {})])
def test_gradients_are_clipped_on_tiny_imagenet(kind, flags):
    assert kind.Config(dataset="tiny-imagenet", **flags).max_grad_norm == 10 and kind.Config(dataset="cifar100", **flags).max_grad_norm is None
    assert kind.Config(dataset="tiny-imagenet", max_grad_norm=3.0, **flags).max_grad_norm == 3
    assert kind.Config(dataset="tiny-imagenet", max_grad_norm=0.0, **flags).max_grad_norm == 0


@pytest.mark.parametrize("arch, width, expected", [
    ("wideresnet34-10", None, None), ("wideresnet34-10", 10, None), ("resnet18", 16, 16), ("preactresnet18", 16, 16), ("resnet18", None, None)])
def test_lbgats_teacher_is_as_wide_as_widths_are_alike(arch, width, expected):
    """A wide ResNet's is a factor."""
    assert train_lbgat.Config(arch=arch, width=width).teacher_width == expected
    assert train_lbgat.Config(arch=arch, width=width, teacher_width=8).teacher_width == 8
