"""The numbers: verdicts against attacks called plainly, AutoAttack against the packages, the evaluation script's files."""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import attacks
import models
from engine import checkpoint, data, evaluate, foreign, record
from engine.errors import Failure, Misuse
from engine.random_streams import evaluation_generator
from tests.test_sharded import shortly

EPS, ALPHA = 38 / 255, 38 / 255 / 4
PLAIN = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "cw")


def network(path: Path) -> torch.nn.Module:
    saved = torch.load(path, weights_only=True)
    built = models.build(saved["arch"], classes=10, channels=1)
    built.load_state_dict(saved["state_dict"])
    return built.eval()


@pytest.fixture
def model(digits_run) -> torch.nn.Module:
    return network(digits_run / "best.pth")


def images(n: int) -> tuple[Tensor, Tensor]:
    dataset = data.load("digits", ".")
    return torch.from_numpy(dataset.x_test[:n]), torch.from_numpy(dataset.y_test[:n])


def measured(model: torch.nn.Module, n: int = 120, columns=PLAIN, batch_size: int = 50, **more) -> dict[str, Tensor]:
    return evaluate.verdicts(model, *images(n), columns=columns, batch_size=batch_size,
                             **dict(eps=EPS, alpha=ALPHA, seed=0) | more)


# ---- PGD and the like ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 7])
def test_verdicts_do_not_depend_on_the_batch_size(model, batch_size):
    """In double precision: in single precision a gradient may be so small that its sign is the batch size's."""
    columns = ("clean", "fgsm", "pgd10", "pgd20", "cw")
    whole, other = (measured(model.double(), n=40, columns=columns, batch_size=size) for size in (40, batch_size))
    assert all(torch.equal(whole[column], other[column]) for column in columns)


def test_verdicts_do_not_depend_on_what_else_is_measured(model):
    whole = measured(model)
    assert list(whole) == list(PLAIN)
    for column in PLAIN:
        assert torch.equal(measured(model, columns=(column,))[column], whole[column]), column


def test_verdicts_are_of_each_image(model):
    """Of the first images the same, whatever follows them; and a verdict that names its image."""
    whole, first = measured(model.double()), measured(model, n=30, batch_size=30)
    assert all(torch.equal(whole[column][:30], first[column]) for column in PLAIN)
    assert all(verdict.shape == (120,) and verdict.dtype == torch.bool for verdict in whole.values())


def test_more_steps_never_find_less(model):
    found = measured(model, n=360, batch_size=360)
    for weaker, stronger in (("clean", "fgsm"), ("pgd10", "pgd20"), ("pgd20", "pgd50")):
        assert not (found[stronger] & ~found[weaker]).any(), "an image once misclassified stays so"
    assert found["clean"].sum() > found["pgd10"].sum() > found["pgd50"].sum() > 0, "a model and a radius that tell them apart"


def test_columns_are_the_attacks_called_plainly(model):
    """One batch, the random starts drawn here as the docstring says: a function of (seed, attack, image)."""
    x, y = images(120)
    points = data.to_images(x)
    found = measured(model, batch_size=120, columns=(*PLAIN, "pgd7"))

    def start(stream: str) -> Tensor:
        return EPS * (2 * torch.rand(points.shape, generator=evaluation_generator(0, stream)) - 1)

    deltas = {
        "clean": torch.zeros_like(points),
        "fgsm": attacks.pgd(model, points, y, eps=EPS, alpha=EPS, steps=1, start=start("fgsm")),
        **{f"pgd{n}": attacks.pgd(model, points, y, eps=EPS, alpha=ALPHA, steps=n, start=start("pgd")) for n in (7, 10, 20, 50)},
        "cw": attacks.pgd(model, points, y, eps=EPS, alpha=ALPHA, steps=20, start=start("cw"), loss=attacks.margin),
    }
    for column, delta in deltas.items():
        assert delta.abs().max() <= EPS and 0 <= (points + delta).min() and (points + delta).max() <= 1
        assert torch.equal(found[column], attacks.predict(model, points + delta) == y), column
    other = measured(model, seed=1, batch_size=120)
    assert torch.equal(found["clean"], other["clean"])


def test_evaluation_is_in_eval_mode_whatever_the_network_is_in(model):
    expected = measured(model)
    model.train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    requires = [p.requires_grad for p in model.parameters()]
    found = measured(model)
    assert all(torch.equal(expected[column], found[column]) for column in PLAIN)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert [p.requires_grad for p in model.parameters()] == requires and all(p.grad is None for p in model.parameters())


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()],
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


