"""What a worker of a study does: it trains a run in its own process, as ``train.py`` does.

A run must not differ from the same run in a new process: what one leaves behind is put back after it.
"""

import gc
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch

from sra_fast.analysis.worker import Failed
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import Config
from sra_fast.training.endings import ending_of
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run
from sra_fast.training.signals import Stopped, StopSignals
from sra_fast.zero.deepspeed_names import restore_linear
from sra_fast.zero.process_group import init_distributed


def start() -> tuple[dict, Callable[[dict, StopSignals], None]]:
    """``(about, work)`` for ``analysis.jobs``: what a run's rounding depends on, and ``train_run``."""
    device = init_distributed()
    on_gpu = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        # on a GPU they compute nothing of a run
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return about, train_run


def parsed(arguments: list[str]) -> tuple[Config, str | None]:
    """``parse_train``, with a ValueError of one line in place of the end of the process."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse_train(arguments)
    except SystemExit:
        lines = said.getvalue().strip().splitlines() or ["?"]
        raise ValueError(lines[-1].removeprefix("error: ")) from None


def train_run(arguments: dict, stop: StopSignals) -> None:
    """Train one run to its summary, from its last checkpoint if it has one.

    Args:
        arguments: ``train``, the arguments of ``train.py`` with ``--train.out``.
        stop: open signals.

    Raises:
        Failed: what ``train.py`` would have said in one line.
        Stopped: it was asked to stop; its checkpoint is whole.
    """
    try:
        _train(arguments["train"], stop)
    finally:
        _put_back()


def _train(arguments: list[str], stop: StopSignals) -> None:
    out = None
    try:
        # a new run if there is no checkpoint
        cfg, ds_json = parsed([*arguments, "--train.resume", "auto"])
        out = Path(cfg.train.out)
        plan = make_run_plan(cfg, ds_json)
        stop.check()
        run(plan, init_distributed(cfg.train.tf32), stop)
    except Stopped:
        raise
    except Exception as error:
        ending = ending_of(error, out)
        if ending is None:
            raise
        raise Failed(ending.line) from None


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
