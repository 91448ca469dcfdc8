"""Where a training waits for its GPU: every line of Python that does, and how often.

python -m benchmarks.step.host_syncs -- --config configs/digits.yaml --train.graph false

Everything after ``--`` is configuration. The whole loop is watched, its first steps and what it logs
and saves included. With a graph (``train.graph``) the step's lines are passed only while it is captured.
"""

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from sra_fast.checkpoint.reading import CHECKPOINTS
from sra_fast.config.cli import parse_train
from sra_fast.data.training_data import TrainingData
from sra_fast.training.logger import TrainLogger
from sra_fast.training.loop import BEGINNING, train
from sra_fast.training.plan import make_run_plan
from sra_fast.training.saver import Saver
from sra_fast.training.step_watch import History
from sra_fast.training.trainer import Trainer, build
from sra_fast.training.watchdog import Watchdog
from sra_fast.zero.process_group import init_distributed

# what PyTorch says
WARNING = "called a synchronizing CUDA operation"


def synchronising_lines(function: Callable[[], object]) -> Counter[str]:
    """``file:line`` of every call in which ``function()`` made the host wait for the GPU, counted."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Counter(
        f"{found.filename}:{found.lineno}" for found in caught if WARNING in str(found.message)
    )


def whole_training(trainer: Trainer, data: TrainingData, out: Path) -> None:
    """All steps of a training, which logs and saves into a folder."""
    logger = TrainLogger(out, trainer.cfg, trainer.device, trainer.plan.world)
    with Saver(trainer, out / CHECKPOINTS, data.facts()) as saver:
        train(trainer, data, out, BEGINNING, None, logger, saver, None, Watchdog(0), History())
    logger.close()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="of the training (default 30)")
    parser.add_argument("rest", nargs="*", help="configuration, after --")
    asked = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as out:
        # the last options count
        given = [*asked.rest, "--train.steps", str(asked.steps), "--train.out", out]
        run_plan = make_run_plan(*parse_train(given))
        device = init_distributed()
        if device.type != "cuda":
            parser.error(f"expected a GPU to wait for, the device is {device}")
        trainer = build(run_plan.plan, device)
        found = synchronising_lines(lambda: whole_training(trainer, run_plan.data, Path(out)))
    for line, times in found.most_common():
        print(f"{times:5d} {line}")
    print(f"{found.total()} calls of {len(found)} lines waited for the GPU in {asked.steps} steps")


if __name__ == "__main__":
    main()
