"""Every training script, run as a user runs it, and the evaluation of what it left."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--dataset", "digits", "--epochs", "2", "--train-size", "200", "--device", "cpu")


def trains_and_is_evaluated(command: Callable[..., str], script: str, out_dir: Path) -> None:
    """`command` runs a script with flags, which must end well, and returns what it printed."""
    said = command(script, *FLAGS, "--out-dir", out_dir)
    assert said.count("epoch ") >= 2 and "test_FGSM_SDI.py --model_path" in said
    result = json.loads((out_dir / "result.json").read_text())
    for name in ("best", "last"):
        for column in ("clean", "fgsm", "pgd10"):
            metric = result["checkpoints"][name][column]
            assert 0 <= metric["interval"][0] <= metric["value"] <= metric["interval"][1] <= 100 and metric["n"] == 137
    assert len((out_dir / "log.jsonl").read_text().splitlines()) == 2

    said = command("test_FGSM_SDI", "--model_path", out_dir / "best.pth", "--attacks", "clean,pgd10", "--n-ex", 60)
    evaluation = json.loads((out_dir / "best-evaluation" / "evaluation.json").read_text())
    assert evaluation["method"] == result["method"] and evaluation["arch"] == "resnet8" and evaluation["epsilon"] == 51
    assert evaluation["metrics"]["pgd10"]["n"] == 60 and f"{evaluation['metrics']['clean']['value']:6.2f} %" in said
    assert any("first 60 of 360" in sentence for sentence in evaluation["warnings"])


def test_script_trains_and_is_evaluated(train_script, tiny):
    def command(*words: Any) -> str:
        result = tiny.command(*words)
        assert result.status == 0, result.err
        return result.out

    trains_and_is_evaluated(command, train_script, tiny.directory)


def test_from_the_shell(tmp_path):
    def command(script: str, *flags: Any) -> str:
        done = subprocess.run([sys.executable, f"{script}.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    trains_and_is_evaluated(command, "train_fgsm_sdi", tmp_path)
