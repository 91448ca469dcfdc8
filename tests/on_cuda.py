"""Hooks of pytest for a run of tests on a GPU.

The test whose kernel breaks CUDA is named and takes no other test with it. Long tests start first,
memory is released after every test, and what tests have measured is printed.
"""

import gc
import itertools
import os
import sys

import pytest
import torch

# unused device memory that a process may keep (1 GiB), because many processes share the device
KEPT = 2**30


def synchronize() -> None:
    """Wait for the device, if this process has used it. Raises what the device reports."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        # after a failed graph capture every random number fails
        state = torch.cuda.get_rng_state()
        torch.rand(1, device="cuda")
        torch.cuda.set_rng_state(state)


def cuda_error() -> str | None:
    """What the device reports when everything that was launched has ended; None without an error.

    CUDA reports an error in a kernel at some later call, and from then on at every call of this
    process.
    """
    try:
        synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Wait for the device within the test, so that a kernel's error fails the test that launched
    it.
    """
    try:
        return (yield)
    finally:
        if error := cuda_error():
            # without "from", what the test itself raised stays in the report
            raise RuntimeError(f"{error} (what the device reports after this test)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After a test and its reports: end a process in which CUDA is broken, else release memory."""
    result = yield
    if error := cuda_error():
        end_process(item, f"{item.nodeid} leaves a process that cannot use CUDA any more: {error}")
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        gc.collect()
        torch.cuda.empty_cache()
    return result


def end_process(item, reason: str) -> None:
    """End a worker of xdist at once, and xdist names its test and starts another. Otherwise end the
    session.
    """
    if not hasattr(item.config, "workerinput"):
        pytest.exit(reason, returncode=1)
    print(f"\n{reason}", file=sys.__stderr__, flush=True)
    os._exit(1)


def seconds(item) -> float:
    """About how long a test takes, if its mark says so; else 0."""
    mark = item.get_closest_marker("long")
    return mark.args[0] if mark else 0.0


def long_ones_first(items: list) -> list:
    """The longest first, each followed by a short one: xdist gives every worker two neighbours to
    start with.
    """
    longest = sorted(filter(seconds, items), key=seconds, reverse=True)
    others = [item for item in items if not seconds(item)]
    pairs = itertools.zip_longest(longest, others[: len(longest)])
    return [item for pair in pairs for item in pair if item is not None] + others[len(longest) :]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        items[:] = long_ones_first(items)


def pytest_terminal_summary(terminalreporter):
    """Print what tests have recorded (`record_property`), whether they passed or not."""
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            # setup and teardown repeat the properties
            if report.when == "call":
                for name, value in report.user_properties:
                    lines.append(f"{report.nodeid}: {name} {value}")
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(sorted(lines)))
