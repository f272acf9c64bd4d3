"""How the detector of catastrophic overfitting does on published training curves: `python -m experiments.detector --curves FILE`.

FILE is JSON, a list of runs with `dataset`, `method`, `seed` and, an entry per epoch, `model_fgsm_acc_list`, `model_pgd_acc_list`,
`model_val_acc_list` (clean) and `train_acc_list` as fractions: the logs of the FastAT Benchmark repository, put together. It is
not part of this repository. A run's label is the first epoch whose PGD-10 accuracy is below half of its best so far (which
exceeds 15 %) and at least 10 points below FGSM's. The methods are split for good: in alphabetical order the first, third, fifth
... are those on which the first sign's bounds were chosen, the others are held out. results/detector/curves.json is what comes out.
"""
from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from engine import guard, record
from engine.config import Parser
from engine.errors import Misuse, one_sentence

RESULT = record.ROOT / "results" / "detector" / "curves.json"
IMAGES = {"cifar10": 1000, "cifar100": 1000, "tiny-imagenet": 2000}  # held out there: the smallest number of which all accuracies are multiples
LISTS = ("model_fgsm_acc_list", "model_pgd_acc_list", "model_val_acc_list", "train_acc_list")
KEYS = ("dataset", "method", "seed", *LISTS)


def labelled(readings: list[guard.Reading]) -> int | None:
    """The epoch, from 1, of catastrophic overfitting as the label has it."""
    best = 0.0
    for epoch, reading in enumerate(readings, 1):
        best = max(best, reading.pgd10)
        if best > 15 and reading.pgd10 < best / 2 and reading.fgsm - reading.pgd10 > 10 - 1e-9:
            return epoch
    return None


def judged(run: dict[str, Any]) -> dict[str, Any]:
    """One run's label and alarms, in epochs from 1."""
    readings = [guard.Reading(100 * fgsm, 100 * pgd10, IMAGES[run["dataset"]], 100 * clean, 100 * train)
                for fgsm, pgd10, clean, train in zip(*(run[name] for name in LISTS))]
    alarms = [epoch for epoch, alarm in enumerate(guard.overfitted(readings), 1) if alarm]
    label, best = labelled(readings), max(reading.pgd10 for reading in readings)
    return {"dataset": run["dataset"], "method": run["method"], "seed": run["seed"], "epochs": len(readings), "labelled": label,
            "first_alarm": alarms[0] if alarms else None, "alarms": len(alarms), "best_pgd10": best,
            "last": {"fgsm": readings[-1].fgsm, "pgd10": readings[-1].pgd10},
            "recovers": label is not None and readings[-1].pgd10 > best / 2 and readings[-1].fgsm - readings[-1].pgd10 < 10}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall, false alarms and lead over some runs. An alarm after the labelled epoch is a miss."""
    collapsed = [run for run in runs if run["labelled"]]
    found = [run for run in collapsed if run["first_alarm"] and run["first_alarm"] <= run["labelled"]]
    lead = sorted(run["labelled"] - run["first_alarm"] for run in found)
    false = [run for run in runs if run["first_alarm"] and not run["labelled"]]
    return {"methods": sorted({run["method"] for run in runs}), "runs": len(runs), "collapsed": len(collapsed), "found": len(found),
            "false_alarms": [named(run) for run in false], "lead": lead, "median_lead": statistics.median(lead) if lead else None,
            "recover": [named(run) for run in collapsed if run["recovers"]]}


def named(run: dict[str, Any]) -> str:
    return f"{run['dataset']} {run['method']} seed {run['seed']}"


def read(path: Path) -> list[dict[str, Any]]:
    """The curves.

    Raises:
        Misuse: the file is no list of curves.
    """
    try:
        runs = json.loads(path.read_text())
        if runs and all(run["dataset"] in IMAGES and all(key in run for key in KEYS) for run in runs):
            return runs
    except (ValueError, TypeError, KeyError):
        pass
    raise Misuse(f"--curves {path}: must be a JSON list of runs with {', '.join(KEYS)}, of {', '.join(IMAGES)}")


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything but where it comes from."""
    results = [judged(run) for run in runs]
    methods = sorted({run["method"] for run in results})
    parts = {"calibration": set(methods[::2]), "held out": set(methods[1::2])}
    return {"bounds": {name: getattr(guard, name.upper()) for name in ("memory", "rise", "fall", "patience", "answered", "left")},
            "parts": {name: summary([run for run in results if run["method"] in part]) for name, part in parts.items()}, "runs": results}


def table(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["| methods | runs | collapsed | found | false alarms | lead, in epochs |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, part in found["parts"].items():
        leads = ", ".join(f"{lead} ({part['lead'].count(lead)} runs)" for lead in sorted(set(part["lead"])))
        lines.append(f"| {name}: {', '.join(part['methods'])} | {part['runs']} | {part['collapsed']} | {part['found']} | {len(part['false_alarms'])} | {leads} |")
    named = {what: [run for part in found["parts"].values() for run in part[what]] for what in ("false_alarms", "recover")}
    return "\n".join(lines) + (f"\n\nFalse alarms: {'; '.join(named['false_alarms']) or 'none'}. Collapsed and sound again at the last epoch, and counted as "
                              f"collapsed: {'; '.join(named['recover']) or 'none'}. Commit {(found['commit'] or 'unknown')[:10]}.")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--curves", type=Path, required=True, help="the curves")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the report goes")
    arguments = parser.parse_args(argv)
    found = report(read(arguments.curves)) | record.provenance(torch.device("cpu"), "fp64", record.source())
    record.write_json(found, arguments.out)
    print(table(found))


if __name__ == "__main__":
    with one_sentence():
        main()