def test_evaluation_moves_no_random_numbers(model, tmp_path):
    before = random_states()
    measured(model, n=20)
    assert random_states() == before
    attack(model, 8, tmp_path / "autoattack.pth", columns=("apgd",))
    assert random_states() == before


def test_what_was_compiled_before_an_evaluation_serves_after_it(model):
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        torch.backends.cuda.matmul.fp32_precision = "none"  # as a process begins
    graphs = []
    plus_one = torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(2):
        plus_one(torch.zeros(3))
        measured(model, n=20)
    assert len(graphs) == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_in_an_evaluation_and_then_as_it_was(allowed):
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = allowed
        with evaluate.trustworthy():
            assert not any(library.allow_tf32 for library in libraries)
        assert all(library.allow_tf32 == allowed for library in libraries)
    finally:
        for library, value in zip(libraries, before):
            library.allow_tf32 = value


@pytest.mark.parametrize("text, expected", [
    ("clean", ("clean",)), ("aa,clean", ("clean", "aa")), ("pgd50, pgd10,fgsm", ("fgsm", "pgd10", "pgd50")),
    ("cw,pgd7,pgd100", ("pgd7", "pgd100", "cw")), (",".join(evaluate.COLUMNS), evaluate.COLUMNS),
])
def test_columns_by_name(text, expected):
    assert evaluate.columns_named(text) == expected


@pytest.mark.parametrize("text", ["pgd", "pgd0", "pgd-1", "pgd010", "pgd²", "PGD10", "autoattack", "clean,foo"])
def test_unknown_columns_are_refused(text):
    with pytest.raises(Misuse, match="is no column of the evaluation: allowed are clean"):
        evaluate.columns_named(text)


def test_a_network_that_is_not_finite_is_no_result(model):
    with torch.no_grad():
        model.linear.bias[3] = torch.nan
    with pytest.raises(Failure, match="not finite"):
        evaluate.check_finite(model, images(5)[0])


def test_a_row_with_nan_is_no_class():
    """Its largest logit would be the first nan, and images of that class robust."""
    logits = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, torch.nan, 2.0], [0.0, 3.0, -torch.inf]])
    assert attacks.predict(lambda x: logits, torch.zeros(3)).tolist() == [-1, -1, 1]


@pytest.mark.parametrize("what", ["verdicts", "autoattack"])
def test_no_pass_of_an_evaluation_is_in_tf32(what, model, tmp_path, monkeypatch):
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    if what == "verdicts":
        measured(model, n=4, columns=("clean", "pgd10"))
    else:
        attack(model, 4, tmp_path / "a.pth", columns=("apgd",))
    assert seen and set(seen) == {(False, False)}


# ---- AutoAttack ------------------------------------------------------------------------------------------------------

N, BATCH = 40, 16  # several batches, and a last one that is not full
WIDE = 48 / 255  # a radius at which few images are left for the slow attacks


def attack(model, n: int, path: Path, columns=("apgd", "aa"), log=lambda line: None, **more) -> dict[str, Tensor]:
    return evaluate.auto_attack(model, *images(n), columns=columns, path=path, log=log,
                                **dict(eps=WIDE, seed=0, batch_size=BATCH) | more)


class Interrupted(Exception):
    pass


def test_verdicts_of_a_network_of_another_form_are_not_taken_over(tmp_path):
    """preactresnet18a and c have the same weights, and differ in what their shortcuts are fed with."""
    torch.manual_seed(0)
    one, other = (models.build(f"preactresnet18{form}", channels=1, width=2).eval() for form in "ac")
    other.load_state_dict(one.state_dict())
    x, y = images(4)
    names = [evaluate._identity(network, x, y, eps=0.1) for network in (one, other)]
    assert names[0]["network"] != names[1]["network"] and names[0]["images"] == names[1]["images"]
    other.load_state_dict(one.state_dict())
    assert names == [evaluate._identity(network, x, y, eps=0.1) for network in (one, other)]


