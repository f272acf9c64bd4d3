"""The claim card: sound networks are trusted, every broken one is not, and what cannot be measured is not trusted."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
import models
from engine import card, data
from utils import inside_image

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "claim-card.md"
N, SMALL, MIDDLE, LARGE, HUGE = 100, 20 / 255, 38 / 255, 76.5 / 255, 120 / 255


@functools.cache
def images(n: int = N, split: str = "test") -> tuple[Tensor, Tensor]:
    dataset = data.load("digits", ".")
    return torch.from_numpy(getattr(dataset, f"x_{split}")[:n]), torch.from_numpy(getattr(dataset, f"y_{split}")[:n])


class Winners(nn.Module):
    """k-winners-take-all (Xiao, Zhong & Zheng, ICLR 2020): only the largest tenth of an image's activations passes."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


def network(activation: Callable[[], nn.Module] = nn.ReLU, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        models.Normalize((0.3,), (0.38,)), nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), activation(),
        nn.Conv2d(12, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), activation(), nn.Flatten(), *more, nn.Linear(384, 10))


@functools.cache
def trained(
    attack: str = "pgd", eps: float = MIDDLE, seed: int = 0, activation: Callable[[], nn.Module] = nn.ReLU, *more: type[nn.Module],
) -> nn.Module:
    """A second's training on the digits: attack "none", "fgsm" (from x itself, which collapses at a large radius) or "pgd"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(activation, *(layer() for layer in more))
        x, y = images(1437, "train")
        points, optimizer = data.to_images(x), torch.optim.Adam(model.parameters(), 3e-3 if attack != "fgsm" else 1e-2)
        for step in range(120 if attack != "fgsm" else 400):
            rows = torch.randperm(len(x))[:128]
            batch, labels = points[rows], y[rows]
            if attack == "fgsm":
                batch = batch + attacks.fgsm(model, batch, labels, eps=eps)
            elif attack == "pgd":
                noise = eps * (2 * torch.rand_like(batch) - 1)
                batch = batch + attacks.pgd(model, batch, labels, eps=eps, alpha=eps * 0.75, steps=2, start=inside_image(noise, batch))
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
    return model.eval()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` draws is the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def measured(model: nn.Module, eps: float = MIDDLE, n: int = N, found: dict[str, Tensor] | None = None, saved: dict | None = None) -> dict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return card.build(model, *images(), found=found or {}, n=n, classes=10, eps=eps, alpha=eps / 4, seed=0, batch_size=100, saved=saved)


def failed(claim: dict) -> list[str]:
    return [check["name"] for check in claim["checks"] if check["required"] and check["status"] != "pass"]


# ---- the zoo ---------------------------------------------------------------------------------------------------------

class Around(nn.Module):
    """A trained network behind or before a function of the caller's."""

    def __init__(
        self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Tensor] = lambda z: z, model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model or trained(), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Forward(torch.autograd.Function):
    """The value of one tensor, the gradient of another, times a factor."""

    @staticmethod
    def forward(context, value: Tensor, through: Tensor, factor: Tensor | float) -> Tensor:
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, gradient * context.factor, None


class StubbornBatchNorm(nn.Module):
    """eval() does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = copy.deepcopy(trained())
        self.train()

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Remembers(nn.Module):
    """Its forward pass changes a buffer, though no prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.model = trained()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.model(x)


