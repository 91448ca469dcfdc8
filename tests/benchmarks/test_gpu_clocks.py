"""Clock, power and throttling of a span of time, from the driver's lines."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.operators.run import driver_clocks
from benchmarks.step.gpu_clocks import FIELDS, Clocks
from benchmarks.timing import nvidia_smi

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


def put_driver(folder: Path, monkeypatch, script: str) -> None:
    """Let a shell script be the machine's nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def use_gpu(monkeypatch, index: int, **properties) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: index)
    found = {index: SimpleNamespace(**properties)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)


# one busy card; without -i an idle one is reported, too, and more often
TWO_CARDS = """
echo "1770, 2619, 689.2, 60, 0x0000000000000004"
case "$*" in *"-i GPU-5c1d-22 "*) exit;; esac
echo "345, 2619, 71.3, 30, 0x0000000000000001"
echo "345, 2619, 71.3, 30, 0x0000000000000001"
"""


def test_only_the_card_in_use_is_read(tmp_path, monkeypatch):
    put_driver(tmp_path, monkeypatch, TWO_CARDS)
    use_gpu(monkeypatch, 1, uuid="5c1d-22")
    clocks = Clocks()
    clocks.process.wait()
    deadline = time.monotonic() + 30
    while not clocks.readings and time.monotonic() < deadline:
        time.sleep(0.01)
    # time for the lines of the other card, if there were any
    time.sleep(0.1)
    assert [words[0] for _, words in clocks.readings] == ["1770"]
    clocks.stop()
    assert driver_clocks() == "1770, 2619, 689.2, 60, 0x0000000000000004"


@pytest.mark.parametrize(
    "properties, visible, expected",
    [
        ({"uuid": "5c1d-22"}, "3", ["-i", "GPU-5c1d-22"]),
        ({"uuid": "GPU-5c1d-22"}, None, ["-i", "GPU-5c1d-22"]),
        ({}, None, ["-i", "1"]),
        # torch's number is not the driver's
        ({}, "2,3", []),
    ],
)
def test_how_the_driver_is_asked_for_a_card(properties, visible, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    use_gpu(monkeypatch, 1, **properties)
    assert nvidia_smi() == ["nvidia-smi", *expected]


def test_a_driver_that_does_not_answer_ends_no_run(tmp_path, monkeypatch):
    put_driver(tmp_path, monkeypatch, "exec sleep 60")
    begin = time.monotonic()
    assert driver_clocks() == "unknown"
    assert time.monotonic() - begin < 15