@pytest.mark.parametrize("classes", [4, 3])
def test_autoattack_on_few_classes(classes):
    """It has nine target classes where there are so many; its targeted attack compares four logits."""
    torch.manual_seed(0)
    network = models.build("resnet8", channels=1, width=4, classes=classes).eval()
    x = torch.rand(6, 1, 8, 8)
    y = attacks.predict(network, x)
    for name in attacks.AUTOATTACK if classes == 4 else ("apgd-ce", "fab-t", "square"):
        with shortly():
            x_adv, standing = attacks.auto_attack(network, x, y, attack=name, eps=0.01, seed=0, batch_size=4, classes=classes)
        assert torch.equal(attacks.predict(network, x_adv) == y, standing) and (x_adv - x).abs().max() <= 0.01 + 1e-6


def test_autoattack_has_its_standard_version(model, monkeypatch):
    """Adversarial images are those of `test_autoattack_is_the_packages`, which has shorter attacks."""
    import pyautoattack

    found = []

    def looked_at(runner, x, y, batch_size):
        found.append(((runner.version, runner.norm), runner.attacks_to_run, [(each.n_iter, each.n_restarts) for each in (runner.apgd, runner.apgd_targeted, runner.fab)],
                      (runner.apgd_targeted.n_target_classes, runner.fab.n_target_classes), runner.square.n_queries, runner.epsilon, runner.seed))
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", looked_at)
    for name in attacks.AUTOATTACK:
        attacks.auto_attack(model, torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long), attack=name, eps=0.1, seed=3, batch_size=2)
    assert found == [(("standard", "Linf"), [name], [(100, 1)] * 3, (9, 9), 5000, 0.1, 3) for name in attacks.AUTOATTACK]


@pytest.mark.parametrize("length, eps", [(shortly, 54 / 255), pytest.param(contextlib.nullcontext, WIDE, marks=pytest.mark.slow)], ids=["short", "standard"])
def test_autoattack_is_the_packages(length, eps, model, tmp_path, monkeypatch):
    """Image by image, verdicts and adversarial images, though ours was interrupted in the middle of one of the attacks.

    And neither the global random numbers nor BatchNorm's averages moved.
    """
    with length():
        is_the_packages(eps, model, tmp_path, monkeypatch)


def is_the_packages(eps, model, tmp_path, monkeypatch):
    from pyautoattack import AutoAttack

    states, buffers, lines = random_states(), {name: value.clone() for name, value in model.named_buffers()}, []
    single, path, begun = attacks.auto_attack, tmp_path / "autoattack.pth", []

    def interrupted(*arguments, attack, **named):
        if attack in begun:
            raise Interrupted
        begun.append(attack)
        return single(*arguments, attack=attack, **named)

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "auto_attack", interrupted)
        patch.setattr(evaluate, "SAVE_EVERY", -1)
        with pytest.raises(Interrupted):
            attack(model, N, path, eps=eps)
    found = attack(model, N, path, eps=eps, log=lines.append)
    assert random_states() == states and all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert any("clean done" in line for line in lines), "it says that it continues, and from where"
    assert any(line.startswith(f"apgd-ce: {2 * BATCH} of") for line in lines) and not any(line.startswith(f"apgd-ce: {BATCH} of") for line in lines)

    x, y = images(N)
    points = data.to_images(x)
    with torch.random.fork_rng():
        package = AutoAttack(model, eps=eps, norm="Linf", seed=0, version="standard", device="cpu")
        x_adv, predicted = package.run_standard_evaluation(points, y, batch_size=BATCH)
    assert torch.equal(found["aa"], predicted == y)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["x_adv"], x_adv)
    assert (x_adv - points).abs().max() <= eps + 1e-6
    assert torch.equal(attacks.predict(model, state["x_adv"]) == y, found["aa"]), "an adversarial image for every verdict"

    standing = [state["standing"][name] for name in ("clean", *attacks.AUTOATTACK)]
    assert all(not (after & ~before).any() for before, after in zip(standing, standing[1:]))
    assert torch.equal(found["apgd"], state["standing"]["apgd-ce"])
    assert 0 < standing[-1].sum() < standing[1].sum() < standing[0].sum(), "a model on which the attacks differ"


