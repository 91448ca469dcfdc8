"""The checkpoints of a run, and which of them is the newest one that is whole.

``latest`` names the checkpoint that was committed last. It is also the limit: a newer one was either
given up by a rollback, or its commit was not finished. An older one is taken if it is an ancestor:
every manifest names the checkpoint before it.
"""

import os
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
from sra_fast.utils.files import ABSENT, is_there, unreadable, write_atomic

LATEST = "latest"
# longer than any name of a step
MOST = 100


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """The steps of a ``checkpoints`` folder, newest first, whole or not."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise unreadable(folder, error) from None
    found = [folder / name for name in names if STEP_FOLDER.fullmatch(name)]
    # a link may lead out of the run
    inside = [path for path in found if _is_folder(path) and not path.is_symlink()]
    return sorted(inside, key=step_of, reverse=True)


def _is_folder(path: Path) -> bool:
    return is_there(path) and path.is_dir()


def has_manifest(path: Path) -> bool:
    """Whether a step's save was finished; ValueError if that cannot be found out."""
    return is_there(path / MANIFEST)


def write_latest(folder: Path, name: str) -> None:
    """Make a checkpoint the one that a run is resumed from."""
    write_atomic(folder / LATEST, lambda path: path.write_text(name))


def latest_text(folder: Path) -> str | None:
    """What ``latest`` says; None if it is not there or no file.

    Raises:
        ValueError: it could not be read. It may name a checkpoint that is older than the newest.
    """
    try:
        with open(folder / LATEST, "rb") as file:
            return file.read(MOST).decode("ascii", "replace").strip()
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise unreadable(folder / LATEST, error) from None


def named_by_latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if it names none of this folder."""
    text = latest_text(folder)
    if text is None or not STEP_FOLDER.fullmatch(text) or not _is_folder(folder / text):
        return None
    return folder / text


def is_begun(folder: Path) -> bool:
    """Whether a ``checkpoints`` folder has ever had a checkpoint.

    Folders of steps without a manifest alone are a first save that was not finished; so is an
    empty ``latest`` without any.
    """
    steps = step_folders(folder)
    if is_there(folder / LATEST) and (steps or latest_text(folder) != ""):
        return True
    return any(has_manifest(path) for path in steps)


@dataclass(frozen=True)
class Candidates:
    """The checkpoints that a run may go on from.

    Attributes:
        paths: the best first.
        proven: how many of them, from the first on, are known to be one line: each is named by the
            manifest of the one before it. The others may be of it.
        remark: a line if ``latest`` is of no help.
    """

    paths: list[Path]
    proven: int
    remark: str | None


def candidates(folder: Path, first: Path | None = None) -> Candidates:
    """The checkpoints of a ``checkpoints`` folder that a run may go on from.

    Args:
        folder: the folder.
        first: the one to begin with; None: the one that ``latest`` names, or the newest.
    """
    steps = [path for path in step_folders(folder) if has_manifest(path)]
    named = first or named_by_latest(folder)
    if named is not None:
        # the named one also without its manifest, so that its fault is said
        older = [path for path in steps if step_of(path) < step_of(named)]
        return _line(named, older, None)
    if not steps:
        return Candidates([], 0, None)
    text = latest_text(folder)
    what = "is missing" if text is None else f"names no checkpoint of the run ({text[:40]!r})"
    remark = f"{folder / LATEST} {what}: looking for the newest whole checkpoint"
    return _line(steps[0], steps[1:], remark)


def _line(first: Path, older: list[Path], remark: str | None) -> Candidates:
    """A checkpoint and its ancestors, as far as the manifests tell; then those that may be some."""
    paths = [first]
    proven = 1
    broken = False
    rest = older
    while True:
        manifest = _manifest_or_none(paths[-1])
        if manifest is not None:
            # between a checkpoint and its parent there is none of the same line
            rest = _not_after(rest, manifest.parent)
            if rest and step_of(rest[0]) == manifest.parent:
                parent = _manifest_or_none(rest[0])
                # a damaged one is tried too, so that its fault is said
                if parent is not None and parent.digest != manifest.parent_digest:
                    rest = rest[1:]
                    broken = True
            else:
                broken = True
        else:
            broken = True
        if not rest:
            return Candidates(paths, proven, remark)
        paths.append(rest[0])
        rest = rest[1:]
        proven += not broken


def _not_after(paths: list[Path], step: int | None) -> list[Path]:
    """Those of a step and before; none if there is no such step."""
    return [] if step is None else [path for path in paths if step_of(path) <= step]


def _manifest_or_none(path: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if it tells nothing, for whatever reason."""
    try:
        return read_manifest(path)
    except ValueError:
        return None


def cheap_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as the manifest and the files' sizes show it.

    Raises:
        ValueError: a later version has written it, or it could not be read.
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
    among: Candidates | None = None,
) -> Choice | None:
    """The newest checkpoint of a ``checkpoints`` folder that is whole; None: it never had one.

    Args:
        folder: the folder.
        fault_of: what is wrong with a checkpoint, in words; None: nothing.
        among: ``candidates``, if they are known.

    Raises:
        ValueError: it had some, and none is whole, or one could not be read. It names the newest
            and its fault.
    """
    found = candidates(folder) if among is None else among
    remarks = [] if found.remark is None else [found.remark]
    faults = []
    for number, path in enumerate(found.paths):
        fault = fault_of(path)
        if fault is None:
            remarks += [
                f"checkpoint step {step_of(bad)} is damaged: {why}; "
                f"going on from step {step_of(path)}"
                for bad, why in faults
            ]
            if number >= found.proven:
                remarks.append(
                    f"no manifest tells whether step {step_of(path)} came before step "
                    f"{step_of(found.paths[0])}: it is taken because it lies in {folder}"
                )
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
