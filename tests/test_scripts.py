"""Every training script starts as a user starts it, and the evaluation reads what it left."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--dataset", "digits", "--epochs", "2", "--train-size", "200", "--device", "cpu"]


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("train_*.py")))
def test_script_trains_and_is_evaluated(script: str, tmp_path: Path) -> None:
    def command(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = command(script, *FLAGS, "--out-dir", str(tmp_path))
    assert said.count("epoch ") >= 2 and "test_FGSM_SDI.py --model_path" in said
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("best", "last"):
        for column in ("clean", "fgsm", "pgd10"):
            metric = result["checkpoints"][name][column]
            assert 0 <= metric["interval"][0] <= metric["value"] <= metric["interval"][1] <= 100 and metric["n"] == 137
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2

    said = command("test_FGSM_SDI.py", "--model_path", str(tmp_path / "best.pth"), "--attacks", "clean,pgd10", "--n-ex", "60")
    evaluation = json.loads((tmp_path / "best-evaluation" / "evaluation.json").read_text())
    assert evaluation["method"] == result["method"] and evaluation["arch"] == "resnet8" and evaluation["epsilon"] == 51
    assert evaluation["metrics"]["pgd10"]["n"] == 60 and f"{evaluation['metrics']['clean']['value']:6.2f} %" in said
    assert any("first 60 of 360" in sentence for sentence in evaluation["warnings"])