@pytest.mark.skipif("AUTOATTACK_CHECKOUT" not in os.environ, reason="AUTOATTACK_CHECKOUT names no clone of fra31/auto-attack")
def test_autoattack_is_the_original(model, tmp_path, monkeypatch, record_property):
    """Against the authors' own repository, which is not on PyPI."""
    monkeypatch.syspath_prepend(os.environ["AUTOATTACK_CHECKOUT"])
    from autoattack import AutoAttack

    x, y = images(N)
    points = data.to_images(x)
    with torch.random.fork_rng():
        original = AutoAttack(model, norm="Linf", eps=WIDE, seed=0, version="standard", device="cpu", verbose=False)
        x_adv = original.run_standard_evaluation(points, y, bs=BATCH)
    found, state = attack(model, N, tmp_path / "autoattack.pth"), torch.load(tmp_path / "autoattack.pth", weights_only=True)
    theirs = attacks.predict(model, x_adv) == y
    difference = (state["x_adv"] - x_adv).abs().max().item()
    print(f"clean {100 * state['standing']['clean'].double().mean():.1f} %, ours {100 * found['aa'].double().mean():.1f} %, "
          f"theirs {100 * theirs.double().mean():.1f} %, verdicts differ on {(theirs != found['aa']).sum()} of {N} images, "
          f"adversarial images by at most {difference:.2g}")
    assert torch.equal(found["aa"], theirs)
    assert difference == 0


@pytest.fixture
def pretended(monkeypatch):
    """In the place of each of the four attacks one that fools every third image that it is given, saved after each batch; the list of calls."""
    def fool(model, x, y, *, attack, eps, seed, batch_size, classes, log=None):
        if len(calls.calls) == calls.interrupt_at:
            raise Interrupted
        calls.calls.append((attack, len(x), x.sum().item()))
        still = torch.arange(len(x)) % 3 != 0
        log(f"{attack} at work")
        return torch.where(still[:, None, None, None], x, x + attacks.AUTOATTACK.index(attack) + 1), still

    monkeypatch.setattr(attacks, "auto_attack", fool)
    monkeypatch.setattr(evaluate, "SAVE_EVERY", -1)
    calls = types.SimpleNamespace(calls=[], interrupt_at=None)
    return calls


def test_an_interrupted_autoattack_repeats_nothing(pretended, model, tmp_path):
    """Wherever it is interrupted: between two attacks, or between two batches of one."""
    whole = attack(model, N, tmp_path / "whole.pth")
    uninterrupted = list(pretended.calls)
    assert [name for name, *_ in uninterrupted] == 3 * ["apgd-ce"] + 2 * ["apgd-t"] + ["fab-t", "square"], "in batches of 16, of what is left of 40 images"
    for at in range(len(uninterrupted)):
        pretended.calls, pretended.interrupt_at, path = [], at, tmp_path / f"{at}.pth"
        with pytest.raises(Interrupted):
            attack(model, N, path)
        pretended.interrupt_at = None
        parts = attack(model, N, path)
        assert pretended.calls == uninterrupted, "each batch once, of what the attacks before left standing"
        assert all(torch.equal(whole[column], parts[column]) for column in ("apgd", "aa"))
        states = [torch.load(file, weights_only=True) for file in (tmp_path / "whole.pth", path)]
        assert torch.equal(states[0]["x_adv"], states[1]["x_adv"]) and not states[1]["unfinished"]
        attack(model, N, path)
        assert pretended.calls == uninterrupted, "a finished one runs nothing"


def test_what_square_alone_finds_is_a_warning(monkeypatch, model, tmp_path):
    """The package says so above 0.2 points, but is given one attack at a time here."""
    for name, most, warned in (("square", N, True), ("square", 2, False), ("fab-t", N, False)):  # two of 40 may be chance
        def falls(model, x, y, *, attack, **more):
            still = torch.ones(len(x), dtype=torch.bool)
            still[:max(0, most - sum(fallen))] = attack != name
            fallen.append(int((~still).sum()))
            return x, still

        fallen: list[int] = []
        monkeypatch.setattr(attacks, "auto_attack", falls)
        attack(model, N, tmp_path / f"{name}{most}.pth")
        said = torch.load(tmp_path / f"{name}{most}.pth", weights_only=True)["warnings"]
        assert [line.partition(" ")[0] for line in said] == ["Square"] * warned


