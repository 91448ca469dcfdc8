"""Work for the workers of ``analysis.jobs`` that trains nothing, named in the place of a study's own."""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from sra_fast.analysis.worker import Failed
from sra_fast.training.signals import stopped

# what this work says of its process; a test may set another one
ABOUT = "FAKE_WORK_ABOUT"


def start():
    """As ``study_runs.start``."""
    about = os.environ.get(ABOUT, '{"device": "cpu", "threads": 1, "torch": "0"}')
    return json.loads(about), work


def work(arguments: dict, stop) -> None:
    """Do what ``arguments`` say; with ``train`` leave what a run leaves."""
    if "train" in arguments:
        train(arguments["train"])
        return
    kind = arguments["kind"]
    print(f"begins {kind}", flush=True)
    if kind == "wait":
        Path(arguments["begun"]).touch()
        while not stop.code:
            time.sleep(0.02)
        raise stopped(stop.code, step=7, saved=True)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "exit":
        os._exit(3)
    if kind == "refuse":
        raise Failed("error: a reason")
    if kind == "raise":
        raise RuntimeError("a fault\nof two lines")
    if kind == "note":
        pid = os.getpid()
        Path(arguments["file"]).write_text(f"{pid} {os.environ['OMP_NUM_THREADS']}")


def train(words: list[str]) -> None:
    """Leave losses and a summary that follow from the arguments and the seed."""
    options = dict(zip(words[::2], words[1::2], strict=True))
    weight = float(options.get("--align.weight", 1.0))
    if weight < 0:
        print("the reason", file=sys.stderr)
        raise Failed("error: align.weight must be positive")
    seed = int(options["--train.seed"])
    run = Path(options["--train.out"]) / "000"
    run.mkdir(parents=True)
    rows = [{"step": step, "denoise": weight + 0.1 * seed + 1 / step} for step in (1, 2, 3)]
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"images_per_s": 100.0 * weight, "label_accuracy": 0.5, "frechet": 2.0 * weight}
    (run / "summary.json").write_text(json.dumps({**summary, "checkpoint": f"{weight} {seed}"}))
