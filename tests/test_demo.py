"""`make demo` in a clone, where the results of the repository's own runs already lie."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import Failure, Misuse
from experiments import demo

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--epochs", "1", "--train-size", "100", "--val-size", "20", "--measure", "clean,fgsm,pgd10,pgd20")
COMMITTED = demo.DEMOS["digits"]
SETTING = replace(COMMITTED, methods=("FGSM-AT", "Standard"), common=("--dataset", "digits", *QUICK), seeds=(0,),
                  evaluation=("--dataset", "digits", "--n-ex", "20", "--attacks", "clean,pgd10", "--card-n", "0"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a demo of the committed one's name that takes seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(demo.DEMOS, "digits", SETTING)
    return tmp_path


def test_it_trains_and_evaluates_shows_the_table_and_draws_the_figure(here, capsys):
    committed = (ROOT / "results" / "demo-digits" / "fgsm-at-seed0.json").read_text()
    demo.main(["digits", "--jobs", "2"])
    said = capsys.readouterr().out
    folder = here / "output" / "demo-digits"
    measured = json.loads((folder / "fgsm-at-seed0.json").read_text())
    assert measured["run"]["config"]["epochs"] == len(measured["log"]) == 1 and measured["evaluations"]["last"]["n"] == 20
    assert "Standard  last" in said and "FGSM-AT" in said and "†: at least one evaluation of the row is not trusted. Claim card not passed: " in said and "figure: output/demo-digits/curves.png" in said
    assert (folder / "curves.png").stat().st_size > 10_000 and (folder / "standard-seed0" / "last.pth").is_file()
    assert list(here.iterdir()) == [here / "output"], "nothing lies anywhere else"
    assert (ROOT / "results" / "demo-digits" / "fgsm-at-seed0.json").read_text() == committed

    demo.main(["digits"])
    said = capsys.readouterr().out
    assert "training done" not in said and "Standard  last" in said, "what is finished is not done again"


def test_what_the_results_given_hold_is_not_done(here, capsys, monkeypatch):
    shutil.copytree(ROOT / "results" / "demo-digits", here / "results" / "demo-digits")
    with pytest.raises(Failure, match="measured with --epochs 40, and now it would be 1"):
        demo.main(["digits", "--only", "fgsm-at", "--results", "results"])
    monkeypatch.setitem(demo.DEMOS, "digits", COMMITTED)
    demo.main(["digits", "--only", "fgsm-at", "--results", "results"])
    said = capsys.readouterr().out
    assert "training done" not in said and "PGD-AT" in said and not (here / "output").exists()


@pytest.mark.parametrize("seeds", ["0,", "a", "-1"])
def test_seeds_that_are_none(seeds, here):
    with pytest.raises(Misuse, match="--seeds"):
        demo.main(["digits", "--seeds", seeds])


def test_a_damaged_result_does_not_stop_the_others(here, in_this_process, capsys):
    folder = here / "output" / "demo-digits"
    folder.mkdir(parents=True)
    (folder / "fgsm-at-seed0.json").write_text("{")
    with pytest.raises(Misuse, match="fgsm-at-seed0.json is damaged"):
        demo.main(["digits", "--jobs", "1"])
    assert (folder / "standard-seed0.json").is_file()


def test_an_unknown_method(here):
    with pytest.raises(Misuse, match="fgsm-xt is not one of fgsm-at, standard"):
        demo.main(["digits", "--only", "fgsm-xt"])