def test_what_the_package_warns_of_is_kept(monkeypatch, model, tmp_path):
    """Also by an evaluation that goes on after it did."""
    def warning(model, x, y, *, attack, log, **more):
        log(f"warning: {attack} might be insufficient")
        log("of no interest")
        return x, torch.ones(len(x), dtype=torch.bool)

    monkeypatch.setattr(attacks, "auto_attack", warning)
    lines = []
    attack(model, N, tmp_path / "a.pth", columns=("apgd",), log=lines.append)
    attack(model, N, tmp_path / "a.pth", log=lines.append)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["warnings"] == [f"{name} might be insufficient" for name in attacks.AUTOATTACK] and state["seconds"] > 0
    assert [line for line in lines if "might" in line] == [f"warning: {name} might be insufficient" for name in attacks.AUTOATTACK]
    assert "of no interest" not in lines


def test_apgd_is_the_first_attack_alone(pretended, model, tmp_path):
    first = attack(model, N, tmp_path / "a.pth", columns=("apgd",))
    assert {name for name, *_ in pretended.calls} == {"apgd-ce"} and first.keys() == {"apgd"}
    both = attack(model, N, tmp_path / "a.pth")
    assert list(dict.fromkeys(name for name, *_ in pretended.calls)) == list(attacks.AUTOATTACK), "aa goes on where apgd ended"
    assert torch.equal(first["apgd"], both["apgd"]) and both["aa"].sum() < both["apgd"].sum()


@pytest.mark.parametrize("what", ["weights", "more images", "more images in smaller batches"])
def test_a_state_of_another_evaluation_is_not_used(what, pretended, model, tmp_path):
    path, lines = tmp_path / "a.pth", []
    attack(model, N, path)
    pretended.calls.clear()
    if what == "weights":
        with torch.no_grad():
            model.linear.bias[0] += 1e-6
    attack(model, N + what.startswith("more images"), path, log=lines.append, batch_size=BATCH - what.endswith("batches"))
    assert {name for name, *_ in pretended.calls} == set(attacks.AUTOATTACK) and any("another evaluation" in line for line in lines)


@pytest.mark.parametrize("what, more", {"eps": dict(eps=EPS), "seed": dict(seed=1), "batch_size": dict(batch_size=8), "n": {}}.items())
def test_a_state_of_the_same_network_is_not_overwritten(what, more, pretended, model, tmp_path):
    """It may have taken hours; a look at fewer images, at another radius, must not cost it."""
    path = tmp_path / "a.pth"
    attack(model, N, path)
    before = path.read_bytes()
    with pytest.raises(Misuse, match=f"a.pth holds an evaluation of the same network with {what} .*give another --out-dir"):
        attack(model, N - (what == "n"), path, **more)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"nonsense", "half", "of something else"])
def test_a_damaged_state_is_not_used(content, pretended, model, tmp_path):
    path, lines = tmp_path / "a.pth", []
    expected = attack(model, N, path)
    whole = path.read_bytes()
    if content == "of something else":
        checkpoint.save({"position": 3}, path)
    else:
        path.write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    pretended.calls.clear()
    found = attack(model, N, path, log=lines.append)
    assert {name for name, *_ in pretended.calls} == set(attacks.AUTOATTACK) and any("starting anew" in line for line in lines)
    assert all(torch.equal(expected[column], found[column]) for column in expected)


def test_no_attack_is_run_on_what_is_already_lost(pretended, model, tmp_path):
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.zero_()  # class 0 for every image
    x, y = images(N)
    found = evaluate.auto_attack(model, x, torch.where(y == 0, 1, y), columns=("apgd", "aa"), eps=WIDE, seed=0, batch_size=BATCH,
                                 path=tmp_path / "a.pth", log=lambda line: None)
    assert pretended.calls == [] and not found["aa"].any() and not found["apgd"].any()


def test_unknown_attacks_are_refused(model):
    with pytest.raises(ValueError, match="'apgd' is not one of apgd-ce, apgd-t, fab-t, square"):
        attacks.auto_attack(model, *images(2), attack="apgd", eps=EPS, seed=0, batch_size=2)


# ---- test_FGSM_SDI.py ------------------------------------------------------------------------------------------------

CONTRACT = {"method", "dataset", "arch", "seed", "commit", "dirty", "versions", "device", "precision", "tf32", "peak_memory_bytes",
            "metrics", "batch_size", "n", "epsilon", "card", "warnings", "verdicts", "seconds"}


