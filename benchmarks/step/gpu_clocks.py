"""Clock, power and throttling of the GPU during a measurement. They are read from the driver, never set."""

import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.timing import nvidia_smi

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
SM_CLOCK = FIELDS.index("clocks.sm")
POWER = FIELDS.index("power.draw")
REASONS_ACTIVE = FIELDS.index("clocks_event_reasons.active")

# bits of the last field that explain a slow run (nvml.h, nvmlClocksEventReason*)
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
PERIOD_MS = 500


class Clocks:
    """Readings of ``nvidia-smi`` every half second, in memory and in a file. Without a driver there are none.

    Only the GPU that this process uses is read. On a machine with several, the clocks of idle GPUs
    would otherwise enter the medians.

    Args:
        path: a CSV file that gets every reading, or None.
        command: prints a line of ``FIELDS`` per reading; None for nvidia-smi.
    """

    def __init__(self, path: Path | None = None, command: Iterable[str] | None = None):
        self.readings: list[tuple[float, list[str]]] = []
        self.path = path
        if command is None:
            command = [
                *nvidia_smi(),
                f"--query-gpu={','.join(FIELDS)}",
                "--format=csv,noheader,nounits",
                f"-lms={PERIOD_MS}",
            ]
        try:
            self.process = subprocess.Popen(
                list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
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
            # a message of the driver is not a reading
            if len(words) != len(FIELDS):
                continue
            now = time.time()
            self.readings.append((now, words))
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write(f"{now:.1f},{','.join(words)}\n")

    def between(self, begin: float, end: float) -> dict:
        """What the GPU did from ``begin`` to ``end`` (seconds of ``time.time``).

        Returns:
            Median ``sm_mhz`` and ``watts``, and ``throttled`` with the reasons that held in more than half of
            the readings. Fields without a reading are left out.
        """
        # half a period on either side: a short measurement may lie between two readings
        slack = PERIOD_MS / 2e3
        inside = [words for at, words in list(self.readings) if begin - slack <= at <= end + slack]
        found = {}
        for name, column in (("sm_mhz", SM_CLOCK), ("watts", POWER)):
            numbers = [float(words[column]) for words in inside if _is_number(words[column])]
            if numbers:
                found[name] = statistics.median(numbers)

        masks = [words[REASONS_ACTIVE] for words in inside]
        active = [int(mask, 16) for mask in masks if mask.startswith("0x")]
        # a majority: the first and the last reading may belong to what ran before or after
        reasons = []
        for bit, reason in REASONS.items():
            if 2 * sum(bits & bit > 0 for bits in active) > len(active):
                reasons.append(reason)
        if reasons:
            found["throttled"] = ", ".join(reasons)
        return found

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
