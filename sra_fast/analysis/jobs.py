"""Several tasks at once, each in a worker process that does one after another.

A worker imports what it needs once. It is a process of its own, so a task that crashes takes no
other one along, and the tasks that it had not begun go to another worker.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

from sra_fast.training.signals import STOPPED
from sra_fast.utils.processes import num_cores

log = logging.getLogger("sra_fast")

ROOT = Path(__file__).resolve().parents[2]
# not `-m`, which would make a second copy of the module and its classes. Python looks for modules
# in the current folder first, which may hold another sra_fast
WORKER = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; from sra_fast.analysis.worker import main; main()"
)
# the variable that OpenMP, MKL and torch read for their number of threads
THREADS = "OMP_NUM_THREADS"
# a worker is alone, whatever has started the parent
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# seconds between two looks at the workers
LOOK_EVERY = 0.2
# seconds that a worker without a task may need to end
END_GRACE = 10.0
# Ctrl-C reaches the workers too, and one of them may answer before this process has noticed it
NOTICE = 1.0


def threads_of(jobs: int) -> int:
    """Threads of each of ``jobs`` workers: an equal share of the cores, or what ``OMP_NUM_THREADS``
    says.

    Raises:
        ValueError: the variable is no number of threads.
    """
    text = os.environ.get(THREADS)
    if text is None:
        return max(1, num_cores() // jobs)
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{THREADS} must be a number of threads, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Task:
    """Something that a worker does.

    Attributes:
        name: for messages.
        log: the file to which everything is appended that the task prints.
        arguments: what the work is called with; it can be pickled.
    """

    name: str
    log: Path
    arguments: dict


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: the task.
        state: ``done``; ``failed``; or ``stopped``, as was asked for.
        reason: why it was not done, in one line.
        result: what the work has returned.
        seconds: that it took.
    """

    task: Task
    state: str
    reason: str = ""
    result: object = None
    seconds: float = 0.0


@dataclass
class _Worker:
    """A process and what it does.

    Attributes:
        process: the process.
        connection: to it.
        errors: what it prints while it has no task.
        task: what it does now.
        log_begins: how long the log of its task was before.
        began: when it began that.
        ready: it has imported everything.
        ending: it ends by itself and takes no task any more.
        told: it was asked to stop.
    """

    process: subprocess.Popen
    connection: Connection
    errors: IO[bytes]
    task: Task | None = None
    log_begins: int = 0
    began: float = 0.0
    ready: bool = False
    ending: bool = False
    told: bool = False


