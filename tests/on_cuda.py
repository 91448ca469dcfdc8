"""What a run of tests on a GPU needs, as hooks of pytest.

A kernel that breaks CUDA is named and takes no other test with it, long tests begin first, memory
goes back, and what tests have measured is printed.
"""

import gc
import itertools
import os
import sys

import pytest
import torch

# unused memory that a process may keep: many processes share the device
KEPT = 2**30


def synchronize() -> None:
    """Wait for the device, where this process has used one; after a capture that has failed random numbers fail for ever."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        state = torch.cuda.get_rng_state()
        torch.rand(1, device="cuda")
        torch.cuda.set_rng_state(state)


def cuda_error() -> str | None:
    """What the device reports once everything that was launched has ended.

    An error in a kernel is reported by a later call, whatever that is for, and then by every call of this process.
    """
    try:
        synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The test that launched a kernel is the one that fails by it."""
    try:
        return (yield)
    finally:
        if error := cuda_error():
            # not "from": what the test itself raised stays in the report
            raise RuntimeError(f"{error} (what the device reports after this test)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After a test and its reports: nothing more can run in a process in which CUDA is broken."""
    result = yield
    if error := cuda_error():
        end_process(item, f"{item.nodeid} leaves a process that cannot use CUDA any more: {error}")
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        gc.collect()
        torch.cuda.empty_cache()
    return result


def end_process(item, reason: str) -> None:
    """A worker of xdist ends at once: xdist names its test and starts another.  Else the session ends."""
    if not hasattr(item.config, "workerinput"):
        pytest.exit(reason, returncode=1)
    print(f"\n{reason}", file=sys.__stderr__, flush=True)
    os._exit(1)


def seconds(item) -> float:
    """About how long a test takes, where its mark says so."""
    mark = item.get_closest_marker("long")
    return mark.args[0] if mark else 0.0


def long_ones_first(items: list) -> list:
    """The longest first, each with a short one after it: xdist begins with two neighbours per worker."""
    longest = sorted(filter(seconds, items), key=seconds, reverse=True)
    others = [item for item in items if not seconds(item)]
    pairs = itertools.zip_longest(longest, others[: len(longest)])
    return [item for pair in pairs for item in pair if item is not None] + others[len(longest) :]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        items[:] = long_ones_first(items)


def pytest_terminal_summary(terminalreporter):
    """What tests have recorded (`record_property`), whether they passed or not."""
    stats = terminalreporter.stats
    reports = [r for key in ("passed", "failed") for r in stats.get(key, ()) if r.when == "call"]
    lines = [f"{r.nodeid}: {name} {value}" for r in reports for name, value in r.user_properties]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(sorted(lines)))
