"""Who may import whom, and that importing anything does nothing."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
OURS = {"utils", "attacks", "models", "engine", "experiments", "test_FGSM_SDI", "benchmarks", "reproduce", *SCRIPTS}
# What a part may import of the others: arrows point one way.
MAY = {
    "utils": set(), "attacks": {"utils"}, "models": set(), "engine": {"utils", "attacks", "models"},
    "test_FGSM_SDI": {"engine"}, "experiments": {"engine", "models", "attacks", "utils"},
    "reproduce": {"engine", "experiments"}, "benchmarks": {"engine", "experiments", "models", "attacks", "utils", *SCRIPTS},
    **{script: {"engine", "utils", "attacks", "models"} for script in SCRIPTS},
}


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / f"{part}.py"]


def imported(path: Path) -> list[str]:
    """Every module that the file imports, anywhere in it, with the names taken from it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("part", MAY)
def test_imports_point_one_way(part: str) -> None:
    for path in files(part):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in OURS - MAY[part] - {part}, f"{path.name} imports {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_method_is_its_algorithm_box(script: str) -> None:
    text = (ROOT / f"{script}.py").read_text()
    of_attacks = {name for name in imported(ROOT / f"{script}.py") if name.startswith("attacks")}
    assert of_attacks <= {"attacks.input_gradient"}, "a training attack is spelt out, never taken from the yardstick"
    of_models = {name for name in imported(ROOT / f"{script}.py") if name.startswith("models")}
    assert of_models <= {"models.generator.PerturbationGenerator", "models.strategy.StrategyNetwork"}
    assert ".cuda(" not in text and ".item(" not in text
    assert len(text.splitlines()) <= (200 if script in ("train_las_at", "train_awp") else 150)
    doc = ast.get_docstring(ast.parse(text))
    venues = ("ICLR", "ICML", "NeurIPS", "TIP", "AAAI", "ECCV", "ICCV", "CVPR", "GitHub")  # the last: two methods have a code and no venue
    assert doc and "docs/methods.md#" in doc and any(venue in doc for venue in venues)
    anchor = doc.split("docs/methods.md#")[1].split(".")[0].strip()
    headings = [line.removeprefix("## ").strip().lower().replace(" ", "-") for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if line.startswith("## ")]
    assert anchor in headings


def test_only_one_file_names_torch_distributed() -> None:
    for part in MAY:
        for path in files(part):
            named = any(name.startswith("torch.distributed") for name in imported(path))
            assert named == (path == ROOT / "engine" / "distributed.py"), path


IMPORT = """
import builtins, io, os, pathlib, sys
real = io.open
def guarded(file, mode="r", *more, **options):
    if set(mode) & set("wax+"):
        raise AssertionError(f"opened {file} for writing")
    return real(file, mode, *more, **options)
import torch, numpy, tqdm, matplotlib  # what these do is theirs
import importlib, traceback
def refuse(*a, **k): raise AssertionError("made a directory")
def imported(module):
    builtins.open = io.open = guarded
    os.makedirs = os.mkdir = refuse
    importlib.import_module(module)
    assert not torch.cuda.is_initialized()
for module in sys.argv[1:]:
    before = os.fstat(1).st_size
    child = os.fork()  # into which none of ours has been imported
    if not child:
        try:
            imported(module)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status or os.fstat(1).st_size > before:
        os.write(1, f"^ of {module}\\n".encode())
"""


def test_importing_prints_nothing_and_touches_nothing(tmp_path: Path) -> None:
    modules = [part for part in MAY if part != "experiments"] + ["experiments.show", "experiments.demo", "experiments.render"]
    without_a_home, said = os.environ | {"MPLCONFIGDIR": str(tmp_path)}, tmp_path / "said"
    with open(said, "wb") as output:
        done = subprocess.run([sys.executable, "-B", "-c", IMPORT, *modules], cwd=ROOT, stdout=output, stderr=output, env=without_a_home)
    assert (done.returncode, said.read_text()) == (0, "")


def test_every_requirement_is_used() -> None:
    names = {"scikit-learn": "sklearn", "pytest-xdist": None, "tensorboard": "torch.utils.tensorboard"}
    used = {name for part in OURS | {"tests"} for path in files(part) for name in imported(path)}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        package = line.split(">=")[0]
        module = names.get(package, package)
        assert module is None or any(name == module or name.startswith(module + ".") for name in used), package


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_mistaken_for_one_of_torchruns(script: str) -> None:
    """torchrun takes what begins one of its own options for itself, even after the script's name."""
    import importlib

    from torch.distributed.run import get_args_parser

    from engine.config import parser
    module = importlib.import_module(script)
    ours = {option for action in parser(module.Config, "")._actions for option in action.option_strings if option.startswith("--") and option != "--help"}
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert not [(a, b) for a in ours for b in theirs if b.startswith(a)]
