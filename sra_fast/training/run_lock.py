"""One process at a time writes into a run folder.

``<run>/lock`` is held by rank 0 as a POSIX record lock: the system gives it back when the process
dies, however it dies, and child processes do not inherit it. For file systems whose locks other
machines do not see, the file also has a heartbeat: its time is set every few seconds.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from sra_fast.utils.files import temporary_beside

LOCK = "lock"
# seconds between two heartbeats
BEAT = 10.0
# a heartbeat that is older than this many is no sign of life
MISSED = 3
# seconds in which the heartbeat of another machine is watched
WATCH = 60.0
# longer than what a lock says
MOST = 4096
# what it means for a run
LOST = "another process may write into this run folder, so this one writes no more"
# locks of this process: a second lock of one file would be granted to it
_held: dict[Path, "RunLock"] = {}


class RunLock:
    """The lock of a run folder, until ``release``.

    Args:
        folder: of the run, which is there.
        beat, watch: see ``BEAT`` and ``WATCH``.

    Raises:
        ValueError: another process has it, or something else lies in its place.
        OSError: the lock cannot be written.
    """

    # closing any other descriptor of the file would give the lock back, so there is one only

    def __init__(self, folder: Path, beat: float = BEAT, watch: float = WATCH):
        self.path = _path_of(folder)
        self.beat = beat
        # tells the file from any other, also for processes that only read it
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()
        if self.path in _held:
            raise ValueError(_in_use(folder, os.getpid(), socket.gethostname()))
        self._handle = _opened(self.path)
        try:
            self._take(folder, watch)
        except BaseException:
            os.close(self._handle)
            raise
        _held[self.path] = self
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def _take(self, folder: Path, watch: float) -> None:
        told = self._told()
        # unless the lock itself tells, a heartbeat does
        doubtful = told and told.get("host") != socket.gethostname()
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(_in_use(folder, told.get("pid"), told.get("host"))) from None
            # a file system without locks
            doubtful = bool(told)
        if doubtful and self._is_beating(watch):
            raise ValueError(_in_use(folder, told.get("pid"), told.get("host")))
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(mine).encode(), 0)
        os.fsync(self._handle)

    def _told(self) -> dict:
        """Who has the lock, or died with it; empty: it was given back, or it is not known."""
        try:
            told = json.loads(os.pread(self._handle, MOST, 0))
        except (OSError, ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    def _is_beating(self, watch: float) -> bool:
        """Whether the heartbeat of the lock moves, by the clock of the file's own machine."""
        first = os.fstat(self._handle).st_mtime_ns
        end = time.monotonic() + watch
        while time.monotonic() < end:
            if self._server_time() - first > MISSED * self.beat * 1e9:
                return False
            time.sleep(min(1.0, self.beat / 4))
            if os.fstat(self._handle).st_mtime_ns != first:
                return True
        return False

    def _server_time(self) -> int:
        """Now, in ns, as the file system sets it on a file."""
        probe = temporary_beside(self.path)
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.beat):
            try:
                os.utime(self._handle)
            except OSError:
                # the file system is away for a while: the lock itself still holds
                continue

    def check(self) -> None:
        """ValueError if the file was removed or replaced, or another process wrote itself into it."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            raise ValueError(f"{self.path} was removed: {LOST}") from None
        except OSError:
            # the file system is away for a while: what is written next fails by itself
            return
        mine = os.fstat(self._handle)
        if (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino):
            raise ValueError(f"{self.path} is another file now: {LOST}")
        told = self._told()
        if told.get("token") != self.token:
            who = f"process {told.get('pid')} on {told.get('host')}" if told else "somebody"
            raise ValueError(f"{self.path} was taken over by {who}: {LOST}")

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        self._thread.join()
        # empty: given back, not left by a process that died
        if self._told().get("token") == self.token:
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
        _held.pop(self.path, None)


def check_held(folder: Path) -> None:
    """ValueError if this process has locked a run folder and has lost the lock since.

    Call it before anything is removed or committed. Nothing happens where there was no lock.
    """
    lock = _held.get(_path_of(folder))
    if lock is not None:
        lock.check()


def token_in(folder: Path) -> str | None:
    """``RunLock.token`` as another process than the holder sees it; None: it sees none.

    The holder must not call this: its lock would be given back with the descriptor.
    """
    try:
        with open(_path_of(folder), "rb") as file:
            told = json.loads(file.read(MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return told.get("token") if isinstance(told, dict) else None


def _path_of(folder: Path) -> Path:
    return folder.resolve() / LOCK


def _opened(path: Path) -> int:
    """A descriptor of the lock's file, which is made if it is not there."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):
            what = "a folder" if error.errno == errno.EISDIR else "a link"
            raise ValueError(f"expected a file {path}, found {what}: remove it") from None
        raise


def _in_use(folder: Path, pid: int | None, host: str | None) -> str:
    who = "another process" if pid is None else f"process {pid} on {host}"
    return f"run folder {folder} is in use by {who}"
