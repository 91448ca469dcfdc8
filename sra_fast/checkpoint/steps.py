"""The checkpoints of a run, and which of them is the newest one that is whole.

``latest`` names the checkpoint that was committed last. It is also the limit: a newer one was either
given up by a rollback, or its commit was not finished.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sra_fast.checkpoint.manifest import (
    MANIFEST,
    STEP_FOLDER,
    DamagedCheckpoint,
    Manifest,
    read_manifest,
    size_fault,
)
from sra_fast.utils.files import write_atomic

LATEST = "latest"
# longer than any name of a step
MOST = 100


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """The steps of a ``checkpoints`` folder, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    # a link may lead out of the run
    inside = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(inside, key=step_of, reverse=True)


def write_latest(folder: Path, name: str) -> None:
    """Make a checkpoint the one that a run is resumed from."""
    write_atomic(folder / LATEST, lambda path: path.write_text(name))


def _latest_text(folder: Path) -> str | None:
    try:
        with open(folder / LATEST, "rb") as file:
            return file.read(MOST).decode("ascii", "replace").strip()
    except OSError:
        return None


def named_by_latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if it names none of this folder."""
    text = _latest_text(folder)
    if text is None or not STEP_FOLDER.fullmatch(text) or not (folder / text).is_dir():
        return None
    return folder / text


def is_begun(folder: Path) -> bool:
    """Whether a ``checkpoints`` folder has ever had a checkpoint.

    Folders of steps without a manifest alone are a first save that was not finished.
    """
    if (folder / LATEST).exists():
        return True
    return any((path / MANIFEST).exists() for path in step_folders(folder))


def candidates(folder: Path) -> tuple[list[Path], str | None]:
    """The checkpoints that a run may go on from, the best first.

    Returns:
        Them, and a remark if ``latest`` is of no help.
    """
    steps = [path for path in step_folders(folder) if (path / MANIFEST).exists()]
    named = named_by_latest(folder)
    if named is not None:
        # the named one also without its manifest, so that its fault is said
        older = [path for path in steps if step_of(path) < step_of(named)]
        return [named, *older], None
    if not steps:
        return [], None
    text = _latest_text(folder)
    what = "is missing" if text is None else f"names no checkpoint of the run ({text[:40]!r})"
    return steps, f"{folder / LATEST} {what}: looking for the newest whole checkpoint"


def cheap_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as the manifest and the files' sizes show it.

    Raises:
        ValueError: a later version has written it.
    """
    try:
        manifest = read_manifest(path)
    except DamagedCheckpoint as error:
        return str(error)
    return size_fault(path, manifest)


@dataclass(frozen=True)
class Choice:
    """A checkpoint that is whole.

    Attributes:
        path: of the checkpoint.
        manifest: of it.
        remarks: lines about what was passed over.
    """

    path: Path
    manifest: Manifest
    remarks: list[str]


def choose(
    folder: Path,
    fault_of: Callable[[Path], str | None] = cheap_fault,
    among: tuple[list[Path], str | None] | None = None,
) -> Choice | None:
    """The newest checkpoint of a ``checkpoints`` folder that is whole; None: it never had one.

    Args:
        folder: the folder.
        fault_of: what is wrong with a checkpoint, in words; None: nothing.
        among: ``candidates``, if they are known.

    Raises:
        ValueError: it had some, and none is whole. It names the newest and its fault.
    """
    paths, remark = candidates(folder) if among is None else among
    remarks = [] if remark is None else [remark]
    faults = []
    for path in paths:
        fault = fault_of(path)
        if fault is None:
            remarks += [
                f"checkpoint step {step_of(bad)} is damaged: {why}; "
                f"going on from step {step_of(path)}"
                for bad, why in faults
            ]
            return Choice(path, read_manifest(path), remarks)
        faults.append((path, fault))
    if faults:
        path, fault = faults[0]
        raise ValueError(
            f"no checkpoint of {folder} is whole; the newest, step {step_of(path)}, is damaged: "
            f"{fault}"
        )
    if is_begun(folder):
        raise ValueError(
            f"no checkpoint of {folder} is whole: expected {MANIFEST} in a step's folder"
        )
    return None
