"""Saving a run while it trains: the state is copied, and a thread writes the copy.

A checkpoint is committed in an order that leaves a whole one behind wherever a process is killed:
every rank's file, then ``manifest.json``, then ``latest``; each is on the disk before the next is
begun. A save that did not get so far is a folder without a manifest.
"""

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch.distributed as dist

from sra_fast.checkpoint.manifest import (
    MAIN,
    MANIFEST,
    Manifest,
    Progress,
    file_name,
    read_manifest,
    step_name,
    write_manifest,
)
from sra_fast.checkpoint.shards import write_pieces
from sra_fast.checkpoint.signed_json import DamagedCheckpoint, StoredFile
from sra_fast.checkpoint.steps import (
    has_manifest,
    named_by_latest,
    step_folders,
    step_of,
    write_latest,
)
from sra_fast.config.schema import TrainConfig
from sra_fast.data.facts import DataFacts
from sra_fast.training.abandoned import abandon
from sra_fast.training.endings import Diverged
from sra_fast.training.host_copy import HostCopy
from sra_fast.training.run_lock import check_held
from sra_fast.training.trainer import Trainer
from sra_fast.utils.collectives import agreed, reason
from sra_fast.utils.files import make_synced, plain, sync_folder

log = logging.getLogger("sra_fast")

# a rank may write much longer than another
PATIENCE = timedelta(hours=2)
# seconds that a run which ends with an error gives the save that is under way
GRACE = 60.0
LIBRARIES = ("sra-fast", "torch", "deepspeed", "safetensors")


def at_phase(name: str) -> None:
    """Called at every phase of a save, in its thread; does nothing.

    Tests put something in its place that stops the process there. In order: ``copied``,
    ``file_begun``, ``file_half``, ``file_written``, ``file_renamed``, ``exchanged``; on rank 0 also
    ``manifest_written``, ``latest_written``, ``pruning``, ``pruned``.
    """


@dataclass(frozen=True)
class _Task:
    """What one save is of."""

    progress: Progress
    epoch: int

    @property
    def name(self) -> str:
        return step_name(self.progress.step)


class SaveFailed(ValueError):
    """A checkpoint could not be written; the one before is as it was."""


