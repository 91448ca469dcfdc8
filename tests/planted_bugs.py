"""Break the operators on purpose, one bug at a time in a copy of the tree, and see the tests go
red.

    python tests/planted_bugs.py [word ...]     the bugs whose name or file contains one of the
    words
    python tests/planted_bugs.py --patterns     only whether every bug still has its place

One line per bug; exit status 1 if a bug goes unnoticed or tests are red without one. Not collected
by pytest: all of it takes about half an hour on one core. tests/test_planted_bugs.py plants a few
of them in every run of the tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import planted_bugs_flat
import planted_bugs_heads
import planted_bugs_integrations
import planted_bugs_layers
import planted_bugs_norm

ROOT = Path(__file__).resolve().parents[1]
TREE = (
    "kernels",
    "sra_fast",
    "csrc",
    "benchmarks",
    "tests",
    "setup.py",
    "pyproject.toml",
    "README.md",
)
# name, file, what is there, what is put there, arguments of the pytest run that must notice
BUGS = [
    *planted_bugs_norm.BUGS,
    *planted_bugs_heads.BUGS,
    *planted_bugs_layers.BUGS,
    *planted_bugs_flat.BUGS,
    *planted_bugs_integrations.BUGS,
]


def misplaced() -> list[str]:
    """A line for every bug whose pattern does not occur exactly once: planted nowhere, or in two
    places, it proves nothing about the test that notices it.
    """
    counts = [(name, path, (ROOT / path).read_text().count(old)) for name, path, old, *_ in BUGS]
    return [
        f"{path}: {name}: its pattern occurs {count} times, expected 1"
        for name, path, count in counts
        if count != 1
    ]


def run_tests(
    tests: str, path: str = "", old: str = "", new: str = ""
) -> subprocess.CompletedProcess:
    """Run the tests in a fresh copy of the tree, with the bug if one is given."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TREE:
            source = ROOT / name
            target = Path(folder) / name
            if source.is_dir():
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so")
                )
            else:
                shutil.copy(source, target)
        if path:
            text = (ROOT / path).read_text()
            (Path(folder) / path).write_text(text.replace(old, new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *tests.split(),
        ]
        env = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def noticed(name: str, path: str, old: str, new: str, tests: str) -> bool:
    run = run_tests(tests, path, old, new)
    # 1: a test failed; negative: a wild address killed the interpreter. 2 would mean that a file
    # does not import, which proves nothing
    red = run.returncode == 1 or run.returncode < 0
    first = next(
        (line for line in run.stdout.splitlines() if line.startswith("FAILED")),
        f"exit {run.returncode}",
    )
    print(
        f"{'noticed' if red else 'MISSED '}  {path}: {name}: {first.partition(' - ')[0]}",
        flush=True,
    )
    return red


def main(words: list[str]) -> int:
    if lines := misplaced():
        print("\n".join(lines))
        return 1
    if words == ["--patterns"]:
        return 0
    bugs = [
        bug for bug in BUGS if not words or any(word in bug[0] or word in bug[1] for word in words)
    ]
    for tests in dict.fromkeys(bug[4] for bug in bugs):
        if run_tests(tests).returncode:
            print(f"RED without a bug: {tests}")
            return 1
    results = [noticed(*bug) for bug in bugs]
    print(f"{sum(results)} of {len(results)} noticed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
