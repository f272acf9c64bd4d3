"""Puts the measured tables into README.md and docs/methods.md, between their markers: `make readme`.

Only from the JSON files of results/, and only when all of them come from clean trees.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from engine import record
from engine.config import Parser
from engine.errors import Failure, one_sentence
from experiments import detector, show, side_by_side, tables

FORWARD = 1.11e9  # operations of ResNet18's forward pass on a CIFAR image


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced.

    Raises:
        Failure: there are no such markers.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise Failure(f"there are no markers <!-- {name} --> in the page")
    return pattern.sub(lambda found: found[1] + content + "\n" + found[2], text)


NOTHING = "Not measured yet."


def report_of(*parts: str) -> dict[str, Any] | None:
    """What a run wrote to a file of results/, None where there is none.

    Raises:
        Failure: it comes from a tree that differs from its commit.
    """
    path = record.ROOT.joinpath("results", *parts)
    if not path.is_file():
        return None
    report = record.read_json(path)
    if report["dirty"]:
        raise Failure(f"{path} comes from a tree that differs from its commit: measure it again")
    return report


def demo(*names: str) -> str:
    """The table of one or several demos of the same setting in Markdown, and what it was measured on."""
    runs: show.Runs = {}
    for name in names:
        found = show.read(record.ROOT / "results" / f"demo-{name}")
        if found and show.is_dirty(found):
            raise Failure(f"results/demo-{name} holds numbers from a tree that differs from its commit: measure them again")
        runs |= found
    if not runs:
        return NOTHING
    facts = [show.facts(run) for several in runs.values() for run in several]
    seeds = sorted({len(several) for several in runs.values()})
    over_seeds = "mean (lowest to highest) over seeds" + (", the 95 % interval of a single one" if seeds[0] == 1 else "")
    spread = over_seeds if seeds[-1] > 1 else "with 95 % intervals"
    count = (f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}") + (" seeds" if seeds[-1] > 1 else " seed")
    on = {key: sorted({fact[key] for fact in facts}) for key in ("precision", "torch")} | {
        key: sorted(set().union(*(fact[key] for fact in facts))) for key in ("devices", "commits")}
    return (f"{show.table(runs, markdown=True)}\n\n"
            f"Accuracy in percent on {facts[0]['n']} test images at epsilon {facts[0]['epsilon']:g}/255, {facts[0]['epochs']} epochs, "
            f"{count}, {spread}; {' and '.join(on['devices'])}, {' and '.join(on['precision'])}, torch {' and '.join(on['torch'])}, "
            f"commit{'s' if len(on['commits']) > 1 else ''} {', '.join(on['commits'])}. {show.legend(runs)}".rstrip())


def gaps(name: str) -> str:
    """PGD-50 minus AutoAttack on the same images, per method and checkpoint."""
    rows = []
    for label, several in show.read(record.ROOT / "results" / f"demo-{name}").items():
        for checkpoint, evaluation in several[0]["evaluations"].items():
            metrics = evaluation["metrics"]
            rows.append(f"{label} {checkpoint} {metrics['pgd50']['value'] - metrics['aa']['value']:.1f}")
    return "PGD-50 minus AutoAttack, in points: " + "; ".join(rows) + "." if rows else ""


def fidelity() -> str:
    """The largest differences from the published code, in Markdown: a row per run."""
    quantities = {"weights": "classifier weights", "BatchNorm buffers": "classifier buffers", "momentum buffers": "classifier optimizer momentum_buffer",
                  "generator": "generator weights", "lr": "classifier lr", "momentum": "classifier momentum", "loss": "classifier loss"}
    rows = []
    torches = set()
    sources: dict[str, set[str]] = {}  # our commits, and the published ones, which several methods may share, that each ran beside
    for path in sorted((record.ROOT / "results" / "fidelity").glob("*.json")):
        report = record.read_json(path)
        if report["ours"]["dirty"]:
            raise Failure(f"{path} comes from a tree that differs from its commit: measure it again")
        for name, run in report["runs"].items():
            found = run["largest_differences"]
            values = [found[key]["relative"]["value"] if key in found else None for key in quantities.values()]
            cells = ["" if value is None else f"{value:.0e}" if value else "0" for value in values]
            rows.append([f"{path.stem} ({report['ours']['script']})", f"{name}: {run['what']}", str(run["steps"]), *cells])
        torches.add(report["torch"])
        published = report["published"]
        source = f"{published['repository']} at {(published['commit'] or 'an unknown commit')[:10]}"
        sources.setdefault(report["ours"]["commit"][:10], set()).add(source)
    if not sources:
        return NOTHING
    beside = "; ".join(f"ours at {commit} beside {', '.join(sorted(published))}" for commit, published in sorted(sources.items()))
    return show.grid(["comparison", "run", "steps", *quantities], rows) + f"\n\nLargest relative difference over all steps: {beside}; torch {' and '.join(sorted(torches))}, float64, CPU."


def processes() -> str:
    """How far two processes end from one, in Markdown: a row per method."""
    if (report := report_of("processes", "equality.json")) is None:
        return NOTHING
    rows = [f"| {label} | {run['updates']} | " + ", ".join(f"{name} {value:.0e}" if value else f"{name} 0" for name, value in run["kept"].items()) + f" | {run['log']:.0e} |"
            for label, run in report["runs"].items()]
    return ("| run | updates | what is kept | log |\n| --- | ---: | --- | ---: |\n" + "\n".join(rows)
            + f"\n\nLargest relative differences; {report['dtype']}, {report['device']}, torch {report['versions']['torch']}, commit {report['commit'][:10]}.")


def collapses() -> str:
    """How the detector of catastrophic overfitting did on published curves, in Markdown."""
    return detector.table(report) if (report := report_of("detector", "curves.json")) else NOTHING


SMALL = {"II": None, "III": None, "IV": None, "V": None, "VII": None, "VIII": "cifar100", "FastAT": None, "PGI": "cifar100"}
"""The tables that stand on docs/tables.md, of which data set where there are several."""


def small(name: str) -> str:
    """What has been measured of a published table at scale small, in Markdown."""
    return side_by_side.rendered(tables.find(name, SMALL[name]), tables.SCALES["small"], record.ROOT / "results" / "tables", "markdown", 1.0, only_measured=True)


def full() -> str:
    """What has been measured of all published tables at the scales full and quick, in Markdown."""
    results = record.ROOT / "results" / "tables"
    found = [(table, scale) for scale in ("full", "quick") for several in tables.TABLES.values() for table in several
             if any(side_by_side.measured_runs(table, row, tables.SCALES[scale], results)[0] for row in table.rows)]
    return "\n\n".join(side_by_side.rendered(table, tables.SCALES[scale], results, "markdown", 1.0, only_measured=True) for table, scale in found) or NOTHING


def cpu() -> str:
    """The CPU step's ratios, in Markdown: a column per machine."""
    reports = [report_of("benchmarks", path.name) for path in sorted((record.ROOT / "results" / "benchmarks").glob("cpu-step*.json"), reverse=True)]
    if not reports:
        return NOTHING
    names = dict.fromkeys(name for report in reports for name in report["variants"])
    rows = [[name, *(f"{row['images_per_second']:.1f} ({row['ours_faster_by']:.2f})" if (row := report["variants"].get(name)) else "" for report in reports)]
            for name in names]
    return (show.grid(["one FGSM-SDI step, ResNet18, batch 128", *(f"{report['threads']} threads" for report in reports)], rows, text=1)
            + "\n\nImages per second (how many times as fast ours is in fp32); "
            + "; ".join(f"{report['device']}, torch {report['versions']['torch']}, commit {report['commit'][:10]}, median of {report['rounds']} rounds in which all take turns"
                        for report in reports) + ".")


