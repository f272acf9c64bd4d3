"""What each figure shows, from runs: one function a figure, whose result is written as JSON.

Networks are measured in eval mode and fp32 unless said otherwise. A line is {"seed", "x", "y"}, and a figure has a list of
them, one a seed, for each method.
"""
from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
from engine import evaluate
from engine.card import mark
from engine.config import numbers
from engine.data import to_images
from engine.errors import Misuse
from engine.random_streams import evaluation_generator, in_ball
from experiments import show
from experiments.figures.sources import Setting, Trained, one
from models import PerturbationGenerator, StrategyNetwork
from utils import cosine, inside_image, project, untracked

RADII = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)  # in 255ths at epsilon 8, and in proportion at others
STEPS = 20
GRID, REACH = 17, 2  # of the landscape: points on each axis, and how many radii it goes to either side
SHOWN = {"grad-cam": 6, "initialisations": 3, "landscape": 50}  # images

Lines = dict[str, list[dict[str, Any]]]


def packed(values: Tensor) -> dict[str, Any]:
    """uint8 as text that json can hold."""
    return {"shape": list(values.shape), "base64": base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()}


def _lines(runs: Sequence[Trained], line: Callable[[Trained], tuple[Sequence[float], Sequence[float]]]) -> Lines:
    """Each run's line by method; a run without points has none."""
    found: Lines = {}
    for run in runs:
        x, y = line(run)
        if len(x):
            found.setdefault(run.label, []).append({"seed": run.result["seed"], "x": list(x), "y": list(y)})
    return found


def _in_batches(network: nn.Module, x: Tensor, y: Tensor, measured: Callable[[Tensor, Tensor], tuple[Tensor, ...]], size: int = 100) -> list[Tensor]:
    """Each of `measured`'s tensors (n, ...) for images (n, H, W, C) uint8, on the CPU."""
    device = next(network.parameters()).device
    with evaluate.trustworthy():
        parts = [measured(to_images(a.to(device)), b.to(device)) for a, b in zip(x.split(size), y.split(size))]
    return [torch.cat([each.detach().cpu() for each in several]) for several in zip(*parts)]


