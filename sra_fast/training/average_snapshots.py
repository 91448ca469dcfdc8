"""Writing snapshots of the power-function averages while a run trains."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.checkpoint.average_snapshots import (
    DTYPE,
    SNAPSHOT,
    AverageSnapshot,
    folder_of,
    write_snapshot,
)
from sra_fast.checkpoint.manifest import file_name, plain
from sra_fast.checkpoint.shards import ema_kind, piece_key, write_pieces
from sra_fast.checkpoint.values import warn
from sra_fast.config.averages import power_averages
from sra_fast.config.schema import TrainConfig
from sra_fast.data.facts import DataFacts
from sra_fast.training.run_lock import check_held
from sra_fast.training.trainer import Trainer
from sra_fast.utils.files import make_synced, sync_folder


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
    _agreed(step, lambda: _prepare(run, folder) if trainer.rank == 0 else None)
    pieces = _pieces(trainer)
    bad = next((key for key, piece in pieces.items() if not piece.isfinite().all()), None)
    faults = _gathered(bad)
    if any(faults):
        key = next(fault for fault in faults if fault is not None)
        warn("the averages of step %d are not stored: %s is not finite in fp16", step, key)
        _agreed(step, lambda: shutil.rmtree(folder) if trainer.rank == 0 else None)
        return
    path = folder / file_name(trainer.rank)
    files = _agreed(step, lambda: write_pieces(path, pieces))
    averages = {
        name: {**average.rule.given, "since": average.since}
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
    _agreed(step, lambda: _commit(run, folder, snapshot) if trainer.rank == 0 else None)


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


def _gathered(value) -> list:
    """The value of every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed(step: int, work: Callable) -> list:
    """Do the work on every rank; its results, or one error that is the same everywhere."""
    result = None
    fault = None
    try:
        result = work()
    except (OSError, ValueError) as error:
        fault = str(error)
    outcomes = _gathered((result, fault))
    for rank, (_, fault) in enumerate(outcomes):
        if fault is not None:
            raise ValueError(
                f"the averages of step {step} could not be stored on rank {rank}: {fault}"
            )
    return [result for result, _ in outcomes]
