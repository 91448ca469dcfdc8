"""Snapshots of a run's power-function averages, and an average of any width from them.

``<run>/ema/step_00001000/`` holds ``rank_00000.safetensors`` of every rank, pieces as in a
checkpoint but in fp16, and ``snapshot.json``, which is written last: a folder without it was not
finished. It knows the size and the SHA-256 of every file, and its own.

fp16, as in EDM2, halves the disk space. Its rounding, at most 2^-11 of a weight, is not amplified:
the coefficients that make another average have a norm of at most 2 between the stored widths.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.manifest import STEP_FOLDER, file_name, step_name
from sra_fast.checkpoint.shards import Shards, ema_kind
from sra_fast.checkpoint.signed_json import (
    DamagedCheckpoint,
    StoredFile,
    content_fault,
    read_signed,
    write_signed,
)
from sra_fast.checkpoint.steps import step_folders, step_of
from sra_fast.utils.files import plain
from sra_fast.utils.messages import warn
from sra_fast.utils.power_profile import LARGEST_ERROR, Profile, fit

FOLDER = "ema"
SNAPSHOT = "snapshot.json"
FORMAT = 1
DTYPE = torch.float16


@dataclass(frozen=True)
class AverageSnapshot:
    """What a snapshot says of itself."""

    step: int
    """optimizer steps of the loop"""
    updates: float
    """those of them that were taken: the time of the averages' profiles"""
    averages: dict[str, dict]
    """name of every average -> its ``sigma_rel``, and ``since``: the updates that had been taken
    when it began
    """
    files: dict[str, StoredFile]
    """name -> file, one of every rank"""
    settings: dict
    """the configuration, as JSON has it"""
    data: dict | None
    """``DataFacts`` of the training data; None: not known"""


def folder_of(run: Path, step: int) -> Path:
    """The folder of a step's snapshot."""
    return run / FOLDER / step_name(step)


def is_snapshot(path: Path) -> bool:
    """Whether a folder is a finished snapshot."""
    return STEP_FOLDER.fullmatch(path.name) is not None and (path / SNAPSHOT).is_file()


def snapshot_folders(run: Path) -> list[Path]:
    """The finished snapshots of a run, newest first."""
    return [path for path in step_folders(run / FOLDER) if is_snapshot(path)]


def remove_after(run: Path, step: int) -> int:
    """Remove the snapshots of later steps, and what unfinished ones have left.

    Returns:
        How many finished ones were removed.

    Raises:
        OSError: one cannot be removed.
    """
    removed = 0
    for path in step_folders(run / FOLDER):
        finished = is_snapshot(path)
        if finished and step_of(path) <= step:
            continue
        # first: what is left of a folder after a kill is no snapshot
        (path / SNAPSHOT).unlink(missing_ok=True)
        shutil.rmtree(path)
        removed += finished
    return removed


def write_snapshot(folder: Path, snapshot: AverageSnapshot) -> None:
    """Write ``snapshot.json`` into a snapshot's folder, after all of its files."""
    write_signed(folder / SNAPSHOT, {"format": FORMAT, **plain(asdict(snapshot))})


def read_snapshot(folder: Path) -> AverageSnapshot:
    """What a snapshot says of itself.

    Raises:
        DamagedCheckpoint: it is not there, or was changed.
        ValueError: a later version has written it, or it could not be read.
    """
    held = read_signed(folder / SNAPSHOT)
    if held.pop("format") != FORMAT:
        raise ValueError(f"{folder} is of another version of sra-fast: expected format {FORMAT}")
    files = {name: StoredFile(**stored) for name, stored in held.pop("files").items()}
    if set(files) != {file_name(rank) for rank in range(len(files))}:
        raise DamagedCheckpoint(f"{SNAPSHOT} names other files than one of each rank")
    return AverageSnapshot(**held, files=files)


@dataclass(frozen=True)
class _Held:
    """One average in one snapshot."""

    folder: Path
    name: str
    since: float
    profile: Profile


