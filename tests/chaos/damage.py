"""What can happen to a file, and to a disk whose power is cut."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

# one file is damaged alone; the random numbers decide where
Damage = Callable[[Path, random.Random], None]


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, max(2, path.stat().st_size)))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def flip(path: Path, rng: random.Random) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def append(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def garbage(path: Path, rng: random.Random) -> None:
    """Other bytes, as many."""
    path.write_bytes(rng.randbytes(max(1, path.stat().st_size)))


def folder(path: Path, rng: random.Random) -> None:
    """A folder under the file's name."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    function.__name__: function
    for function in (truncate, empty, delete, flip, append, garbage, folder)
}


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    between = one.with_name(f"{one.name}.swap")
    os.rename(one, between)
    os.rename(other, one)
    os.rename(between, other)


class Payload:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


class FullDisk:
    """Lets the writes of this process into a folder fail with ENOSPC, from the ``after``-th on.

    Args:
        folder: below which files count.
        after: writes that succeed.
    """

    def __init__(self, folder: Path, after: int):
        self.folder = str(folder)
        self.left = after

    def install(self) -> None:
        import builtins
        import io

        plain = io.open

        def opened(file, mode="r", *arguments, **options):
            handle = plain(file, mode, *arguments, **options)
            inside = isinstance(file, str | os.PathLike) and os.fspath(file).startswith(self.folder)
            return _FullFile(handle, self) if inside and set(mode) & set("wax+") else handle

        builtins.open = opened
        io.open = opened

    def write(self, handle, data):
        if self.left <= 0:
            raise OSError(28, "No space left on device", getattr(handle, "name", None))
        self.left -= 1
        return handle.write(data)


class _FullFile:
    """A file on a ``FullDisk``."""

    def __init__(self, handle, disk: FullDisk):
        self._handle = handle
        self._disk = disk

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def __enter__(self):
        self._handle.__enter__()
        return self

    def __exit__(self, *error):
        return self._handle.__exit__(*error)

    def __iter__(self):
        return iter(self._handle)

    def write(self, data):
        return self._disk.write(self._handle, data)


class PowerCut:
    """What of a process's writes would outlive a power cut.

    In the process, ``install`` notes what is flushed, renamed and removed. After its death ``apply``
    empties every file that was not flushed since its last change, and undoes some of the renames and
    removals in folders that were not flushed since. An entry of a new folder in its parent counts as
    flushed, as it is on the usual file systems once a file in it is.

    Args:
        folder: the disk.
        journal: a folder elsewhere, for notes and for what was replaced.
    """

    def __init__(self, folder: Path, journal: Path):
        self.folder = str(folder)
        self.journal = journal
        self._kept = 0

    def install(self, rank: int) -> None:
        self.journal.mkdir(exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._notes = os.open(self.journal / f"notes_{rank}", flags)
        self._rank = rank
        os.fsync = self._fsync(os.fsync)
        os.replace = self._rename(os.replace)
        os.rename = self._rename(os.rename)
        os.unlink = self._unlink(os.unlink)
        os.remove = os.unlink

    def _note(self, **event) -> None:
        line = json.dumps({"at": time.monotonic_ns(), **event}) + "\n"
        os.write(self._notes, line.encode())

    def _keep(self, path: str) -> str | None:
        """A second name for a file that is about to lose its own."""
        if not path.startswith(self.folder) or not os.path.isfile(path):
            return None
        self._kept += 1
        name = f"kept_{self._rank}_{self._kept}"
        os.link(path, self.journal / name)
        return name

    def _fsync(self, fsync):
        def noted(handle):
            number = handle if isinstance(handle, int) else handle.fileno()
            fsync(number)
            found = os.fstat(number)
            path = os.readlink(f"/proc/self/fd/{number}")
            if os.path.isdir(path):
                self._note(kind="folder", path=path)
            else:
                self._note(kind="file", inode=found.st_ino, changed=found.st_mtime_ns)

        return noted

    def _rename(self, rename):
        def noted(source, target, **options):
            kept = self._keep(os.fspath(target))
            rename(source, target, **options)
            source, target = os.fspath(source), os.fspath(target)
            if target.startswith(self.folder):
                self._note(kind="rename", source=source, target=target, kept=kept)

        return noted

    def _unlink(self, unlink):
        def noted(path, *, dir_fd=None):
            name = os.fspath(path)
            if dir_fd is not None:
                name = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)
            kept = self._keep(name)
            unlink(path, dir_fd=dir_fd)
            if kept is not None:
                self._note(kind="unlink", target=name, kept=kept)

        return noted

    def apply(self, rng: random.Random) -> list[str]:
        """Make of the folder what the disk would hold; returns what was lost, in words."""
        events = []
        for notes in self.journal.glob("notes_*"):
            events += [json.loads(line) for line in notes.read_text().splitlines()]
        events.sort(key=lambda event: event["at"])
        lost = self._undo(events, rng)
        flushed = {(e["inode"], e["changed"]) for e in events if e["kind"] == "file"}
        for path in sorted(Path(self.folder).rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            found = path.stat()
            if found.st_size and (found.st_ino, found.st_mtime_ns) not in flushed:
                os.truncate(path, 0)
                lost.append(f"{path.name} emptied")
        return lost

    def _undo(self, events: list[dict], rng: random.Random) -> list[str]:
        pending = []
        for event in events:
            if event["kind"] in ("rename", "unlink"):
                pending.append(event)
            elif event["kind"] == "folder":
                pending = [e for e in pending if os.path.dirname(e["target"]) != event["path"]]
        undone = []
        for event in reversed(pending):
            if rng.random() < 0.3:
                # the disk was quick enough
                continue
            target = Path(event["target"])
            if event["kind"] == "rename":
                if not target.exists():
                    continue
                Path(event["source"]).parent.mkdir(parents=True, exist_ok=True)
                os.rename(target, event["source"])
            if event["kept"] is not None and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # the same file: what was flushed of it still is
                os.rename(self.journal / event["kept"], target)
            undone.append(f"{event['kind']} of {target.name} undone")
        return undone
