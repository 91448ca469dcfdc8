"""Runs of the real program in forked processes, with a launcher that is as hard as real ones.

The process that forks has everything imported, no thread and no process group, so a run costs a
second and not ten.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch import free_port

from sra_fast import train
from sra_fast.training import saving
from sra_fast.utils import stopping

# seconds from the end of one rank to SIGTERM for the others, and from there to SIGKILL
TERM_AFTER = 0.2
KILL_AFTER = 5.0
# a run that takes longer hangs
LIMIT = 90.0
# said by a rank into the log when it resumes
RESUMED = "chaos: resumed at step"

BAR = re.compile(r"\| \d+/\d+ \[")

Hook = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """How a run has ended.

    Attributes:
        codes: of every rank; a negative one is a signal.
        log: what all ranks printed.
        hung: the limit passed.
    """

    codes: list[int]
    log: str
    hung: bool = False

    @property
    def complete(self) -> bool:
        return all(code == 0 for code in self.codes)

    @property
    def code(self) -> int:
        """Of the rank that ended first with a fault of its own; 0: none."""
        own = [code for code in self.codes if code > 0]
        return own[0] if own else min(self.codes)

    def lines(self) -> list[str]:
        """What was said, without the bar."""
        text = self.log.replace("\r", "\n")
        return [line for line in text.splitlines() if line.strip() and not BAR.search(line)]

    def errors(self) -> list[str]:
        """The lines that a user would read as the reason."""
        return [line for line in self.lines() if line.startswith("error")]

    @property
    def resumed_at(self) -> int | None:
        """The step that rank 0 resumed at; None: it began anew."""
        found = [line for line in self.lines() if line.startswith(RESUMED)]
        return int(found[-1].split()[-1]) if found else None


class Running:
    """A run that has been started: one process per rank, in a process group of their own.

    Args:
        arguments: of train.py.
        world: number of ranks.
        log: file for what they print.
        hook: called by every rank with its number, before the program; it may patch things.
    """

    def __init__(self, arguments: list[str], world: int, log: Path, hook: Hook | None = None):
        self.log = log
        self.codes: dict[int, int] = {}
        self.pids: list[int] = []
        port = free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                group = self.pids[0] if self.pids else 0
                os.setpgid(0, group)
                _be_a_rank(arguments, rank, world, port, log, hook)
            # both sides: whoever comes first
            with suppress(OSError):
                os.setpgid(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the end as a launcher does: one rank that fails ends the others."""
        until = time.monotonic() + limit
        failed_at = None
        hung = False
        while not self.poll():
            now = time.monotonic()
            if now > until:
                hung = True
                self.signal(signal.SIGKILL)
            if failed_at is None and any(self.codes.values()):
                failed_at = now
            if failed_at is not None and now - failed_at > TERM_AFTER + KILL_AFTER:
                self.signal(signal.SIGKILL)
            elif failed_at is not None and now - failed_at > TERM_AFTER:
                self.signal(signal.SIGTERM)
            time.sleep(0.005)
        codes = [self.codes[rank] for rank in range(len(self.pids))]
        # a run that was killed at once has said nothing
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(codes, said, hung)


def run(
    arguments: list[str],
    world: int,
    log: Path,
    hook: Hook | None = None,
    meanwhile: Callable[[Running], None] | None = None,
) -> Ended:
    """A whole run; ``meanwhile`` is called while it runs."""
    log.unlink(missing_ok=True)
    running = Running(arguments, world, log, hook)
    try:
        if meanwhile is not None:
            meanwhile(running)
        return running.wait()
    finally:
        if not running.poll():
            running.signal(signal.SIGKILL)


def _be_a_rank(
    arguments: list[str], rank: int, world: int, port: str, log: Path, hook: Hook | None
) -> None:
    """The life of a forked child; does not return."""
    code = 1
    try:
        _redirect(log)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        if world > 1:
            values = (rank, world, rank, world)
            os.environ.update(zip(names, map(str, values), strict=True))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sys.argv = ["train.py", *arguments]
        stopping.LAUNCHER_REACTS = 2 * TERM_AFTER
        if rank == 0:
            _say_resumed()
        if hook is not None:
            hook(rank)
        train.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    # line by line: the ranks share the file
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _say_resumed() -> None:
    load = saving.load

    def saying(*arguments, **options):
        progress = load(*arguments, **options)
        print(RESUMED, progress.step, flush=True)
        return progress

    saving.load = saying