def test_the_evaluation_script(pretended, digits_run, tiny, monkeypatch):
    monkeypatch.setenv("SOURCE_COMMIT", "abc")
    out_dir = tiny.directory / "evaluation"
    result = tiny.command("test_FGSM_SDI", "--model_path", digits_run / "best.pth", "--out_dir", out_dir, "--batch_size", 100)
    assert result.status == 0 and result.err == ""
    content = json.loads((out_dir / "evaluation.json").read_text())
    assert CONTRACT <= content.keys()
    assert {"torch", "cuda", "pyautoattack"} <= content["versions"].keys()
    assert (content["method"], content["dataset"], content["arch"]) == ("fgsm-rs", "digits", "resnet8")
    assert (content["n"], content["batch_size"], content["seed"], content["norm"]) == (360, 100, 0, "Linf")
    assert content["epsilon"] == 38 and content["pgd_alpha"] == 9.5, "the radius that it was trained for, and a quarter of it"
    assert content["precision"] == "fp32" and content["tf32"] == {"matmul": False, "cudnn": False}, "as it was while measuring"
    assert not content["card"]["trusted"] and content["card"]["n"] == 256
    not_passed = [check["name"] for check in content["card"]["checks"] if check["status"] != "pass"]
    wrong = {"bounds", "pgd and autoattack", "autoattack's square"}
    assert wrong <= set(not_passed) <= wrong | {"recomputed"}, "what stands in for AutoAttack leaves the ball; each attack of it finds a third"
    assert content["warnings"][0].startswith("Square takes") and [sentence.partition(":")[0] for sentence in content["warnings"][1:]] == not_passed
    assert all(f"warning: {sentence}" in result.out for sentence in content["warnings"])

    assert list(content["metrics"]) == list(evaluate.COLUMNS)
    with np.load(out_dir / content["verdicts"]) as file:
        verdicts = dict(file)
    assert verdicts.keys() == content["metrics"].keys()
    for column, metric in content["metrics"].items():
        assert verdicts[column].shape == (360,) and verdicts[column].dtype == bool
        assert metric["value"] == pytest.approx(100 * verdicts[column].mean()) and metric["n"] == 360
        low, high = record.wilson(int(verdicts[column].sum()), 360)
        assert metric["interval"] == pytest.approx([100 * low, 100 * high])
        assert f"{column:6s} {metric['value']:6.2f} %†" in result.out, "marked, because the card is not trusted"
    plain = measured(network(digits_run / "best.pth"), n=360, batch_size=100)
    assert all(np.array_equal(plain[column].numpy(), verdicts[column]) for column in PLAIN)


def test_an_evaluation_names_the_code_of_all_its_parts(pretended, digits_run, tiny, monkeypatch):
    """AutoAttack may have been begun by another commit."""
    out_dir = tiny.directory / "evaluation"
    command = ("test_FGSM_SDI", "--model_path", digits_run / "best.pth", "--out_dir", out_dir, "--n-ex", 50, "--card-n", 0, "--attacks", "clean,aa")
    for commit, dirty, more in (("a", True, 1), ("b", False, 2)):
        monkeypatch.setattr(record, "source", lambda commit=commit, dirty=dirty: {"commit": commit, "dirty": dirty})
        pretended.interrupt_at = len(pretended.calls) + more
        with pytest.raises(Interrupted):
            tiny.command(*command)
    pretended.interrupt_at = None
    monkeypatch.setattr(record, "source", lambda: {"commit": "c", "dirty": False})
    assert tiny.command(*command).status == 0
    content = json.loads((out_dir / "evaluation.json").read_text())
    assert (content["commit"], content["dirty"], content["earlier_commits"]) == ("c", True, ["a", "b"])
    (out_dir / "evaluation.json").unlink()
    assert tiny.command(*command[:-1], "clean").status == 0
    content = json.loads((out_dir / "evaluation.json").read_text())
    assert (content["commit"], content["dirty"]) == ("c", False) and "earlier_commits" not in content, "nothing of it is AutoAttack's"


def test_a_file_of_another_repository_is_evaluated_at_8(digits_run, tiny):
    """What it calls epsilon may be a fraction of 1, and its data sets have other names."""
    ours = torch.load(digits_run / "best.pth", weights_only=True)
    out_dir, flags = tiny.directory / "e", ("--attacks", "clean", "--n-ex", 20, "--card-n", 0)
    torch.save({"state_dict": ours["state_dict"], "epsilon": 0.031, "dataset": "DIGITS"}, tiny.directory / "raw.pth")
    assert tiny.command("test_FGSM_SDI", "--model_path", tiny.directory / "raw.pth", "--out-dir", out_dir, *flags).status == 0
    content = json.loads((out_dir / "evaluation.json").read_text())
    assert (content["epsilon"], content["pgd_alpha"], content["dataset"]) == (8, 2, "digits")