def throughput() -> str:
    """Images per second of every method, in Markdown: a table per device and set of flags."""
    parts = []
    for path in sorted((record.ROOT / "results" / "benchmarks").glob("throughput*.json")):
        report = report_of("benchmarks", path.name)
        rows = report["rows"].values()
        for row in rows:
            if row.get("operations_per_image", 0) < 2.9 * FORWARD:  # training alone is three passes; a first report counted FAT's, whose work depends on the images
                row.pop("operations_per_image", None)
            if {"operations_per_image", "images_per_second"} <= row.keys():
                row["passes_per_second"] = row["images_per_second"] * row["operations_per_image"] / FORWARD
        columns = {  # title: what is shown of a row, times what, and how
            "passes' worth": ("operations_per_image", 1 / FORWARD, ".1f"), "images per second": ("images_per_second", 1, ".4g"),
            "passes per second": ("passes_per_second", 1, ".3g"), "seconds an epoch": ("seconds_per_epoch", 1, ".3g"),
            "seconds before": ("seconds_before", 1, ".0f"), "peak memory, GB": ("peak_memory_bytes", 1e-9, ".1f"), "reserved, GB": ("reserved_memory_bytes", 1e-9, ".1f"),
            "arithmetic floor, %": ("fraction_of_arithmetic_floor", 100, ".0f"), "memory floor, %": ("fraction_of_memory_floor", 100, ".0f"),
            "times published FGSM-SDI": ("times_the_published_fgsm_sdi", 1, ".2f")}
        cells = {title: [format(times * row[key], form) if key in row else "" for row in rows] for title, (key, times, form) in columns.items()}
        cells = {title: found for title, found in cells.items() if any(found)}
        parts.append(show.grid(["method", *cells], zip(report["rows"], *cells.values()), text=1) + f"\n\nResNet18, batch 128, real CIFAR-10 images"
                     f"{', ' + report['flags'] if report['flags'] else ''}; {report['batches'] - report['warm_up']} batches "
                     f"after {report['warm_up']}; {report['device']}, torch {report['versions']['torch']}, commit {report['commit'][:10]}.")
    return "\n\n".join(parts) or NOTHING


