"""The step benchmark runs on any machine and writes rows that the tables can be made from."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--device cpu --model SiT-S/4 --resolution 32 --warmup 1 --steps 2".split()


def run(*args):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/train_step.py", *SMALL, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_rows_of_both_variants(tmp_path):
    done = run("--batch", 2, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout + done.stderr
    plain, sra = json.loads((tmp_path / "rows.json").read_text())
    for row, variant in ((plain, "plain"), (sra, "sra")):
        assert (row["kind"], row["variant"], row["model"], row["batch"]) == ("train_step", variant, "SiT-S/4", 2)
        assert row["images_per_s"] * row["ms"] / 1e3 - 2 < 1e-6 and row["ms"] > 0
        assert row["device"] == "cpu" and row["versions"]["torch"] and row["commit"] and "mfu" not in row and "peak_bytes" not in row


def test_a_case_that_fails_is_said_and_the_others_go_on(tmp_path):
    done = run("--batch", 1, "--variants", "plain", "--json", tmp_path / "rows.json", "--zero-stage", 7)
    assert done.returncode == 1 and "plain  batch 1: failed" in done.stdout
    assert run("--variants", "fastest").returncode == 2
