"""What a worker of a study does: it trains and scores runs in its process, as ``train.py`` does.

A run must not differ from the same run in a new process: what one leaves behind is put
back after it.
"""

import fcntl
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

import torch

from sra_fast.analysis.run_scores import LOSSES, ScoreOptions, scores_folder
from sra_fast.analysis.study_plans import parsed
from sra_fast.analysis.study_scores import RECORD, finished_run, made_like
from sra_fast.analysis.worker import Failed, find_function
from sra_fast.data.loader import Batches
from sra_fast.training.endings import ending_of
from sra_fast.training.logger import TrainLogger
from sra_fast.training.loop import BEGINNING, image_order, optimizer_step
from sra_fast.training.plan import RunPlan, make_run_plan
from sra_fast.training.run import run
from sra_fast.training.signals import STOPPED, Stopped, StopSignals
from sra_fast.training.trainer import build
from sra_fast.utils.files import write_json
from sra_fast.zero.deepspeed_names import restore_linear
from sra_fast.zero.process_group import init_distributed

# the most steps of a trial, and seconds after which it takes no further one
TRIAL_STEPS = 20
TRIAL_SECONDS = 10.0
# seconds between two looks for a stop while a run is scored
LOOK_EVERY = 0.3


def start() -> tuple[dict, Callable[[dict, StopSignals], dict | None]]:
    """``(about, work)`` for ``analysis.jobs``: what a run's rounding depends on, and ``do_run``."""
    device = init_distributed()
    on_gpu = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        # on a GPU they compute nothing of a run
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return about, do_run


def do_run(arguments: dict, stop: StopSignals) -> dict | None:
    """Train one run to its summary, from its last checkpoint if it has one, and score it.

    Args:
        arguments: ``runs``, the folder of the run. ``train``, the arguments of ``train.py`` with
            this folder as ``--train.out``: absent if it is only scored. ``score``, arguments of
            ``score_one``: absent if it is not. Or ``trial``, arguments of ``train.py`` for a trial.
        stop: open signals.

    Returns:
        Of a trial ``{"seconds": ..., "images": ...}``, else None.

    Raises:
        Failed: what ``train.py`` would have said in one line.
        Stopped: it was asked to stop; its checkpoint is whole.
    """
    try:
        if "trial" in arguments:
            return _one_line(lambda: _trial(arguments["trial"], stop))
        if "train" in arguments:
            _one_line(lambda: _train(arguments["train"], stop))
        if "score" in arguments:
            stop.check()
            with ending_at(stop):
                _one_line(
                    lambda: score_one(Path(arguments["runs"]), **arguments["score"]), "scoring "
                )
        return None
    finally:
        _put_back()


def _one_line(work: Callable, what: str = ""):
    """What ``work`` returns; ``Failed`` for an error that ``train.py`` would tell in one line."""
    try:
        return work()
    except (Stopped, Failed):
        raise
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        line = ending.line.removeprefix("error: ")
        raise Failed(f"{what}failed: {line}" if what else line) from None


def _planned(arguments: list[str], stop: StopSignals) -> tuple[RunPlan, torch.device]:
    cfg, ds_json = parsed(arguments)
    plan = make_run_plan(cfg, ds_json)
    stop.check()
    return plan, init_distributed(cfg.train.tf32)


def _train(arguments: list[str], stop: StopSignals) -> None:
    # a new run if there is no checkpoint
    plan, device = _planned([*arguments, "--train.resume", "auto"], stop)
    run(plan, device, stop)


