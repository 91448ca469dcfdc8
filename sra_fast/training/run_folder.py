"""The folder of a run: made or found, locked, and its checkpoint chosen, the same on every rank.

Rank 0 decides and the others are told: they all go on together, or raise the same error.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from sra_fast.checkpoint import reading, steps, version_0_1
from sra_fast.checkpoint.manifest import MANIFEST, hash_fault, read_manifest
from sra_fast.checkpoint.steps import Choice, step_folders, step_of
from sra_fast.checkpoint.values import warn
from sra_fast.training.run_lock import RunLock
from sra_fast.training.saver import abandon


def agreed(work: Callable):
    """What ``work`` returns on rank 0, on every rank; collective.

    Raises:
        ValueError: rank 0's ValueError or OSError, on every rank.
    """
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [work(), None]
        except (ValueError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, src=0)
    value, fault = outcome
    if fault is not None:
        raise ValueError(fault)
    return value


def new_folder(out: Path) -> Path:
    """Make ``out/000``, ``out/001``, ...: rank 0 does, every rank gets the path; collective."""
    return Path(agreed(lambda: str(_make_numbered(out))))


def _make_numbered(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in out.iterdir() if path.name.isdigit()), default=-1)
    while True:
        folder = out / f"{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            # another run started at the same moment
            number += 1


@dataclass(frozen=True)
class OpenRun:
    """A run folder that this run may write into.

    Attributes:
        folder: the folder.
        choice: the checkpoint to go on from; None: the run is new.
    """

    folder: Path
    choice: Choice | None


@contextmanager
def opened(out: Path, resume: Path | None, exact: bool = False) -> Iterator[OpenRun]:
    """Make or find the run folder, hold its lock, and choose its checkpoint; collective.

    Args:
        out: where a new folder is made.
        resume: the checkpoint that was found before the lock was held; None: a new run.
        exact: this checkpoint and no other.

    Raises:
        ValueError: another process uses the folder, or none of its checkpoints is whole.
    """
    _check_same_view(resume)
    folder = new_folder(out) if resume is None else reading.run_folder(resume)
    locks: list[RunLock] = []
    agreed(lambda: locks.append(RunLock(folder)))
    try:
        choice = None
        if resume is not None:
            # again: the process that held the lock may have saved since
            choice = choose_checkpoint(folder, resume if exact else None)
            for remark in choice.remarks:
                warn("%s", remark)
        yield OpenRun(folder, choice)
    finally:
        for lock in locks:
            lock.release()


def _check_same_view(resume: Path | None) -> None:
    """ValueError unless every rank has found the same checkpoint."""
    views: list = [None] * dist.get_world_size()
    dist.all_gather_object(views, None if resume is None else str(resume))
    for rank, view in enumerate(views):
        if view != views[0]:
            raise ValueError(
                f"rank 0 found the checkpoint {views[0]}, rank {rank} {view}: expected train.out on "
                "a file system that all machines share"
            )


def choose_checkpoint(folder: Path, exact: Path | None = None) -> Choice:
    """The newest checkpoint of a run folder whose files all have their hashes; collective.

    The ranks share the reading.

    Args:
        folder: of the run, locked.
        exact: the checkpoint that was asked for; None: the newest.

    Raises:
        ValueError: none is whole, or not the one that was asked for.
    """
    checkpoints = folder / reading.CHECKPOINTS
    if exact is not None:
        fault = collective_fault(exact)
        if fault is not None:
            raise ValueError(f"train.resume {exact} is damaged: {fault}")
        return Choice(exact, read_manifest(exact), [])

    def found() -> tuple[list[str], str | None]:
        paths, remark = steps.candidates(checkpoints)
        return [str(path) for path in paths], remark

    names, remark = agreed(found)
    among = ([Path(name) for name in names], remark)
    choice = steps.choose(checkpoints, collective_fault, among)
    if choice is None:
        raise ValueError(f"expected a checkpoint in {checkpoints}, found none that is whole")
    return choice


def collective_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: nothing. Collective.

    Every rank looks at its share of the files, and all get the same answer.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    fault = None
    refused = None
    try:
        fault = steps.cheap_fault(path)
        if fault is None:
            manifest = read_manifest(path)
            fault = hash_fault(path, manifest, sorted(manifest.files)[rank::world])
    except ValueError as error:
        refused = str(error)
    outcomes: list = [None] * world
    dist.all_gather_object(outcomes, (fault, refused))
    for _, refused in outcomes:
        if refused is not None:
            raise ValueError(refused)
    return next((fault for fault, _ in outcomes if fault is not None), None)


def settle(folder: Path, chosen: Path) -> list[str]:
    """Make a checkpoint the newest of its run, for good; collective, rank 0 writes.

    ``latest`` comes first: a kill after it changes nothing any more. Newer checkpoints are moved to
    ``checkpoints/abandoned``; what killed saves have left is removed.

    Args:
        folder: of the run, locked.
        chosen: the checkpoint that was loaded.

    Returns:
        Lines about what was moved.
    """
    return agreed(lambda: _settle(folder, chosen))


def _settle(folder: Path, chosen: Path) -> list[str]:
    checkpoints = chosen.parent
    if steps.named_by_latest(checkpoints) != chosen:
        steps.write_latest(checkpoints, chosen.name)
    lines = []
    for path in step_folders(checkpoints):
        whole = (path / MANIFEST).exists()
        if step_of(path) > step_of(chosen) and whole:
            lines.append(f"{path} is given up: moved to {checkpoints / 'abandoned'}")
            abandon(path)
        elif not whole and path != chosen and not version_0_1.is_checkpoint(path):
            shutil.rmtree(path)
    for place in (folder, checkpoints, *step_folders(checkpoints)):
        for temporary in place.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
    return lines
