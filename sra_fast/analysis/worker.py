"""A worker process of ``analysis.jobs``.

It gets tasks through a pipe and ends with the pipe, when it is told to stop, with its parent, and
after a task that has failed.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

# seconds between two looks for a stop while there is nothing to do
LOOK_EVERY = 0.5


class Failed(Exception):
    """A task has failed for a reason that one line tells; any other error has a traceback in the
    log.
    """


def find_function(name: str) -> Callable:
    """``module:function`` -> the function.

    Raises:
        ValueError: there is none of this name.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"expected module:function, got {name!r}")
    try:
        found = import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {error}") from None
    if not callable(getattr(found, function, None)):
        raise ValueError(f"{name}: the module {module} has no function {function}")
    return getattr(found, function)


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Append what this process prints, and what its libraries do, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    # log handlers hold the streams that they were made with: the descriptors are changed below them
    with open(path, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, number)
            os.close(kept)


def _next_task(connection: Connection, stop) -> tuple[str, dict] | None:
    """The next task, or None at the end of the pipe or if somebody has asked to stop."""
    try:
        while not connection.poll(LOOK_EVERY):
            if stop.code:
                return None
        return None if stop.code else connection.recv()
    except (EOFError, OSError):
        return None


def _do(work: Callable, log: Path, arguments: dict, stop) -> tuple[str, str, object]:
    """What became of a task: ``done``, ``stopped`` or ``failed``, why, and what it returned."""
    from sra_fast.training.signals import Stopped

    with ExitStack() as streams:
        try:
            streams.enter_context(printing_to(log))
        except OSError as error:
            return "failed", f"{log} cannot be written: {error.strerror}", None
        try:
            result = work(arguments, stop)
        except Stopped as error:
            print(error, file=sys.stderr)
            return "stopped", str(error), None
        except Failed as error:
            print(error, file=sys.stderr)
            return "failed", str(error), None
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            return "failed", f"{type(error).__name__}: {lines[0][:300]}", None
    return "done", "", result


def main() -> None:
    """Do tasks. Arguments of the process: the pipe's descriptor, ``Pool.start``, ``Pool.path``."""
    # before the imports, which take seconds: the parent may end meanwhile
    from sra_fast.utils.processes import LauncherWatch

    launchers = LauncherWatch(parent=True)
    from sra_fast.training.signals import StopSignals

    descriptor, start, *path = sys.argv[1:]
    sys.path[1:1] = path
    connection = Connection(int(descriptor))
    with StopSignals(launchers) as stop:
        about, work = find_function(start)()
        connection.send(("ready", "", about))
        while (task := _next_task(connection, stop)) is not None:
            log, arguments = task
            state, *rest = _do(work, Path(log), arguments, stop)
            # the parent may be gone
            with suppress(OSError):
                connection.send((state, *rest))
            if state != "done":
                break
    sys.stdout.flush()
    sys.stderr.flush()
    # nothing of the libraries has to end in an orderly way, and some would wait
    os._exit(0)
