"""JSON files that contain their own SHA-256, and those of the files beside them.

``NAME.json`` holds ``{"NAME": values, "sha256": digest}``. Whoever reads it makes the text from the
values again and compares it to the byte, so that whatever was changed shows. ``manifest.json`` of a
checkpoint and ``snapshot.json`` of a snapshot of averages are such files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sra_fast.utils.files import ABSENT, sha256, unreadable, write_atomic


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved: a file is missing, short or has other bytes."""


@dataclass(frozen=True)
class StoredFile:
    """What a file of a checkpoint must be."""

    size: int
    """bytes"""
    sha256: str
    """of its contents, in hexadecimal"""


def digest_of(values: dict) -> str:
    """SHA-256 of the values' canonical JSON, in hexadecimal; ``values`` are plain."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def render(name: str, values: dict) -> str:
    """The text of ``<name>.json``; ``values`` are plain."""
    signed = {"sha256": digest_of(values), name: values}
    return json.dumps(signed, sort_keys=True, indent=1) + "\n"


def write_signed(path: Path, values: dict) -> None:
    """Write plain values into ``path``, after all files that they tell of.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    text = render(path.stem, values)
    write_atomic(path, lambda temporary: temporary.write_text(text))


def read_signed(path: Path) -> dict:
    """The values of a file that ``write_signed`` has written.

    Raises:
        DamagedCheckpoint: it is not there, or was changed.
        ValueError: the file system could not read it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(absence(path, error)) from None
    try:
        text = content.decode("utf-8")
        values = json.loads(text)[path.stem]
        whole = isinstance(values, dict) and text == render(path.stem, values)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DamagedCheckpoint(f"{path.name} cannot be read: it is not what was written") from None
    if not whole:
        raise DamagedCheckpoint(f"{path.name} has another SHA-256")
    return values


def absence(path: Path, error: OSError) -> str:
    """What is wrong with a file that is not there, in words.

    Raises:
        ValueError: the error does not say that; the file may be whole and could only not be read.
    """
    if error.errno not in ABSENT:
        raise unreadable(path, error) from None
    return f"{path.name} cannot be read: {error.strerror}"


def content_fault(folder: Path, files: Mapping[str, StoredFile]) -> str | None:
    """The first of some files that has other contents, in words; every byte is read.

    Args:
        folder: that they lie in.
        files: name -> what the file must be.

    Raises:
        ValueError: the file system could not read one.
    """
    for name, stored in files.items():
        try:
            digest = sha256(folder / name)
        except OSError as error:
            return absence(folder / name, error)
        if digest != stored.sha256:
            return f"{name} has another SHA-256"
    return None
