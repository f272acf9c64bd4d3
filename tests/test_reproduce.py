"""The tables: every command of theirs parses, what is published is all there, and an interrupted run goes on where it was."""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reproduce
import train_fgsm_rs
from engine import checkpoint, record
from engine.errors import Failure, Misuse
from experiments import runner, side_by_side, tables
from experiments.demo import DEMOS, job as demo_job
from experiments.tables import SCALES, Row, Scale, Table

EVERY = [(name, table) for name, several in tables.TABLES.items() for table in several]
NAMES = [f"{name}-{table.dataset}" for name, table in EVERY]


# ---- the tables as data --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("name, table", EVERY, ids=NAMES)
def test_every_command_parses(name, table, scale):
    for row in table.rows:
        if row.command:
            script, *flags = table.job(row, 3, scale, Path(), Path()).train
            cfg = importlib.import_module(script.removesuffix(".py")).Config.parse(None, flags)
            assert (cfg.dataset, cfg.epsilon, cfg.seed) == (table.dataset, float(row.epsilon), 3)
            if not scale.shrunk and table.paper != "FastAT":
                assert (cfg.select_on, cfg.val_size) == ("test", 0), "the papers pick on the test set"


def test_the_recipes_are_the_papers():
    def config(name, method, dataset=None):
        table = tables.find(name, dataset)
        script, *flags = table.command(next(row for row in table.rows if row.method == method), 0, SCALES["full"])
        return importlib.import_module(script.removesuffix(".py")).Config.parse(None, flags)

    v = config("V", "FGSM-RS")
    assert (v.arch, v.epochs, v.batch_size, v.lr, v.lr_schedule, v.alpha) == ("resnet18", 110, 128, 0.1, "multistep", 10)
    assert [config("VII", method).lr for method in ("FGSM-SDI", "FGSM-RS", "FGSM-GA", "FGSM-CKPT")] == [0.2, 0.2, 0.3, 0.3]
    assert train_fgsm_rs.Config.parse(None, ["--lr-schedule", "cyclic", "--lr", "0.05"]).lr == 0.05 and train_fgsm_rs.Config.parse(None, []).lr == 0.1
    assert config("VII", "PGD-AT").epochs == 30 and config("VI", "FGSM-SDI").arch == "wideresnet34-10"
    assert (config("IX", "FGSM-RS").arch, config("IX", "FGSM-RS").augment) == ("preactresnet18", "none")
    assert (config("IV", "PGD2-AT").alpha, config("IV", "PGD4-AT").alpha, config("IV", "PGD2-AT").init) == (4, 2, "zero")
    fast = config("FastAT", "N-FGSM", "cifar100")
    assert (fast.ema, fast.lr_schedule, fast.val_size, fast.select_on) == (0.9995, "onecycle", 1000, "val")
    assert fast.label_factor == pytest.approx(1 - 0.4 + 0.4 / 100)  # torch: (1 - e) on the true class, and e / C on every class


def test_everything_published_is_shown_once():
    shown = [(t.paper, t.number, t.dataset, row.epsilon, row.method, row.variant, checkpoint) for _, t in EVERY for row in t.rows for checkpoint in ("best", "last")]
    assert len(shown) == len(set(shown))
    assert set(tables.published()) <= set(shown)
    for name, table in EVERY:
        for row in table.rows:
            there = any(table.published(row, checkpoint) for checkpoint in table.checkpoints)
            ours = row is tables.HARD_LABELS or (table.paper, row.method) == ("FastAT", "FGSM-SDI")
            assert there != ours, f"{name}: {row.name} has no published number"
    assert tables.find("V").published(tables.FGSM_SDI, "last")["aa"] == 47.91


def test_published_columns_are_not_lost():
    for name, table in EVERY:
        for row in table.rows:
            for checkpoint in table.checkpoints:
                assert set(table.published(row, checkpoint)) - {"minutes"} <= set(table.columns), f"{name}: {row.name}"


