"""Work that trains nothing, for the workers of ``analysis.jobs`` and as a study's own function."""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from sra_fast.analysis.study_scores import finished_run, made_like
from sra_fast.analysis.worker import Failed, find_function
from sra_fast.training.signals import STOPPED, stopped

# what this work says of its process; a test may set another one
ABOUT = "FAKE_WORK_ABOUT"


def start():
    """As ``study_runs.start``."""
    about = os.environ.get(ABOUT, '{"device": "cpu", "threads": 1, "torch": "0"}')
    return json.loads(about), work


def work(arguments: dict, stop):
    """Do what ``arguments`` say; with those of a study leave what its runs leave."""
    if "trial" in arguments:
        return {"seconds": 0.5, "images": 64}
    if "runs" in arguments:
        if "train" in arguments:
            train(arguments["train"], stop)
        if "score" in arguments:
            score(Path(arguments["runs"]), arguments["score"])
        return None
    kind = arguments["kind"]
    print(f"begins {kind}", flush=True)
    if kind == "wait":
        Path(arguments["begun"]).touch()
        wait(stop)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "exit":
        os._exit(3)
    if kind == "leave":
        Path(arguments["begun"]).touch()
        while not stop.code:
            time.sleep(0.02)
        print("left the scores", flush=True)
        os._exit(STOPPED)
    if kind == "refuse":
        raise Failed("error: a reason")
    if kind == "raise":
        raise RuntimeError("a fault\nof two lines")
    if kind == "note":
        pid = os.getpid()
        Path(arguments["file"]).write_text(f"{pid} {os.environ['OMP_NUM_THREADS']}")
    return os.getpid()


def wait(stop):
    """Go on until somebody asks to stop."""
    while not stop.code:
        time.sleep(0.02)
    raise stopped(stop.code, step=7, saved=True)


def train(words: list[str], stop) -> None:
    """Leave losses and a summary that follow from the arguments and the seed."""
    options = dict(zip(words[::2], words[1::2], strict=True))
    weight = float(options.get("--align.weight", 1.0))
    seed = int(options["--train.seed"])
    if weight == 7:
        print("the reason", file=sys.stderr)
        raise Failed("no such weight")
    run = Path(options["--train.out"]) / "000"
    if weight == 9 and not run.exists():
        run.mkdir(parents=True)
        wait(stop)
    run.mkdir(parents=True, exist_ok=True)
    # seeds differ more than variants do, and the difference of variants hardly differs
    level = weight + seed + 0.001 * weight * seed
    rows = [{"step": step, "denoise": level + 1 / step} for step in (1, 2, 3)]
    (run / "config.yaml").write_text("train: {log_every: 1}")
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"images_per_s": 100.0, "label_accuracy": 0.5, "frechet": 2.0 * level}
    (run / "summary.json").write_text(json.dumps({**summary, "checkpoint": f"{weight} {seed}"}))


def score(runs: Path, arguments: dict) -> None:
    """As ``study_runs.score_one``, with a function of this module."""
    run = finished_run(runs)
    scores = find_function(arguments["function"])(run)
    record = {"made_with": made_like(run, arguments["how"]), "scores": scores}
    (runs / "scores.json").write_text(json.dumps(record))


def quality(run: Path) -> dict[str, float]:
    """A score that follows from the training."""
    count = run.parent / "scored"
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    return {"quality": 10 - json.loads((run / "summary.json").read_text())["frechet"]}
