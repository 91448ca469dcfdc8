"""What a rollback gives up is moved to ``checkpoints/abandoned``, and kept there for a while.

Nothing resumes or reads it any more: a checkpoint there is none of the run's.
"""

import json
import os
import shutil
from pathlib import Path

from sra_fast.checkpoint.manifest import Manifest
from sra_fast.checkpoint.published import published_step
from sra_fast.checkpoint.reading import EXPORT, PICTURE, PUBLISHED, SCORES, SUMMARY
from sra_fast.checkpoint.sources import export_origin
from sra_fast.checkpoint.steps import has_manifest
from sra_fast.utils.files import make_synced, sync_folder

ABANDONED = "abandoned"
# of the folder that what a run wrote at its end is moved to
END = "end_"


def abandon(path: Path) -> Path | None:
    """Take a step's folder, or what is in its place, out of the run.

    Returns:
        Where it is now; None: its save was not finished, and it was removed.

    Raises:
        ValueError: ``abandoned`` is no folder.
        OSError: it cannot be moved.
    """
    unfinished = path.is_dir() and not path.is_symlink() and not has_manifest(path)
    if unfinished:
        shutil.rmtree(path)
        return None
    target = _free_name(_made(path.parent), path.name)
    os.replace(path, target)
    if target.is_dir() and not target.is_symlink():
        # `trim` goes by the time of the move
        os.utime(target)
    sync_folder(target.parent)
    sync_folder(path.parent)
    return target


def abandon_end(run: Path, checkpoints: Path, chosen: Manifest) -> Path | None:
    """Take out of the run what was written at its end, if that was after the chosen checkpoint.

    Args:
        run: the run's folder.
        checkpoints: its checkpoints.
        chosen: manifest of the checkpoint that the run goes on from.

    Returns:
        The folder where it is now; None: nothing was moved.
    """
    if not (run / SUMMARY).exists():
        # what an end that was not finished has left: it does not say what it is of
        (run / PICTURE).unlink(missing_ok=True)
    names = [name for name in _given_up(run, chosen) if (run / name).is_file()]
    if not names:
        return None
    target = _free_name(_made(checkpoints), f"{END}{chosen.step:08d}")
    make_synced(target)
    for name in names:
        os.replace(run / name, target / name)
    sync_folder(target)
    sync_folder(run)
    return target


def trim(checkpoints: Path, keep: int, spared: list[Path]) -> None:
    """Remove all but the newest ``keep`` of what was given up; 0: nothing.

    What this start has moved is never removed.
    """
    kept = checkpoints / ABANDONED
    if not keep or not kept.is_dir():
        return
    for prefix in (END, "step_"):
        found = [path for path in kept.glob(f"{prefix}*") if not path.is_symlink()]
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in found[keep:]:
            if path not in spared and path.is_dir():
                shutil.rmtree(path)


def _given_up(run: Path, chosen: Manifest) -> list[str]:
    """The files of a run's end that are of a later step than the chosen one, or of another branch."""
    origins = {
        EXPORT: export_origin(run / EXPORT),
        PUBLISHED: (published_step(run / PUBLISHED), None),
        SCORES: _told_by(run / SCORES),
        SUMMARY: _told_by(run / SUMMARY),
    }
    names = []
    for name, (step, digest) in origins.items():
        other = digest is not None and digest != chosen.digest
        if step is not None and (step > chosen.step or (step == chosen.step and other)):
            names.append(name)
    # the picture is that of the summary, which is moved last: it tells of both until then
    return names if SUMMARY not in names else [PICTURE, *names]


def _told_by(file: Path) -> tuple[int | None, str | None]:
    """Step and checkpoint that a JSON file says it is of; None for what it does not say."""
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None, None
    if not isinstance(held, dict):
        return None, None
    step = held.get("step")
    digest = held.get("checkpoint")
    return (
        step if isinstance(step, int) else None,
        digest if isinstance(digest, str) else None,
    )


def _made(checkpoints: Path) -> Path:
    kept = checkpoints / ABANDONED
    if not kept.is_dir() and os.path.lexists(kept):
        raise ValueError(f"expected a folder {kept}, found something else: move it away")
    make_synced(kept)
    return kept


def _free_name(folder: Path, name: str) -> Path:
    target = folder / name
    number = 1
    while os.path.lexists(target):
        target = folder / f"{name}.{number}"
        number += 1
    return target
