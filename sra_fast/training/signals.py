"""Signals that end a run early: they are noted, the step ends, a checkpoint is written.

Schedulers send SIGTERM, or SIGUSR1 some time before, when they take a machine back. A closed
terminal sends SIGHUP, Ctrl-C SIGINT. A launcher that has ended counts as SIGTERM: nobody would stop
its processes any more.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import wait

from sra_fast.checkpoint.manifest import step_name
from sra_fast.utils.processes import LauncherWatch
from sra_fast.utils.stopping import INTERRUPTED

# exit code of a run that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h
STOPPED = 75
NOTED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# a reason beside the signals' numbers
LAUNCHER_GONE = 1000
# a launcher forwards the Ctrl-C that the terminal has already sent: two within these seconds are one
SAME_INTERRUPT = 1.0
# how long the main thread may need to notice a second Ctrl-C: it may wait for another process
INTERRUPT_GRACE = 5.0
# how long a run whose launcher is gone may need for its checkpoint: nobody would kill it
ORPHAN_GRACE = 600.0
# exit code of one that needs longer
TOO_LATE = 1
# how long a line may take: nobody may read it, and its pipe be full
LINE_GRACE = 2.0
LOOK_EVERY = 1.0


class Stopped(Exception):
    """A run that was asked to stop has ended as it should; the text is the line for the user."""


def reason(code: int) -> str:
    """The words for a ``StopSignals.code``."""
    if code == LAUNCHER_GONE:
        return "the end of its launcher"
    return signal.Signals(code).name


def stopped(code: int, step: int, saved: bool) -> Stopped:
    """What a run raises that has stopped for ``code``.

    Args:
        code: of ``StopSignals``, the largest of all ranks.
        step: optimizer steps of the loop.
        saved: whether the checkpoint of this step is whole; False before the first step.
    """
    first = f"stopped by {reason(code)} after step {step}"
    if not saved:
        return Stopped(f"{first}; there was nothing to save")
    return Stopped(
        f"{first}; checkpoint {step_name(step)} is whole; resume with --train.resume auto"
    )


class StopSignals:
    """Notes the signals that ask a run to stop, as long as the context is open.

    A signal that this process was told to ignore (``nohup``, a shell's background job) stays ignored.
    Handlers are only installed in the main thread, the only one in which Python runs them. A second
    SIGINT raises KeyboardInterrupt, and ends the process if its main thread does not get to that.

    Args:
        launchers: made as early as possible, before the slow imports: it notices only what ends after
            it was made. None: it is made here.

    Attributes:
        code: number of the first signal, or ``LAUNCHER_GONE``; 0 as long as nobody has asked.
    """

    def __init__(self, launchers: LauncherWatch | None = None):
        self.code = 0
        self._interrupted_at: float | None = None
        self._before: dict = {}
        self._launchers = LauncherWatch() if launchers is None else launchers

    @property
    def asked(self) -> str | None:
        """Why the run should stop, or None."""
        return reason(self.code) if self.code else None

    def check(self) -> None:
        """Raise ``Stopped`` if somebody has asked, before there is anything to save."""
        if self.code:
            raise stopped(self.code, step=0, saved=False)

    def __enter__(self) -> "StopSignals":
        if self._launchers.gone():
            self.code = LAUNCHER_GONE
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            for number in NOTED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            # the number also comes through a pipe, even while the main thread is in a library's call
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        for number, handler in self._before.items():
            # a handler that was not set from Python cannot be set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        # no signal has the number 0. closing would not do: loader processes hold copies of this end
        os.write(self._write, b"\0")
        self._watcher.join()
        os.close(self._write)
        os.close(self._read)

    def _note(self, number: int, frame) -> None:
        # runs between two instructions of the main thread: it assigns, and nothing else
        if number == signal.SIGINT:
            now = time.monotonic()
            first = self._interrupted_at
            if first is not None and now - first > SAME_INTERRUPT:
                raise KeyboardInterrupt
            if first is None:
                self._interrupted_at = now
        if not self.code:
            self.code = number

    def _watch(self) -> None:
        """Look for launchers that have ended, and end a process that Ctrl-C cannot reach."""
        interrupted_at = None
        end_at = None
        exit_code = 0
        while True:
            if wait([self._read], LOOK_EVERY):
                numbers = os.read(self._read, 64)
                if 0 in numbers:
                    return
                if signal.SIGINT in numbers:
                    now = time.monotonic()
                    interrupted_at = interrupted_at or now
                    # a third one does not put off the end
                    if now - interrupted_at > SAME_INTERRUPT and exit_code != INTERRUPTED:
                        end_at = now + INTERRUPT_GRACE
                        exit_code = INTERRUPTED
            if end_at is None and self._launchers.gone():
                self.code = self.code or LAUNCHER_GONE
                end_at = time.monotonic() + ORPHAN_GRACE
                exit_code = TOO_LATE
            if end_at is not None and time.monotonic() > end_at:
                if exit_code == TOO_LATE:
                    _say_in_time(
                        "error: the launcher has ended, and the run did not stop within "
                        f"{ORPHAN_GRACE:g} s; --train.resume auto resumes from the last whole "
                        "checkpoint"
                    )
                os._exit(exit_code)


def _say_in_time(line: str) -> None:
    """Print to stderr, and go on if that takes too long: the main thread may hold the stream."""
    speaker = threading.Thread(
        target=print, args=(line,), kwargs={"file": sys.stderr, "flush": True}, daemon=True
    )
    speaker.start()
    speaker.join(LINE_GRACE)
