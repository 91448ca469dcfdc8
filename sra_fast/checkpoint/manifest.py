"""The manifest of a checkpoint: which files it consists of, and all that is not a tensor.

``<run>/checkpoints/step_00001200/`` holds ``rank_00000.safetensors`` of every rank and
``manifest.json``, which is written last: a folder without it is a save that was not finished. The
manifest knows the size and the SHA-256 of every file, and its own.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sra_fast.utils.files import write_atomic

MANIFEST = "manifest.json"
FORMAT = 1
STEP_FOLDER = re.compile(r"step_\d{8,}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved: a file is missing, short or has other bytes."""


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
class StoredFile:
    """What a file of a checkpoint must be."""

    size: int
    """bytes"""
    sha256: str
    """of its contents, in hexadecimal"""


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
    created: str
    """when it was written, UTC, ISO 8601"""
    files: dict[str, StoredFile]
    """name -> file, one of every rank"""
    settings: dict
    """the configuration, as JSON has it"""
    emas: dict[str, dict]
    """name of every EMA -> its ``decay``"""
    teacher: str | None = "main"
    """the EMA that the alignment's network follows"""
    sampled: str = "main"
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


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def plain(value):
    """The value as it comes back from JSON: tuples are lists, and keys are strings."""
    return json.loads(json.dumps(value))


def render(manifest: Manifest) -> str:
    """The text of ``manifest.json``: the manifest, and the SHA-256 of its canonical JSON."""
    held = asdict(manifest)
    held.update(held.pop("progress"))
    return _render({"format": FORMAT, **plain(held)})


def _render(held: dict) -> str:
    canonical = json.dumps(held, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({"sha256": digest, "manifest": held}, sort_keys=True, indent=1) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a checkpoint's folder, after all of its files."""
    text = render(manifest)
    write_atomic(folder / MANIFEST, lambda path: path.write_text(text))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        DamagedCheckpoint: it cannot be read, was changed, or is of another step than the folder.
        ValueError: a later version has written it.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode("utf-8")
        held = json.loads(text)["manifest"]
        # the same text again, to the byte: whatever was changed shows
        whole = isinstance(held, dict) and text == _render(held)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not what was written"
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read: {reason}") from None
    if not whole:
        raise DamagedCheckpoint(f"{MANIFEST} has another SHA-256")
    if held.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has the format {held.get('format')!r} of another version of sra-fast, "
            f"expected {FORMAT}"
        )
    try:
        manifest = _checked(held)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what it should: {error}") from None
    if folder.name != step_name(manifest.step):
        raise DamagedCheckpoint(f"{MANIFEST} is that of step {manifest.step}")
    return manifest


def _checked(held: dict) -> Manifest:
    """The manifest of JSON whose hash holds; ValueError for a value of another kind."""
    known = {item.name for item in fields(Manifest)} - {"progress"}
    values = {name: held[name] for name in known}
    progress = Progress(_count(held, "step"), _count(held, "shift"))
    for name in ("epoch", "world", "stage"):
        _count(held, name)
    if held["parent"] is not None:
        _count(held, "parent")
    for name in ("run_id", "created", "sampled"):
        _is(held, name, str)
    for name in ("settings", "emas", "scales", "versions"):
        _is(held, name, dict)
    _is(held, "data", dict | None)
    _is(held, "teacher", str | None)
    counts = [float(count) for count in held["counts"]]
    if len(counts) != 3 or not all(count >= 0 and count.is_integer() for count in counts):
        raise ValueError(f"counts should be three whole numbers from 0, got {held['counts']}")
    names = {file_name(rank) for rank in range(held["world"])}
    if set(held["files"]) != names or not names:
        raise ValueError(f"files should be one of each of {held['world']} ranks")
    if held["sampled"] not in held["emas"]:
        raise ValueError(f"the sampled EMA {held['sampled']} is none of {sorted(held['emas'])}")
    files = {name: _stored(entry) for name, entry in held["files"].items()}
    return Manifest(**{**values, "progress": progress, "counts": counts, "files": files})


def _stored(entry: dict) -> StoredFile:
    size = _count(entry, "size")
    _is(entry, "sha256", str)
    if not SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"{entry['sha256']!r} is no SHA-256")
    return StoredFile(size, entry["sha256"])


def _is(held: dict, name: str, kind) -> None:
    if not isinstance(held[name], kind):
        raise ValueError(f"{name} should be a {kind}, got {held[name]!r}")


def _count(held: dict, name: str) -> int:
    value = held[name]
    # True is an int
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} should be a whole number of at least 0, got {value!r}")
    return value


def size_fault(folder: Path, manifest: Manifest) -> str | None:
    """The first file of a checkpoint that is missing or has another size, in words."""
    for name, stored in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != stored.size:
            return f"{name} has {size} bytes instead of {stored.size}"
    return None


def hash_fault(folder: Path, manifest: Manifest, names: list[str]) -> str | None:
    """The first of these files of a checkpoint that has other contents, in words."""
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if digest != manifest.files[name].sha256:
            return f"{name} has another SHA-256"
    return None
