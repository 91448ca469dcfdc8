"""Writing snapshots of the power-function averages while a run trains."""

import os
import shutil
from collections.abc import Callable, Container
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.average_snapshots import (
    DTYPE,
    SNAPSHOT,
    AverageSnapshot,
    folder_of,
    write_snapshot,
)
from sra_fast.checkpoint.manifest import file_name
from sra_fast.checkpoint.shards import ema_kind, piece_key, write_pieces
from sra_fast.config.averages import power_averages
from sra_fast.config.schema import TrainConfig
from sra_fast.data.facts import DataFacts
from sra_fast.training.run_lock import check_held
from sra_fast.training.trainer import Trainer
from sra_fast.utils.collectives import agreed, reason
from sra_fast.utils.files import make_synced, plain, sync_folder
from sra_fast.utils.messages import warn


def is_due(cfg: TrainConfig, step: int) -> bool:
    """Whether the averages are stored after ``step`` steps: every so many, and after the last."""
    every = cfg.average_snapshots
    return bool(every) and (step % every == 0 or step == cfg.steps)


def store(trainer: Trainer, run: Path, step: int, facts: DataFacts | None = None) -> None:
    """Write the power-function averages as they are into the run's folder; collective.

    Each rank writes its part in fp16, so that no process needs memory for a whole model. Training
    waits for it: 2 bytes per parameter and average over the ranks.

    Args:
        trainer: whose averages are stored.
        run: the run's folder, locked.
        step: optimizer steps so far.
        facts: about the training data.

    Raises:
        ValueError: it cannot be written, the same on every rank.
    """
    updates = float(trainer.guard.counts[0])
    if not updates:
        # nothing was averaged yet
        return
    folder = folder_of(run, step)
    _agreed(trainer, step, lambda: _prepare(run, folder), ranks=(0,))
    pieces: dict[str, Tensor] = {}
    bad = _agreed(trainer, step, lambda: _take(trainer, pieces))
    not_finite = next((key for key in bad if key is not None), None)
    if not_finite is not None:
        warn("the averages of step %d are not stored: %s is not finite in fp16", step, not_finite)
        _agreed(trainer, step, lambda: shutil.rmtree(folder), ranks=(0,))
        return
    path = folder / file_name(trainer.rank)
    files = _agreed(trainer, step, lambda: write_pieces(path, pieces))
    averages = {
        name: average.facts
        for name, average in trainer.averages.items()
        if average.rule.sigma_rel is not None
    }
    snapshot = AverageSnapshot(
        step,
        updates,
        averages,
        {file_name(rank): stored for rank, stored in enumerate(files)},
        plain(asdict(trainer.cfg)),
        None if facts is None else facts.as_json(),
    )
    _agreed(trainer, step, lambda: _commit(run, folder, snapshot), ranks=(0,))


def _prepare(run: Path, folder: Path) -> None:
    """Make an empty folder; one of this step that is there belongs to what was given up."""
    check_held(run)
    make_synced(folder.parent)
    if os.path.lexists(folder):
        # what is left after a kill is no snapshot
        (folder / SNAPSHOT).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir()
    sync_folder(folder.parent)


def _commit(run: Path, folder: Path, snapshot: AverageSnapshot) -> None:
    check_held(run)
    write_snapshot(folder, snapshot)


def _take(trainer: Trainer, pieces: dict[str, Tensor]) -> str | None:
    """Put this rank's share into ``pieces``; the key of the first that is not finite, or None."""
    pieces.update(_pieces(trainer))
    return next((key for key, piece in pieces.items() if not piece.isfinite().all()), None)


@torch.no_grad()
def _pieces(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's share of the averages in host memory, as ``write_pieces`` takes it."""
    return {
        # converted one by one: the device needs memory for one parameter
        piece_key(ema_kind(name), segment.name, segment.start): segment.of(
            trainer.averages[name].flats
        )
        .to(DTYPE)
        .cpu()
        for name in power_averages(trainer.cfg.train)
        for segment in trainer.masters.stored()
    }


def _agreed(
    trainer: Trainer, step: int, work: Callable, ranks: Container[int] | None = None
) -> list:
    """Do the work on these ranks, or on all; its results, or one error, the same everywhere."""

    def line_of(error: Exception) -> str:
        what = f"the averages of step {step} could not be stored on rank {trainer.rank}"
        return f"{what}: {reason(error)}"

    return agreed(work, ranks, line_of=line_of)
