"""What was measured of a published table beside what was published, from the JSON files of results/tables and from nothing else."""
from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import record
from engine.card import MARK
from experiments import tables
from experiments.show import HEADINGS, commits, devices, dirty, doubt, grid
from experiments.tables import Row, Scale, Table


CHANGED = "came from a tree that differed from its commit; another --output for run, and another --results for run and show, measure anew"


@dataclass
class Cell:
    """One accuracy in percent: ours over seeds, and the published one. intervals: ours, 95 %, low and high."""

    values: list[float] = field(default_factory=list)
    published: float | None = None
    intervals: list[list[float]] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float:
        """Half of the mean's 95 % interval. Seeds do not make it smaller: they are measured on the same images."""
        return statistics.mean((high - low) / 2 for low, high in self.intervals) if self.intervals else 0.0


@dataclass
class Line:
    """A row of the table at one checkpoint. `runs`: the JSON of its seeds."""

    row: Row
    checkpoint: str
    cells: dict[str, Cell]
    runs: list[dict[str, Any]]
    minutes: Cell
    doubts: list[str]
    dropped: int = 0  # runs of a tree that differs from its commit

    @property
    def trusted(self) -> bool | None:
        """Whether every evaluation's claim card stands behind it; None where nothing is measured."""
        return not doubt(self.runs, self.checkpoint) if self.runs else None


