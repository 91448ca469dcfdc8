"""The manifest of a checkpoint: which files it consists of, and all that is not a tensor.

``<run>/checkpoints/step_00001200/`` holds ``rank_00000.safetensors`` of every rank and
``manifest.json``, which is written last: a folder without it is a save that was not finished. The
manifest knows the size and the SHA-256 of every file, and its own.
"""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sra_fast.checkpoint.signed_json import (
    DamagedCheckpoint,
    StoredFile,
    absence,
    content_fault,
    digest_of,
    read_signed,
    write_signed,
)
from sra_fast.data.facts import DataFacts
from sra_fast.utils.files import plain

MANIFEST = "manifest.json"
FORMAT = 1
STEP_FOLDER = re.compile(r"step_\d{8,}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# the EMA that the teacher follows and that is sampled by default; ``train.averages`` are further ones
MAIN = "main"
# how an average is made: the fields of which every entry of ``Manifest.emas`` has one
RULES = ("decay", "sigma_rel")
# whole numbers below this are exact in fp64
MOST_COUNT = 2**53
# fields of ``DataFacts`` besides its sizes
FACT_KINDS = {
    "path": str | None,
    "class_names": list | None,
    "pixels": bool,
    "scale": int | float | list,
    "shift": int | float | list,
    "vae": dict | None,
    "vae_path": str | None,
    "fingerprint": str | None,
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps of the loop; those whose update was skipped count too.
        shift: data positions that rollbacks have left out: step ``s`` of the loop uses the images,
            noise and times of position ``s + shift``.
    """

    step: int
    shift: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    progress: Progress
    epoch: int
    """epoch of the last step"""
    counts: list[float]
    """updates taken, updates skipped in all, updates skipped in a row"""
    world: int
    """processes that wrote it, each one file"""
    stage: int
    """their ZeRO stage"""
    run_id: str
    """random, the same in all checkpoints of a run"""
    parent: int | None
    """step of the checkpoint before this one, of the same run"""
    parent_digest: str | None
    """``digest`` of that checkpoint: another one of the same step is none of this run's"""
    created: str
    """when it was written, UTC, ISO 8601"""
    files: dict[str, StoredFile]
    """name -> file, one of every rank"""
    settings: dict
    """the configuration, as JSON has it"""
    emas: dict[str, dict]
    """name of every average -> its ``decay`` or ``sigma_rel``, and ``since``: the updates that had been
    taken when it began (absent: it began with the run)"""
    teacher: str | None = MAIN
    """the EMA that the alignment's network follows; None: there is no such network"""
    sampled: str = MAIN
    """the EMA that is sampled and exported"""
    data: dict | None = None
    """``DataFacts`` of the training data; None: not known"""
    scales: dict[str, float] = field(default_factory=dict)
    """name of every weight of the teacher in fp8 -> what it was multiplied by"""
    versions: dict[str, str] = field(default_factory=dict)
    """library -> its version"""

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def digest(self) -> str:
        """SHA-256 that tells a checkpoint from every other: it covers those of its files."""
        return digest_of(_held(self))


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def _held(manifest: Manifest) -> dict:
    held = asdict(manifest)
    held.update(held.pop("progress"))
    return {"format": FORMAT, **plain(held)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a checkpoint's folder, after all of its files."""
    write_signed(folder / MANIFEST, _held(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        DamagedCheckpoint: it is not there, was changed, or is of another step than the one that the
            folder is named after.
        ValueError: a later version has written it, or the file system could not read it.
    """
    held = read_signed(folder / MANIFEST)
    if held.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has the format {held.get('format')!r} of another version of sra-fast, "
            f"expected {FORMAT}"
        )
    try:
        manifest = _checked(held)
    except LookupError as error:
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what it should: no {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what it should: {error}") from None
    _check_emas(folder, manifest)
    # a copy or a link may have any name; one that names a step has to be of this one
    for name in (folder.name, folder.resolve().name):
        if STEP_FOLDER.fullmatch(name) and name != step_name(manifest.step):
            raise DamagedCheckpoint(f"{MANIFEST} is that of step {manifest.step}, not of {name}")
    return manifest


def _checked(held: dict) -> Manifest:
    """The manifest of JSON whose hash holds; ValueError for a value of another kind."""
    known = {item.name for item in fields(Manifest)} - {"progress"}
    values = {name: held[name] for name in known}
    progress = Progress(_count(held, "step"), _count(held, "shift"))
    for name in ("epoch", "world", "stage"):
        _count(held, name)
    if (held["parent"] is None) != (held["parent_digest"] is None):
        raise ValueError("parent and parent_digest should be there both or not at all")
    if held["parent"] is not None:
        if _count(held, "parent") >= progress.step:
            raise ValueError(f"parent {held['parent']} should be before step {progress.step}")
        _sha256(held, "parent_digest")
    for name in ("run_id", "created", "sampled"):
        _is(held, name, str)
    for name in ("settings", "emas", "scales", "versions"):
        _is(held, name, dict)
    _is(held, "data", dict | None)
    _is(held, "teacher", str | None)
    for name in ("settings", "emas"):
        _require_values(held, name, dict)
    _require_values(held, "versions", str)
    for name, scale in held["scales"].items():
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise ValueError(f"the scale of {name} should be a finite number, got {scale!r}")
    if held["data"] is not None:
        _check_facts(held["data"])
    counts = _update_counts(held)
    _is(held, "files", dict)
    # before any loop over the ranks: the number is not to be trusted
    if len(held["files"]) != held["world"]:
        raise ValueError(f"files should be one of each of {held['world']} ranks")
    names = {file_name(rank) for rank in range(held["world"])}
    if set(held["files"]) != names or not names:
        raise ValueError(f"files should be one of each of {held['world']} ranks")
    if held["sampled"] not in held["emas"]:
        raise ValueError(f"the sampled EMA {held['sampled']} is none of {sorted(held['emas'])}")
    files = {name: _stored(entry) for name, entry in held["files"].items()}
    return Manifest(**{**values, "progress": progress, "counts": counts, "files": files})


def _stored(entry: dict) -> StoredFile:
    return StoredFile(_count(entry, "size"), _sha256(entry, "sha256"))


def _update_counts(held: dict) -> list[float]:
    _is(held, "counts", list)
    for count in held["counts"]:
        fits = type(count) in (int, float) and 0 <= count < MOST_COUNT and count == int(count)
        if not fits:
            raise ValueError(f"counts should be three whole numbers from 0, got {held['counts']}")
    if len(held["counts"]) != 3:
        raise ValueError(f"counts should be three whole numbers from 0, got {held['counts']}")
    return [float(count) for count in held["counts"]]


def _check_facts(data: dict) -> None:
    """ValueError unless the facts about the data are complete."""
    for name in ("name", "num_classes", "shape", *FACT_KINDS):
        if name not in data:
            raise ValueError(f"data should have {name}")
    _is(data, "name", str)
    _count(data, "num_classes")
    _is(data, "shape", list)
    if len(data["shape"]) != 3 or not all(type(n) is int and n > 0 for n in data["shape"]):
        raise ValueError(f"data: shape should be three sizes, got {data['shape']}")
    for name, kind in FACT_KINDS.items():
        _is(data, name, kind)
    # a run whose data had no features may be of before there were any
    if data.get("features") is not None:
        _is(data, "features", dict)
        for name in ("name", "fingerprint"):
            _is(data["features"], name, str)
    # as may one whose data had no captions
    if data.get("text") is not None:
        _is(data, "text", dict)
        for name in ("name", "fingerprint"):
            _is(data["text"], name, str)
        if data["text"].get("encoders") is not None:
            _is(data["text"], "encoders", list)
    # raises for a scale or a shift that is not of these channels
    DataFacts.from_json(data)


def _check_emas(folder: Path, manifest: Manifest) -> None:
    """ValueError for EMAs that this version would leave unread, or read as something else."""
    known = MAIN in manifest.emas and manifest.sampled == MAIN
    if not known or manifest.teacher not in (MAIN, None):
        raise ValueError(
            f"{folder} has the EMAs {sorted(manifest.emas)} (sampled: {manifest.sampled}, teacher: "
            f"{manifest.teacher}), this version of sra-fast samples and follows only {MAIN!r}"
        )
    for name, entry in manifest.emas.items():
        values = [entry.get("since", 0), *(entry[rule] for rule in RULES if rule in entry)]
        unknown = set(entry) - {*RULES, "since"}
        numbers = all(type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in values)
        if unknown or len(values) != 2 or not numbers:
            raise ValueError(
                f"{folder} has the average {name} with {entry}, this version of sra-fast expects one "
                f"number of {' and '.join(RULES)}, and since"
            )


def _sha256(held: dict, name: str) -> str:
    _is(held, name, str)
    if not SHA256.fullmatch(held[name]):
        raise ValueError(f"{held[name]!r} is no SHA-256")
    return held[name]


def _require_values(held: dict, name: str, kind) -> None:
    for key, value in held[name].items():
        if not isinstance(value, kind):
            raise ValueError(f"{name}: {key} should be a {kind.__name__}, got {value!r}")


def _is(held: dict, name: str, kind) -> None:
    if not isinstance(held[name], kind):
        raise ValueError(f"{name} should be a {kind}, got {held[name]!r}")


def _count(held: dict, name: str) -> int:
    value = held[name]
    # True is an int
    if type(value) is not int or not 0 <= value < MOST_COUNT:
        raise ValueError(f"{name} should be a whole number of at least 0, got {value!r}")
    return value


def size_fault(folder: Path, manifest: Manifest) -> str | None:
    """The first file of a checkpoint that is missing or has another size, in words.

    Raises:
        ValueError: the file system could not tell.
    """
    for name, stored in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return absence(folder / name, error)
        if size != stored.size:
            return f"{name} has {size} bytes instead of {stored.size}"
    return None


def hash_fault(folder: Path, manifest: Manifest, names: list[str]) -> str | None:
    """The first of these files of a checkpoint that has other contents, in words.

    Raises:
        ValueError: the file system could not read one.
    """
    return content_fault(folder, {name: manifest.files[name] for name in names})