class Counts(nn.Module):
    """Answers as its call's number tells: a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = trained(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x).roll(self.calls % 2, 1)


def wrong_for_some(x: Tensor) -> Tensor:
    return torch.where((x.sum((1, 2, 3), keepdim=True) * 1e3).long() % 20 == 0, torch.nan, x)


def hashed_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(1e5 * x.detach() + x.detach().sum((1, 2, 3), keepdim=True))


def ripple(z: Tensor) -> Tensor:
    return z + 0.05 * torch.sin(1e4 * z)


def rounded(x: Tensor, levels: int = 8) -> Tensor:
    return (x * levels).round() / levels


def fixed_signs(x: Tensor) -> Tensor:
    return torch.randint(2, x.shape[1:], generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def straight_through_another() -> nn.Module:
    model, other = Around(model=trained("none", 0.0)), network().eval()
    model.forward = lambda x: Forward.apply(model.model(x.detach()), other(x), 1.0)
    return model


def raising(x: Tensor) -> Tensor:
    if len(x) == 1:
        raise ValueError("expected more than 1 value")
    return x


ZOO: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "FGSM without a random start, collapsed": (lambda: trained("fgsm", HUGE), HUGE),
    "softmax outputs": (lambda: Around(after=lambda z: z.softmax(1)), MIDDLE),
    "log-softmax outputs": (lambda: Around(after=lambda z: z.log_softmax(1)), MIDDLE),
    "logits x 1000": (lambda: Around(after=lambda z: 1000 * z), MIDDLE),
    "BatchNorm whose eval() does nothing": (StubbornBatchNorm, MIDDLE),
    "noise added to the image": (lambda: Around(before=lambda x: x + 0.1 * torch.randn_like(x)), MIDDLE),
    "noise that is a function of the image": (lambda: Around(before=hashed_noise), MIDDLE),
    "image normalised by its batch": (lambda: Around(before=lambda x: x - x.mean(0, keepdim=True) + 0.3), MIDDLE),
    "quantised image": (lambda: Around(before=rounded, model=trained("none", 0.0)), MIDDLE),
    "quantised image, gradient of random sign": (
        lambda: Around(before=lambda x: Forward.apply(rounded(x.detach()), x, fixed_signs(x)), model=trained("none", 0.0)), MIDDLE),
    "gradient of an untrained network": (straight_through_another, MIDDLE),
    "gradient reversed": (lambda: Around(before=lambda x: Forward.apply(x.detach(), x, -1.0), model=trained("none", 0.0)), MIDDLE),
    "gradient scaled to vanish": (lambda: Around(before=lambda x: Forward.apply(x.detach(), x, 1e-40), model=trained("none", 0.0)), MIDDLE),
    "gradient of half the image cut": (
        lambda: Around(before=lambda x: torch.cat([x[:, :, :4].detach(), x[:, :, 4:]], 2), model=trained("none", 0.0)), MIDDLE),
    "ripple on the logits": (lambda: Around(after=ripple), MIDDLE),
    "clipped image": (lambda: Around(before=lambda x: x.clamp(0.25, 0.75), model=trained("none", 0.0)), LARGE),
    "image saturated by a sigmoid": (lambda: Around(before=lambda x: torch.sigmoid(400 * (x - 0.5)), model=trained("none", 0.0)), LARGE),
    "image out of range": (lambda: Around(before=lambda x: 255 * x), MIDDLE),
    "k-winners-take-all": (lambda: trained("none", 0.0, 0, Winners), MIDDLE),
    "nan for some images": (lambda: Around(before=wrong_for_some), MIDDLE),
    "a forward pass that changes a buffer": (Remembers, MIDDLE),
    "a forward pass that counts its calls": (Counts, MIDDLE),
    "fails on a single image": (lambda: Around(before=raising), MIDDLE),
    "untrained": (network, MIDDLE),
}


def documented() -> dict[str, list[str]]:
    """The zoo's table in the documentation: a broken network, and the checks that flag it."""
    rows = DOCUMENT.read_text().split("## The zoo")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")][2:]
    return {name: checks.split(", ") for name, checks in cells}


@pytest.mark.parametrize("name", ZOO)
def test_every_broken_network_is_flagged(name: str) -> None:
    """By every check that the documentation's table names for it."""
    make, eps = ZOO[name]
    claim = measured(made(make), eps)
    assert not claim["trusted"] and set(documented()[name]) <= set(failed(claim)), failed(claim)
    said = card.warnings(claim, N, N)
    assert len(said) == len(failed(claim)) and all(check in claim["reason"] for check in failed(claim))


def test_the_zoo_is_documented() -> None:
    assert list(documented()) == list(ZOO)
    flagged = {check for checks in documented().values() for check in checks}
    assert flagged <= card.CHECKS.keys()


def test_every_check_is_documented() -> None:
    rows = DOCUMENT.read_text().split("## The checks")[1].split("\n## ")[0].splitlines()
    assert [row.strip("|").split("|")[0].strip() for row in rows if row.startswith("|")][2:] == list(card.CHECKS)


