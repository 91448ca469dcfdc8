"""A process that measures one case after the other, so that imports, the CUDA context and compiled kernels are paid for once.

What belongs to a case is given back before the next.  A case that breaks the device, or does not end, ends the process; the next
case starts another.  So does one whose memory is not given back.
"""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

MARK = "RESULT "


class Failure(Exception):
    """A case that gave no time; the message says why."""


class Worker:
    """The process, as its parent sees it.

    Args:
        command: starts it; it runs ``serve``.
        environment: of the process.
        separate: a process for every request.
    """

    def __init__(self, command: list[str], environment: dict[str, str], separate: bool = False):
        self.command, self.environment, self.separate = command, environment, separate
        self.process: subprocess.Popen | None = None

    def ask(self, request: list, limit: float) -> dict:
        """The answer to a request; ``Failure`` if there is none within ``limit`` seconds, or it is an error."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self._answer(time.monotonic() + limit, limit)
        except (Failure, BrokenPipeError) as error:
            self.stop()
            raise (
                error if isinstance(error, Failure) else Failure("the process has ended")
            ) from None
        if self.separate or answer["last"]:
            self.stop()
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def _start(self) -> None:
        # read after the process has ended: it stays open
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(
            target=_forward, args=(self.process.stdout, self.lines), daemon=True
        ).start()

    def _answer(self, deadline: float, limit: float) -> dict:
        while True:
            try:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise Failure(f"not finished in {limit:.0f} s") from None
            if line is None:
                raise Failure(self._last_error())
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            print(line, end="", flush=True)  # what libraries say

    def _last_error(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        # libraries still warn after the error
        lines = self.errors.read().strip().splitlines() or ["?"]
        said = next(
            (line for line in reversed(lines) if re.search(r"(Error|error)\b", line)), lines[-1]
        )
        return f"the process has ended ({self.process.returncode}): {said}"

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.process = None


def _forward(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def serve(handle: Callable[[list], dict], release: Callable[[], bool]) -> None:
    """Answer requests, one per line of the standard input, until it ends.

    Args:
        handle: a request to its answer.
        release: gives back what the last case held; whether this process may take another.
    """
    for line in sys.stdin:
        answer = _handled(handle, json.loads(line))
        answer["last"] = not release()
        print(MARK + json.dumps(answer), flush=True)
        if answer["last"]:
            # nothing that a broken device is asked for at exit can succeed
            os._exit(1)


def _handled(handle: Callable[[list], dict], request: list) -> dict:
    """A function of its own: an exception holds the frames of the case, and so its tensors, until it is gone."""
    try:
        return handle(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