def test_flags_of_the_evaluation_reach_what_they_are_for(digits_run, tiny, monkeypatch):
    torch.save({name: torch.load(digits_run / f"{name}.pth", weights_only=True)["state_dict"] for name in ("best", "last")}, tiny.directory / "both.pth")
    load, verdicts, asked = foreign.load, evaluate.verdicts, {}
    monkeypatch.setattr(foreign, "load", lambda *arguments, **more: asked.update(more) or load(*arguments, **more))
    monkeypatch.setattr(evaluate, "verdicts", lambda *arguments, **more: asked.update(more) or verdicts(*arguments, **more))
    result = tiny.command("test_FGSM_SDI", "--model_path", tiny.directory / "both.pth", "--which", "last", "--normalise", "none", "--seed", 7, "--n-ex", 20,
                          "--card-n", 0, "--attacks", "clean", "--out-dir", tiny.directory / "e")
    assert result.status == 0 and (asked["which"], asked["normalise"], asked["seed"]) == ("last", "none", 7)


def test_doubts_of_which_network_it_is_are_warnings(digits_run, tiny, monkeypatch):
    load = foreign.load

    def doubted(*arguments, **more):
        network, report = load(*arguments, **more)
        return network, report | {"doubts": ["it may be another network"]}

    monkeypatch.setattr(foreign, "load", doubted)
    out_dir = tiny.directory / "evaluation"
    result = tiny.command("test_FGSM_SDI", "--model_path", digits_run / "best.pth", "--out_dir", out_dir, "--n-ex", 20, "--card-n", 0, "--attacks", "clean")
    content = json.loads((out_dir / "evaluation.json").read_text())
    assert content["warnings"][0] == "it may be another network" and "warning: it may be another network" in result.out
    assert f"resnet8, normalisation none ({content['checkpoint']['reason']})" in result.out
    assert content["checkpoint"]["sha256"] == json.loads((digits_run / "result.json").read_text())["checkpoints"]["best"]["sha256"]
    assert content["config"]["n_ex"] == 20 and content["images_per_second"] > 0


@pytest.mark.parametrize("dash", ["-", "_"])
def test_the_published_flags(dash, digits_run, tiny):
    flags = {"model_path": digits_run / "last.pth", "norm": "Linf", "epsilon": 20, "n_ex": 30, "batch_size": 10, "pgd_alpha": 3,
             "out_dir": tiny.directory / "evaluation", "data_dir": "data/", "attacks": "pgd10,clean", "device": "cpu"}
    arguments = [word for name, value in flags.items() for word in ("--" + name.replace("_", dash), value)]
    result = tiny.command("test_FGSM_SDI", *arguments)
    assert result.status == 0, result.err
    content = json.loads((tiny.directory / "evaluation" / "evaluation.json").read_text())
    assert (content["n"], content["batch_size"], content["epsilon"], content["pgd_alpha"]) == (30, 10, 20, 3)
    assert list(content["metrics"]) == ["clean", "pgd10"]
    few, no_card = content["warnings"]
    assert "first 30 of 360" in few and "needs 100 images" in no_card and all(f"warning: {said}" in result.out for said in (few, no_card))
    assert not content["card"]["trusted"] and {check["status"] for check in content["card"]["checks"]} == {"not run"}
    found = measured(network(digits_run / "last.pth"), n=30, columns=("clean", "pgd10"), eps=20 / 255, alpha=3 / 255, batch_size=10)
    with np.load(tiny.directory / "evaluation" / "verdicts.npz") as verdicts:
        assert all(np.array_equal(verdicts[column], found[column].numpy()) for column in found)


@pytest.mark.parametrize("n, trusted", [(150, True), (0, False)])
def test_the_card_of_a_sound_network(n, trusted, digits_run, tiny):
    flags = "--model_path", digits_run / "best.pth", "--out_dir", tiny.directory / "e", "--attacks", "clean,fgsm,pgd10", "--card-n", n
    result = tiny.command("test_FGSM_SDI", *flags)
    assert result.status == 0, result.err
    content = json.loads((tiny.directory / "e" / "evaluation.json").read_text())
    assert content["card"]["trusted"] == trusted and content["card"]["n"] == n
    assert content["seconds"]["card"] == content["card"]["seconds"]
    assert (content["warnings"] == []) == trusted == ("†" not in result.out)
    assert ("NOT TRUSTED" in result.out) != trusted and result.out.count("claim card") == 1 + (not trusted) * 2


