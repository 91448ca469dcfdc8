"""Clock, power and throttling of a span of time, from the driver's lines."""

import sys
import time

from benchmarks.step.gpu_clocks import FIELDS, Clocks

LINES = [
    "1980, 2619, 610.5, 55, 0x0000000000000000",
    "[N/A], 2619, [N/A], 55, 0x0000000000000004",
    "no device",
    "1410, 2619, 690.5, 60, 0x24",
]


def test_clock_power_and_throttling_of_a_time(tmp_path):
    text = "\n".join(LINES)
    clocks = Clocks(tmp_path / "clocks.csv", [sys.executable, "-c", f"print({text!r})"])
    clocks.process.wait()
    deadline = time.monotonic() + 30
    while len(clocks.readings) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    first, _ = clocks.readings[0]
    # two of three readings hold the bit of the power cap, only one that of the temperature
    assert clocks.between(first, first + 5) == {
        "sm_mhz": 1695.0,
        "watts": 650.5,
        "throttled": "power cap",
    }
    assert clocks.between(first + 60, first + 70) == {}
    lines = (tmp_path / "clocks.csv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0] == "seconds," + ",".join(FIELDS)
    assert lines[1].endswith(",1980,2619,610.5,55,0x0000000000000000")
    clocks.stop()


def test_without_a_driver_nothing_is_read():
    clocks = Clocks(command=["no-such-program"])
    assert clocks.between(0, 1e12) == {}
    clocks.stop()
