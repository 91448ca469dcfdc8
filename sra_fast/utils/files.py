"""Writing files so that a killed process never leaves a half-written one under its final name."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# a file that is not there, or something else in its place; any other error says nothing of the file
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def unreadable(path: Path, error: OSError) -> ValueError:
    """The error of a file that may be whole but could not be read."""
    reason = error.strerror or error
    return ValueError(f"{path} could not be read: {reason}; nothing was changed")


def is_there(path: Path) -> bool:
    """Whether a path exists; ValueError if that cannot be found out."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise unreadable(path, error) from None
    return True


def temporary_beside(path: Path) -> Path:
    """The name under which this process writes ``path`` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a rename is lost in a power cut before that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # some network file systems cannot, and keep names in order without it
        pass
    finally:
        os.close(handle)


def make_synced(folder: Path) -> None:
    """Make a folder, and those that it lies in, where they are missing; their names are on the
    disk after this.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary name beside ``path``, flush to disk, then rename; OSError
    names the file.
    """
    temporary = temporary_beside(path)
    try:
        write(temporary)
        # without it a crash of the machine may leave the new name with no data
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path):
    """The value of a JSON file; ValueError, which names the file, if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON file: {error}; remove it") from None


def plain(value):
    """The value as it comes back from JSON: tuples are lists, and keys are strings."""
    return json.loads(json.dumps(value))


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def write_first(path: Path, value) -> None:
    """``write_json`` unless the file is there: of processes that start together one writes, the
    others read it.
    """
    temporary = temporary_beside(path)
    try:
        write_json(temporary, value)
        try:
            # a link fails if the name is taken: the first process wins
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | Path) -> Path:
    """The folder, made if it is not there; ValueError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {path} cannot be made: {error.strerror}") from None
    return Path(path)


def require(module: str, package: str, extra: str) -> None:
    """ValueError that says how to install what an optional part needs, if it is not there."""
    if find_spec(module) is None:
        raise ValueError(f"this needs {package}: pip install 'sra-fast[{extra}]'")


def why_unreadable(error: Exception) -> str:
    """What numpy says is wrong with an array's file, in one line, without its advice to load the
    file unsafely.
    """
    # what is no array is taken for a pickled object, and all texts about these name the option
    if "allow_pickle" in str(error):
        return "it holds no plain array"
    return " ".join(str(error).split())
