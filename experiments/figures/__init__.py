"""The papers' figures, each in two stages: `measure` makes one JSON of runs, `draw` makes .pdf and .png of that JSON and of nothing else.

A figure's name, with _ for -, is that of its function in both modules.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import record
from engine.errors import Misuse
from experiments.figures.sources import Place, Setting, Trained


@dataclass(frozen=True)
class Figure:
    """text: what it shows. table, rows: whose runs it is made of unless told otherwise; no rows are all that the table offers.

    Rows that are named must all be measured; of a whole table those that are measured are drawn. siblings: so are the methods
    of the other tables of the same data set and recipe.
    """

    text: str
    table: str = "V"
    rows: tuple[str, ...] = ()
    siblings: bool = False


FIGURES = {
    "curves": Figure("clean and PGD-10 accuracy on training and held-out images over the epochs"),
    "attack-success": Figure("how often the training attack succeeds, over the epochs"),
    "grad-cam": Figure("where two networks look, on clean and on adversarial images", rows=("FGSM-RS", "FGSM-SDI")),
    "landscape": Figure("cross-entropy along the adversarial direction and a random one", rows=("FGSM-RS", "FGSM-SDI", "PGD-AT")),
    "initialisations": Figure("FGSM-SDI's initial and final perturbations over the epochs", rows=("FGSM-SDI",)),
    "radius": Figure("robust accuracy against the radius"),
    "alignment": Figure("how much the input gradient turns inside the ball, over the epochs"),
    "transplants": Figure("whose label a network answers with where one image's perturbation lies on another"),
    "strategies": Figure("what LAS-AT's strategy network picks, over the epochs", table="LAS-6", rows=("LAS-AT L1+L2+L3",)),
    "pareto": Figure("robust accuracy against training time", siblings=True),
}


def runs(figure: Figure, place: Place, rows: Sequence[str] = ()) -> list[Trained]:
    """The runs of a table that the figure is made of; those that it can do without and that are not there are named on stderr.

    Raises:
        Misuse: one that it needs is not measured, or none is.
    """
    found, missing = place.rows(rows or figure.rows)
    if missing:
        sentence = f"{', '.join(missing)}: not measured at scale {place.scale.name}; {place.command(missing)} makes {'it' if len(missing) == 1 else 'them'}"
        if rows or figure.rows or not found:
            raise Misuse(sentence)
        print(f"note: {sentence}", file=sys.stderr, flush=True)
    return found + (place.siblings() if figure.siblings and not rows else [])


def write_measurement(name: str, found: Sequence[Trained], setting: Setting, path: Path) -> None:
    """Writes what the figure shows of these runs, and where every number comes from."""
    from experiments.figures import measure

    code = record.source()
    content = getattr(measure, name.replace("-", "_"))(found, setting)
    record.write_json({"figure": name, "runs": [run.origin() for run in found], "checkpoint": setting.checkpoint, **content,
                       "provenance": record.provenance(setting.device, "fp32", code)}, path)


def write_pictures(path: Path) -> None:
    """The .pdf and .png beside a figure's JSON, made of it alone: the same bytes every time.

    Raises:
        Misuse: there is no such file.
    """
    from experiments.figures import draw

    if not path.is_file():
        raise Misuse(f"{path} is not there: leave out --redraw, and it is measured")
    draw.save(record.read_json(path), path)