class Ensemble(nn.Module):
    """The mean of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([trained(seed=0), trained(seed=1)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


SOUND: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "standard, 8": (lambda: trained("none", 0.0), 8 / 255),
    "standard, 20, another seed": (lambda: trained("none", 0.0, 7), SMALL),
    "standard, 76.5": (lambda: trained("none", 0.0), LARGE),
    "PGD, 38": (trained, MIDDLE),
    "PGD, 76.5": (lambda: trained("pgd", LARGE), LARGE),
    "PGD, 76.5, another seed": (lambda: trained("pgd", LARGE, 1), LARGE),
    "ensemble": (Ensemble, MIDDLE),
    "GELU": (lambda: trained("pgd", MIDDLE, 0, nn.GELU), MIDDLE),
    "Softplus, dropout": (lambda: trained("pgd", MIDDLE, 0, nn.Softplus, nn.Dropout), MIDDLE),
    "logits x 3 + 100": (lambda: Around(after=lambda z: 3 * z + 100), MIDDLE),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_networks_are_trusted(name: str) -> None:
    make, eps = SOUND[name]
    claim = measured(made(make), eps)
    assert claim["trusted"], card.warnings(claim, N, N)
    assert claim["reason"] == "every required check passed" and card.warnings(claim, N, N) == []
    optional = [check["name"] for check in claim["checks"] if not check["required"]]
    assert optional == ["pgd and autoattack", "autoattack's square"], "what needs AutoAttack, which was not run"
    assert all(check["status"] == "pass" for check in claim["checks"] if check["required"])


# ---- it fails closed -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, 99])
def test_too_few_images_are_no_card(n: int) -> None:
    claim = measured(trained(), n=n)
    assert not claim["trusted"] and failed(claim) == list(card.CHECKS)
    few, none = card.warnings(claim, N, 1000)
    assert few.startswith(f"measured on the first {N} of 1000") and none == claim["reason"]


@pytest.mark.parametrize("result, status", [
    ((0.0, 1.0, "said"), "pass"), ((1.0, 1.0, "said"), "pass"), ((1.1, 1.0, "said"), "fail"), ((float("nan"), 1.0, "said"), "fail"),
    ((0.0, float("nan"), "said"), "fail"), (RuntimeError("broken"), "not run"), (None, "not run"),
])
def test_what_a_check_measures_decides(result, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(subject: card.Subject) -> card.Measured | None:
        if isinstance(result, Exception):
            raise result
        return result

    for only in card.CHECKS:
        monkeypatch.setitem(card.CHECKS, only, (lambda subject: (0.0, 1.0, "said"), "meaning"))
    assert measured(trained())["trusted"]
    monkeypatch.setitem(card.CHECKS, "slope", (measure, "meaning"))
    claim = measured(trained())
    check = next(check for check in claim["checks"] if check["name"] == "slope")
    assert check["status"] == status and claim["trusted"] == (status == "pass" or result is None)
    assert ("meaning" in check["sentence"]) == (status == "fail")
    assert bool(card.warnings(claim, N, N)) != claim["trusted"]


def test_numbers_without_a_trusted_card_are_marked() -> None:
    assert card.mark({"card": {"trusted": True}}) == ""
    assert card.mark({"card": {"trusted": False}}) == card.mark({"card": {}}) == card.mark({}) == card.MARK


def test_a_card_changes_nothing() -> None:
    model = copy.deepcopy(trained()).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    card.build(model, *images(), found={}, n=N, classes=10, eps=MIDDLE, alpha=MIDDLE / 4, seed=0, batch_size=100)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(layer.training for layer in model.modules())


# ---- single checks ---------------------------------------------------------------------------------------------------

def accuracies(n: int = 1000, **percent: float) -> dict[str, Tensor]:
    return {column: torch.arange(n) < value * n / 100 for column, value in percent.items()}


def passes(name: str, **subject) -> bool:
    value, threshold, _ = card.CHECKS[name][0](SimpleNamespace(**subject))
    return value <= threshold


@pytest.mark.parametrize("name, sound, broken", [
    ("chance", dict(clean=82), dict(clean=12)),
    ("overfitting", dict(clean=82, fgsm=56, pgd10=52), dict(clean=85, fgsm=80, pgd10=0.1)),
    ("overfitting", dict(clean=95, fgsm=20, pgd10=0), dict(clean=35, fgsm=27, pgd10=0)),  # standard training; collapsed
    ("iterations", dict(fgsm=56, pgd50=51), dict(fgsm=40, pgd50=60)),
    ("steps", dict(pgd50=50, pgd100=49), dict(pgd50=50, pgd100=40)),
    ("margin", dict(pgd50=50, cw=48), dict(pgd50=50, cw=30)),
    ("margin", dict(pgd50=12, cw=9), dict(pgd50=12, cw=2)),
])
def test_columns_that_disagree(name: str, sound: dict, broken: dict) -> None:
    assert passes(name, standing=accuracies(**sound), classes=10) and not passes(name, standing=accuracies(**broken), classes=10)


@pytest.mark.parametrize("clean, ours, aa, expected", [
    (90, 60, 47, True), (90, 60, 5, False),  # of what AutoAttack fools, PGD misses much
    (98, 42, 5.6, False), (98, 42, 26, True),  # it misses little of that, and is eight times as high all the same
    (0.2, 0.2, 0, True),  # two of two: too few to tell
    (10, 100, 0, False),  # more stand PGD than were right
    (90, 90, 90, True)])
def test_a_pgd_that_misses_what_autoattack_finds(clean: float, ours: float, aa: float, expected: bool) -> None:
    standing = accuracies(clean=clean)
    assert passes("pgd and autoattack", white_box=accuracies(pgd=ours)["pgd"], found=accuracies(aa=aa), standing=standing, n=1000) == expected


def test_a_start_that_decides() -> None:
    for second, expected in ((45, True), (20, False)):
        assert passes("restarts", standing=accuracies(pgd50=50), restarted=accuracies(pgd50=second)["pgd50"]) == expected


def test_the_second_start_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        subject = card.Subject(trained(), *images(), {}, N, 10, MIDDLE, MIDDLE / 4, 7, 100)
    seeds, measure = [], card.Subject.measure
    monkeypatch.setattr(card.Subject, "measure", lambda self, *columns, seed=None, **more: seeds.append(seed) or measure(self, *columns, seed=seed, **more))
    assert len(subject.restarted) == N and seeds == [8]


def only_whole_pixels(x: Tensor) -> Tensor:
    whole = ((255 * x - (255 * x).round()).abs() < 1e-3).flatten(1).all(1)
    return torch.where(whole[:, None, None, None], x, 1 - x)


@pytest.mark.parametrize("name, broken, found", [
    ("bf16", lambda: Around(after=lambda z: z + 1e4), {}),
    ("uint8", lambda: Around(before=only_whole_pixels), {}),
    ("radius zero", trained, {"clean": torch.arange(N) % 2 == 0}),  # a clean column of another network
])
def test_checks_that_nothing_in_the_zoo_needs(name: str, broken: Callable[[], nn.Module], found: dict[str, Tensor]) -> None:
    for model, columns, expected in ((trained(), {}, "pass"), (broken(), found, "fail")):
        with torch.random.fork_rng():
            subject = card.Subject(model, *images(), columns, N, 10, MIDDLE, MIDDLE / 4, 0, 100)
            assert card.examine(name, subject)["status"] == expected


def test_a_difference_is_of_the_same_images() -> None:
    higher, lower = torch.tensor([1, 1, 1, 0], dtype=torch.bool), torch.tensor([1, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert card.excess(higher, lower) == (25.0, 196 * 3 ** 0.5 / 4)
    assert torch.equal(card.worst(higher, lower), torch.tensor([True, False, False, False]))


def autoattack_file(path: Path, change: str = "") -> tuple[dict[str, Tensor], Path]:
    """What AutoAttack could have left of the trained network: PGD's images, here, and verdicts that are theirs."""
    x, y = images()
    points = data.to_images(x)
    x_adv = points + attacks.pgd(trained(), points, y, eps=MIDDLE, alpha=MIDDLE / 4, steps=50)
    if change == "ball":
        x_adv[3] += torch.where(x_adv[3] > 0.5, -MIDDLE, MIDDLE) * 2.1
    if change == "range":  # inside the ball, and blacker than black
        black = points[3].flatten().argmin()
        x_adv[3].view(-1)[black] = points[3].flatten()[black] - MIDDLE / 2
    if change == "nan":
        x_adv[3] = torch.nan
    last = attacks.predict(trained(), x_adv) == y
    if change == "verdicts":
        last[:2] = ~last[:2]
    standing = {name: last.clone() for name in attacks.AUTOATTACK}
    if change == "square":
        standing |= {name: last | True for name in attacks.AUTOATTACK[:3]}
    torch.save({"standing": standing, "x_adv": x_adv}, path)
    return {"aa": standing["square"]}, path


