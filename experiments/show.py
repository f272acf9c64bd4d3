"""Tables and figures, from the JSON files of results/ and from nothing else."""
from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine import record
from engine.card import MARK, mark
from engine.errors import Misuse

HEADINGS = {"clean": "Clean", "fgsm": "FGSM", "pgd10": "PGD-10", "pgd20": "PGD-20", "pgd50": "PGD-50", "cw": "C&W", "apgd": "APGD", "aa": "AA"}
# Okabe & Ito's palette, which colour-blind readers can tell apart; a line style each besides.
STYLES = {"FGSM-AT": ("#D55E00", ":"), "FGSM-RS": ("#E69F00", "--"), "FGSM-SDI": ("#0072B2", "-"),
          "FGSM-SDI, hard labels": ("#56B4E9", (0, (5, 1))), "FGSM-GA": ("#009E73", "-."), "PGD-AT": ("#000000", "-.")}

Runs = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Runs:
    """The runs in a folder of results, by method, in the order of `STYLES`; each method's by seed."""
    runs: Runs = {}
    for path in sorted(folder.glob("*.json")):
        run = record.read_json(path)
        runs.setdefault(run["label"], []).append(run)
    known = [label for label in STYLES if label in runs]
    return {label: sorted(runs[label], key=lambda run: run["run"]["seed"]) for label in [*known, *sorted(runs.keys() - set(known))]}


def is_dirty(runs: Runs) -> bool:
    """Whether any number comes from a tree that differs from its commit: such a table is never put into the README."""
    return any(dirty(run) for several in runs.values() for run in several)


def table(runs: Runs, markdown: bool) -> str:
    """The papers' columns: one row per method and checkpoint; mean and range over seeds, or the 95 % interval of one.

    How many seeds stands in a last column where that is not the same for all.
    """
    first = next(iter(runs.values()))[0]["evaluations"]
    columns = list(next(iter(first.values()))["metrics"])
    counted = len({len(several) for several in runs.values()}) > 1
    heading = ["Method", "Checkpoint", *(HEADINGS.get(c, c.upper()) for c in columns), "Training, s", *(["Seeds"] if counted else [])]
    rows = [[label, name, *(cell([run["evaluations"][name]["metrics"][c] for run in several]) + doubt(several, name) for c in columns),
             f"{statistics.mean(run['run']['seconds']['training'] for run in several):.0f}", *([str(len(several))] if counted else [])]
            for label, several in runs.items() for name in first]
    return grid(heading, rows, markdown)


def over_seeds(runs: Runs) -> str:
    """A table of runs that somebody trained and evaluated, and what its numbers are.

    Raises:
        Misuse: they were not evaluated alike.
    """
    every = [run for several in runs.values() for run in several]
    checkpoints = [name for name in ("best", "last") if all(name in run["evaluations"] for run in every)]
    if not checkpoints:
        raise Misuse("of some of these runs best.pth was evaluated, of others last.pth: evaluate the same one of all")
    found = {(e["dataset"], e["n"], e["epsilon"], tuple(e["metrics"])) for run in every for name in checkpoints for e in [run["evaluations"][name]]}
    if len(found) > 1:
        what = ("data set", "number of images", "epsilon", "columns")
        which = next(i for i in range(len(what)) if len({each[i] for each in found}) > 1)
        raise Misuse(f"the evaluations differ in their {what[which]} ({' and '.join(sorted({str(each[which]) for each in found}))}): evaluate all runs alike")
    (dataset, n, epsilon, _), = found
    rows = {label: [run | {"evaluations": {name: run["evaluations"][name] for name in checkpoints}} for run in several] for label, several in runs.items()}
    return (f"{table(rows, markdown=False)}\n\nAccuracy in percent on {n} test images of {dataset} at epsilon {epsilon:g}/255; mean (lowest to highest) over seeds, "
            f"the 95 % interval of a single one. {legend(rows)}").rstrip() + (
                f" {changed} of {len(every)} runs came from a tree that differed from its commit." if (changed := sum(map(dirty, every))) else "")


def grid(heading: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = True, text: int = 2) -> str:
    """A table whose first `text` columns are text and whose others are numbers, in Markdown or for a terminal."""
    if markdown:
        lines = [heading, ["---"] * text + ["---:"] * (len(heading) - text), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(value.ljust(width) if i < text else value.rjust(width) for i, (value, width) in enumerate(zip(line, widths))) for line in lines)


def doubt(several: list[dict[str, Any]], checkpoint: str) -> str:
    """The mark of a number of which one seed at least has no claim card that stands behind it."""
    return next(filter(None, (mark(run["evaluations"][checkpoint]) for run in several)), "")