def test_a_rows_own_settings():
    """Where a table's row is not what its script does by itself: (table, data set, row) to flags."""
    def config(name, dataset, method, variant="", scale="full"):
        table = tables.find(name, dataset)
        script, *flags = table.command(next(row for row in table.rows if (row.method, row.variant) == (method, variant)), 0, SCALES[scale])
        return importlib.import_module(script.removesuffix(".py")).Config.parse(None, flags)

    assert [config(*where, "LBGAT").beta for where in (("LAS-2", None), ("LAS-3", None), ("LAS-5", "cifar100"))] == [0, 6, 6]
    assert config("LAS-2", None, "MART").beta == 6
    whole, without = (config("LAS-6", None, "LAS-AT", variant) for variant in ("L1+L2+L3", "L1"))
    assert (whole.interval, whole.robust, whole.clean, without.robust, without.clean) == (40, 4, 2, 0, 0)
    twice = [(cfg.label_factor, cfg.attack_factor) for cfg in (config("FastAT", name, "FGSM-RS-CS") for name in ("cifar10", "cifar100", "tiny-imagenet"))]
    assert twice == [pytest.approx((0.6 * 0.6 + 0.4 / classes, 0.6 + 0.4 / classes)) for classes in (10, 100, 200)], "smoothed twice, and once"
    assert [config("FastAT", name, "N-FGSM").val_size for name in ("cifar10", "cifar100", "tiny-imagenet")] == [1000, 1000, 2000]
    assert [(config("FastAT", None, method).attack_bn, config("FastAT", None, method).ema) for method in ("PGD-AT", "PGD-AT-WA")] == [("eval", 0), ("eval", 0.9995)]
    assert [config("FastAT", name, "N-FGSM").arch for name in ("cifar10", "cifar100", "tiny-imagenet")] == ["resnet18", "resnet18", "preactresnet18-gap"]
    assert [config("FastAT", name, "FGSM-PGI").max_grad_norm for name in ("cifar100", "tiny-imagenet")] == [None, 0], "not clipped, as FGSM-PGI's own is"
    assert [config("PGI", "tiny-imagenet", f"FGSM-{name}").max_grad_norm for name in ("BP", "EP", "MEP")] == [10] * 3
    own = [config(*where) for where in (("LAS-1b", None, "AWP", "train steps=10 train eps=8"), ("LAS-1b", None, "LAS-AWP"), ("LAS-2", None, "LAS-AWP"),
                                        ("LAS-5", "cifar10", "LAS-AWP"))]
    assert {(cfg.normalise, cfg.padding, cfg.epochs) for cfg in own} == {("dataset", "reflect", 200)}
    others = [config(*where, "LAS-AWP") for where in (("LAS-3", None), ("LAS-4", None), ("LAS-5", "cifar100"))]
    assert {(cfg.normalise, cfg.padding, cfg.epochs) for cfg in others} == {("none", "zero", 200)}, "normalised on CIFAR-10 alone"
    epochs = {("FastAT", "N-FGSM"): 100, ("FastAT", "FREE-AT"): 50, ("LAS-2", "LAS-TRADES"): 100, ("LAS-4", "LAS-TRADES"): 110, ("LAS-2", "LAS-AWP"): 200}
    assert {key: config(key[0], None, key[1]).epochs for key in epochs} == epochs and config("FastAT", None, "FREE-AT").replays == 4
    awp = config("LAS-1b", None, "AWP", "train steps=10 train eps=8", "small")
    assert (awp.epochs, list(awp.decays)) == (10, [0.5, 0.75])


def test_an_evaluation_of_fewer_columns_is_no_whole_one():
    """LAS-AT's first table needs PGD-10 alone of the run that Table V needs AutoAttack of."""
    v, las = (tables.find(name).job(tables.PGD_AT, 0, SCALES["full"], Path("o"), Path("r")) for name in ("V", "LAS-1"))
    assert v.folder == las.folder and v.result != las.result and v._evaluated("best") != las._evaluated("best")


def test_one_run_serves_all_tables_that_have_it():
    jobs = {name: tables.find(name).job(row, 0, SCALES["full"], Path("o"), Path("r")) for name in ("II", "III", "IV", "V")
            for row in tables.find(name).rows if row.method == "FGSM-SDI" and row.variant in ("", "k=20", "input=Benign+Grad")}
    assert len(jobs) == 4 and len({job.result for job in jobs.values()}) == 1
    quick = tables.find("V").job(tables.FGSM_SDI, 0, SCALES["quick"], Path("o"), Path("r"))
    assert quick.folder == jobs["V"].folder and quick.suffix and quick.result != jobs["V"].result
    assert tables.find("VII").job(tables.FGSM_SDI, 0, SCALES["full"], Path("o"), Path("r")).folder != jobs["V"].folder