def autoattack() -> str:
    """What AutoAttack's attacks cost, and how far evaluations of one network disagree, in Markdown: two tables."""
    if (report := report_of("benchmarks", "autoattack.json")) is None:
        return NOTHING
    costs = [[f"{row['attack']}{'' if row['frozen'] else ', network not frozen'}", f"{row['images']}", f"{row['standing']}", f"{row['forward']:,.0f}",
              f"{row['input_gradients']:,.0f}", f"{row['weight_gradients']:,.0f}", f"{100 * row['filling']:.0f} %", f"{row['processor_seconds']:.1f}"] for row in report["costs"]]
    first, *others = report["evaluations"]
    columns = report["evaluations"][first]["columns"]
    cells = {first: [f"{found['accuracy']:.0f} %" for found in columns.values()]} | {
        label: [f"{found['differ']} ({found['accuracy']:.0f} %)" for found in report["evaluations"][label]["columns"].values()] for label in others}
    evaluations = [[label, *several, f"{report['evaluations'][label]['processor_seconds']:.0f}"] for label, several in cells.items()]
    return (show.grid(["attack", "images", "left standing", "forward passes an image", "image gradients", "weight gradients", "batch filled", "processor seconds"], costs, text=1)
            + "\n\n" + show.grid(["evaluation", *columns, "processor seconds"], evaluations, text=1)
            + f"\n\n{report['arch']} by {report['method']} on the digits, epsilon {report['epsilon']:g}/255. Above: the first {report['images_counted']} test "
            f"images, passes per image, processor time of all. Below: {report['n']} test images, verdicts that are not those of the first row, (robust accuracy). "
            f"{report['device']}, one thread, torch {report['versions']['torch']}, commit {report['commit'][:10]}.")


def second_derivative() -> str:
    """The forms of the second derivative side by side, in Markdown: over all networks and penalties, from the lowest to the highest."""
    if (report := report_of("benchmarks", "second-derivative.json")) is None:
        return NOTHING
    cases = [forms for penalties in report["rows"].values() for forms in penalties.values()]

    def span(form: str, value: Callable[[dict, dict], float], shown: str) -> str:
        found = []
        for case in cases:
            try:
                found.append(value(case[form], case["double backward"]))
            except KeyError:  # not measured, or it failed
                pass
        low, high = (format(end, shown) for end in (min(found), max(found))) if found else ("", "")
        return low if low == high else f"{low} to {high}"

    columns: dict[str, tuple[Callable[[dict, dict], float], str]] = {  # title: of a form and the double backward
        "predicted": (lambda row, double: row["passes"]["predicted"], "g"), "counted": (lambda row, double: row["passes"]["counted"], ".2f"),
        "error, float64": (lambda row, double: row["float64"]["error"], ".0e"), "1 - cosine, fp32": (lambda row, double: row["fp32"]["one_minus_cosine"], ".0e"),
        "1 - cosine, bf16": (lambda row, double: row["bf16"]["one_minus_cosine"], ".0e"), "best step in fp32": (lambda row, double: row["fp32"]["step"], ".0e"),
        "ReLUs that it crosses, %": (lambda row, double: 100 * row["fp32"]["crossed"], ".2g"),
        "time, of the double backward's": (lambda row, double: row["milliseconds"] / double["milliseconds"], ".2f"),
        "peak memory, of the same": (lambda row, double: row["peak_memory_bytes"] / double["peak_memory_bytes"], ".2f")}
    rows = [[form, *(span(form, *column) for column in columns.values())] for form in cases[0]]
    loss = [row["bf16"]["one_minus_cosine"] for row in report["loss"].values()]
    return (show.grid(["form", *columns], rows, text=1) + f"\n\n{' and '.join(report['rows'])}, width {report['width']}, batch {report['batch_size']}, both penalties, lowest to highest; of a difference the best of its steps. "
            f"1 - cosine of the loss's own gradient in bf16: {min(loss):.0e} to {max(loss):.0e}. {report['device']}, {report['threads']} "
            f"thread{'s' if report['threads'] > 1 else ''}, torch {report['versions']['torch']}, commit {report['commit'][:10]}.")


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo-digits": lambda: demo("digits"), "demo-cifar": lambda: demo("cifar") + "\n\n" + gaps("cifar"), "cpu-step": cpu},
    "docs/methods.md": {"fidelity": fidelity, "demo-digits-all": lambda: demo("digits", "digits-all"), "demo-cifar-all": lambda: demo("cifar-all")},
    "docs/processes.md": {"equality": processes},
    "docs/guard.md": {"detector": collapses},
    "docs/tables.md": {f"table-{name}": partial(small, name) for name in SMALL} | {"full": full},
    "docs/performance.md": {"throughput": throughput, "second-derivative": second_derivative, "autoattack": autoattack},
}
"""What stands between which markers of which page."""


def main(argv: list[str] | None = None) -> None:
    Parser(description=__doc__).parse_args(argv)
    texts: dict[str, str] = {}
    for page, contents in PAGES.items():
        texts[page] = (record.ROOT / page).read_text(encoding="utf-8")
        for name, content in contents.items():
            texts[page] = between(texts[page], name, content())
    for page, text in texts.items():  # only now: a number that may not be shown leaves every page as it was
        record.write_text(text, record.ROOT / page)
        print(f"{page}: {', '.join(PAGES[page])}")


if __name__ == "__main__":
    with one_sentence():
        main()
