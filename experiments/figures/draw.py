"""From a figure's JSON to .pdf and .png: one function a figure. Okabe & Ito's colours, and a line style and a marker besides."""
from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from engine.card import MARK
from experiments import show

COLUMN, PAGE = 3.4, 6.9  # inches: widths of a column and of a page
# Type 42: text that stays text, which publishers ask for.
RC = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
      "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.linewidth": 0.7,
      "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False, "pdf.fonttype": 42, "figure.constrained_layout.use": True}
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # without the yellow, too pale for a line
MARKERS = "osDv^<>ph*X"
OWN = {label: dict(color=show.STYLES[label][0], linestyle=show.STYLES[label][1], marker=marker)
       for label, marker in {"FGSM-SDI": "o", "FGSM-RS": "s", "PGD-AT": "D", "FGSM-GA": "v", "FGSM-AT": "X"}.items()}
OWN["FGSM-CKPT"] = dict(color="#CC79A7", linestyle=(0, (5, 1)), marker="^")
OWN |= dict.fromkeys(("Free-AT(m=8)", "Free-AT(m=4)", "FREE-AT"), dict(color="#56B4E9", linestyle=(0, (3, 1, 1, 1)), marker="P"))
OWN["GRAD-ALIGN"] = OWN["FGSM-GA"]
OTHERS = [(colour, line) for line in ("-", (0, (1, 1)), (0, (8, 2, 1, 2))) for colour in COLOURS if (colour, line) != ("#0072B2", "-")]
COLUMNS = {"clean": "clean", "pgd10": "PGD-10"}
PARTS = {"train": "training images", "held-out": "held-out images"}


def save(content: dict[str, Any], path: Path) -> None:
    """Draws a figure's JSON into .pdf and .png beside `path`; one that is not of a clean commit says so."""
    with plt.rc_context(RC):
        figure = globals()[content["figure"].replace("-", "_")](content)
        if content["provenance"]["dirty"] or any(run["dirty"] for run in content["runs"]):
            figure.supxlabel("measured on a tree that differs from its commit", fontsize=5, color="#888888", x=0.99, ha="right")
        show.save(figure, path)


def looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each method: the well-known ones have their own in every figure, the others hollow ones by their order."""
    found, others = {}, 0
    for label in labels:
        if label in OWN:
            found[label] = OWN[label]
        else:
            colour, line = OTHERS[others % len(OTHERS)]
            found[label] = dict(color=colour, linestyle=line, marker=MARKERS[others % len(MARKERS)], markerfacecolor="white")
            others += 1
    return found


def _lines(axis: Axes, lines: dict[str, list[dict[str, Any]]], look: dict[str, dict[str, Any]], every: bool = True) -> None:
    """Each method's mean over seeds, and a band from the lowest to the highest; what not all its seeds have is left out."""
    for label, seeds in lines.items():
        common = [x for x in seeds[0]["x"] if all(x in seed["x"] for seed in seeds)]
        values = [[seed["y"][seed["x"].index(x)] for seed in seeds] for x in common]
        axis.plot(common, [statistics.mean(v) for v in values], label=label, **look[label], markevery=1 if every else max(1, len(common) // 8))
        if len(seeds) > 1:
            axis.fill_between(common, [min(v) for v in values], [max(v) for v in values], color=look[label]["color"], alpha=0.15, linewidth=0)


def _legend(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=columns, columnspacing=1.2, handlelength=2.6)


def _epochs(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _picture(axis: Axes, image: np.ndarray, left: str = "", above: str = "") -> None:
    """One of (H, W, 1 or 3) uint8, without axes."""
    axis.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=above or None)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if left:
        axis.set_ylabel(left, rotation=0, ha="right", va="center")


def unpacked(values: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values["base64"]), np.uint8).reshape(values["shape"])


def curves(content: dict[str, Any]) -> Figure:
    panels = content["panels"]
    parts = [part for part in PARTS if any(name.startswith(part) for name in panels)]
    look = looks(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure, axes = plt.subplots(2, len(parts), figsize=(PAGE if len(parts) > 1 else COLUMN, 4.4), sharex=True, sharey="row", squeeze=False)
    for i, column in enumerate(COLUMNS):
        for axis, part in zip(axes[i], parts):
            _lines(axis, panels.get(f"{part} {column}", {}), look, every=False)
            axis.set_title(f"{PARTS[part]}, {COLUMNS[column]} (n = {' or '.join(f'{n:,}' for n in content['n'][part])})")
        axes[i, 0].set_ylabel("accuracy (%)")
    for axis in axes[1]:
        _epochs(axis)
    _legend(figure, max(axes.flat, key=lambda axis: len(axis.lines)), 6 if len(parts) > 1 else 3)
    return figure


def attack_success(content: dict[str, Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(COLUMN, 2.7))
    _lines(axis, content["lines"], looks(content["lines"]), every=False)
    _epochs(axis)
    axis.set_ylabel("success of the training attack (%)")
    _legend(figure, axis, 3)
    return figure


def radius(content: dict[str, Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(COLUMN, 2.7))
    _lines(axis, content["lines"], looks(content["lines"]))
    axis.axvline(content["epsilon"], color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axis.annotate("radius in training", (content["epsilon"], 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                  va="top", fontsize=6.5, color="#666666")
    axis.set(xlabel="radius of the attack (/255)", ylabel=f"accuracy under PGD-20 (%), n = {content['n']:,}", ylim=(0, None), xlim=(0, None))
    _legend(figure, axis, 3)
    return figure


def alignment(content: dict[str, Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(COLUMN, 2.7))
    _lines(axis, content["lines"], looks(content["lines"]))
    _epochs(axis)
    axis.set(ylabel=f"gradient alignment (cosine), n = {content['n']:,}", ylim=(min(0, axis.get_ylim()[0]), 1))
    _legend(figure, axis, 3)
    return figure


def transplants(content: dict[str, Any]) -> Figure:
    methods = dict(reversed(content["methods"].items()))  # the first one above

    def means(mode: str, key: str) -> list[float]:
        return [statistics.mean(seed[mode][key] for seed in seeds) for seeds in methods.values()]

    figure, axes = plt.subplots(1, 3, figsize=(PAGE, 0.9 + 0.2 * len(methods)), sharey=True)
    for axis, mode in zip(axes, ("training", "evaluation")):
        axis.barh(list(methods), means(mode, "perturbation"), height=0.6, color="#D55E00", label="the perturbation's label")
        axis.barh(list(methods), means(mode, "image"), left=means(mode, "perturbation"), height=0.6, color="#0072B2", hatch="////", edgecolor="white",
                  linewidth=0, label="the image's label")
        axis.set(xlabel=f"answers (%), {mode} mode", xlim=(0, 100))
    axes[2].plot(means("training", "cosine"), list(methods), "ko", label="cosine of gradients at $x$ and $x + U$")
    axes[2].plot(means("training", "agreement"), list(methods), "X", color="#E69F00", label="agreement within a class")
    axes[2].axvline(0, color="#888888", linewidth=0.8)
    axes[2].set(xlabel="gradients, training mode", xlim=(min(-0.05, axes[2].get_xlim()[0]), 1.05))
    for axis in axes:
        axis.grid(visible=False, axis="y")
    handles = [part for axis in axes[1:] for part in zip(*axis.get_legend_handles_labels())]
    figure.legend(*zip(*handles), loc="outside upper center", ncols=4, columnspacing=1.2, handlelength=1.6)
    return figure


def grad_cam(content: dict[str, Any]) -> Figure:
    images = unpacked(content["images"])
    rows: list[tuple[str, np.ndarray, np.ndarray | None, list[bool]]] = [("clean image", images, None, [False] * len(images))]
    for label, method in content["methods"].items():
        rows.append((f"{label}\nclean", images, unpacked(method["clean"]), [False] * len(images)))
        rows.append((f"{label}\nadversarial", unpacked(method["perturbed"]), unpacked(method["adversarial"]), method["wrong"]))
    side = (PAGE - 1.0) / 7
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.0 + side * len(images), side * len(rows) + 0.1), squeeze=False)
    for (left, pictures, maps, wrong), line in zip(rows, axes):
        for j, axis in enumerate(line):
            _picture(axis, pictures[j], left if j == 0 else "")
            if maps is not None:
                axis.imshow(maps[j, ..., 0], cmap="inferno", vmin=0, vmax=255, alpha=0.55, interpolation="bilinear")
            if wrong[j]:
                axis.text(0.97, 0.96, "×", transform=axis.transAxes, ha="right", va="top", color="white", fontsize=11, fontweight="bold")
    return figure


def landscape(content: dict[str, Any]) -> Figure:
    axis_values, middle, eps = content["axis"], len(content["axis"]) // 2, content["epsilon"]
    levels = {label: values[middle][middle] for label, values in content["surfaces"].items()}
    # Above the value at x: smoothed labels alone make a network's losses higher.
    rises = {label: np.array(values) - levels[label] for label, values in content["surfaces"].items()}
    most = max(abs(rise).max() for rise in rises.values())
    figure, axes = plt.subplots(1, len(rises), figsize=(0.7 + 2 * len(rises), 2.7), sharex=True, sharey=True, squeeze=False)
    for axis, (label, rise) in zip(axes[0], rises.items()):
        shades = axis.contourf(axis_values, axis_values, rise, levels=np.linspace(-most, most, 22), cmap="PuOr_r")
        lines = axis.contour(axis_values, axis_values, rise, levels=MaxNLocator(12).tick_values(-most, most), colors="#00000090", linewidths=0.5)
        axis.clabel(lines, fontsize=5.5, fmt="%g")
        axis.plot([-eps, eps, eps, -eps, -eps], [-eps, -eps, eps, eps, -eps], color="#000000", linewidth=0.8, linestyle="--")
        axis.plot(0, 0, "k.", markersize=4)
        axis.set(title=f"{label} ({levels[label]:.2f} at $x$)", xlabel="adversarial direction (/255)", aspect="equal")
        axis.grid(False)
    axes[0, 0].set_ylabel("random direction (/255)")
    bar = figure.colorbar(shades, ax=axes, ticks=MaxNLocator(6), shrink=0.9)
    bar.set_label(f"rise of cross-entropy, n = {content['n']:,}")
    bar.outline.set_visible(False)
    return figure


def initialisations(content: dict[str, Any]) -> Figure:
    images, epochs = unpacked(content["images"]), content["epochs"]
    figure, axes = plt.subplots(2 * len(images), 1 + len(epochs), figsize=(0.8 * (2 + len(epochs)), 0.8 * 2 * len(images) + 0.6), squeeze=False)
    for i, image in enumerate(images):
        _picture(axes[2 * i, 0], image, above="image" if i == 0 else "")
        axes[2 * i + 1, 0].set_visible(False)
        for j, epoch in enumerate(epochs):
            above = f"epoch {epoch['epoch']}\n" + rf"$\overline{{|\eta|}}$ = {epoch['eta_size']:.2f} $\epsilon$" if i == 0 else ""
            _picture(axes[2 * i, 1 + j], unpacked(epoch["eta"])[i], r"$\eta$" if j == 0 else "", above)
            _picture(axes[2 * i + 1, 1 + j], unpacked(epoch["delta"])[i], r"$\delta$" if j == 0 else "")
    return figure


def strategies(content: dict[str, Any]) -> Figure:
    names = {"radii": "radius (/255)", "steps": "steps", "step_sizes": "step size (/255)", "betas": r"$\beta$"}
    options, epochs = content["options"], content["epochs"]
    figure, axes = plt.subplots(1, len(options), figsize=(PAGE, 2.2), squeeze=False)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.9, 0, len(epochs)))
    for axis, (name, values) in zip(axes[0], options.items()):
        for epoch, shade, marker in zip(epochs, shades, MARKERS):
            axis.plot(values, epoch["picked"][name], color=shade, marker=marker, markersize=3, label=f"epoch {epoch['epoch']}")
        axis.axhline(1 / len(values), color="#888888", linewidth=0.8, linestyle=":", zorder=0, label="all alike")
        axis.set(xlabel=names[name], ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0, 0].set_ylabel("mean probability")
    _legend(figure, axes[0, 0], len(epochs) + 1)
    return figure


def pareto(content: dict[str, Any]) -> Figure:
    many = len(content["points"]) > 12  # the legend then stands beside a plot as wide as the page
    look, figure, axis = looks(content["points"]), *plt.subplots(figsize=(PAGE, 3.4) if many else (COLUMN, 2.9))
    middles = []
    for label, seeds in content["points"].items():
        values, minutes = ([seed[key] for seed in seeds] for key in ("value", "minutes"))
        x, y = statistics.mean(minutes), statistics.mean(values)
        low, high = seeds[0]["interval"] if len(seeds) == 1 else (min(values), max(values))
        across = {} if len(seeds) == 1 else {"xerr": [[x - min(minutes)], [max(minutes) - x]]}
        trusted = all(seed.get("trusted") for seed in seeds)  # an older file does not say, and is not
        axis.errorbar(x, y, yerr=[[y - low], [high - y]], **across, **look[label] | {"linestyle": "none"}, markersize=5, elinewidth=0.8, capsize=2,
                      **{"label": label} if trusted else {"label": f"{label} {MARK}", "alpha": 0.35})
        middles.append((x, y, trusted))
    sound = sorted((x, y) for x, y, trusted in middles if trusted)
    front = [(x, y) for x, y in sound if y >= max(other for across, other in sound if across <= x)]
    axis.plot([x for x, _ in front], [y for _, y in front], color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    attack = {"aa": "AutoAttack", "pgd50": "PGD-50"}[content["column"]]
    axis.set(xlabel="training time (minutes)", ylabel=f"{attack} accuracy (%), n = {content['n']:,}")
    times = [x for x, *_ in middles]
    if max(times) > 10 * min(times):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, None)
    place = dict(loc="outside right upper", ncols=2) if many else dict(loc="outside upper center", ncols=3)
    said = f"{MARK}, pale: no claim card stands behind it" if len(sound) < len(middles) else None
    figure.legend(*axis.get_legend_handles_labels(), handlelength=1, columnspacing=1.2, title=said, title_fontsize=7.5, **place)
    return figure
