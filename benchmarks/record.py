"""JSON rows of measurements: their fields, where they were taken, and the file that holds them."""

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# a field is absent where it means nothing; a row without ms is of a variant whose results were wrong
FIELDS = (
    "kind", "name", "variant", "model", "resolution", "batch", "dtype", "device", "ms", "images_per_s", "mfu",
    "mfu_with_teacher", "gbps", "percent_of_ceiling", "peak_bytes", "sm_mhz", "watts", "throttled", "spread",
    "versions", "commit", "date", "command",
)  # fmt: skip
KEY = ("kind", "name", "variant", "model", "resolution", "batch", "dtype", "device", "commit")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None


def commit() -> str:
    """$SRA_FAST_COMMIT where it is set, as on a machine that has a copy of the tree; else the short hash, "-dirty" if the code
    differs from it; "unknown" outside a checkout."""
    if given := os.environ.get("SRA_FAST_COMMIT"):
        return given
    found = _git("rev-parse", "--short=10", "HEAD")
    if found is None:
        return "unknown"
    # what a run itself leads to does not count
    results = (":!benchmarks/results", ":!README.md")
    return found + (
        "-dirty"
        if _git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
        else ""
    )


def environment(device: str, command: str) -> dict:
    """The fields that all rows of a run share."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    with contextlib.suppress(PackageNotFoundError):
        versions["deepspeed"] = version("deepspeed")
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return {
        "device": name,
        "versions": versions,
        "commit": commit(),
        "date": date,
        "command": anonymous(command),
    }


def anonymous(command: str) -> str:
    """The command without the folders of the machine that it ran on."""
    words = [
        os.path.relpath(word, ROOT) if word.startswith(f"{ROOT}{os.sep}") else word
        for word in command.split()
    ]
    return " ".join(os.path.basename(word) if os.path.isabs(word) else word for word in words)


def make_row(**fields) -> dict:
    """The fields in their order, without those that are None."""
    unknown = set(fields) - set(FIELDS)
    assert not unknown, unknown
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


class RowFile:
    """Rows on disk, written after every change; a repeated measurement replaces the older one."""

    def __init__(self, path: Path | None, where: dict):
        slug = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
        self.path = path or RESULTS / f"{slug}-{where['commit']}.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []

    def add(self, row: dict) -> None:
        key = [row.get(name) for name in KEY]
        self.rows = [old for old in self.rows if [old.get(name) for name in KEY] != key] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        os.replace(partial, self.path)


def load_results(folder: Path = RESULTS) -> list[dict]:
    """All rows under benchmarks/results, the oldest first."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    return sorted(rows, key=lambda row: row.get("date", ""))