def test_of_a_flag_that_is_given_twice_the_second_counts():
    assert tables.last_of_each(("s.py", "--b", "1", "--a", "--b", "2")) == ("s.py", "--a", "--b", "2")


@pytest.mark.parametrize("name, dataset", [("XI", None), ("V", "svhn")])
def test_an_unknown_table_is_refused(name, dataset):
    with pytest.raises(Misuse, match=name if dataset is None else dataset):
        tables.find(name, dataset)


# ---- what is shown -------------------------------------------------------------------------------------------------

def made_up(job, seed: int, values: dict[str, float], n: int = 10_000, dirty: bool = False, warnings: tuple[str, ...] = (), card: bool | None = True,
            compiled: bool = False) -> None:
    """A run's JSON with the fields that the tables read. card: whether it is trusted, None where there is none."""
    evaluation = {"n": n, "dirty": dirty, "device": "another device", "commit": "e" * 40, "warnings": list(warnings),
                  "metrics": {name: record.percent_of(value, n) for name, value in values.items()}} | ({} if card is None else {"card": {"trusted": card}})
    run = {"seed": seed, "config": {"compile": compiled}, "dirty": False, "device": "a device", "precision": "fp32", "commit": "c" * 40, "versions": {"torch": "2.6"}, "seconds": {"training": 600.0}}
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text(json.dumps({"label": job.label, "run": run, "log": [], "evaluations": {"best": evaluation, "last": evaluation}}))


@pytest.mark.parametrize("name, table", EVERY, ids=NAMES)
def test_nothing_measured_is_nothing_shown(name, table, tmp_path):
    for scale in SCALES.values():
        text = side_by_side.rendered(table, scale, tmp_path, "csv", 1.0)
        assert all(not row["ours"] and not row["deviation"] and not row["minutes"] for row in csv.DictReader(io.StringIO(text)))
    assert "has been measured yet" in side_by_side.rendered(table, SCALES["full"], tmp_path, "text", 1.0)


def test_what_is_not_shown_and_what_was_compiled_is_said(tmp_path):
    table, scale = tables.find("VII"), SCALES["full"]
    jobs = [table.job(tables.FGSM_RS, seed, scale, Path(), tmp_path) for seed in range(3)]
    made_up(jobs[0], 0, {"aa": 42.0})
    made_up(jobs[1], 1, {"aa": 10.0}, dirty=True)
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    assert "Not shown: 1 run that came from a tree that differed from its commit" in text and "compile" not in text and "42.00 (41.0 to 43.0) [42.92" in text
    made_up(jobs[2], 2, {"aa": 44.0}, compiled=True)
    assert "some with --compile" in side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    jobs[2].result.write_text("{")
    with pytest.raises(Misuse, match="is damaged"):
        side_by_side.rendered(table, scale, tmp_path, "text", 1.0)


def test_a_table_names_what_it_was_trained_and_evaluated_on(tmp_path):
    table, scale = tables.find("VII"), SCALES["full"]
    made_up(table.job(tables.FGSM_RS, 0, scale, Path(), tmp_path), 0, {"aa": 42.0})
    assert "a device, another device; fp32" in (text := side_by_side.rendered(table, scale, tmp_path, "text", 1.0)) and "commit cccccccccc, eeeeeeeeee." in text
    row = next(row for row in csv.DictReader(io.StringIO(side_by_side.rendered(table, scale, tmp_path, "csv", 1.0))) if row["ours"])
    assert (row["device"], row["commit"]) == ("a device; another device", "cccccccccc; eeeeeeeeee")


