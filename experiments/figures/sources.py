"""The runs that figures are made of: a table's rows, or folders that a training script filled."""
from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, data, foreign, record
from engine.config import spelled
from engine.errors import Misuse
from engine.kept import restore
from experiments import show, tables
from experiments.tables import Row, Scale, Table


@dataclass(frozen=True)
class Trained:
    """A finished run. folder: its own files. content: what a table's JSON has of it (run, log, evaluations)."""

    label: str
    folder: Path
    content: dict[str, Any]
    remedy: str = "train and measure it again"

    @property
    def result(self) -> dict[str, Any]:
        return self.content["run"]

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.content["log"]

    @property
    def eps(self) -> float:
        """The radius of its training, as a fraction of 1."""
        return self.result["config"]["epsilon"] / 255

    def origin(self) -> dict[str, Any]:
        """What a figure's JSON says of it."""
        return {"label": self.label, "seed": self.result["seed"], "commits": sorted(show.commits(self.content)), "dirty": show.dirty(self.content),
                "device": self.result["device"], "config": {key: value for key, value in self.result["config"].items() if key not in ("data_dir", "out_dir")}}

    def network(self, name: str, device: torch.device) -> nn.Module:
        """best.pth or last.pth, in eval mode.

        Raises:
            Misuse: the file is not there any more, or another training's is.
        """
        path, own = self.folder / f"{name}.pth", self.folder / "result.json"
        if not path.is_file():
            raise Misuse(f"{path}, of {self.label}, is not there: {self.remedy}")
        if not own.is_file() or record.read_json(own) != self.result:
            raise Misuse(f"{path} is of another training than the one that was measured as {self.label}, or of one that has not ended: {self.remedy}")
        return foreign.load(path, device=device)[0]

    def snapshots(self) -> dict[int, Path]:
        """state-<epoch>.pth by epoch, in order."""
        return dict(sorted((int(path.stem.removeprefix("state-")), path) for path in self.folder.glob("state-*.pth")))

    def at(self, path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        """The classifier, in eval mode, and the whole state at a snapshot."""
        state, network = checkpoint.load_state(path), self.network("last", device)
        restore(network, state["kept"]["classifier"], "classifier")
        return network, state


@dataclass(frozen=True)
class Setting:
    """How networks are measured. checkpoint: best or last. n: how many images."""

    data_dir: Path
    device: torch.device
    checkpoint: str
    n: int

    def images(self, runs: Sequence[Trained], part: str = "test", n: int | None = None) -> tuple[Tensor, Tensor]:
        """The first n of the runs' data set, (n, H, W, C) uint8 and (n,) int64.

        Raises:
            Misuse: the runs are of several data sets.
        """
        dataset = _loaded(one("data set", [run.result["dataset"] for run in runs]), self.data_dir,
                          one("size of images", [run.result["config"].get("image_size") for run in runs]))
        x, y = (getattr(dataset, f"{name}_{part}")[:n or self.n] for name in "xy")
        return torch.from_numpy(dataset.pixels(x)), torch.from_numpy(y)


_loaded = functools.cache(data.load)


def one(what: str, values: list[Any]) -> Any:
    """The one value that all runs have.

    Raises:
        Misuse: they differ.
    """
    if len(set(values)) > 1:
        found = ", ".join(sorted(set(map(str, values))))
        raise Misuse(f"the runs differ in {what} ({found}), and one figure cannot compare them: choose among them with --rows or --runs")
    return values[0]


def of_folders(folders: Sequence[Path]) -> list[Trained]:
    """Runs of the training scripts by their --out-dir, with the evaluations of their weights that lie in it; or by a demo's JSON.

    Raises:
        Misuse: a folder holds no finished run, or a file no run.
    """
    found = []
    for folder in folders:
        if folder.suffix == ".json":
            try:
                content = json.loads(folder.read_text())
                found.append(Trained(content["label"], folder.with_suffix(""), {key: content[key] for key in ("run", "log", "evaluations")}))
            except (OSError, ValueError, KeyError) as error:
                raise Misuse(f"{folder}: it is not a run's JSON as the demos write it ({error!r})") from error
            continue
        if not (folder / "result.json").is_file():
            raise Misuse(f"{folder}: there is no result.json, so it is no folder of a finished run")
        run = record.read_json(folder / "result.json")
        log = record.read_lines(folder / "log.jsonl")
        evaluations: dict[str, Any] = {}
        for path in sorted(folder.glob("*/evaluation.json")):
            evaluation = record.read_json(path)
            names = [name for name, trained in run["checkpoints"].items() if trained.get("sha256") == evaluation["checkpoint"].get("sha256")]
            if not names:
                raise Misuse(f"{folder}: {path.parent.name}/evaluation.json is of other weights than the run has: evaluate them again, or delete it")
            for name in names:  # of several, the one at the training's radius, of most images and columns
                evaluations[name] = max(evaluations.get(name, evaluation), evaluation,
                                        key=lambda each: (each["epsilon"] == run["config"]["epsilon"], each["n"], len(each["metrics"])))
        found.append(Trained(run["method"].upper(), folder, {"run": run, "log": log, "evaluations": evaluations}))
    return told_apart(found)


def told_apart(runs: Sequence[Trained]) -> list[Trained]:
    """The runs, those of one label with what they differ in, beside the seed, behind it: they are no seeds of each other."""
    def settings(run: Trained) -> dict[str, Any]:
        return {key: value for key, value in run.result["config"].items() if key != "seed" and key not in checkpoint.MAY_CHANGE}

    differing: dict[str, list[str]] = {}
    for label in {run.label for run in runs}:
        several = [settings(run) for run in runs if run.label == label]
        differing[label] = [key for key in dict.fromkeys(key for each in several for key in each) if len({str(each.get(key)) for each in several}) > 1]
    return [dataclasses.replace(run, label=" ".join([run.label, *(f"{spelled(key)} {settings(run).get(key)}" for key in differing[run.label])])) for run in runs]


@dataclass(frozen=True)
class Place:
    """A table at a scale, and where its runs lie. given: the flags that say so, for the command that a message names."""

    name: str
    table: Table
    scale: Scale
    output: Path
    results: Path
    given: str = ""

    def command(self, rows: Sequence[str]) -> str:
        return f'python reproduce.py run {self.name} --scale {self.scale.name} --rows "{",".join(rows)}"{self.given}'

    def trained(self, row: Row, table: Table | None = None) -> list[Trained]:
        """The row's runs by seed."""
        return [Trained(row.name, job.folder, record.read_json(job.result), "reproduce.py run with --output and --results elsewhere makes both anew, and figure takes the same flags")
                for job in (table or self.table).done(row, self.scale, self.output, self.results)]

    def rows(self, wanted: Sequence[str]) -> tuple[list[Trained], list[str]]:
        """The runs of the rows, or of all that the table offers, and the names of the rows without any.

        Raises:
            Misuse: the table does not offer a row.
        """
        found = {name: self.trained(row) for name, row in self.table.offered(wanted).items()}
        return [run for runs in found.values() for run in runs], [name for name, runs in found.items() if not runs]

    def siblings(self) -> list[Trained]:
        """The runs of the other tables of this data set and recipe: of whole methods, not of an ablation's rows; each once."""
        seen, found = {row.name for row in self.table.rows}, []
        for several in tables.TABLES.values():
            for table in several:
                for row in table.rows if (table.dataset, table.recipe) == (self.table.dataset, self.table.recipe) else ():
                    if row.command and not row.variant and row.name not in seen:
                        seen.add(row.name)
                        found += self.trained(row, table)
        return found

