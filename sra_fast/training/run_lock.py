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
# locks of this process: a second lock of one file would be granted to it
_held: set[Path] = set()


class RunLock:
    """The lock of a run folder, until ``release``.

    Args:
        folder: of the run, which is there.
        beat, watch: see ``BEAT`` and ``WATCH``.

    Raises:
        ValueError: another process has it.
        OSError: the lock cannot be written.
    """

    # closing any other descriptor of the file would give the lock back, so there is one only

    def __init__(self, folder: Path, beat: float = BEAT, watch: float = WATCH):
        self.path = (folder / LOCK).resolve()
        self.beat = beat
        self._ended = threading.Event()
        if self.path in _held:
            raise ValueError(_in_use(folder, os.getpid(), socket.gethostname()))
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(folder, watch)
        except BaseException:
            os.close(self._handle)
            raise
        _held.add(self.path)
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
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, mine, 0)
        os.fsync(self._handle)

    def _told(self) -> dict:
        """Who has the lock, or died with it; empty: it was given back, or it is not known."""
        try:
            told = json.loads(os.pread(self._handle, MOST, 0))
        except (OSError, ValueError):
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

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        self._thread.join()
        # empty: given back, not left by a process that died
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        _held.discard(self.path)


def _in_use(folder: Path, pid: int | None, host: str | None) -> str:
    who = "another process" if pid is None else f"process {pid} on {host}"
    return f"run folder {folder} is in use by {who}"