def test_an_evaluation_that_asks_less_does_not_replace_one_that_asked_more(digits_run, tiny):
    def evaluated(*flags):
        return tiny.command("test_FGSM_SDI", "--model_path", path, "--card-n", 0, *flags)

    path, out_dir = Path(shutil.copy(digits_run / "best.pth", tiny.directory / "mine.pth")), tiny.directory / "mine-evaluation"
    assert evaluated("--attacks", "clean", "--n-ex", 20).status == 0
    assert evaluated("--attacks", "clean,fgsm", "--n-ex", 40).status == 0, "more of both"
    before = {file.name: file.read_bytes() for file in out_dir.iterdir()}
    for flags, differing in ((("--attacks", "clean"), "the columns fgsm, for which"), (("--attacks", "clean,fgsm", "--n-ex", 20), "n 40"),
                             (("--attacks", "clean,fgsm", "--epsilon", 4), "epsilon 38"), (("--attacks", "clean,fgsm", "--seed", 1), "seed 0")):
        result = evaluated(*flags)
        assert result.status == 2 and differing in result.err and "give another --out-dir" in result.err
        assert {file.name: file.read_bytes() for file in out_dir.iterdir()} == before
    content = torch.load(path, weights_only=True)
    content["state_dict"]["linear.bias"] += 0.1
    torch.save(content, path)
    assert evaluated("--attacks", "clean", "--n-ex", 20).status == 0, "of other weights, as after a new training"


def test_results_lie_beside_the_checkpoint_by_default(digits_run, tiny):
    path = Path(shutil.copy(digits_run / "best.pth", tiny.directory / "mine.pth"))
    result = tiny.command("test_FGSM_SDI", "--model_path", path, "--attacks", "clean", "--card-n", 0)
    assert result.status == 0, result.err
    assert {file.name for file in (tiny.directory / "mine-evaluation").iterdir()} == {"evaluation.json", "verdicts.npz", ".lock"}


def test_another_epsilon_and_more_columns_do_not_move_a_column(digits_run, tiny):
    def evaluated(*flags) -> dict:
        out_dir = tiny.directory / f"evaluation{len(list(tiny.directory.iterdir()))}"
        assert tiny.command("test_FGSM_SDI", "--model_path", digits_run / "best.pth", "--out_dir", out_dir, "--card-n", 0, *flags).status == 0
        with np.load(out_dir / "verdicts.npz") as file:
            return dict(file)

    alone, among = evaluated("--attacks", "pgd20"), evaluated("--attacks", "clean,fgsm,pgd10,pgd20,cw")
    assert np.array_equal(alone["pgd20"], among["pgd20"])
    smaller, larger = evaluated("--attacks", "pgd20", "--epsilon", 5), evaluated("--attacks", "pgd20", "--epsilon", 100)
    assert smaller["pgd20"].sum() > alone["pgd20"].sum() > larger["pgd20"].sum()


@pytest.mark.parametrize("form", ["raw", "container", "data-parallel"])
def test_weights_in_another_container_evaluate_alike(form, digits_run, tiny):
    """Without the entries that say what they are; then the data set follows from classes and channels, the radius is 8."""
    saved = torch.load(digits_run / "best.pth", weights_only=True)["state_dict"]
    content = {"raw": saved, "container": {"model": saved, "epoch": 3}, "data-parallel": {f"module.{k}": v for k, v in saved.items()}}[form]
    torch.save(content, tiny.directory / "foreign.pth")
    results = []
    for path in (digits_run / "best.pth", tiny.directory / "foreign.pth"):
        out_dir = tiny.directory / path.stem
        result = tiny.command("test_FGSM_SDI", "--model_path", path, "--attacks", "clean,pgd10", "--epsilon", 38, "--card-n", 0, "--out-dir", out_dir)
        assert result.status == 0, result.err
        results.append(json.loads((out_dir / "evaluation.json").read_text()))
    assert results[0]["metrics"] == results[1]["metrics"] and results[1]["dataset"] == "digits"
