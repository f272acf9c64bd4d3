"""A verdict on the comparisons with published code (tests/published), whose numbers lie in results/fidelity."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parent.parent / "results" / "fidelity").glob("*.json"))
ROUNDING = 1e-8  # of float64 over all steps; what is really another computation differs by a thousandth and more
AVERAGE = {"average": {"average"}}  # the published average begins one update later: docs/methods.md
EVERYTHING = None
KNOWN = {  # method to run to the quantities that may differ; beside each of these runs there is one with just its cause removed
    "awp": {"as published, one epoch": {"classifier buffers"}, "as published, crossing an epoch": EVERYTHING},
    "fgsm-rs-cs": AVERAGE, "liet": AVERAGE, "fgsm-uap": AVERAGE | {"the attack's gradient": EVERYTHING},
    "ga": {"saturated": EVERYTHING, "saturated, before torch 1.9": EVERYTHING}, "vfsat": {"saturated, before torch 1.9": EVERYTHING},
    "las-awp": {"as it is": EVERYTHING, "milestones": EVERYTHING},
}


def test_every_comparison_is_there():
    assert len(FILES) == 24 and KNOWN.keys() <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ours_is_the_published_one_to_rounding(path):
    report = json.loads(path.read_text())
    assert report["published"]["commit"] and not report["ours"]["dirty"]
    known = KNOWN.get(path.stem, {})
    assert known.keys() <= report["runs"].keys()
    for name, run in report["runs"].items():
        assert {"classifier weights", "classifier buffers", "classifier loss"} <= run["largest_differences"].keys() and run["steps"] >= 5
        apart = {quantity for quantity, found in run["largest_differences"].items() if not found["relative"]["value"] <= ROUNDING}
        if name not in known:
            assert not apart, f"{name}: {sorted(apart)}"
        else:
            assert apart and (known[name] is EVERYTHING or apart <= known[name]), f"{name} is no longer apart in {known[name]}, or in more: {sorted(apart)}"


def test_the_comparisons_can_be_imported():
    """They need the published repositories to run, and would not notice what has been renamed here."""
    folder = Path(__file__).resolve().parent / "published"
    done = subprocess.run([sys.executable, "-c", "import compare, single_step, multi_step, strategies, everything"], cwd=folder, env={**os.environ, "PYTHONPATH": f"{folder}:{folder.parent.parent}"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