def legend(runs: Runs) -> str:
    """What the mark says in a table of these runs; nothing where there is none."""
    found = [(label, [*run["evaluations"].values()]) for label, several in runs.items() for run in several]
    failed = dict.fromkeys(label for label, evaluations in found if any("card" in e and mark(e) for e in evaluations))
    without = sum(any("card" not in e for e in evaluations) for _, evaluations in found)
    said = f" Claim card not passed: {'; '.join(failed)}." if failed else ""
    if without:
        said += f" No claim card, evaluated before there were any: {'all' if without == len(found) else f'{without} of the'} {len(found)} runs."
    return f"{MARK}: at least one evaluation of the row is not trusted.{said}" if said else ""


def cell(metrics: list[dict[str, Any]]) -> str:
    """One seed: the accuracy and its 95 % interval. Several: their mean, lowest and highest."""
    values = [metric["value"] for metric in metrics]
    low, high = metrics[0]["interval"] if len(metrics) == 1 else (min(values), max(values))
    return f"{statistics.mean(values):.1f} ({low:.1f} to {high:.1f})"


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """What a caption needs to say of a run: n, radius, machines, versions, commits."""
    run, evaluations = result["run"], list(result["evaluations"].values())
    return {"n": evaluations[0]["n"], "epsilon": evaluations[0]["epsilon"], "epochs": run["config"]["epochs"], "precision": run["precision"],
            "torch": run["versions"]["torch"], "devices": devices(result), "commits": commits(result)}


def parts(result: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Its training and its evaluations, each of which says where its numbers come from."""
    return result["run"], *result["evaluations"].values()


def dirty(result: dict[str, Any]) -> bool:
    """Whether any of its numbers comes from a tree that differs from its commit."""
    return any(part["dirty"] for part in parts(result))


def held_out(result: dict[str, Any], column: str) -> str:
    """Under which name its log has an accuracy on the images that pick best.pth."""
    return f"{result['run']['config']['select_on']}_{column}"


def commits(result: dict[str, Any]) -> set[str]:
    """Of its training and of its evaluations, the first ten digits."""
    return {str(commit)[:10] for part in parts(result) for commit in (part["commit"], *part.get("earlier_commits", ()))}


def devices(result: dict[str, Any]) -> set[str]:
    """On which it was trained and evaluated."""
    return {part["device"] for part in (*parts(result), *result["run"].get("earlier_machines", ()))}


def curves(runs: Runs, path: Path) -> None:
    """Clean, FGSM and PGD-20 accuracy on held-out images over the epochs, a panel each; writes .png and .pdf."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    highest = max(row[key] for several in runs.values() for run in several for row in run["log"] for key in row if key.endswith("_clean"))
    top = 10 * (highest // 10 + 1)
    panels = {"clean": "clean images", "fgsm": "FGSM, one step", "pgd20": "PGD-20"}
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, panels.items()):
        for label, several in runs.items():
            colour, line = STYLES.get(label, ("#777777", "-"))
            epochs = [row["epoch"] for row in several[0]["log"]]
            values = list(zip(*([row[held_out(run, column)] for row in run["log"]] for run in several)))
            axis.plot(epochs, [statistics.mean(v) for v in values], linestyle=line, color=colour, label=label, linewidth=1.8)
            if len(several) > 1:
                axis.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylim(0, min(top, 100))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out images (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside upper center", ncols=len(runs))
    save(figure, path)


def panels(runs: Runs, path: Path) -> None:
    """The same for many methods: a panel for each of them, with its three accuracies; a line a seed. Writes .png and .pdf."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {"clean": ("clean images", "#000000", ":"), "fgsm": ("FGSM, one step", "#D55E00", "--"), "pgd20": ("PGD-20", "#0072B2", "-")}
    wide = 6
    high = -(-len(runs) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(12, 1.9 * high + 0.5), sharex=True, sharey=True, layout="constrained", squeeze=False)
    for axis, (label, several) in zip(axes.flat, runs.items()):
        for column, (name, colour, line) in lines.items():
            for run in several:
                axis.plot([row["epoch"] for row in run["log"]], [row[held_out(run, column)] for row in run["log"]], linestyle=line, color=colour,
                          linewidth=1.3, label=name if run is several[0] else None)
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(runs):]:
        axis.set_visible(False)
    axes[0, 0].set_ylim(bottom=0)  # of all, now that the highest is known
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)", fontsize=8)
    for column in range(wide):
        lowest = max((row for row in range(high) if row * wide + column < len(runs)), default=0)
        axes[lowest, column].set_xlabel("epoch", fontsize=8)
        axes[lowest, column].tick_params(labelbottom=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside upper center", ncols=len(lines))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """As .png and as .pdf, the same bytes every time."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
        figure.savefig(path.with_suffix(f".{suffix}"), **options)
    plt.close(figure)
