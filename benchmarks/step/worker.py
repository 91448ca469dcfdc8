"""A process that measures one case after another, so imports, the CUDA context and compiled kernels are paid for once.

Memory of a case is released before the next one starts. A case that breaks the device or does not end takes the
process with it, and so does one whose memory is not released. The next case starts a new process.
"""

import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# not from benchmarks.record, which imports torch: a worker that does not need it starts at once
ROOT = Path(__file__).resolve().parents[2]
# starts a line that holds an answer; everything else is what libraries print
MARK = "RESULT "
# seconds between two looks at whether the process still runs
POLL_SECONDS = 0.2
# seconds in which a process that has closed its output must end
END_SECONDS = 5.0
# of Linux's prctl: the signal that a process gets when its parent ends
PR_SET_PDEATHSIG = 1


class Failure(Exception):
    """A case that gave no time. The message says why."""


class Worker:
    """The process, as its parent sees it.

    Args:
        command: starts it in the root of the checkout; it runs ``serve``.
        environment: of the process.
        separate: start a process for every request.
    """

    def __init__(self, command: list[str], environment: dict[str, str], separate: bool = False):
        self.command = command
        self.environment = environment
        self.separate = separate
        self.process: subprocess.Popen | None = None

    def ask(self, request: list, limit: float) -> dict:
        """The answer to a request.

        Args:
            request: anything that JSON holds.
            limit: seconds to wait.

        Raises:
            Failure: no answer in time, the process has ended, or the answer is an error.
        """
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self._answer(time.monotonic() + limit, limit)
        except BrokenPipeError:
            self.stop()
            raise Failure("the process has ended") from None
        except Failure:
            self.stop()
            raise
        if self.separate or answer["last"]:
            self.stop()
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def _start(self) -> None:
        # stays open: it is read after the process has ended
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            # a library may print bytes of another encoding
            errors="replace",
            # a group of its own: what the process has started is ended with it
            start_new_session=True,
        )
        # a thread reads, so that waiting for a line can time out
        self.lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(
            target=_forward, args=(self.process.stdout, self.lines), daemon=True
        )
        reader.start()

    def _answer(self, deadline: float, limit: float) -> dict:
        while True:
            # before the wait for a line: what it has written until now is read first
            has_ended = self.process.poll() is not None
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(f"not finished in {limit:.0f} s")
            try:
                line = self.lines.get(timeout=min(left, POLL_SECONDS))
            except queue.Empty:
                # its output has no end yet if a process that it has started still holds it
                if has_ended:
                    raise Failure(self._last_error(left)) from None
                continue
            if line is None:
                raise Failure(self._last_error(left))
            if line.startswith(MARK):
                try:
                    return json.loads(line.removeprefix(MARK))
                # the process has died while it wrote
                except ValueError:
                    raise Failure(f"half an answer: {line.strip()[:100]}") from None
            print(line, end="", flush=True)

    def _last_error(self, left: float) -> str:
        """How a process without further output has ended, and why; ``left`` are seconds to wait."""
        try:
            code = self.process.wait(timeout=min(left, END_SECONDS))
            state = f"the process has ended ({code})"
        except subprocess.TimeoutExpired:
            state = "the process has closed its output and does not end"
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["?"]
        # libraries still print warnings after the error
        errors = [line for line in lines if re.search(r"(Error|error)\b", line)]
        said = errors[-1] if errors else lines[-1]
        return f"{state}: {said}"

    def stop(self) -> None:
        """End the process and what it has started, if there is one."""
        if self.process is None:
            return
        # none of the group may be left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
        self.process = None


def _forward(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def serve(handle: Callable[[list], dict], release: Callable[[], bool]) -> None:
    """Answer requests, one per line of standard input, until it ends.

    Args:
        handle: takes a request and returns its answer.
        release: releases what the last case held, and returns whether this process can take another.
    """
    _end_with_parent()
    for line in sys.stdin:
        answer = _handled(handle, json.loads(line))
        answer["last"] = not release()
        print(MARK + json.dumps(answer), flush=True)
        if answer["last"]:
            # no clean exit: on a broken device the handlers at exit fail or hang
            os._exit(1)


def _end_with_parent() -> None:
    """A signal to the parent's group does not reach this process, which has a group of its own."""
    # Linux only; elsewhere it ends after its case, when its input does
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _handled(handle: Callable[[list], dict], request: list) -> dict:
    """The answer or the error.

    A separate function: an exception holds the frames of the case, and so its tensors, until this returns.
    """
    try:
        return handle(request)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
