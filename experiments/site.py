"""One self-contained HTML page of everything measured and published: no server, no network. Its text is in site.html."""
from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from engine.card import mark
from experiments import show, side_by_side, tables
from experiments.show import HEADINGS

TEMPLATE = Path(__file__).with_name("site.html")
TEXTS = {"source": "Source", "table": "Table", "dataset": "Data set", "method": "Method", "checkpoint": "Checkpoint", "scale": "Scale"}
COLUMNS = [{"key": key, "title": title} for key, title in TEXTS.items()] + [
    {"key": key, "title": title, "digits": 2} for key, title in HEADINGS.items()] + [
    {"key": "minutes", "title": "Minutes", "digits": 1}, {"key": "seeds", "title": "Seeds", "digits": 0}, {"key": "n", "title": "n", "digits": 0},
    {"key": "device", "title": "Device"}]
PANELS = {"clean": "Clean accuracy (%)", "fgsm": "FGSM accuracy (%)", "pgd10": "PGD-10 accuracy (%)", "pgd20": "PGD-20 accuracy (%)"}


def page(measured_tables: Path) -> str:
    """The page's HTML. `measured_tables`: the folder tables/, beside which demo-*/ and figures/ lie."""
    results = measured_tables.parent
    rows, curves = [], []
    for name, several in tables.TABLES.items():
        for table in several:
            for scale in tables.SCALES.values():
                found = side_by_side.lines(table, scale, measured_tables)
                rows += [row for line in found for row in _rows(name, table.dataset, scale.name, line)]
                if any(line.runs for line in found):
                    runs = {line.row.name: line.runs[0] for line in found if line.runs}
                    curves.append(_curves(f"Table {name}, {table.dataset}, scale {scale.name}", runs))
    for folder in sorted(results.glob("demo-*")):
        runs = show.read(folder)
        if runs and not show.is_dirty(runs):
            curves.append(_curves(folder.name, {label: several[0] for label, several in runs.items()}))
            rows += [row for label, several in runs.items() for row in _demo_rows(folder.name, label, several)]
    pictures = sorted([*results.glob("figures/*/*.png"), *results.glob("demo-*/*.png")])
    figures = [{"caption": f"{path.parent.name}: {path.stem}", "source": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()} for path in pictures]
    measured = sum(row["source"] == "ours" for row in rows)
    data = {"columns": COLUMNS, "rows": rows, "curves": curves, "figures": figures,
            "made": f"{measured} measured and {len(rows) - measured} published rows; made by reproduce.py site."}
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", json.dumps(data).replace("</", "<\\/"))


def _rows(name: str, dataset: str, scale: str, line: side_by_side.Line) -> list[dict[str, Any]]:
    """A table's row: as published, and as measured where it was."""
    shared = {"table": name, "dataset": dataset, "method": line.row.name, "checkpoint": line.checkpoint}
    found = []
    if scale == "full" and any(cell.published is not None for cell in line.cells.values()):
        found.append(shared | {"source": "published", "scale": "full", **{key: line.cells[key].published if key in line.cells else None for key in HEADINGS},
                               "minutes": line.minutes.published, "seeds": None, "n": None, "device": "", "doubt": ""})
    if any(cell.values for cell in line.cells.values()):
        first = line.runs[0]
        found.append(shared | {"source": "ours", "scale": scale, **{key: line.cells[key].mean if key in line.cells else None for key in HEADINGS},
                               "minutes": line.minutes.mean, "seeds": len(line.runs), "n": first["evaluations"]["best"]["n"],
                               "device": first["run"]["device"], "doubt": "" if line.trusted else "; ".join(line.doubts) or "not trusted"})
    return found


def _demo_rows(demo: str, label: str, several: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def mean(values: list[float]) -> float | None:
        return side_by_side.Cell(values).mean

    found = []
    for checkpoint in several[0]["evaluations"]:
        evaluations = [run["evaluations"][checkpoint] for run in several]
        found.append({"source": "ours", "table": demo, "dataset": evaluations[0]["dataset"], "method": label, "checkpoint": checkpoint, "scale": "small",
                      **{key: mean([e["metrics"][key]["value"] for e in evaluations if key in e["metrics"]]) for key in HEADINGS},
                      "minutes": mean([run["run"]["seconds"]["training"] / 60 for run in several]), "seeds": len(several), "n": evaluations[0]["n"],
                      "device": several[0]["run"]["device"],
                      "doubt": "; ".join(sorted({said for e in evaluations if mark(e) for said in side_by_side.doubts_of(e) or ["not trusted"]}))})
    return found


def _curves(title: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The held-out accuracies over the epochs that all these runs measured."""
    panels = {column: text for column, text in PANELS.items() if all(show.held_out(run, column) in row for run in runs.values() for row in run["log"])}
    return {"title": title, "panels": panels,
            "runs": [{"name": name, "values": {column: [round(row[show.held_out(run, column)], 2) for row in run["log"]] for column in panels}} for name, run in runs.items()]}