def _trial(arguments: list[str], stop: StopSignals) -> dict:
    """Time some steps; nothing is written."""
    plan, device = _planned(arguments, stop)
    trainer = build(plan.plan, device)
    cfg = trainer.cfg
    logger = TrainLogger(None, cfg, device, trainer.plan.world)
    # one for the loader, which is ahead
    stream, ahead = (image_order(trainer, len(plan.data), BEGINNING) for _ in range(2))
    seconds: list[float] = []
    with Batches(plan.data, ahead, cfg.data.num_workers, device.type == "cuda") as batches:
        trainer.engine.train()
        while len(seconds) < min(TRIAL_STEPS, cfg.train.steps) and sum(seconds) < TRIAL_SECONDS:
            stop.check()
            began = time.perf_counter()
            optimizer_step(trainer, batches, stream, plan.data, len(seconds), logger)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    # the first half warms everything up; a step that takes very long is alone
    steady = seconds[len(seconds) // 2 :]
    return {"seconds": sum(steady) / len(steady), "images": cfg.train.global_batch}


def score_one(runs: Path, function: str, options: dict, own: bool, cache: str, how: dict) -> None:
    """Score a finished run and record its scores.

    Args:
        runs: the folder that holds the run folder.
        function: ``module:function``.
        options: of ``ScoreOptions``.
        own: whether the function is the study's own, and called with the run folder alone.
        cache: where the networks that score lie.
        how: what the scores are recorded with, ``Scoring.identity``.

    Raises:
        ValueError: the run cannot be scored, or what the function returned is no scores.
    """
    done = finished_run(runs)
    if done is None:
        raise ValueError(f"expected a finished run in {runs}, found none")
    score = find_function(function)
    if own:
        scores = score(done)
    else:
        made = ScoreOptions(**options)
        with networks(Path(cache), made.samples > 0):
            scores = score(done, made, Path(cache), init_distributed())
    numbers = _numbers(function, scores, lists=not own)
    record = {"made_with": made_like(done, how), "scores": numbers}
    key = None if own else scores["made_of"].get("held_out_key")
    if key is not None:
        file = scores_folder(done, made.weights) / LOSSES
        record["held_out"] = {"file": str(file.relative_to(runs)), "key": key}
    write_json(runs / RECORD, record)


def _numbers(function: str, scores: object, lists: bool) -> dict[str, float]:
    """The scores by name.

    ``lists``: there may be lists and mappings among them, which stay in the function's own file.

    Raises:
        ValueError: something else is among them, a score is not finite, or there is none.
    """
    if isinstance(scores, dict) and all(isinstance(name, str) for name in scores):
        held = {
            name: value
            for name, value in scores.items()
            if not (lists and isinstance(value, list | dict))
        }
        numbers = {name: _number(function, name, value) for name, value in held.items()}
        if numbers:
            bad = [name for name, value in numbers.items() if not math.isfinite(value)]
            if bad:
                raise ValueError(
                    f"{function} returned scores that are not finite: {', '.join(bad)}"
                )
            return numbers
    raise ValueError(f"{function} must return numbers by name, got {str(scores)[:100]}")


def _number(function: str, name: str, value: object) -> float:
    # a tensor or an array of one element
    if getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(
            f"{function} must return numbers by name, got {name} of type {type(value).__name__}"
        )
    return float(value)


@contextmanager
def networks(cache: Path, needed: bool) -> Iterator[None]:
    """Let one worker make the networks that score: the others wait, and read them."""
    if not needed:
        yield
        return
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as file:
        if not _has_networks(cache):
            fcntl.lockf(file, fcntl.LOCK_EX)
            if _has_networks(cache):
                # another worker has made them meanwhile
                fcntl.lockf(file, fcntl.LOCK_UN)
        # the end of the file is the end of the lock
        yield


def _has_networks(cache: Path) -> bool:
    return any(cache.glob("*.safetensors"))


@contextmanager
def ending_at(stop: StopSignals) -> Iterator[None]:
    """End this process when somebody asks to stop: scores are made anew, not in parts."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(LOOK_EVERY):
            if stop.code:
                print(
                    f"stopped by {stop.asked} while the run was scored", file=sys.stderr, flush=True
                )
                os._exit(STOPPED)

    thread = threading.Thread(target=watch, name="stop of scores", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _put_back() -> None:
    """What the next run must not find: a stage 3's ``linear``, compiled code, memory."""
    restore_linear()
    if "torch._dynamo" in sys.modules:
        # it stops to compile after a few models of one class
        torch._dynamo.reset()
    # an engine refers to itself
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
