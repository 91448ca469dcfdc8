"""Training and saving without a run around it: no plan, no export, no summary."""

from contextlib import ExitStack
from pathlib import Path

from sra_fast.checkpoint.manifest import Progress, step_name
from sra_fast.checkpoint.reading import CHECKPOINTS
from sra_fast.data.facts import DataFacts
from sra_fast.data.training_data import TrainingData
from sra_fast.training import loop
from sra_fast.training.logger import TrainLogger
from sra_fast.training.monitor import Monitor
from sra_fast.training.saver import Saver
from sra_fast.training.signals import StopSignals
from sra_fast.training.step_watch import History
from sra_fast.training.trainer import Trainer
from sra_fast.training.watchdog import Watchdog


def train(
    trainer: Trainer,
    data: TrainingData,
    folder: Path,
    start: Progress = loop.BEGINNING,
    monitor: Monitor | None = None,
    saver: Saver | None = None,
    stop: StopSignals | None = None,
) -> list[dict]:
    """``loop.train`` into a folder, with a logger of its own; the logged rows.

    ``saver``: None: one of its own.
    """
    written = folder if trainer.rank == 0 else None
    logger = TrainLogger(written, trainer.cfg, trainer.device, trainer.plan.world, start.step)
    with ExitStack() as opened:
        if saver is None:
            saver = opened.enter_context(Saver(trainer, folder / CHECKPOINTS, data.facts()))
        watchdog = Watchdog(0)
        loop.train(trainer, data, folder, start, monitor, logger, saver, stop, watchdog, History())
    return logger.close()


def save(
    trainer: Trainer,
    folder: Path,
    progress: Progress,
    epoch: int,
    facts: DataFacts | None = None,
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and wait until it is on the disk; collective."""
    saver = Saver(trainer, folder, facts)
    saver.save(progress, epoch)
    saver.close()
    if saver.error is not None:
        raise saver.error
    return folder / step_name(progress.step)
