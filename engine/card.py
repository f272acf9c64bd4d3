"""The claim card: what a robust accuracy must pass before it is believed. It fails closed. See docs/claim-card.md.

A card is trusted only when every required check ran and passed; one that raised, or was never run, did not pass. The
list follows the evaluation guide of Carlini et al. (arXiv 1902.06705, section 5), the flags of AutoAttack (Croce & Hein,
ICML 2020) and the indicators of attack failure (Pintor et al., NeurIPS 2022).
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
from engine import checkpoint, evaluate
from engine.data import to_images
from engine.random_streams import evaluation_generator, in_ball
from utils import eval_mode, inside_image

MINIMUM = 100
"""Fewer images tell nothing: the thresholds' binomial part alone is then more than ten points."""
QUERIES = 300
MARK = "†"
Measured = tuple[float, float, str]
"""A value, what it may be at most, and what was measured in words."""


@dataclass
class Subject:
    """A model on the images of its card, and what was measured of it; computed once, when a check first asks.

    Args:
        model: in eval mode.
        x, y: all images evaluated, (N, H, W, C) uint8, and labels (N,); the card's are the first n.
        found: the evaluation's verdicts, (N,) bool a column; those missing here are measured on the first n.
        saved: what `evaluate.auto_attack` left, or None where no AutoAttack was run.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    found: dict[str, Tensor]
    n: int
    classes: int
    eps: float
    alpha: float
    seed: int
    batch_size: int
    saved: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.images, self.labels = to_images(self.x[:self.n].to(self.device)), self.y[:self.n].to(self.device)
        self.before = hashes(self.model)

    def batched(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function over batches of the evaluation's size, its results joined."""
        parts = zip(*(tensor.split(self.batch_size) for tensor in tensors))
        return torch.cat([function(*(tensor.to(self.device) for tensor in part)) for part in parts])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return self.batched(self.model, images).float()

    def measure(self, *columns: str, eps: float | None = None, alpha: float | None = None, seed: int | None = None) -> dict[str, Tensor]:
        return evaluate.verdicts(
            self.model, self.x[:self.n], self.y[:self.n], columns=columns, batch_size=self.batch_size, eps=eps or self.eps,
            alpha=alpha or self.alpha, seed=self.seed if seed is None else seed)

    @cached_property
    def clean(self) -> Tensor:
        """Logits of the card's images."""
        return self.logits(self.images)

    @cached_property
    def standing(self) -> dict[str, Tensor]:
        """Verdicts: of all images where the evaluation has the column, of the card's where not."""
        return self.measure("clean", "fgsm", "pgd10", "pgd50", "pgd100", "cw") | self.found

    @cached_property
    def restarted(self) -> Tensor:
        return self.measure("pgd50", seed=self.seed + 1)["pgd50"]

    @cached_property
    def white_box(self) -> Tensor:
        """(n,) bool: stood every attack that follows a gradient."""
        return worst(self.standing["pgd50"], self.standing["pgd100"], self.standing["cw"], self.restarted)

    @cached_property
    def adversarial(self) -> tuple[Tensor, Tensor]:
        """PGD-10's images, and their verdicts as judged at once."""
        starts = self.start("ball")
        x_adv = self.batched(lambda x, y, start: x + attacks.pgd(
            self.model, x, y, eps=self.eps, alpha=self.alpha, steps=10, start=start), self.images, self.labels, starts)
        return x_adv, self.batched(self.predict, x_adv) == self.labels

    def predict(self, x: Tensor) -> Tensor:
        return attacks.predict(self.model, x)

    def start(self, stream: str) -> Tensor:
        """Uniform in the ball: the same for every model."""
        return in_ball(self.images.shape, self.eps, evaluation_generator(self.seed, stream), self.device)