def test_ours_stands_beside_published_with_its_deviation(tmp_path):
    table, scale = tables.find("VII"), SCALES["full"]
    row = next(row for row in table.rows if row.method == "FGSM-RS")
    for seed, aa in enumerate((42.0, 43.0, 44.0)):
        made_up(table.job(row, seed, scale, Path(), tmp_path), seed, {"clean": 80.0, "aa": aa})
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    line = next(line for line in text.splitlines() if line.startswith("FGSM-RS"))
    assert "43.00 ±1.00 [42.92, +0.08]" in line and "80.00 ±0.00 [83.75, -3.75!]" in line and "10.0 [15]" in line
    assert "80.00 ±0.00 [83.75, -3.75]" in side_by_side.rendered(table, scale, tmp_path, "text", 4.0)
    assert "n = 10000" in text and "3 seeds" in text and "a device" in text and "cccccccccc" in text
    assert "| 43.00 ±1.00 [42.92, +0.08] |" in side_by_side.rendered(table, scale, tmp_path, "markdown", 1.0)
    measured = side_by_side.rendered(table, scale, tmp_path, "markdown", 1.0, only_measured=True).splitlines()
    assert [line.split(" | ")[0] for line in measured if line.startswith("| FGSM") or line.startswith("| PGD")] == ["| FGSM-RS"] * 2
    assert f"- {len(table.rows) - 1} of {len(table.rows)} rows have not been measured." in measured
    found = [row for row in csv.DictReader(io.StringIO(side_by_side.rendered(table, scale, tmp_path, "csv", 1.0))) if row["row"] == "FGSM-RS" and row["column"] == "aa"]
    assert [(row["ours"], row["sd"], row["seeds"], row["published"], row["deviation"]) for row in found] == [("43.0", "1.0", "3", "42.92", "0.08")] * 2


def test_the_small_scale_is_not_compared(tmp_path):
    table, scale = tables.find("VII"), SCALES["small"]
    made_up(table.job(table.rows[0], 0, scale, Path(), tmp_path), 0, {"clean": 20.0, "aa": 10.0}, n=200)
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    assert "10.00 (6.6 to 14.9) [46.83]" in text and "!" not in text
    assert "10.00" not in side_by_side.rendered(table, SCALES["full"], tmp_path, "text", 1.0)


def test_numbers_that_do_not_count(tmp_path):
    """From a tree that differs from its commit; on fewer images than another seed; and one that the evaluation doubts."""
    table, scale = tables.find("VII"), SCALES["full"]
    job = lambda seed: table.job(table.rows[0], seed, scale, Path(), tmp_path)
    made_up(job(0), 0, {"aa": 99.0}, dirty=True)
    assert "99.00" not in side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    made_up(job(1), 1, {"aa": 40.0}, n=1000)
    made_up(job(2), 2, {"aa": 46.0}, card=False, warnings=("PGD misleads on this model", "measured on the first 10000 of ..."))
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    assert "46.00 (45.0 to 47.0) [46.83, -0.83]" in text and "40.00" not in text and "43.00" not in text
    assert "PGD-AT †" in text and "† PGD-AT, best: PGD misleads on this model" in text and "measured on the first" not in text
    made_up(job(2), 2, {"aa": 46.0}, card=None, warnings=("apgd warned of something",))
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    assert "† PGD-AT, best: evaluated without a claim card" in text and "† PGD-AT, best: apgd warned of something" in text
    made_up(job(2), 2, {"aa": 46.0})
    assert "†" not in side_by_side.rendered(table, scale, tmp_path, "text", 1.0)


def test_what_an_evaluation_doubts_beside_a_trusted_card_is_said(tmp_path):
    """As which network a file holds, or what AutoAttack's own checks found; the mark is the card's alone."""
    table, scale = tables.find("VII"), SCALES["quick"]
    made_up(table.job(tables.FGSM_RS, 0, scale, Path(), tmp_path), 0, {"aa": 42.0}, n=1000, warnings=("measured on the first 1000 of ...", "normalisation: two candidates fit"))
    text = side_by_side.rendered(table, scale, tmp_path, "text", 1.0)
    assert "FGSM-RS, best: normalisation: two candidates fit" in text.splitlines() and "†" not in text and "measured on the first" not in text


def test_the_csv_says_which_rows_are_trusted(tmp_path):
    table, scale = tables.find("VII"), SCALES["full"]
    for row, card in ((tables.FGSM_RS, True), (tables.FGSM_SDI, False), (tables.PGD_AT, None)):
        made_up(table.job(row, 0, scale, Path(), tmp_path), 0, {"aa": 42.0}, card=card)
    rows = csv.DictReader(io.StringIO(side_by_side.rendered(table, scale, tmp_path, "csv", 1.0)))
    assert {row["row"]: row["trusted"] for row in rows} == {row.name: "" for row in table.rows} | {"FGSM-RS": "True", "FGSM-SDI": "False", "PGD-AT": "False"}


