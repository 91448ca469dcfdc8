"""How a program ends early: with one line, whatever the number of processes. ``train.py`` has more to
say.

Only the standard library is imported here: Ctrl-C may come while the libraries are loaded, which
takes seconds.
"""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn

from sra_fast.utils.messages import rank

# what a shell reports of a program that Ctrl-C ended
INTERRUPTED = 130
# seconds in which a launcher ends the other processes after one has failed: DeepSpeed's looks every
# second
LAUNCHER_REACTS = 3.0


def one_line_on_interrupt(line: str = "stopped") -> None:
    """From now on Ctrl-C ends the program with this line, of rank 0, and exit code 130.

    Called in the first lines of ``main``. What is open is closed before, as by any exception.

    Args:
        line: says what is to be done next, if there is more than to start again.
    """
    before = sys.excepthook

    def hook(kind, error, traceback) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, traceback)
            return
        # a launcher forwards the Ctrl-C that the terminal has already sent
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if rank() == "0":
            print(line, file=sys.stderr, flush=True)
        # ends a program that then waits for a thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(INTERRUPTED)

    sys.excepthook = hook


def of_rank(line: str, number: int | str) -> str:
    """A line that begins with ``error:``, with the rank of a process that has failed alone."""
    return line if str(number) == "0" else line.replace("error:", f"error on rank {number}:", 1)


def fail(line: str, code: int = 2) -> NoReturn:
    """End with a line on stderr that the processes of a launcher do not all say.

    Mostly all of them fail alike: rank 0 says it, and the launcher ends the others. A process that
    is still alive after that has failed alone, and says so.

    Args:
        line: begins with ``error:``.
        code: exit code.
    """
    if rank() != "0":
        time.sleep(LAUNCHER_REACTS)
    print(of_rank(line, rank()), file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def one_line_on_error(in_words: Callable[[OSError], str] = str):
    """What a user can change ends the program with one line: a ValueError with exit code 2, an
    OSError with 1.

    Args:
        in_words: what is said of an OSError.
    """
    try:
        yield
    except ValueError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        fail(f"error: {' '.join(filter(None, lines))}")
    except OSError as error:
        fail(f"error: {in_words(error)}", code=1)
