"""The folder of a run: made or found, locked, and its checkpoint chosen, the same on every rank.

Rank 0 decides and the others are told: they all go on together, or raise the same error.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from sra_fast.checkpoint import average_snapshots, reading, steps
from sra_fast.checkpoint.manifest import hash_fault, read_manifest
from sra_fast.checkpoint.steps import Choice, step_folders
from sra_fast.training import monitor_files
from sra_fast.training.abandoned import abandon, abandon_end, trim
from sra_fast.training.run_lock import LOCK, RunLock, token_in
from sra_fast.utils import collectives
from sra_fast.utils.files import make_synced, sync_folder
from sra_fast.utils.messages import warn

# seconds after which every machine sees a new file of a file system that they share
LATE = 60.0


def agreed(work: Callable):
    """What ``work`` returns on rank 0, on every rank; collective.

    Raises:
        ValueError: rank 0's ValueError or OSError, on every rank; see ``collectives.agreed`` for
            others.
    """
    return collectives.agreed(work, ranks=(0,))[0]


def new_folder(out: Path) -> Path:
    """Make ``out/000``, ``out/001``, ...: rank 0 does, every rank gets the path; collective."""
    return Path(agreed(lambda: str(_make_numbered(out))))


def _make_numbered(out: Path) -> Path:
    make_synced(out)
    number = 1 + max(
        (int(path.name) for path in out.iterdir() if path.name.isdecimal()), default=-1
    )
    while True:
        folder = out / f"{number:03d}"
        try:
            folder.mkdir()
            sync_folder(out)
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
        _check_same_folder(folder, locks[0].token if locks else None)
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
            if resume is None:
                _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a new run that has ended before it wrote anything."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _check_same_view(resume: Path | None) -> None:
    """ValueError unless every rank has found the same checkpoint."""
    views = collectives.gathered(None if resume is None else str(resume))
    for rank, view in enumerate(views):
        if view != views[0]:
            raise ValueError(
                f"rank 0 found the checkpoint {views[0]}, rank {rank} {view}: expected train.out on "
                "a file system that all machines share"
            )


def _check_same_folder(folder: Path, token: str | None) -> None:
    """ValueError unless every rank sees the lock that rank 0 has just written; collective."""
    held = collectives.gathered(token)[0]
    # rank 0 holds the lock, and would give it back by reading it
    others = range(1, dist.get_world_size())
    views = collectives.agreed(lambda: _sees(folder, held), others)
    for rank in others:
        if not views[rank]:
            raise ValueError(
                f"rank 0 writes into {folder}, which rank {rank} does not see: expected train.out "
                "on a file system that all machines share"
            )


def _sees(folder: Path, token: str | None) -> bool:
    """Whether this process comes to see a lock with this token; a network file system may be late."""
    end = time.monotonic() + LATE
    while token_in(folder) != token:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


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

    among = agreed(lambda: steps.candidates(checkpoints))
    choice = steps.choose(checkpoints, collective_fault, among)
    if choice is None:
        raise ValueError(f"expected a checkpoint in {checkpoints}, found none that is whole")
    return choice


def collective_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: nothing. Collective.

    Every rank looks at its share of the files, and all get the same answer.

    Raises:
        ValueError: a file could not be read, or a later version has written it; the same on every
            rank.
    """
    faults = collectives.agreed(lambda: _fault_of_share(path))
    return next((fault for fault in faults if fault is not None), None)


def _fault_of_share(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as this rank's share of its files shows it."""
    fault = steps.cheap_fault(path)
    if fault is not None:
        return fault
    manifest = read_manifest(path)
    share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    return hash_fault(path, manifest, share)


def settle(folder: Path, chosen: Path, keep: int = 0, exact: bool = False) -> list[str]:
    """Make a checkpoint the newest of its run, for good; collective, rank 0 writes.

    ``latest`` comes first: a kill after it changes nothing any more. Other checkpoints than the
    chosen one and its ancestors, and what was written at the end of a run that went further, are
    moved to ``checkpoints/abandoned``; later snapshots of averages and what the monitor has seen
    later, which the run makes again, and what killed saves have left are removed.

    Args:
        folder: of the run, locked.
        chosen: the checkpoint that was loaded.
        keep: how many of those that earlier starts gave up are kept; 0: all.
        exact: ``train.resume`` names it.

    Returns:
        Lines about what was moved.
    """
    return agreed(lambda: _settle(folder, chosen, keep, exact))


def _settle(folder: Path, chosen: Path, keep: int, exact: bool) -> list[str]:
    checkpoints = chosen.parent
    manifest = read_manifest(chosen)
    if steps.named_by_latest(checkpoints) != chosen:
        steps.write_latest(checkpoints, chosen.name)
    ours = steps.candidates(checkpoints, chosen).paths
    # path -> where it is now
    moved: dict[Path, Path | None] = {}
    for path in step_folders(checkpoints):
        if path not in ours:
            moved[path] = abandon(path)
    lines = [f"{path} is given up: moved to {target}" for path, target in moved.items() if target]
    spared = [target for target in moved.values() if target is not None]
    end = abandon_end(folder, checkpoints, manifest)
    if end is not None:
        spared.append(end)
        lines.append(f"export and summary of a step that was given up: moved to {end}")
    if lines and exact:
        lines.append(
            f"to restart this run use --train.resume auto: with {chosen} it goes back each time"
        )
    lines += remove_after(folder, manifest.step)
    trim(checkpoints, keep, spared)
    for place in (folder, checkpoints, *step_folders(checkpoints)):
        for temporary in place.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
    return lines


def remove_after(folder: Path, step: int) -> list[str]:
    """Remove what a run makes again after a step, which must not be mixed with what it has given up.

    For rank 0 only.

    Returns:
        A line for each kind of which there was something.
    """
    removed = {
        "snapshots of averages": average_snapshots.remove_after(folder, step),
        "samples and held-out losses": monitor_files.remove_after(folder, step),
    }
    return [
        f"{what} after step {step} are removed: {count}" for what, count in removed.items() if count
    ]