def _whole_snapshots(run: Path, step: int | None) -> dict[Path, AverageSnapshot]:
    """The snapshots of a run up to a step that are whole, newest first; a line for each other."""
    found = {}
    for path in snapshot_folders(run):
        if step is not None and step_of(path) > step:
            continue
        try:
            snapshot = read_snapshot(path)
            fault = content_fault(path, snapshot.files)
        except DamagedCheckpoint as error:
            fault = str(error)
        if fault is not None:
            warn("the snapshot %s is left out, it is damaged: %s", path, fault)
            continue
        found[path] = snapshot
    return found


def reconstruct(
    run: Path, sigma_rel: float, step: int | None = None
) -> tuple[AverageSnapshot, dict[str, Tensor]]:
    """The average of a relative width at the newest snapshot (EDM2's post-hoc EMA); not collective.

    Averages that began later than others are left out: what stands for the weights before is
    another. The host needs two models in fp32.

    Args:
        run: the run's folder.
        sigma_rel: relative width.
        step: no snapshot of a later step is used; None: all are.

    Returns:
        The newest snapshot, and ``{parameter: flat fp32 tensor}``.

    Raises:
        ValueError: there are no snapshots, too few for this width, or it is no width.
    """
    snapshots = _whole_snapshots(run, step)
    if not snapshots:
        until = "" if step is None else f" up to step {step}"
        raise ValueError(
            f"power:{sigma_rel:g} is made from a run's snapshots: expected some in {run / FOLDER}"
            f"{until} (train.average_snapshots writes them), found none"
        )
    newest = next(iter(snapshots.values()))
    held, later = _usable(snapshots)
    found = fit([item.profile for item in held], Profile(sigma_rel, newest.updates))
    widths = sorted({item.profile.sigma_rel for item in held})
    of_what = f"from {len(held)} averages of width {', '.join(f'{w:g}' for w in widths)} in {run / FOLDER}"
    if later:
        of_what += f" ({', '.join(later)} began later and cannot be used with them)"
    if found.error > LARGEST_ERROR:
        raise ValueError(
            f"power:{sigma_rel:g} cannot be made {of_what}: its profile would be wrong by "
            f"{found.error:.0%}, expected at most {LARGEST_ERROR:.0%}; two widths around it and more "
            "snapshots (train.average_snapshots) come nearer"
        )
    warn(
        "power:%g of step %d is made %s; its profile is wrong by %.2g %%%s",
        sigma_rel,
        newest.step,
        of_what,
        100 * found.error,
        "" if len(widths) > 1 else "; with two widths it would be less",
    )
    return newest, _sum(snapshots, held, found.coefficients)


def _usable(snapshots: dict[Path, AverageSnapshot]) -> tuple[list[_Held], list[str]]:
    """The averages that began first, each profile once; and the names of those that began later."""
    every = [
        _Held(path, name, entry["since"], Profile(entry["sigma_rel"], snapshot.updates))
        for path, snapshot in snapshots.items()
        for name, entry in snapshot.averages.items()
    ]
    first = min(item.since for item in every)
    by_profile = {item.profile: item for item in every if item.since == first}
    later = sorted({item.name for item in every if item.since != first})
    return list(by_profile.values()), later


def _sum(
    snapshots: dict[Path, AverageSnapshot], held: list[_Held], coefficients: list[float]
) -> dict[str, Tensor]:
    """The sum of stored averages, each times its coefficient."""
    total: dict[str, Tensor] = {}
    for path, snapshot in snapshots.items():
        # one snapshot's files at a time: there may be many
        shards = Shards(path, snapshot.files, DTYPE)
        for item, coefficient in zip(held, coefficients, strict=True):
            if item.folder != path:
                continue
            for name, values in shards.whole(ema_kind(item.name)).items():
                if name in total:
                    total[name].add_(values, alpha=coefficient)
                else:
                    total[name] = values.mul_(coefficient)
    return total