def test_a_deviation_that_so_few_images_cannot_tell_is_not_marked(tmp_path):
    """Half of the interval of 40 % is 3.0 points on 1,000 images and 1.0 on 10,000; published are 42.92 %."""
    table = tables.find("VII")
    for scale, n, aa, shown in (("quick", 1000, 40.5, "40.50 (37.5 to 43.6) [42.92, -2.42]"), ("quick", 1000, 38.5, "38.50 (35.5 to 41.6) [42.92, -4.42!]"),
                                ("full", 10_000, 40.5, "40.50 (39.5 to 41.5) [42.92, -2.42!]")):
        made_up(table.job(tables.FGSM_RS, 0, SCALES[scale], Path(), tmp_path), 0, {"aa": aa}, n=n)
        assert shown in side_by_side.rendered(table, SCALES[scale], tmp_path, "text", 1.0)
    for seed in (0, 1):
        made_up(table.job(tables.FGSM_RS, seed, SCALES["quick"], Path(), tmp_path), seed, {"aa": 40.5}, n=1000)
    assert "40.50 ±0.00 [42.92, -2.42]" in side_by_side.rendered(table, SCALES["quick"], tmp_path, "text", 1.0), "two seeds on the same images tell no more"
    assert "-2.42]" in side_by_side.rendered(table, SCALES["full"], tmp_path, "text", 2.5)


