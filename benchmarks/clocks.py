"""Clock, power and throttling of the GPU while something is measured: read from its driver, never set."""

import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
# bits of the last field that make a time unlike another run's (nvml.h: nvmlClocksEventReason*)
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
PERIOD_MS = 500


class Clocks:
    """Readings of ``nvidia-smi`` every half second, from the beginning on, in memory and in a file.

    Without a driver there are none.

    Args:
        path: a CSV file that gets every reading as it comes, or None.
        command: what prints one line of ``FIELDS`` per reading.
    """

    def __init__(self, path: Path | None = None, command: Iterable[str] | None = None):
        self.readings: list[tuple[float, list[str]]] = []
        self.path = path
        query = [
            "nvidia-smi",
            f"--query-gpu={','.join(FIELDS)}",
            "--format=csv,noheader,nounits",
            f"-lms={PERIOD_MS}",
        ]
        try:
            self.process = subprocess.Popen(
                list(command or query), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self.process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        if self.path is not None:
            self.path.write_text(f"seconds,{','.join(FIELDS)}\n")
        for line in self.process.stdout:
            words = [word.strip() for word in line.split(",")]
            if len(words) != len(FIELDS):
                continue  # a message, not a reading
            now = time.time()
            self.readings.append((now, words))
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write(f"{now:.1f},{','.join(words)}\n")

    def between(self, begin: float, end: float) -> dict:
        """Of the readings from ``begin`` to ``end`` (seconds of ``time.time``): the median clock in MHz and power in W, and what
        held the clock back.  Empty if nothing was read; a single measurement may lie between two readings, so that half a
        period on either side counts."""
        slack = PERIOD_MS / 2e3
        inside = [words for at, words in list(self.readings) if begin - slack <= at <= end + slack]
        found = {}
        for name, column in (("sm_mhz", 0), ("watts", 2)):
            numbers = [float(words[column]) for words in inside if _is_number(words[column])]
            if numbers:
                found[name] = statistics.median(numbers)
        active = [int(words[4], 16) for words in inside if words[4].startswith("0x")]
        # at most of the readings: the first and the last one may belong to what was before or came after
        held = [
            name
            for bit, name in REASONS.items()
            if 2 * sum(bits & bit > 0 for bits in active) > len(active)
        ]
        return {**found, "throttled": ", ".join(held)} if held else found

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
