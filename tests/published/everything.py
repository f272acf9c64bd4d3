"""Every comparison with published code, one after the other: `compare`, `single_step`, `multi_step`, `strategies`.

    python tests/published/everything.py --checkouts DIR             about two hours; writes results/fidelity/
    python tests/published/everything.py --checkouts DIR --steps 2   ten minutes; does each still run? Nothing is written

DIR/<name of the repository> is a copy of each; one that is missing is cloned from GitHub, at the commit that was compared.
"""
from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("compare", "single_step", "multi_step", "strategies")


def checkout(url: str, commit: str, folder: Path) -> Path:
    """The repository's copy in `folder`."""
    copy = folder / url.rsplit("/", 1)[1]
    if not copy.is_dir():
        subprocess.run(["git", "clone", "--quiet", url, str(copy)], check=True)
        subprocess.run(["git", "-C", str(copy), "checkout", "--quiet", commit], check=True)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, help="where the repositories' copies lie, and are cloned to")
    parser.add_argument("--steps", type=int, help="stop every run after so many updates of the classifier; nothing is written")
    parser.add_argument("--only", help="some of the methods, with commas between them")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    failed = []
    for file in FILES:
        for name, method in importlib.import_module(file).METHODS.items():
            if options.only is None or name in options.only.split(","):
                copy = checkout(method.url, method.commit, options.checkouts)
                limit = ["--steps", str(options.steps)] if options.steps else []
                if subprocess.run([sys.executable, str(HERE / f"{file}.py"), name, "--checkout", str(copy), *limit]).returncode:
                    failed.append(name)
    if failed:
        sys.exit(f"not compared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
