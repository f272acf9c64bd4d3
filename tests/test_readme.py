"""Every command on the README parses, and its numbers are those of the files in results/."""
from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from engine import card, record
from engine.errors import Failure
from experiments import figures, render, show

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Lines of the README's shell blocks, and inline code that starts with a program."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert not [line for line in lines if "#" in line], "a comment without a blank before it is part of the command"
    return lines + re.findall(r"`((?:make|python|torchrun|pip) [^`]+)`", README)


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"the Makefile has no {words[1]}"
        return
    if words[0] == "pip":
        assert (ROOT / words[words.index("-r") + 1]).is_file()
        return
    if words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        return
    assert words[0] in ("python", "torchrun")
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1:]
    module = importlib.import_module(script.removesuffix(".py"))
    if script.startswith("train_"):
        module.Config.parse(module.__doc__, flags)
    else:
        module.parse(flags)


def test_its_python_loads_a_network(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code.replace("output/fgsm-sdi-cifar10-seed0", str(digits_run)), names)
    assert names["model"](torch.rand(2, 1, 8, 8)).shape == (2, 10) and not names["model"].training


def test_there_are_commands_for_every_script() -> None:
    text = "\n".join(commands())
    for path in ROOT.glob("train_*.py"):
        assert path.name in text
    assert "test_FGSM_SDI.py" in text and "make demo" in text and "make test" in text


def test_counts_in_the_prose() -> None:
    zoo = (ROOT / "docs" / "claim-card.md").read_text().split("| broken network |")[1].split("\n\n")[0].splitlines()[2:]
    counts = {"scripts in pytorch": len(list(ROOT.glob("train_*.py"))), "broken networks": len(zoo), "of them": len(figures.FIGURES)}
    words = {10: "ten", 11: "eleven", 24: "twenty-four", 25: "twenty-five", 26: "twenty-six"}
    for what, count in counts.items():
        assert f"{words[count]} {what}" in README.lower()
    assert f"{len(card.CHECKS)} checks" in README


def test_flags_in_the_table_exist() -> None:
    import train_fgsm_sdi
    from engine.config import parser
    known = {option for action in parser(train_fgsm_sdi.Config, "")._actions for option in action.option_strings}
    named = set(re.findall(r"`[^`]*?(--[a-z-]+)", "\n".join(line for line in README.splitlines() if line.startswith("| `--"))))
    assert named and named <= known


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("page", render.PAGES)
def test_tables_are_rendered_from_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert set(re.findall(r"<!-- ([A-Za-z-]+) -->", text)) == set(render.PAGES[page])
    for name, content in render.PAGES[page].items():
        assert render.between(text, name, content()) == text, f"{page}: {name} is not what results/ say; run make readme"


def test_a_number_from_a_changed_tree_is_not_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sorted((ROOT / "results" / "demo-digits").glob("*.json"))[0]
    run = json.loads(source.read_text())
    folder = tmp_path / "results" / "demo-digits"
    folder.mkdir(parents=True)
    (folder / source.name).write_text(json.dumps(run))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert "| FGSM" in render.demo("digits") or "| PGD" in render.demo("digits")
    run["run"]["dirty"] = True
    (folder / source.name).write_text(json.dumps(run))
    with pytest.raises(Failure, match="measure them again"):
        render.demo("digits")


def test_throughput_shows_what_was_measured_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / "benchmarks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert render.throughput() == "Not measured yet."
    measured = {"images_per_second": 100.0, "seconds_per_epoch": 500.0, "seconds_before": 3.0, "peak_memory_bytes": 2e9, "operations_per_image": 5.55e9}
    report = {"flags": "--compile", "batches": 9, "warm_up": 4, "device": "a device", "dirty": False, "commit": "c" * 40, "versions": {"torch": "2.6"},
              "rows": {"FGSM-RS": measured, "LIET": {"failed": "an error"}, "FAT": measured | {"operations_per_image": 1e9}}}
    (folder / "throughput.json").write_text(json.dumps(report))
    lines = render.throughput().splitlines()
    assert lines[0] == "| method | passes' worth | images per second | passes per second | seconds an epoch | seconds before | peak memory, GB |"
    assert lines[2:5] == ["| FGSM-RS | 5.0 | 100 | 500 | 500 | 3 | 2.0 |", "| LIET |  |  |  |  |  |  |", "| FAT |  | 100 |  | 500 | 3 | 2.0 |"]
    assert "--compile; 5 batches after 4; a device, torch 2.6, commit cccccccccc" in lines[-1]
    report["rows"]["FGSM-RS"] = measured | {"fraction_of_arithmetic_floor": 0.35}
    (folder / "throughput.json").write_text(json.dumps(report))
    assert render.throughput().splitlines()[0].endswith("| arithmetic floor, % |") and "| 35 |" in render.throughput()
    (folder / "throughput.json").write_text(json.dumps(report | {"dirty": True}))
    with pytest.raises(Failure, match="measure it again"):
        render.throughput()