class Saver:
    """Writes checkpoints of a run in the background, one at a time.

    Args:
        trainer: whose state is saved.
        folder: ``checkpoints`` of the run; made if it is not there.
        facts: about the training data, which the manifest keeps.

    Every method is called by all ranks.

    Attributes:
        error: of the last save that has finished, the same on every rank: ``Diverged`` if
            something is not finite, ``SaveFailed`` (a ValueError) if it could not be written; None:
            there was none.
        last: what the last checkpoint that this object has committed is of.
        parent: step of the last whole checkpoint of the run, whoever has committed it; None: there
            is none.
        blocked_ms: how long the last ``save`` kept training, in milliseconds.
    """

    def __init__(self, trainer: Trainer, folder: Path, facts: DataFacts | None = None):
        self.trainer = trainer
        self.folder = folder
        self.facts = facts
        self.error: Exception | None = None
        self.last: Progress | None = None
        self.blocked_ms = 0.0
        self.settings = plain(asdict(trainer.cfg))
        self.world = trainer.plan.world
        # of its own: the thread's messages must not come between those of training
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world > 1 else None
        self.host_copy = HostCopy(trainer)
        self.thread: threading.Thread | None = None
        self.run_id, self.parent, self.parent_digest = self._origin()

    def _origin(self) -> tuple[str, int | None, str | None]:
        """Id of the run, step and digest of the checkpoint that it goes on from: what rank 0 sees;
        collective.

        Raises:
            ValueError: there is one, and it could not be read.
        """
        return agreed(self._before, ranks=(0,), group=self.group)[0]

    def _before(self) -> tuple[str, int | None, str | None]:
        """``_origin`` as this process sees it."""
        new_run = (uuid.uuid4().hex, None, None)
        try:
            before = named_by_latest(self.folder)
            if before is None:
                return new_run
            manifest = read_manifest(before)
        except DamagedCheckpoint:
            # `latest` stays where it is until the next save
            return new_run
        return manifest.run_id, manifest.step, manifest.digest

    def save(self, progress: Progress, epoch: int) -> None:
        """Begin to save what the steps so far have made; an earlier save is waited for.

        Args:
            progress: of the run; a checkpoint that was just committed is not written again.
            epoch: of the last step.

        Raises:
            Diverged, SaveFailed: the earlier save has failed.
        """
        begun = time.perf_counter()
        self.wait()
        if self.error is not None:
            raise self.error
        if progress == self.last:
            return
        self.host_copy.take()
        task = _Task(progress, epoch)
        # a daemon: a process that ends with an error does not wait for what it was writing
        self.thread = threading.Thread(target=self._run, args=(task,), name="saver", daemon=True)
        self.thread.start()
        self.blocked_ms = 1e3 * (time.perf_counter() - begun)

    def wait(self) -> None:
        """Until the save that runs has finished; see ``error`` for how."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        elif self.thread is not None:
            # what is being written becomes whole, unless another rank is gone and waits for nothing
            self.thread.join(GRACE)

    def close(self) -> None:
        """Wait, and give the ranks' connection back."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def _run(self, task: _Task) -> None:
        try:
            digest = self._write(task)
        except Exception as error:
            self.error = error
        else:
            self.last = task.progress
            self.parent_digest = digest
            self.parent = task.progress.step
            if self.trainer.rank == 0:
                self._prune()

    def _write(self, task: _Task) -> str:
        """The whole save; an error is the same on every rank.

        Returns:
            The checkpoint's digest.
        """
        folder = self.folder / task.name
        bad = self._agreed(task, self._copied)
        for rank, what in enumerate(bad):
            if what is not None:
                raise Diverged(
                    f"{what} is not finite on rank {rank}: the checkpoint of step "
                    f"{task.progress.step} is not written; {self._fallback()}"
                )
        self._agreed(task, lambda: self._prepare(folder), ranks=(0,))
        try:
            files = self._agreed(task, lambda: self._write_file(folder))
            at_phase("exchanged")
            return self._agreed(task, lambda: self._commit(task, folder, files), ranks=(0,))[0]
        except SaveFailed:
            # every rank has stopped writing
            if self.trainer.rank == 0 and self._is_ours(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _copied(self) -> str | None:
        """What is not finite in this rank's copy, once that is complete; None: all is."""
        self.host_copy.wait()
        at_phase("copied")
        return self.host_copy.not_finite()

    def _prepare(self, folder: Path) -> None:
        """Make the folder. One of this step that is there belongs to what was given up."""
        check_held(self.folder.parent)
        make_synced(self.folder)
        if os.path.lexists(folder):
            abandon(folder)
        folder.mkdir()
        sync_folder(self.folder)

    def _is_ours(self, folder: Path) -> bool:
        """Whether a folder is what this save has left, and no other process's."""
        try:
            check_held(self.folder.parent)
            return not has_manifest(folder)
        except ValueError:
            return False

    def _write_file(self, folder: Path) -> StoredFile:
        path = folder / file_name(self.trainer.rank)
        return write_pieces(path, self.host_copy.pieces(), lambda name: at_phase(name))

    def _commit(self, task: _Task, folder: Path, files: list[StoredFile]) -> str:
        check_held(self.folder.parent)
        manifest = self._manifest(task, files)
        write_manifest(folder, manifest)
        at_phase("manifest_written")
        write_latest(self.folder, folder.name)
        at_phase("latest_written")
        return manifest.digest

    def _manifest(self, task: _Task, files: list[StoredFile]) -> Manifest:
        scales = {}
        if self.host_copy.scales is not None:
            names = self.trainer.teacher.fp8_weights()
            scales = dict(zip(names, self.host_copy.scales.tolist(), strict=True))
        # a step that is saved once more is not its own parent
        linked = self.parent is not None and self.parent < task.progress.step
        return Manifest(
            progress=task.progress,
            epoch=task.epoch,
            counts=self.host_copy.counts.tolist(),
            world=self.world,
            stage=self.trainer.plan.stage,
            run_id=self.run_id,
            parent=self.parent if linked else None,
            parent_digest=self.parent_digest if linked else None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={file_name(rank): stored for rank, stored in enumerate(files)},
            settings=self.settings,
            emas={MAIN: {"decay": self.trainer.cfg.train.ema_decay}, **self._averages()},
            teacher=None if self.trainer.teacher is None else MAIN,
            data=None if self.facts is None else self.facts.as_json(),
            scales=scales,
            versions=_versions(),
        )

    def _averages(self) -> dict[str, dict[str, float]]:
        """What the manifest says of the averages besides the EMA."""
        return {name: average.facts for name, average in self.trainer.averages.items()}

    def _agreed(self, task: _Task, work: Callable, ranks: Container[int] | None = None) -> list:
        """Do the work on these ranks, or on all; its results, or one error, the same everywhere."""
        where = f" on rank {self.trainer.rank}" if self.world > 1 else ""

        def line_of(error: Exception) -> str:
            return (
                f"the checkpoint of step {task.progress.step} could not be written{where}: "
                f"{self._reason(error)}; {self._fallback()}"
            )

        return agreed(work, ranks, self.group, line_of, SaveFailed)

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return reason(error)
        where = error.filename or self.folder
        try:
            free = shutil.disk_usage(self.folder).free / 2**20
        except OSError:
            return f"{where}: {error.strerror or error}"
        return f"{where}: {error.strerror or error} ({free:.0f} MiB are free there)"

    def _fallback(self) -> str:
        """What is left, for the end of a message."""
        try:
            before = named_by_latest(self.folder)
        except ValueError as error:
            return str(error)
        if before is None:
            return "there is no checkpoint before it"
        return f"the last whole checkpoint is {before}"

    def _prune(self) -> None:
        """Remove old checkpoints; a failure costs disk space only, and is logged."""
        at_phase("pruning")
        try:
            prune(self.folder, self.trainer.cfg.train)
        except (OSError, ValueError) as error:
            log.warning("an old checkpoint was not removed: %s", error)
        at_phase("pruned")


def prune(folder: Path, cfg: TrainConfig) -> None:
    """Remove the checkpoints that ``train.keep`` and ``train.keep_every`` do not keep.

    Never the one that ``latest`` names. A manifest goes first: what is left of a folder after a
    kill is no checkpoint.
    """
    if not cfg.keep:
        return
    named = named_by_latest(folder)
    whole = [path for path in step_folders(folder) if has_manifest(path)]
    for path in whole[cfg.keep :]:
        kept_besides = cfg.keep_every and step_of(path) % cfg.keep_every == 0
        if path == named or kept_besides:
            continue
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
