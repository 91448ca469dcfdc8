"""A test that breaks CUDA is named and ends its process, and long tests start first. Needs no
GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from on_cuda import long_ones_first

# stands for a device on which every call fails after a kernel has read past its tensors
CONFTEST = """
import sys
from types import ModuleType

import pytest

broken = []


def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand what to do about it")


torch = sys.modules["torch"] = ModuleType("torch")
torch.cuda = ModuleType("cuda")
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.memory_reserved = lambda: 0
torch.cuda.synchronize = synchronize
torch.cuda.get_rng_state = torch.cuda.set_rng_state = torch.rand = lambda *args, **options: None
from on_cuda import *


@pytest.fixture
def breaks():
    yield
    broken.append(True)
"""
TESTS = """
from conftest import broken


def test_before(record_property):
    record_property("largest error", "1.0e-03")


def test_kernel():
    broken.append(True)
    assert 1 == 2, "by its own numbers"


def test_after():
    assert not broken


def test_late(breaks):
    assert not broken
"""
KERNEL = "test_it.py::test_kernel"
CAUSE = "CUDA error: an illegal memory access was encountered"
FAILED = f"FAILED {KERNEL} - RuntimeError: {CAUSE} (what the device reports after this test)"


def session(folder, *options):
    """What pytest prints about the tests above, and its exit status."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environ |= {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "200"}
    words = "-m pytest -v -p no:cacheprovider".split()
    command = [sys.executable, *words, *options, "test_it.py"]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr, done.returncode


def test_a_broken_device_ends_the_session_and_is_named(tmp_path):
    said, status = session(tmp_path)
    assert status == 1
    assert FAILED in said
    assert "by its own numbers" in said, "what the test itself found stays in its report"
    assert f"{KERNEL} leaves a process that cannot use CUDA any more: {CAUSE}" in said
    assert "test_after" not in said
    assert "test_before: largest error 1.0e-03" in said


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist")
def test_a_broken_device_ends_one_worker_and_the_others_tests_run(tmp_path):
    said, status = session(tmp_path, "-n", "1", "--dist", "load", "--maxschedchunk", "1")
    assert status == 1
    assert FAILED in said
    assert f"crashed while running '{KERNEL}'" in said
    assert "PASSED test_it.py::test_after" in said
    # a fixture breaks the device after this test has passed: no report holds the cause, but the
    # worker prints it
    assert "PASSED test_it.py::test_late" in said
    assert "crashed while running 'test_it.py::test_late'" in said
    assert f"test_late leaves a process that cannot use CUDA any more: {CAUSE}" in said
    assert said.count("replacing crashed worker") == 2
    assert "test_before: largest error 1.0e-03" in said


def test_long_ones_start_first_each_with_a_short_one():
    def item(name, *seconds):
        mark = SimpleNamespace(args=seconds) if seconds else None
        return SimpleNamespace(name=name, get_closest_marker=lambda kind: mark)

    items = [item("a"), item("b", 10), item("c"), item("d", 30), item("e"), item("f")]
    assert [i.name for i in long_ones_first(items)] == ["d", "a", "b", "c", "e", "f"]
    assert [i.name for i in long_ones_first([items[1], items[3], items[0]])] == ["d", "a", "b"]