def test_autoattack_shows_costs_and_disagreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results" / "benchmarks" / "autoattack.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert render.autoattack() == "Not measured yet."
    cost = {"attack": "fab-t", "frozen": True, "images": 37, "standing": 36, "forward": 1837.2, "input_gradients": 900.0, "weight_gradients": 0.0,
            "filling": 0.914, "processor_seconds": 13.52}

    def evaluation(differ: int, accuracy: float) -> dict:
        return {"processor_seconds": 70.2, "columns": {"pgd10": {"accuracy": 61.0, "differ": 0}, "aa": {"accuracy": accuracy, "differ": differ}}}

    report = {"method": "fgsm-rs", "arch": "resnet8", "epsilon": 38.0, "n": 100, "images_counted": 60, "device": "a device", "dirty": False, "commit": "c" * 40,
              "versions": {"torch": "2.6"}, "costs": [cost, cost | {"frozen": False, "weight_gradients": 900.0}],
              "evaluations": {"plain, seed 0": evaluation(0, 55.0), "plain, seed 1": evaluation(3, 52.0)}}
    path.write_text(json.dumps(report))
    lines = render.autoattack().splitlines()
    assert lines[2:4] == ["| fab-t | 37 | 36 | 1,837 | 900 | 0 | 91 % | 13.5 |", "| fab-t, network not frozen | 37 | 36 | 1,837 | 900 | 900 | 91 % | 13.5 |"]
    assert lines[5:9] == ["| evaluation | pgd10 | aa | processor seconds |", "| --- | ---: | ---: | ---: |",
                          "| plain, seed 0 | 61 % | 55 % | 70 |", "| plain, seed 1 | 0 (61 %) | 3 (52 %) | 70 |"]
    assert "a device, one thread, torch 2.6, commit cccccccccc" in lines[-1]
    assert all(line.count("|") == lines[start].count("|") for start, end in ((0, 4), (5, 9)) for line in lines[start:end])
    path.write_text(json.dumps(report | {"dirty": True}))
    with pytest.raises(Failure, match="measure it again"):
        render.autoattack()


@pytest.mark.parametrize("name", ["digits", "digits-all", "cifar", "cifar-all"])
def test_a_demos_table_says_which_runs_it_is_of(name: str) -> None:
    runs = show.read(ROOT / "results" / f"demo-{name}")
    caption = render.demo(name).splitlines()[-1]
    for run in (run["run"] for several in runs.values() for run in several):
        assert run["commit"][:10] in caption and run["device"] in caption


def test_a_number_without_a_trusted_card_is_marked_in_every_demos_table() -> None:
    """Also that of an evaluation that is older than the cards, which `engine.card.mark` does not trust either."""
    for folder in sorted((ROOT / "results").glob("demo-*")):
        runs = show.read(folder)
        for line in show.table(runs, markdown=True).splitlines()[2:]:
            label, checkpoint, *cells = (part.strip() for part in line.strip("|").split("|"))
            marks = {card.mark(run["evaluations"][checkpoint]) for run in runs[label]}
            assert {cell.endswith("†") for cell in cells if "(" in cell} == {"†" in marks}, line
        assert ("†" in show.table(runs, markdown=True)) == bool(show.legend(runs))


def test_the_caption_says_what_the_mark_means() -> None:
    def run(label: str, *cards: bool | None) -> tuple[str, list]:
        return label, [{"evaluations": {"last": {} if trusted is None else {"card": {"trusted": trusted}}}} for trusted in cards]

    assert show.legend(dict([run("A", True, True), run("B", True)])) == ""
    assert show.legend(dict([run("A", None, None)])).endswith(" is not trusted. No claim card, evaluated before there were any: all 2 runs.")
    assert show.legend(dict([run("A", None, True), run("B", True, False), run("C, c", False)])).endswith(
        " Claim card not passed: B; C, c. No claim card, evaluated before there were any: 1 of the 5 runs.")
    assert "Claim card not passed: FGSM-AT." in render.demo("digits") and "all 5 runs." in render.demo("cifar")


def test_the_image_that_is_wrong_when_clean_and_right_under_attack() -> None:
    name, clean, fgsm = re.search(r"\(`(results/demo-[^`]+\.json)`: clean ([0-9.]+), FGSM ([0-9.]+)\)", README).groups()
    metrics = json.loads((ROOT / name).read_text())["evaluations"]["last"]["metrics"]
    assert float(fgsm) > float(clean) and [f"{metrics[key]['value']:.1f}" for key in ("clean", "fgsm")] == [clean, fgsm]


def test_a_table_of_unequal_numbers_of_seeds_has_a_column_of_them() -> None:
    runs = show.read(ROOT / "results" / "demo-digits")
    assert "Seeds" not in show.table(runs, markdown=True)
    runs[next(iter(runs))].pop()
    assert [line.split("|")[-2].strip() for line in show.table(runs, markdown=True).splitlines()] == ["Seeds", "---:", "2", "3", "3", "3"]


def test_cell_shows_range_or_interval() -> None:
    one = {"value": 50.0, "n": 100, "interval": [40.4, 59.6]}
    assert show.cell([one]) == "50.0 (40.4 to 59.6)"
    assert show.cell([one, one | {"value": 52.0}]) == "51.0 (50.0 to 52.0)"