def hashes(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer, those that are never saved included."""
    return {name: checkpoint.digest({name: tensor}) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def worst(*verdicts: Tensor) -> Tensor:
    """Stood all of them, image by image, on the images that all have."""
    n = min(map(len, verdicts))
    return reduce(torch.logical_and, (verdict[:n] for verdict in verdicts))


def percent(verdict: Tensor) -> float:
    return 100 * verdict.float().mean().item()


def excess(higher: Tensor, lower: Tensor) -> tuple[float, float]:
    """By how many points one accuracy is above another on the same images, and 1.96 standard errors of that (McNemar's, without the difference's square)."""
    n = min(len(higher), len(lower))
    higher, lower = higher[:n].cpu(), lower[:n].cpu()
    return percent(higher) - percent(lower), 196 * (higher != lower).sum().item() ** 0.5 / n


def spread(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits, relative to the largest logit beside its row's mean."""
    return ((a - b).abs().max() / (a - a.mean(1, keepdim=True)).abs().max()).item()


# ---- the network -----------------------------------------------------------------------------------------------------

def finite(of: Subject) -> Measured:
    logits = torch.cat([of.clean, of.logits(of.adversarial[0])])
    bad = (~logits.isfinite()).any(1).sum().item()
    return bad, 0, f"{bad} of {len(logits)} clean and adversarial images have a logit that is not finite"


def determinism(of: Subject) -> Measured:
    value = spread(of.clean, of.logits(of.images))
    return value, 1e-4, f"two passes over the same images differ by {value:.1e} of the largest logit"


def batch(of: Subject) -> Measured:
    order = torch.randperm(of.n, generator=evaluation_generator(of.seed, "order")).to(of.device)
    shuffled = torch.empty_like(of.clean)
    shuffled[order] = of.logits(of.images[order])
    few = of.images[:16]
    with torch.no_grad():
        alone = torch.cat([of.model(image) for image in few.split(1)]).float()
    value = torch.tensor([spread(of.clean, shuffled), spread(of.clean[:16], alone)]).max().item()  # nan where one is
    return value, 1e-4, f"an image's logits move by {value:.1e} of the largest one with the batch that it is in"


def logits(of: Subject) -> Measured:
    total, log_total = of.clean.sum(1) - 1, of.clean.logsumexp(1)
    normalised = (of.clean.amin(1) >= 0) & (total.abs() < 1e-3) | (log_total.abs() < 1e-3)
    return percent(normalised), 10, f"the outputs of {percent(normalised):.1f} % of the images are probabilities, or their logarithms"


def chance(of: Subject) -> Measured:
    verdict = of.standing["clean"]
    limit = 100 - 100 / of.classes - 196 / len(verdict) ** 0.5
    return 100 - percent(verdict), limit, f"clean accuracy {percent(verdict):.1f} % with {of.classes} classes"


# ---- the attack's own books ------------------------------------------------------------------------------------------

def radius_zero(of: Subject) -> Measured:
    x_adv = of.batched(lambda x, y: x + attacks.pgd(of.model, x, y, eps=0.0, alpha=of.alpha, steps=2), of.images, of.labels)
    differ = (of.batched(of.predict, x_adv) == of.labels).cpu() != of.standing["clean"][:of.n]
    return percent(differ), 1, f"at radius 0 the verdicts of {percent(differ):.1f} % of the images differ from the clean ones"


def adversarial_images(of: Subject) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Images, labels, adversarial images and the verdicts written down for them: of PGD here, and of AutoAttack's file."""
    yield of.images, of.labels, *of.adversarial
    if of.saved:
        last = of.saved.get("unfinished") or {"standing": list(of.saved["standing"].values())[-1]}  # one that went beyond the columns asked for
        yield to_images(of.x), of.y, of.saved["x_adv"], last["standing"]


def bounds(of: Subject) -> Measured:
    largest = [torch.zeros(())]
    for x, _, x_adv, _ in adversarial_images(of):
        for here, image in zip(x.split(of.batch_size), x_adv.split(of.batch_size)):
            kept = [image]
            if float(255 * of.eps).is_integer():  # only then does rounding to uint8 stay in the ball
                kept.append((255 * image).round() / 255)
            largest += [part.cpu() for a in kept for part in ((a - here).abs().max() - of.eps, -a.min(), a.max() - 1)]
    beyond = torch.stack(largest).max().item()  # nan where one is
    return beyond, 1e-6, f"an adversarial image leaves the ball or the range [0, 1] by {beyond:.1e}"


def recomputed(of: Subject) -> Measured:
    differ = max(percent((of.batched(of.predict, x_adv.flip(0)).flip(0).cpu() == y.cpu()) != verdict.cpu()) for _, y, x_adv, verdict in adversarial_images(of))
    return differ, 0.5, f"judged again, in another order, {differ:.2f} % of PGD's or AutoAttack's images have another verdict"


def uint8(of: Subject) -> Measured | None:
    if of.eps < 2 / 255:
        return None
    x_adv, verdict = of.adversarial
    value, error = excess(of.batched(of.predict, (255 * x_adv).round() / 255) == of.labels, verdict)
    return value, 5 + error, f"rounded to 8 bits, the adversarial images are classified {value:.1f} points better"


# ---- gradients -------------------------------------------------------------------------------------------------------

def gradients(of: Subject) -> Measured:
    def dead(x: Tensor, y: Tensor) -> Tensor:
        largest = [attacks.input_gradient(of.model, x, y, loss).flatten(1).abs().amax(1) for loss in (summed_cross_entropy, summed_margin)]
        return torch.stack([~(g.isfinite() & (g > 1e-30)) for g in largest]).any(0)

    value = percent(of.batched(dead, of.images + inside_image(of.start("ball"), of.images), of.labels))
    return value, 1, f"the gradient of cross-entropy or margin is zero, underflows or is not finite on {value:.1f} % of the images"


def slope(of: Subject) -> Measured:
    h = of.eps / 100
    points = (of.images + of.start("ball")).clamp(h, 1 - h)
    directions = of.start("directions").sign()

    def slopes(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        predicted = (attacks.input_gradient(of.model, x, y, summed_margin) * d).flatten(1).sum(1)
        with torch.no_grad():
            measured = (attacks.margins(of.model(x + h * d), y) - attacks.margins(of.model(x - h * d), y)) / (2 * h)
        return torch.stack([predicted, measured], 1)

    value = 1 - torch.corrcoef(of.batched(slopes, points, of.labels, directions).double().T)[0, 1].item()
    return value, 0.2, f"the margin's slope along random directions correlates by {1 - value:.2f} with what the gradient says of it"


def summed_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")  # a mean would make an image's gradient the batch size's


def summed_margin(z: Tensor, y: Tensor) -> Tensor:
    return attacks.margins(z, y).sum()


# ---- attacks against each other --------------------------------------------------------------------------------------

def ladder(of: Subject) -> Measured:
    radii = sorted({*(r for r in (of.eps / 2, of.eps, 2 * of.eps, 4 * of.eps) if r < 0.5), 0.5})  # at 1/2 every image can be made grey
    rungs = [of.standing["clean"][:of.n], *(of.measure("pgd20", eps=r, alpha=r / 4)["pgd20"] for r in radii)]
    rises = (excess(larger, smaller) for smaller, larger in zip(rungs, rungs[1:]))
    accuracies = ", ".join(f"{percent(verdict):.1f} % at {255 * r:g}/255" for r, verdict in zip((0, *radii), rungs))
    return max(percent(rungs[-1]) - 4, *(rise - error for rise, error in rises)), 1, f"PGD-20 leaves {accuracies}"


def iterations(of: Subject) -> Measured:
    value, error = excess(of.standing["pgd50"], of.standing["fgsm"])
    return value, 2 + error, f"one step of FGSM finds {value:.1f} points more than PGD-50"


def steps(of: Subject) -> Measured:
    value, error = excess(of.standing["pgd50"], of.standing["pgd100"])
    return value, 2 + error, f"50 more steps of PGD take {value:.1f} points"


def restarts(of: Subject) -> Measured:
    value, error = excess(of.standing["pgd50"], worst(of.standing["pgd50"], of.restarted))
    return value, 12 + error, f"another start of PGD-50 takes {value:.1f} points"


def margin(of: Subject) -> Measured:
    value, error = excess(of.standing["pgd50"], of.standing["cw"])
    return value, min(10, percent(of.standing["pgd50"]) / 3) + error, f"20 steps on the margin find {value:.1f} points more than 50 on cross-entropy"


def overfitting(of: Subject) -> Measured:
    n = min(len(of.standing[column]) for column in ("clean", "fgsm", "pgd10"))
    clean, one, ten = (percent(of.standing[column][:n]) for column in ("clean", "fgsm", "pgd10"))
    variance = one * (100 - one) + 2.5 ** 2 * ten * (100 - ten)
    return one - max(2.5 * ten, clean / 2), 1.96 * (variance / n) ** 0.5, f"FGSM {one:.1f} % against PGD-10 {ten:.1f} % and clean {clean:.1f} %"


def shorter_step(of: Subject) -> Measured:
    delta = of.batched(lambda x, y: attacks.fgsm(of.model, x, y, eps=of.eps), of.images, of.labels)
    whole, *shorter = (of.batched(of.predict, of.images + part * delta) == of.labels for part in (1, 0.75, 0.5, 0.25))
    value, error = excess(whole, worst(whole, *shorter))
    return value, 10 + error, f"a quarter, a half or three quarters of FGSM's step takes {value:.1f} points more than all of it"


def black_box(of: Subject) -> Measured:
    standing = of.white_box.nonzero().squeeze(1).to(of.device)
    if len(standing) == 0:
        return 0.0, 0.0, "no image stood the gradient's attacks"
    generator = evaluation_generator(of.seed, "square")
    x, y = of.images[standing], of.labels[standing]
    delta = of.batched(lambda x, y: attacks.square(of.model, x, y, eps=of.eps, queries=QUERIES, generator=generator), x, y)
    fell = (of.batched(of.predict, x + delta) != y).sum().item()
    stood = len(standing)
    limit = min(8, max(4, 40 * stood / of.n))  # two fifths of those that stood, where that is between 4 and 8 points
    return 100 * fell / of.n, limit + 196 * (fell * (1 - fell / stood)) ** 0.5 / of.n, (
        f"{QUERIES} queries of random search fool {fell} of the {stood} images that stood every gradient")


def pgd_autoattack(of: Subject) -> Measured | None:
    if "aa" not in of.found:
        return None
    ours, theirs, clean = of.white_box, of.found["aa"][:of.n], of.standing["clean"][:of.n]
    missed = (clean & ours & ~theirs).sum().item()

    def beyond(among: Tensor, limit: float) -> tuple[float, float]:
        n = max(1, among.sum().item())
        return 100 * missed / n, limit + 1.96 * (limit * (100 - limit) / n) ** 0.5  # the limit's own error: that of all of one image is none

    fooled, standing = clean & ~theirs, clean & ours
    value, threshold = max(beyond(fooled, 40), beyond(standing, 60), key=lambda pair: pair[0] - pair[1])
    return value, threshold, (f"PGD and margin miss {missed} of the {fooled.sum()} images that AutoAttack fools, and leave {standing.sum()} standing")


def autoattack_square(of: Subject) -> Measured | None:
    if "aa" not in of.found:
        return None
    value, error = excess(of.saved["standing"]["fab-t"], of.saved["standing"]["square"])
    return value, 2 + error, f"AutoAttack's Square takes {value:.1f} points more than its three attacks that follow a gradient"


def bf16(of: Subject) -> Measured:
    reference = of.clean.argmax(1)  # before autocast begins
    with torch.autocast(of.device.type, torch.bfloat16):
        flips = percent(of.logits(of.images).argmax(1) != reference)
    return flips, 5, f"{flips:.1f} % of the clean predictions are others in bf16"


def state(of: Subject) -> Measured:
    after = hashes(of.model)
    changed = [name for name in of.before.keys() | after.keys() if of.before.get(name) != after.get(name)]
    training = sum(layer.training for layer in of.model.modules())
    return len(changed) + training, 0, f"{len(changed)} parameters or buffers have changed, and {training} layers are in training mode"


CHECKS: dict[str, tuple[Callable[[Subject], Measured | None], str]] = {
    "finite": (finite, "the weights are damaged, or the network hides behind numbers that cannot be compared"),
    "determinism": (determinism, "the network is randomised: an attack must average over its randomness"),
    "batch": (batch, "predictions depend on other images: BatchNorm in training mode, or another normalisation over the batch"),
    "logits": (logits, "softmax hides gradients: let the network return its logits"),
    "chance": (chance, "near chance: wrong weights, architecture or normalisation?"),
    "radius zero": (radius_zero, "the clean accuracy and the attacks are not of the same network"),
    "bounds": (bounds, "the images are not of the threat model"),
    "recomputed": (recomputed, "the saved images do not show the accuracy that is claimed"),
    "uint8": (uint8, "the attack's success hangs on digits that no image file holds"),
    "gradients": (gradients, "gradients are masked: saturated, cut or scaled away"),
    "slope": (slope, "gradients are masked: they are not the function's own"),
    "ladder": (ladder, "a larger radius must help the attack, and half the range must leave nothing"),
    "iterations": (iterations, "gradients are masked: many steps must find more than one"),
    "steps": (steps, "PGD has not converged"),
    "restarts": (restarts, "PGD depends on its start: gradients are masked, or the loss is rugged"),
    "margin": (margin, "cross-entropy misleads PGD on this network"),
    "overfitting": (overfitting, "catastrophic overfitting or masked gradients"),
    "shorter step": (shorter_step, "catastrophic overfitting: robust at the end of the step, and not on the way there"),
    "black box": (black_box, "gradients are masked: an attack that sees none is better"),
    "pgd and autoattack": (pgd_autoattack, "PGD misleads on this network"),
    "autoattack's square": (autoattack_square, "gradients are masked: an attack that sees none is better"),
    "bf16": (bf16, "the predictions hang on rounding"),
    "state": (state, "the network changes while it is measured, or eval() does not reach all of it"),
}
"""In the order in which they run: each a measurement, and what it means when the value is above the threshold.

A measurement that returns None is optional, and there was nothing to measure: AutoAttack's, where it was not run."""


def build(
    model: nn.Module, x: Tensor, y: Tensor, *, found: dict[str, Tensor], n: int, classes: int, eps: float, alpha: float,
    seed: int, batch_size: int, saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The card of an evaluation, on its first n images (0: none, and the card is not trusted).

    Args:
        x, y, eps, alpha, seed, batch_size: as for `evaluate.verdicts`, which made `found`.
        saved: what is in the file that `evaluate.auto_attack` left, where `found` has its columns.

    Returns:
        trusted (bool), reason (a sentence), n, seconds, and checks: for each its name, status ("pass", "fail" or "not
        run"), required (bool), value, threshold (the value may be that at most; null where not run) and sentence.
    """
    began, n = time.perf_counter(), min(n, len(x))
    if n < MINIMUM:
        reason = f"the claim card was not run: it needs {MINIMUM} images, and there are {n}"
        checks = [entry(name, reason) for name in CHECKS]
    else:
        with evaluate.trustworthy(), eval_mode(model):
            subject = Subject(model, x, y, found, n, classes, eps, alpha, seed, batch_size, saved)
            checks = [examine(name, subject) for name in CHECKS]
        wrong = [check["name"] for check in checks if check["required"] and check["status"] != "pass"]
        reason = f"not passed: {', '.join(wrong)}" if wrong else "every required check passed"
    trusted = all(check["status"] == "pass" for check in checks if check["required"])
    return {"trusted": trusted, "reason": reason, "n": n, "seconds": time.perf_counter() - began, "checks": checks}


def entry(
    name: str, sentence: str, *, status: str = "not run", required: bool = True, value: float | None = None, threshold: float | None = None,
) -> dict[str, Any]:
    return {"name": name, "status": status, "required": required, "value": value, "threshold": threshold, "sentence": sentence}


def examine(name: str, subject: Subject) -> dict[str, Any]:
    """One check; whatever it raises means that it was not run."""
    measure, meaning = CHECKS[name]
    try:
        measured = measure(subject)
        if measured is None:
            return entry(name, "nothing to measure", required=False)
        value, threshold, sentence = measured
        passed = value <= threshold  # false for nan
    except Exception as error:  # of a network that somebody else wrote
        return entry(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    said = sentence if passed else f"{sentence}: {meaning}"
    return entry(name, said, status="pass" if passed else "fail", value=value, threshold=threshold)


def warnings(card: dict[str, Any], n: int, total: int) -> list[str]:
    """Why the numbers are not to be trusted, or not to be compared, as they stand: a sentence each."""
    said = [f"measured on the first {n} of {total} images: not comparable with a figure on all of them"] if n < total else []
    wrong = [check for check in card["checks"] if check["required"] and check["status"] != "pass"]
    if card["n"] < MINIMUM:
        return [*said, card["reason"]]
    return said + [f"{check['name']}{' was not run' if check['status'] == 'not run' else ''}: {check['sentence']}" for check in wrong]


def mark(evaluation: dict[str, Any]) -> str:
    """What stands behind every number of an evaluation.json: nothing where its card is trusted; it has none: not trusted."""
    return "" if evaluation.get("card", {}).get("trusted") else MARK


def text(card: dict[str, Any]) -> str:
    """The card in a few lines."""
    lines = [f"claim card, {card['n']} images, {card['seconds']:.0f} s: {'trusted' if card['trusted'] else f'NOT TRUSTED {MARK}'} ({card['reason']})"]
    for status in ("pass", "fail", "not run"):
        names = [check["name"] for check in card["checks"] if check["status"] == status]
        lines += [f"  {status}: {', '.join(names)}"] if names else []
    return "\n".join(lines)