def test_a_scale_without_results_names_those_that_have_some(tmp_path, capsys):
    table = tables.find("VII")
    for name in ("quick", "small"):
        made_up(table.job(tables.FGSM_RS, 0, SCALES[name], Path(), tmp_path), 0, {"aa": 42.0}, n=100)
    reproduce.main(["show", "VII", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert "Nothing of this table has been measured at scale full: show --scale quick or small has results." in said and "measured yet" not in said
    reproduce.main(["show", "VII", "--scale", "small", "--results", str(tmp_path)])
    assert "Nothing of this table" not in capsys.readouterr().out


def test_list_names_every_table(tmp_path, capsys):
    job = tables.find("V").job(tables.FGSM_SDI, 0, SCALES["full"], Path(), tmp_path)
    made_up(job, 0, {"aa": 48.0})
    reproduce.main(["list", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(EVERY)
    counts = {line.split()[0]: line.split()[3] for line in lines if "cifar10 " in line}
    assert (counts["V"], counts["II"], counts["III"], counts["IV"], counts["VII"]) == ("1", "1", "1", "1", "0")


# ---- running them --------------------------------------------------------------------------------------------------

ROWS = (Row("RS", ("train_fgsm_rs.py",)), Row("Standard", ("train_standard.py",)), Row("Absent"))
DIGITS = Table("Nobody", "1", "digits", "a table that takes seconds", ("--epochs", "3", "--train-size", "128", "--val-size", "32", "--arch", "resnet8", "--width", "8"), ROWS,
               columns=("clean", "pgd10"))
TINY = Scale("tiny", ("--n-ex", "20", "--attacks", "clean,pgd10"))


@pytest.fixture
def digits(monkeypatch, tmp_path, in_this_process):
    """A function that runs the table of digits, as from the shell; its folder is tmp_path."""
    monkeypatch.setitem(tables.TABLES, "D", (DIGITS,))
    monkeypatch.setitem(tables.SCALES, "tiny", TINY)

    def run(*flags: str) -> None:
        reproduce.main(["run", "D", "--scale", "tiny", "--devices", "cpu", "--output", str(tmp_path / "output"), "--results", str(tmp_path / "results"), *flags])

    return run


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_what_is_finished_is_not_done_again(digits, tmp_path, capsys):
    digits()
    results = sorted((tmp_path / "results" / "tiny").glob("*.json"))
    assert len(results) == 2
    run = json.loads(results[0].read_text())
    assert run["evaluations"].keys() == {"best", "last"} and run["evaluations"]["last"]["metrics"]["pgd10"]["n"] == 20 and len(run["log"]) == 3
    before = stamps(tmp_path)
    digits()
    assert stamps(tmp_path) == before and "2 runs, 2 of them done" in capsys.readouterr().out
    results[0].unlink()
    digits()
    assert {path: stamp for path, stamp in stamps(tmp_path).items() if before.get(path) != stamp}.keys() == {str(results[0])}, "collected again, not trained or evaluated"


MEASURED = [job for name, demo in DEMOS.items() for label in demo.methods for seed in demo.seeds
            if (job := demo_job(demo, label, seed, Path(), record.ROOT / "results" / f"demo-{name}")).result.is_file()] + [
    job for _, table in EVERY for row in table.rows if row.command for seed in tables.SEEDS for scale in SCALES.values()
    if (job := table.job(row, seed, scale, Path(), record.ROOT / "results" / "tables")).result.is_file()]


def test_what_is_measured_here_is_what_its_command_would_do_today():
    """A default that changes makes the numbers those of another setting."""
    assert len(MEASURED) > 150
    assert {job.result.name: changes for job in MEASURED if (changes := job.changes(record.read_json(job.result)["run"]["config"]))} == {}


def test_a_result_of_other_settings_is_neither_taken_nor_overwritten(tmp_path):
    job = DIGITS.job(ROWS[0], 0, TINY, tmp_path / "output", tmp_path)
    config = dataclasses.asdict(train_fgsm_rs.Config.parse(None, list(job.train[1:])))
    job.result.parent.mkdir(parents=True)
    record.write_json({"run": {"config": config | {"data_dir": "elsewhere/"}}, "evaluations": {"best": {}, "last": {}}}, job.result)
    assert job.is_done()
    record.write_json({"run": {"config": config | {"lr": 0.3}}, "evaluations": {"best": {}, "last": {}}}, job.result)
    (said,), unfinished = runner.do_all([job], tmp_path, ["cpu"])
    assert not unfinished and "measured with --lr 0.3, and now it would be 0.2" in said and not (tmp_path / "output").exists()
    job.result.unlink()  # as the sentence says, but the training's own result is still there
    record.write_json({"config": config | {"lr": 0.3}}, job.folder / "result.json")
    (said,), unfinished = runner.do_all([job], tmp_path, ["cpu"])
    assert not unfinished and "result.json was measured with --lr 0.3, and now it would be 0.2" in said and not job.result.exists()


def test_an_evaluation_of_weights_that_are_gone_is_none(tmp_path):
    """Where a training began anew, the old one's still lie beside it."""
    job = DIGITS.job(ROWS[0], 0, TINY, tmp_path, tmp_path)
    folder = job.folder / f"best{job.suffix}"
    folder.mkdir(parents=True)
    assert not job._is_of("best")
    record.write_json({"checkpoints": {"best": {"sha256": "a"}}}, job.folder / "result.json")
    for digest, expected in (("a", True), ("b", False)):
        record.write_json({"checkpoint": {"sha256": digest}}, folder / "evaluation.json")
        assert job._is_of("best") == expected


def test_a_table_that_shows_more_checkpoints_adds_their_evaluation(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "D", (Table(**{**vars(DIGITS), "checkpoints": ("last",)}),))
    digits("--rows", "RS")
    result, = (tmp_path / "results").rglob("*.json")
    last = json.loads(result.read_text())["evaluations"]
    monkeypatch.setitem(tables.TABLES, "D", (DIGITS,))
    before = stamps(tmp_path / "output")
    digits("--rows", "RS")
    both = json.loads(result.read_text())["evaluations"]
    assert last.keys() == {"last"} and both.keys() == {"best", "last"} and both["last"]["metrics"] == last["last"]["metrics"]
    changed = {Path(path).relative_to(tmp_path / "output").parts[2] for path, stamp in stamps(tmp_path / "output").items() if before.get(path) != stamp}
    assert changed <= {"best-clean-pgd10", "output.log"}, "what was trained and evaluated stays"


def test_time_runs_out_and_the_next_call_goes_on(digits, in_this_process, tmp_path, capsys):
    digits("--rows", "RS")
    folder = next((tmp_path / "output" / "full").iterdir())
    whole = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    folder.rename(tmp_path / "whole")
    next((tmp_path / "results" / "tiny").iterdir()).unlink()
    assert "nothing is missing" in capsys.readouterr().out
    in_this_process += ["--time-limit", "0"]  # whatever the machine's speed
    digits("--rows", "RS", "--time-limit", "60")  # and exits with 0, as a training script
    said = capsys.readouterr().out
    assert "RS, seed 0: the training is not finished" in said and "1 of 1 runs are not finished: the same command goes on" in said and "nothing is missing" not in said
    in_this_process.clear()
    assert (folder / "state.pth").is_file() and not list((tmp_path / "results").rglob("*.json"))
    digits("--rows", "RS")
    pieces = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(pieces[key], whole[key]) for key in whole) and "nothing is missing" in capsys.readouterr().out


def test_a_failure_counts_though_others_want_only_time(digits, tmp_path, monkeypatch, capsys):
    broken = Table(**{**vars(DIGITS), "rows": (Row("Broken", ("train_fgsm_rs.py", "--alpha", "nonsense")), *ROWS)})
    monkeypatch.setitem(tables.TABLES, "D", (broken,))
    times = iter([60.0, 60.0, 600.0])  # what is left when the first run asks; nothing for the second
    monkeypatch.setattr(runner.TimeLimit, "left", lambda self: next(times, 0.0))
    with pytest.raises(Failure, match="Broken, seed 0") as failed:
        digits("--rows", "Broken,RS", "--time-limit", "60")
    assert "RS, seed 0: no time left for the training" in capsys.readouterr().out and "RS, seed 0" not in str(failed.value)


def test_a_run_that_is_stopped_without_a_limit_has_failed(digits, in_this_process):
    """Nobody asked for it, so that nothing here may count as done."""
    in_this_process += ["--time-limit", "0"]
    with pytest.raises(Failure, match="RS, seed 0: .* ended with status 0"):
        digits("--rows", "RS")


DRIVER = """import sys
import reproduce
from experiments import tables
from tests import test_reproduce as t
tables.TABLES['D'], tables.SCALES['tiny'] = (t.DIGITS,), t.TINY
reproduce.main(sys.argv[1:])
"""


@pytest.fixture
def driven(tmp_path):
    """Begins `digits` in a process of its own, with more flags for its trainings."""
    def begin(*training: str) -> subprocess.Popen:
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER if not training else DRIVER.replace("(t.DIGITS,)", f"(t.replace(t.DIGITS, recipe=(*t.DIGITS.recipe, *{training})),)"))
        command = [sys.executable, str(driver), "run", "D", "--scale", "tiny", "--devices", "cpu", "--output", str(tmp_path / "output"), "--results", str(tmp_path / "results")]
        begun.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(record.ROOT)}, start_new_session=True, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    begun: list[subprocess.Popen] = []
    yield begin
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(folder: Path, pattern: str) -> Path:
    """The first file of that name, once it is there."""
    began = time.monotonic()
    while not (found := list(folder.glob(pattern))) and time.monotonic() < began + 180:
        time.sleep(0.02)
    return found[0]


def test_sigterm_ends_the_runs_too(driven, tmp_path):
    """It comes to the parent alone, as from a scheduler or a caller's timeout."""
    process = driven("--epochs", "100000")
    folder = wait_for(tmp_path / "output", "full/*/log.jsonl").parent
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "RS, seed 0: the training is not finished" in said and "Standard, seed 0: no time left for the training" in said
    assert "run the same command again to continue" in (folder / "output.log").read_text() and not (folder / "result.json").exists()
    checkpoint.lock(folder).close()  # raises where somebody still trains


def test_killed_at_a_random_moment_it_repeats_nothing_finished(digits, driven, tmp_path):
    process = driven()
    wait_for(tmp_path / "output", "full/*/result.json")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trained = list((tmp_path / "output").glob("full/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in trained}
    digits()
    assert len(list((tmp_path / "results").rglob("*.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in trained} == before


def test_one_failure_does_not_stop_the_rest(digits, tmp_path, monkeypatch):
    broken = Table(**{**vars(DIGITS), "rows": (Row("Broken", ("train_fgsm_rs.py", "--alpha", "nonsense")), *ROWS)})
    monkeypatch.setitem(tables.TABLES, "D", (broken,))
    with pytest.raises(Failure, match="Broken, seed 0.*status 2") as failed:
        digits("--rows", "Broken,Standard")
    assert len(list((tmp_path / "results").rglob("*.json"))) == 1 and "Standard" not in str(failed.value)


def test_a_result_that_cannot_be_written_does_not_stop_the_rest(monkeypatch, tmp_path):
    done = []

    def do(job, *_):
        if job.seed == 0:
            raise OSError(30, "Read-only file system", str(job.result))
        done.append(job.seed)

    monkeypatch.setattr(runner.Job, "do", do)
    jobs = [DIGITS.job(ROWS[0], seed, TINY, tmp_path, tmp_path) for seed in range(3)]
    (said,), unfinished = runner.do_all(jobs, tmp_path, ["cpu"])
    assert not unfinished and said.startswith("RS, seed 0: ") and "Read-only" in said and done == [1, 2]


def test_runs_of_ones_own_over_their_seeds(tiny, capsys):
    def evaluated(folder: Path, *flags) -> None:
        assert tiny.command("test_FGSM_SDI", "--model_path", folder / "best.pth", "--card-n", 0, *flags).status == 0

    ours = [tiny.train("train_fgsm_rs", "--seed", seed) for seed in (0, 1)]
    other = tiny.train("train_standard")
    with pytest.raises(Misuse, match=f"{ours[0]} holds no evaluation: python test_FGSM_SDI.py --model_path {ours[0]}/best.pth"):
        reproduce.main(["seeds", *map(str, [*ours, other])])
    for folder in (*ours, other):
        evaluated(folder, "--attacks", "clean,pgd10", "--n-ex", 50)
    capsys.readouterr()
    reproduce.main(["seeds", *map(str, [*ours, other])])
    said = capsys.readouterr().out
    values = [json.loads((folder / "best-evaluation" / "evaluation.json").read_text())["metrics"]["pgd10"]["value"] for folder in ours]
    row, = (line for line in said.splitlines() if line.split()[:2] == ["FGSM-RS", "best"])
    assert f"{sum(values) / 2:.1f} ({min(values):.1f} to {max(values):.1f})" in row and row.split()[-1] == "2"
    assert "on 50 test images of digits at epsilon 51/255" in said and "STANDARD" in said
    evaluated(other, "--attacks", "clean,pgd10", "--n-ex", 60)
    with pytest.raises(Misuse, match="differ in their number of images .50 and 60.: evaluate all runs alike"):
        reproduce.main(["seeds", *map(str, [*ours, other])])


def test_rows_that_are_not_offered_are_refused(digits):
    for name in ("Absent", "Nonsense"):
        with pytest.raises(Misuse, match=f"offers RS, Standard, not {name}"):
            digits("--rows", name)


def test_a_last_checkpoint_that_is_the_best_one_is_evaluated_once(digits, tmp_path):
    digits("--rows", "Standard")
    folder = next((tmp_path / "output" / "full").iterdir())
    best, last = (json.loads((folder / "result.json").read_text())["checkpoints"][name]["epoch"] for name in ("best", "last"))
    assert (folder / "last-clean-pgd10").is_dir() == (best != last)


def test_every_device_is_used_and_none_twice_at_a_time(monkeypatch, tmp_path):
    busy, seen = set(), set()

    def do(job, data_dir, device, limit):
        assert device not in busy
        busy.add(device)
        seen.add(device)
        time.sleep(0.05)
        busy.remove(device)

    monkeypatch.setattr(runner.Job, "do", do)
    jobs = [DIGITS.job(ROWS[0], seed, TINY, tmp_path, tmp_path) for seed in range(6)]
    assert runner.do_all(jobs, tmp_path, ["cuda:0", "cuda:1"]) == ([], []) and seen == {"cuda:0", "cuda:1"}


def test_as_many_runs_at_a_time_as_there_are_devices(monkeypatch, tmp_path):
    together = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(runner.Job, "do", lambda *_: together.wait() and None)
    jobs = [DIGITS.job(ROWS[0], seed, TINY, tmp_path, tmp_path) for seed in range(4)]
    assert runner.do_all(jobs, tmp_path, ["cuda:0", "cuda:1"]) == ([], [])


def test_the_fast_path_of_every_table(capsys):
    """The same runs, under the same names; each script takes the flag, with which it trains on one GPU as recorded."""
    for name, table in EVERY:
        reproduce.main(["run", name, "--dataset", table.dataset, "--print"])
        plain = capsys.readouterr().out.splitlines()
        reproduce.main(["run", name, "--dataset", table.dataset, "--print", "--compile"])
        for line, fast in zip(plain, capsys.readouterr().out.splitlines(), strict=True):
            script, *flags = fast.split()[1:]
            cfg = importlib.import_module(script.removesuffix(".py")).Config.parse(None, flags)
            assert cfg.compile and fast.replace(" --compile", "") == line