@dataclass
class Pool:
    """Workers that do tasks; a context, at whose end no worker is left.

    Attributes:
        start: ``module:function``. A worker calls it once, and it returns ``(about, work)``: facts
            about the worker, and what is called for every task as ``work(arguments, stop)``, with
            open ``StopSignals``. A task has failed if ``work`` raises, and was stopped if it raises
            ``Stopped``.
        jobs: the most tasks at once.
        threads: of each worker.
        path: folders in which a worker looks for modules besides its own.
        check: called with ``about`` of every worker; what it raises ends everything.
    """

    start: str
    jobs: int
    threads: int
    path: list[Path] = field(default_factory=list)
    check: Callable[[dict], None] = lambda about: None
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        for worker in self._workers:
            # the end of the pipe is the end of a worker that has nothing to do
            worker.connection.close()
            if worker.task is not None or error[0] is not None:
                worker.process.kill()
        end = time.monotonic() + END_GRACE
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.errors.close()
        self._workers = []

    def add_workers(self, count: int) -> None:
        """Start workers until there are ``count``, at most ``jobs``: their imports take a while."""
        while len(self._workers) < min(count, self.jobs):
            self._workers.append(self._new_worker())

    def _new_worker(self) -> _Worker:
        ours, theirs = Pipe()
        modules = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **ALONE,
            THREADS: str(self.threads),
            "PYTHONPATH": os.pathsep.join(modules),
        }
        # stays open as long as the worker lives
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-c", WORKER, str(theirs.fileno()), self.start]
        process = subprocess.Popen(
            [*command, *map(str, self.path)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        return _Worker(process, ours, errors)

    def run(
        self,
        tasks: Iterable[Task],
        report: Callable[[Outcome], None],
        asked: Callable[[], object] = lambda: None,
        before: Callable[[Task], None] = lambda task: None,
    ) -> None:
        """Do the tasks, in this order as far as workers are free.

        Args:
            tasks: what to do.
            report: called with each outcome, in this process. What was never begun has none.
            asked: whether to stop, looked at several times a second. Then no task is begun, and
                those that run are told to stop (SIGTERM).
            before: called with each task when it begins.

        Raises:
            RuntimeError: workers cannot be started.
        """
        waiting = deque(tasks)
        while waiting or self._busy():
            stopping = bool(asked())
            if stopping:
                waiting.clear()
                self._tell_to_stop()
            else:
                self.add_workers(len(waiting) + len(self._busy()))
                self._hand_out(waiting, before)
            for worker in self._look():
                outcome = self._hear(worker, asked)
                if outcome is None:
                    continue
                if outcome.state == "stopped" and not _notices(asked):
                    outcome = replace(outcome, state="failed")
                report(replace(outcome, seconds=time.monotonic() - worker.began))

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.task is not None]

    def _hand_out(self, waiting: deque[Task], before: Callable[[Task], None]) -> None:
        for worker in self._workers:
            if waiting and worker.ready and not worker.ending and worker.task is None:
                task = waiting.popleft()
                before(task)
                worker.log_begins = len(_content(task.log))
                try:
                    worker.connection.send((str(task.log), task.arguments))
                except OSError:
                    # it has just died: another one does the task
                    waiting.appendleft(task)
                    worker.ending = True
                    continue
                worker.task = task
                worker.began = time.monotonic()

    def _tell_to_stop(self) -> None:
        for worker in self._busy():
            if not worker.told:
                worker.told = True
                # the process was not waited for: the number is still its own
                worker.process.send_signal(signal.SIGTERM)

    def _look(self) -> list[_Worker]:
        """Workers that have said something or have ended, waiting for them a short while."""
        found = wait([worker.connection for worker in self._workers], LOOK_EVERY)
        # a pipe may be held open by the loader processes of a worker that was killed
        return [
            worker
            for worker in self._workers
            if worker.connection in found or worker.process.poll() is not None
        ]

    def _hear(self, worker: _Worker, asked: Callable[[], object]) -> Outcome | None:
        """What a worker says; an outcome if it is about its task."""
        try:
            # something that it sent before it ended comes first
            if worker.connection.poll():
                kind, said, result = worker.connection.recv()
            elif worker.process.poll() is not None:
                raise EOFError
            else:
                return None
        except (EOFError, OSError):
            return self._bury(worker, asked)
        if kind == "ready":
            self.check(result)
            worker.ready = True
            return None
        task = worker.task
        worker.task = None
        if kind != "done":
            # what a task that failed has left behind must not reach another one
            worker.ending = True
        return Outcome(task, kind, said, result)

    def _bury(self, worker: _Worker, asked: Callable[[], object]) -> Outcome | None:
        """Take a worker that has ended off the list; an outcome if it had a task."""
        worker.process.wait()
        worker.connection.close()
        self._workers.remove(worker)
        code = worker.process.returncode
        with worker.errors:
            worker.errors.seek(0)
            said = worker.errors.read().decode(errors="replace")
        if worker.task is not None:
            printed = _content(worker.task.log)[worker.log_begins :]
            last = _last_line(printed.decode(errors="replace"))
            if code == STOPPED:
                return Outcome(worker.task, "stopped", last.removeprefix(": "))
            return Outcome(worker.task, "failed", f"its process {_ended(code)}{last}")
        if not worker.ready and not _notices(asked):
            raise RuntimeError(f"a worker {_ended(code)} at its start{_last_line(said)}")
        return None


def _notices(asked: Callable[[], object]) -> bool:
    """Whether this process comes to notice a stop that a worker has noticed."""
    end = time.monotonic() + NOTICE
    while not asked():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        memory = " (is the machine out of memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{memory}"
    return f"ended with exit code {code}"


def _content(log: Path) -> bytes:
    """What a log holds; nothing if it is not there, or no file."""
    try:
        return log.read_bytes()
    except OSError:
        return b""


def _last_line(text: str) -> str:
    """``: `` and the last line that is not empty, or nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
