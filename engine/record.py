"""What is written down: JSON files, where a number comes from, and how far it can be trusted."""
from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.errors import Misuse

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end: whole and on the disk, or not at all."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(text: str, path: Path) -> None:
    """Replaces the file whole; its folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def write_json(content: Any, path: Path) -> None:
    """Replaces the file whole, by indented JSON; a number that is not finite becomes null."""
    write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        Misuse: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Misuse(f"{path} is damaged ({error}): delete it, and what it held is done again") from error


def write_lines(rows: list[dict[str, Any]], path: Path) -> None:
    """Replaces the file whole, by one JSON object a line."""
    write_text("".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows), path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(standing: torch.Tensor) -> dict[str, Any]:
    """(n,) bool verdicts to the accuracy in percent, n, and Wilson's 95 % interval of it."""
    return percent_of(100 * int(standing.sum()) / len(standing), len(standing))


def percent_of(value: float, n: int) -> dict[str, Any]:
    """An accuracy in percent over n images, with its interval."""
    low, high = wilson(round(value * n / 100), n)
    return {"value": value, "n": n, "interval": [100 * low, 100 * high]}


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a binomial proportion k / n (Wilson 1927)."""
    z = 1.959964
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def provenance(device: torch.device, precision: str, code: dict[str, Any]) -> dict[str, Any]:
    """Commit, versions and machine of a measurement. `code`: what `source` said when the program began; a tree may change while it runs."""
    return {
        **code,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda,
                     "pyautoattack": _version("pyautoattack")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on the GPU, or the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def continued(source: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """What `source` says of a measurement that another tree began: dirty where one part of it is, and the other commits listed.

    Args:
        before: what this said of the earlier part; None where there is none.
    """
    if before is None:
        return source
    earlier = [commit for commit in (*before.get("earlier_commits", ()), before["commit"]) if commit != source["commit"]]
    return source | {"dirty": source["dirty"] or before["dirty"], **({"earlier_commits": list(dict.fromkeys(earlier))} if earlier else {})}


def digest_of_script(kind: type) -> str | None:
    """SHA-256 of the file in which a class is defined; None where that is none, as in a notebook."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def source() -> dict[str, Any]:
    """The code's commit, and whether the tree differs from it: from git, or from SOURCE_COMMIT where the tree was exported without its history.

    Files in results/ do not count: what one measurement writes does not change what the next one measures. Nor do files that git does not track,
    unless they are Python.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            raise FileNotFoundError
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results") or git("ls-files", "--others", "--exclude-standard", "--", "*.py"))}
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("SOURCE_COMMIT") or None
        return {"commit": commit, "dirty": commit is None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"CPU {names[0]}, {len(names)} cores" if names else f"CPU {platform.machine()}"
    except OSError:
        return f"CPU {platform.processor() or platform.machine()}"