def measured_runs(table: Table, row: Row, scale: Scale, results: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON of a row's seeds, and how many more there are that come from a tree that differs from its commit: those do not count."""
    runs = [record.read_json(job.result) for job in table.done(row, scale, Path(), results)]
    clean = [run for run in runs if not dirty(run)]
    return clean, len(runs) - len(clean)


def lines(table: Table, scale: Scale, results: Path) -> list[Line]:
    """All rows, measured or not.

    Numbers on different numbers of images are never put together: only the seeds with the most images count.
    """
    found = []
    for row in table.rows:
        runs, dropped = measured_runs(table, row, scale, results)
        n = max((run["evaluations"]["best"]["n"] for run in runs), default=0)
        runs = [run for run in runs if run["evaluations"]["best"]["n"] == n]
        for checkpoint in table.checkpoints:
            published = table.published(row, checkpoint)
            evaluated = [run for run in runs if checkpoint in run["evaluations"]]
            evaluations = [run["evaluations"][checkpoint] for run in evaluated]
            metrics = {column: [e["metrics"][column] for e in evaluations if column in e["metrics"]] for column in table.columns}
            cells = {column: Cell([metric["value"] for metric in several], published.get(column), [metric["interval"] for metric in several])
                     for column, several in metrics.items()}
            minutes = Cell([run["run"]["seconds"]["training"] / 60 for run in evaluated], published.get("minutes"))
            doubts = sorted({said for e in evaluations for said in doubts_of(e)})
            found.append(Line(row, checkpoint, cells, evaluated, minutes, doubts, dropped))
    return found


def doubts_of(evaluation: dict[str, Any]) -> list[str]:
    """Why its numbers may be wrong: what its card says, and what else it warns of, trusted or not, as a doubt which network a file holds."""
    said = [said for said in evaluation["warnings"] if not said.startswith("measured on the first")]
    return said if "card" in evaluation else [*said, "evaluated without a claim card"]


def cell(found: Cell, comparable: bool, tolerance: float) -> str:
    """Ours, and in square brackets the published one and the deviation; "!" after one beyond the tolerance and what so many images can tell."""
    ours = "-"
    if found.mean is not None:
        low, high = found.intervals[0]
        ours = f"{found.mean:.2f} " + (f"({low:.1f} to {high:.1f})" if found.spread is None else f"±{found.spread:.2f}")
    if found.published is None:
        return ours
    if found.mean is None or not comparable:
        return f"{ours} [{found.published:.2f}]"
    deviation = found.mean - found.published
    return f"{ours} [{found.published:.2f}, {deviation:+.2f}{'!' if abs(deviation) > max(tolerance, found.error) else ''}]"


def rendered(table: Table, scale: Scale, results: Path, form: str, tolerance: float, only_measured: bool = False) -> str:
    """The table as text, Markdown or CSV, with or without rows that have not been measured."""
    every = lines(table, scale, results)
    found = [line for line in every if line.runs or not only_measured]
    changed = sum({line.row: line.dropped for line in every}.values())
    if form == "csv":
        return _csv(table, scale, found)
    comparable = not scale.shrunk
    heading = ["Method", "Checkpoint", *(HEADINGS[column] for column in table.columns), "Minutes"]
    body = [[line.row.name + ("" if line.row.command else " (not offered)") + (f" {MARK}" if line.trusted is False else ""), line.checkpoint,
             *(cell(line.cells[column], comparable, tolerance) for column in table.columns), _minutes(line.minutes)] for line in found]
    title = f"{table.paper}, Table {table.number}: {table.title} ({table.dataset}, scale {scale.name})"
    missing = {row.name for row in table.rows} - {line.row.name for line in found}
    left_out = [f"{len(missing)} of {len(table.rows)} rows have not been measured."] if missing else []
    left_out += [f"Not shown: {changed} run{'s' if changed > 1 else ''} that {CHANGED}."] if changed else []
    notes = [_legend(comparable, tolerance), *(_provenance(found) or [_elsewhere(table, scale, results)]), *left_out, *table.notes,
             *sorted({f"{'' if line.trusted else MARK + ' '}{line.row.name}, {line.checkpoint}: {said}" for line in found for said in line.doubts})]
    if form == "markdown":
        return "\n".join([f"**{title}**", "", grid(heading, body, markdown=True), "", *(f"- {note}" for note in notes)])
    return "\n".join([title, "", grid(heading, body, markdown=False), "", *notes])


def _minutes(found: Cell) -> str:
    ours = "-" if found.mean is None else f"{found.mean:.1f}"
    return ours if found.published is None else f"{ours} [{found.published:g}]"


def _legend(comparable: bool, tolerance: float) -> str:
    ours = "Accuracy in percent: ours (95 % interval of one seed; ± standard deviation over several)"
    minutes = "Minutes: of training alone, ours on the machine below, the paper's on its own."
    if comparable:
        return f"{ours} [published, deviation; ! beyond {tolerance:g} points and half of the 95 % interval]. -: not measured. {minutes}"
    return f"{ours} [published]. At this scale the two are not of the same thing, and no deviation is given. -: not measured. {minutes}"


def _provenance(found: list[Line]) -> list[str]:
    runs = [run for line in found for run in line.runs]
    if not runs:
        return []

    def each(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    seeds = sorted({len(line.runs) for line in found if line.runs})
    compiled = sum(run["run"]["config"].get("compile", False) for run in runs)
    return [f"Measured on n = {each(run['evaluations']['best']['n'] for run in runs)} test images; {' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}; "
            f"{each(set().union(*map(devices, runs)))}; {each(run['run']['precision'] for run in runs)}; torch {each(run['run']['versions']['torch'] for run in runs)}; "
            f"{'' if not compiled else '--compile; ' if compiled == len(runs) else 'some with --compile; '}"
            f"commit {each(set().union(*map(commits, runs)))}."]


def _elsewhere(table: Table, scale: Scale, results: Path) -> str:
    """That a scale has no results, and which have."""
    others = [name for name, other in tables.SCALES.items() if any(measured_runs(table, row, other, results)[0] for row in table.rows)]
    return f"Nothing of this table has been measured {f'at scale {scale.name}: show --scale ' + ' or '.join(others) + ' has results' if others else 'yet'}."


def _csv(table: Table, scale: Scale, found: list[Line]) -> str:
    """One line per row, checkpoint and column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["paper", "table", "dataset", "scale", "row", "checkpoint", "column", "ours", "sd", "seeds", "n", "published", "deviation", "minutes", "device",
                     "commit", "trusted"])
    for line in found:
        first = line.runs[0] if line.runs else None
        on, at = ("; ".join(sorted(set().union(*map(each, line.runs)))) or None for each in (devices, commits))
        for column, each in line.cells.items():
            deviation = None if None in (each.mean, each.published) or scale.shrunk else round(each.mean - each.published, 4)
            writer.writerow([table.paper, table.number, table.dataset, scale.name, line.row.name, line.checkpoint, column, each.mean, each.spread, len(each.values) or None,
                             first and first["evaluations"]["best"]["n"], each.published, deviation, line.minutes.mean, on, at, line.trusted])
    return text.getvalue().rstrip("\n")


def overview(results: Path) -> list[str]:
    """A line per table and data set: its rows, and how many of them are measured at each scale."""
    said = [f"{'table':<10} {'data set':<14} {'rows':>4} " + " ".join(f"{name:>6}" for name in tables.SCALES) + "  what"]
    for name, several in tables.TABLES.items():
        for table in several:
            counts = [sum(bool(measured_runs(table, row, scale, results)[0]) for row in table.rows) for scale in tables.SCALES.values()]
            said.append(f"{name:<10} {table.dataset:<14} {len(table.rows):>4} " + " ".join(f"{count:>6}" for count in counts) + f"  {table.paper}, Table {table.number}: {table.title}")
    return said