def _aligned(network: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The loss gradient at x, and (B,) its cosine with the one at x + U(-eps, eps), which may leave [0, 1]: GradAlign's measure."""
    noisy = x + in_ball(x.shape, eps, generator, x.device)
    gradient = attacks.input_gradient(network, x, y)
    return gradient, cosine(gradient, attacks.input_gradient(network, noisy, y))


def curves(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """From the logs: clean and PGD-10 accuracy in percent after each epoch; the training images' only where --measure-train had them measured."""
    def logged(part: str, column: str) -> Lines:
        def line(run: Trained) -> tuple[list[float], list[float]]:
            key = show.held_out(run.content, column) if part == "held-out" else f"{part}_{column}"
            rows = [row for row in run.log if key in row]
            return [row["epoch"] for row in rows], [row[key] for row in rows]
        return _lines(runs, line)

    n = {"train": [run.result["config"]["measure_train"] for run in runs], "held-out": [run.result["checkpoints"]["last"]["pgd10"]["n"] for run in runs]}
    return {"n": {part: sorted(set(counts) - {0}) for part, counts in n.items()},
            "panels": {f"{part} {column}": lines for column in ("clean", "pgd10") for part in n if (lines := logged(part, column))}}


def attack_success(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """From the logs: the percentage of training images that the network, at the moment of its update on them, got wrong under the training attack."""
    return {"lines": _lines(runs, lambda run: ([row["epoch"] for row in run.log], [100 - row["train_accuracy"] for row in run.log]))}


def grad_cam(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of the true class at the last stage's output, by captum; adversarial: PGD-10 on that network.

    Shown are the first test images, one a class, that all networks classify right. `cosine` is the mean over all test images
    measured of that between the maps of the clean and of the adversarial image, where neither map is zero everywhere.
    """
    from captum.attr import LayerGradCam  # here, because importing it is slow and only this figure needs it
    runs = _first_seeds(runs)
    x, y = setting.images(runs)
    looked = {}
    for run in runs:
        network = run.network(setting.checkpoint, setting.device)
        stage = [module for module in network.children() if isinstance(module, nn.Sequential) and len(module)][-1]
        cam, eps, generator = LayerGradCam(network, stage), run.eps, evaluation_generator(0, "figures")

        def look(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            perturbed = images + attacks.pgd(network, images, labels, eps=eps, alpha=eps / 4, steps=10, start=in_ball(images.shape, eps, generator, images.device))
            maps = (cam.attribute(each, target=labels, relu_attributions=True) for each in (images, perturbed))
            return perturbed, *maps, *(attacks.predict(network, each) == labels for each in (images, perturbed))

        looked[run.label] = _in_batches(network, x, y, look)
    right = torch.stack([found[3] for found in looked.values()]).all(0)
    firsts = {label: i for i, label in reversed(list(enumerate(y.tolist()))) if right[i]}
    chosen = sorted(firsts.values())[:SHOWN["grad-cam"]]

    def shown(maps: Tensor) -> dict[str, Any]:
        whole = F.interpolate(maps[chosen], x.shape[1:3], mode="bilinear", align_corners=False)
        return packed(_bytes(whole / whole.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)))

    methods = {}
    for label, (perturbed, clean, adversarial, _, stands) in looked.items():
        similar = cosine(clean, adversarial)
        methods[label] = {"clean": shown(clean), "adversarial": shown(adversarial), "perturbed": packed(_bytes(perturbed[chosen])),
                          "wrong": (~stands[chosen]).tolist(), "cosine": similar.nanmean().item(), "compared": int((~similar.isnan()).sum())}
    return {"n": len(x), "images": packed(x[chosen]), "methods": methods}


def _bytes(values: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] to (N, H, W, C) uint8."""
    return (255 * values.detach()).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _first_seeds(runs: Sequence[Trained]) -> list[Trained]:
    """Each method's first seed: a picture shows one network."""
    return list({run.label: run for run in reversed(runs)}.values())[::-1]


def landscape(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Mean cross-entropy at x + a sign(gradient at x) + b r, with r random signs, the same for all networks; not clipped to [0, 1]."""
    runs = _first_seeds(runs)
    epsilon = one("radius", [run.result["config"]["epsilon"] for run in runs])
    x, y = setting.images(runs, n=min(SHOWN["landscape"], setting.n))
    axis = [epsilon * REACH * (2 * i / (GRID - 1) - 1) for i in range(GRID)]
    x, y = to_images(x).to(setting.device), y.to(setting.device)
    other = (2 * torch.randint(2, x.shape, generator=evaluation_generator(0, "figures")) - 1).to(setting.device)
    surfaces = {}
    with evaluate.trustworthy():
        for run in runs:
            network = run.network(setting.checkpoint, setting.device)
            sign = attacks.input_gradient(network, x, y).sign()
            with torch.no_grad():
                surfaces[run.label] = [[F.cross_entropy(network(x + a / 255 * sign + b / 255 * other), y).item() for a in axis] for b in axis]
    return {"n": len(x), "epsilon": epsilon, "axis": axis, "surfaces": surfaces}


def initialisations(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """FGSM-SDI's eta = eps g(x, s_x) and delta (Eq. 6 and 7) at each snapshot, in training's own setting.

    One batch of test images; the classifier's BatchNorm sees it as in training, its averages untouched; the generator's is in eval mode.
    """
    run = _first_seeds(runs)[0]
    config = run.result["config"]
    if run.result["method"] != "fgsm-sdi":
        raise Misuse(f"figure initialisations: {run.label} has no generator; choose a run of train_fgsm_sdi.py")
    x, y = setting.images([run], n=config["batch_size"])
    x, y = to_images(x).to(setting.device), y.to(setting.device)
    shown, epochs = SHOWN["initialisations"], []
    for epoch, path in _snapshots(run).items():
        network, state = run.at(path, setting.device)
        generator = PerturbationGenerator(x.shape[1], inputs=config["generator_input"], layout=config["generator_layout"]).to(setting.device).eval()
        generator.load_state_dict(state["kept"]["generator"])
        with evaluate.trustworthy(), untracked(network.train()), torch.no_grad():
            eta, delta, gradient = initialised(network, generator, x, y, run.eps, config["alpha"] / 255)
        epochs.append({"epoch": epoch, "eta": packed(_bytes((eta[:shown] / run.eps + 1) / 2)), "delta": packed(_bytes((delta[:shown] / run.eps + 1) / 2)),
                       "eta_size": (eta.abs().mean() / run.eps).item(), "agreement": (eta.sign() == gradient.sign()).double().mean().item()})
    return {"n": len(x), "images": packed(_bytes(x[:shown])), "epsilon": config["epsilon"], "epochs": epochs}


def initialised(network: nn.Module, generator: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """eta, delta, and the gradient at x of whose sign eta is made."""
    gradient = attacks.input_gradient(network, x, y)
    eta = eps * generator(x, gradient.sign())
    step = project(alpha * attacks.input_gradient(network, x + eta, y).sign(), eps)
    return eta, project(eta + step, eps), gradient


def _snapshots(run: Trained) -> dict[int, Any]:
    if not (found := run.snapshots()):
        raise Misuse(f"{run.folder} has no state-<epoch>.pth of {run.label}: its training needs --snapshots with the epochs, as 1,4,7,10")
    return found


def radius(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Accuracy in percent under PGD-20 (step a quarter of the radius, random start) at each radius.

    An image that fell at one radius has fallen at every larger one, whose ball contains its adversarial image.
    """
    x, y = setting.images(runs)

    def line(run: Trained) -> tuple[list[float], list[float]]:
        network, standing, accuracies = run.network(setting.checkpoint, setting.device), torch.arange(len(x)), []
        radii = [run.result["config"]["epsilon"] / 8 * r for r in RADII]
        for r in radii:
            if len(standing):
                column = f"pgd{STEPS}" if r else "clean"
                found = evaluate.verdicts(network, x[standing], y[standing], columns=(column,), eps=r / 255, alpha=r / 255 / 4, seed=0, batch_size=100)
                standing = standing[found[column]]
            accuracies.append(100 * len(standing) / len(x))
        return radii, accuracies

    return {"n": len(x), "epsilon": one("radius", [run.result["config"]["epsilon"] for run in runs]), "lines": _lines(runs, line)}


def alignment(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Mean cosine of the loss gradients at x and at x + U(-eps, eps) (GradAlign's measure) at each snapshot; x + noise may leave [0, 1]."""
    if not (runs := [run for run in runs if run.snapshots()]):
        raise Misuse("figure alignment: no run has a state-<epoch>.pth: training needs --snapshots with the epochs, as 1,4,7,10")
    x, y = setting.images(runs)

    def line(run: Trained) -> tuple[list[int], list[float]]:
        means = []
        for path in run.snapshots().values():
            network, _ = run.at(path, setting.device)
            generator = evaluation_generator(0, "figures")
            cosines, = _in_batches(network, x, y, lambda images, labels: _aligned(network, images, labels, run.eps, generator)[1:])
            means.append(cosines.nanmean().item())
        return list(run.snapshots()), means

    return {"n": len(x), "lines": _lines(runs, line)}


def transplants(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Whose label a network answers with where one image's FGSM perturbation lies on another image of another class.

    Every image of a batch carries the one of the image after it. In training mode, which is how a training attack meets the network
    (batches are of the training's size; the last one, if shorter, is left out), and in evaluation mode.
    """
    size = one("batch size", [run.result["config"]["batch_size"] for run in runs])
    epsilon = one("radius", [run.result["config"]["epsilon"] for run in runs])
    x, y = setting.images(runs)
    whole = len(x) // size * size or len(x)
    methods: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        network = run.network(setting.checkpoint, setting.device)
        modes = {mode: _transplanted(network.train(mode == "training"), x[:whole], y[:whole], run.eps, size) for mode in ("training", "evaluation")}
        methods.setdefault(run.label, []).append({"seed": run.result["seed"], **modes})
    return {"n": whole, "epsilon": epsilon, "methods": methods}


def _transplanted(network: nn.Module, x: Tensor, y: Tensor, eps: float, size: int) -> dict[str, float]:
    """In percent: clean and FGSM accuracy; of the pairs of two classes, answers with the perturbation's label and with that of the image under it.

    cosine: alignment of the gradients at x and x + U(-eps, eps), mean. agreement: mean product of the signs of two gradients, over
    pixels and all pairs of images of one class.
    """
    generator = evaluation_generator(0, "figures")

    def look(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        gradient, aligned = _aligned(network, images, labels, eps, generator)
        delta, under = eps * gradient.sign(), images.roll(1, 0)
        seen = (images, images + inside_image(delta, images), under + inside_image(delta, under))
        return labels.roll(1), aligned, gradient.sign().flatten(1), *(attacks.predict(network, each) for each in seen)

    with untracked(network):
        below, aligned, signs, clean, own, moved = _in_batches(network, x, y, look, size)
    two, same = y != below, (y[:, None] == y).fill_diagonal_(False)

    def percent(right: Tensor) -> float:
        return 100 * right.double().mean().item()

    return {"clean": percent(clean == y), "fgsm": percent(own == y), "perturbation": percent((moved == y)[two]), "image": percent((moved == below)[two]),
            "cosine": aligned.nanmean().item(), "agreement": (signs @ signs.T / signs.shape[1])[same].mean().item()}


def strategies(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """Probability of each radius, number of steps and step size, mean over the first training images, at each snapshot."""
    run = _first_seeds(runs)[0]
    if run.result["method"] != "las-at":
        raise Misuse(f"figure strategies: {run.label} has no strategy network; choose a run of train_las_at.py")
    config, (x, y) = run.result["config"], setting.images([run], "train")
    names = ["radii", "steps", "step_sizes", *(["betas"] if config["base"] == "trades" else [])]
    scale = {name: config["epsilon"] / 8 if name in ("radii", "step_sizes") else 1 for name in names}
    options = {name: [scale[name] * value for value in numbers(name, config[name])] for name in names}
    epochs = []
    for epoch, path in _snapshots(run).items():
        _, state = run.at(path, setting.device)
        strategy = StrategyNetwork({name: len(values) for name, values in options.items()}, channels=x.shape[3], image_size=x.shape[1],
                                   width=config["strategy_width"])
        strategy.load_state_dict(state["kept"]["strategy"])
        strategy.to(setting.device).eval()
        with torch.no_grad():
            found = _in_batches(strategy, x, y, lambda images, _: tuple(F.softmax(logits, 1) for logits in strategy(images).values()))
        picked = {name: each.mean(0).tolist() for name, each in zip(names, found)}
        epochs.append({"epoch": epoch, "picked": picked})
    return {"n": len(x), "options": options, "epochs": epochs}


def pareto(runs: Sequence[Trained], setting: Setting) -> dict[str, Any]:
    """From the tables' JSON: accuracy in percent, under AutoAttack where all have it and else under PGD-50, and minutes of training.

    Only runs of one data set, radius and kind of machine, evaluated on equally many images, are comparable.
    """
    runs = [run for run in runs if setting.checkpoint in run.content["evaluations"]]
    if not runs:
        raise Misuse(f"figure pareto: no run has an evaluation of {setting.checkpoint}.pth: python reproduce.py run evaluates a table's runs")
    evaluations = [run.content["evaluations"][setting.checkpoint] for run in runs]
    metrics = [evaluation["metrics"] for evaluation in evaluations]
    column = next((name for name in ("aa", "pgd50") if all(name in found for found in metrics)), None)
    if column is None:
        raise Misuse("figure pareto: the runs have neither AutoAttack nor PGD-50 in common: choose among them with --rows or --runs")
    one("data set", [run.result["dataset"] for run in runs])
    one("radius", [run.result["config"]["epsilon"] for run in runs])
    device = one("device", ["; ".join(sorted(show.devices(run.content))) for run in runs])
    n = one("the number of images", [found[column]["n"] for found in metrics])
    points: dict[str, list[dict[str, Any]]] = {}
    for run, evaluation in zip(runs, evaluations):
        points.setdefault(run.label, []).append({"seed": run.result["seed"], "minutes": run.result["seconds"]["training"] / 60, "trusted": not mark(evaluation),
                                                 **{key: evaluation["metrics"][column][key] for key in ("value", "interval")}})
    return {"n": n, "device": device, "column": column, "points": points}