@pytest.mark.parametrize("change, flagged", [
    ("", set()), ("ball", {"bounds"}), ("range", {"bounds"}), ("nan", {"bounds"}), ("verdicts", {"recomputed"}), ("square", {"autoattack's square"}),
])
def test_autoattacks_file_is_checked(change: str, flagged: set[str], tmp_path: Path) -> None:
    found, saved = autoattack_file(tmp_path / "autoattack.pth", change)
    keep = {"bounds", "recomputed", "autoattack's square", "pgd and autoattack"}
    with torch.random.fork_rng():
        subject = card.Subject(trained(), *images(), found, N, 10, MIDDLE, MIDDLE / 4, 0, 100, torch.load(saved, weights_only=True))
        status = {name: card.examine(name, subject)["status"] for name in card.CHECKS if name in keep}
    assert {name for name in status if status[name] != "pass"} == flagged


# ---- the attack without a gradient -----------------------------------------------------------------------------------

def squared(model: nn.Module, x: Tensor, y: Tensor, queries: int = 300, seed: int = 0) -> Tensor:
    return attacks.square(model, x, y, eps=0.1, queries=queries, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """Two classes apart by w . x - threshold: the smallest perturbation that fools it is known."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * 6 * 5).reshape(3, 6, 5).sin())
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).sum((1, 2, 3)) - self.threshold
        return torch.stack([score, -score], 1)


def test_planted_adversarial_examples_are_found() -> None:
    """On a linear network: PGD wherever there is one, random search where there are plenty, and neither where there is none."""
    x, y = torch.full((4, 3, 6, 5), 0.5), torch.zeros(4, dtype=torch.int64)
    weight = Linear(0).weight
    reach, middle = 0.1 * weight.abs().sum().item(), (0.5 * weight).sum().item()
    for part, by_gradient, by_search in ((0.5, True, True), (0.999, True, None), (1.001, False, False)):
        model = Linear(middle - part * reach)
        delta = attacks.pgd(model, x, y, eps=0.1, alpha=0.025, steps=10)
        assert (attacks.predict(model, x + delta) != y).all() == by_gradient
        delta = squared(model, x, y)
        if by_search is not None:
            assert (attacks.predict(model, x + delta) != y).all() == by_search
        assert delta.abs().max() <= 0.1 and 0 <= (x + delta).min() and (x + delta).max() <= 1


def test_random_search_is_a_function_of_its_generator_and_climbs() -> None:
    x, y = torch.rand(5, 3, 6, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(5, dtype=torch.int64)
    model = Linear(-100.0)  # out of reach: nobody falls, everybody climbs
    few, many = squared(model, x, y, queries=1), squared(model, x, y)
    assert torch.equal(many, squared(model, x, y)) and not torch.equal(many, squared(model, x, y, seed=1))
    before, after = (attacks.margins(model(x + delta), y) for delta in (few, many))
    assert (after > before).all()
    worst = (x - 0.1 * model.weight.sign()).clamp(0, 1)  # where the first class's logit is smallest in the ball
    assert (after <= attacks.margins(model(worst), y) + 1e-4).all()


def test_random_search_leaves_alone_what_is_misclassified() -> None:
    x, y = torch.full((2, 3, 6, 5), 0.5), torch.tensor([0, 1])  # the second is wrong from the start
    model = Linear(-100.0)
    assert torch.equal(squared(model, x, y)[1], squared(model, x, y, queries=1)[1])
