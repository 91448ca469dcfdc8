"""Rows of measurements: their fields, where they were taken, and the JSON file that holds them."""

import argparse
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

# a row leaves out the fields that mean nothing for it; without "ms" the variant was wrong or failed
FIELDS = (
    "kind",
    "name",
    "variant",
    "model",
    "resolution",
    "batch",
    "dtype",
    "device",
    "ms",
    "images_per_s",
    "mfu",
    "mfu_with_teacher",
    "gbps",
    "percent_of_ceiling",
    "peak_bytes",
    "sm_mhz",
    "watts",
    "throttled",
    "spread",
    "versions",
    "commit",
    "date",
    "command",
)
# files whose content decides what is measured, also before git knows them
CODE = (
    "sra_fast/*.py",
    "kernels/*.py",
    "csrc/*.py",
    "csrc/*.cu",
    "csrc/*.cpp",
    "benchmarks/*.py",
)
# what the operators read from the environment. A row has no field for it
VARIABLES = ("SRA_FAST_BACKEND", "SRA_FAST_ATTENTION", "SRA_FAST_CUBLASLT")
# two rows that agree in these fields measure the same thing
KEY = ("kind", "name", "variant", "model", "resolution", "batch", "dtype", "device", "commit")
# rows that agree in these fields are of one run
RUN = ("device", "commit", "versions")
# fields that every row has
ALWAYS = ("kind", "name", "variant", *RUN)


def _git(*arguments: str) -> str | None:
    """What git prints, or None without git or outside a checkout."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit that is measured.

    Returns:
        $SRA_FAST_COMMIT if it is set (for a machine that has a copy of the tree without git). Otherwise
        the short hash, with "-dirty" if code was changed or added since; "unknown" outside a
        checkout.
    """
    if given := os.environ.get("SRA_FAST_COMMIT"):
        return given
    found = _git("rev-parse", "--short=10", "HEAD")
    # a copy without git inside another repository would take that one's hash
    top = _git("rev-parse", "--show-toplevel")
    if not found or not top or Path(top).resolve() != ROOT:
        return "unknown"
    # a run and its tables write these
    results = (":!benchmarks/results", ":!README.md", ":!docs/benchmarks.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    new = _git("ls-files", "--others", "--exclude-standard", "--", *CODE)
    return f"{found}-dirty" if changed or new else found


def variables_set() -> str | None:
    """What is wrong with the environment of a benchmark without variants for it; None: nothing."""
    found = [name for name in VARIABLES if name in os.environ]
    return f"expected no {found[0]}, which rows do not show: unset it" if found else None


def command_line(module: str, argv: list[str]) -> str:
    """The command that starts a benchmark, as it is written into rows."""
    return f"python -m {module} " + " ".join(argv)


def environment(device: str, command: str) -> dict:
    """The fields that all rows of a run share: device, versions, commit, date and command."""
    # what a time depends on besides the code
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    # the operators need no DeepSpeed
    with contextlib.suppress(PackageNotFoundError):
        versions["deepspeed"] = version("deepspeed")
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": without_machine_paths(command),
    }


def without_machine_paths(command: str) -> str:
    """The command with paths relative to the checkout; of a path outside it only the last part stays."""
    words = []
    for word in command.split():
        if word.startswith(f"{ROOT}{os.sep}"):
            word = os.path.relpath(word, ROOT)
        # the folders above it are those of one machine
        words.append(os.path.basename(word) if os.path.isabs(word) else word)
    return " ".join(words)


def make_row(**fields) -> dict:
    """A row with its fields in the order of ``FIELDS``, without those that are None."""
    unknown = set(fields) - set(FIELDS)
    assert not unknown, unknown
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def in_file_name(device: str) -> str:
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, none if there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected rows in JSON, got a damaged file: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        lacking = set(ALWAYS) - set(row) if isinstance(row, dict) else ALWAYS
        if lacking:
            names = ", ".join(sorted(lacking))
            raise ValueError(f"{path}: expected rows, got no {names} in number {i}")
    return rows


def row_file(text: str) -> Path:
    """The argument of a --json: a file of rows, or one that is not there yet."""
    path = Path(text)
    try:
        read_rows(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{error}") from error
    return path


class RowFile:
    """Rows on disk. The file is written after every change; a repeated measurement replaces the older one.

    Args:
        path: the JSON file, or None for ``benchmarks/results/<device>-<commit>.json``.
        where: what ``environment`` returned.

    Raises:
        ValueError: the file is there and holds something else. It stays as it is.
    """

    def __init__(self, path: Path | None, where: dict):
        device = in_file_name(where["device"])
        self.path = path or RESULTS / f"{device}-{where['commit']}.json"
        self.rows = read_rows(self.path)

    def add(self, row: dict) -> None:
        key = [row.get(name) for name in KEY]
        others = [old for old in self.rows if [old.get(name) for name in KEY] != key]
        self.rows = [*others, row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # replaced in one go: a run that is killed here leaves a whole file
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        os.replace(partial, self.path)


def load_results(folder: Path = RESULTS) -> list[dict]:
    """All rows of a folder's JSON files, the oldest first; of a repeated measurement the newest.

    Raises:
        ValueError: a file holds something else.
    """
    rows = [row for path in sorted(folder.glob("*.json")) for row in read_rows(path)]
    rows.sort(key=lambda row: row.get("date", ""))
    # other versions measure something else
    found = {json.dumps([row.get(name) for name in (*KEY, "versions")]): row for row in rows}
    return list(found.values())
