"""Timing counts what it should, and the fields of a row say where it was measured."""

import weakref

import pytest
import torch

from benchmarks import record, timing


class FakeEvent:
    """An event on a device that runs everything at once; ``now`` is its clock in milliseconds."""

    now = 0.0
    # whether the device begins before a round is queued
    early = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return FakeEvent.early

    def elapsed_time(self, other):
        return other.at - self.at


def test_device_times_count_only_what_is_timed(monkeypatch):
    log = []

    def set_up(x):
        FakeEvent.now += 100.0
        return [x]

    def timed(state):
        # fails if a state is used twice, as a graph that has been freed would
        log.append(state.pop())
        FakeEvent.now += 3.0
        return object()

    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert timing.milliseconds([0, 1, 2], set_up, timed, "cuda", 0.0) == 3.0
    # nine warm-up calls, a round for the host's time, then at least three rounds over the sets in turn
    rounds = log[9:]
    assert len(rounds) >= 3 + 3 * 3
    assert rounds == [0, 1, 2] * (len(rounds) // 3)


def test_no_repetition_reuses_the_memory_of_the_last_ones(monkeypatch):
    """Outputs that are freed at once get the same addresses again, which L2 still holds."""
    made = []
    kept = []

    class Output:
        pass

    def timed(state):
        kept.append(sum(output() is not None for output in made[-3:]))
        output = Output()
        made.append(weakref.ref(output))
        FakeEvent.now += 3.0
        return output

    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    timing.milliseconds([0, 1, 2], lambda x: x, timed, "cuda", 0.0)
    # after nine warm-up calls and a round that fills up what is kept
    counts = kept[12:]
    assert len(counts) >= 3 * 3
    assert set(counts) == {3}


def test_ceilings_count_what_is_moved_and_multiplied(monkeypatch):
    outputs = []

    def four_milliseconds(sets, set_up, timed, device, budget_s):
        outputs.append(timed(set_up(sets[0])))
        return 4.0

    monkeypatch.setattr(timing, "milliseconds", four_milliseconds)
    copy_ms, gbps = timing.copy_bandwidth("cpu")
    matmul_ms, tflops = timing.matmul_rate("cpu", torch.float32)
    target, product = outputs
    assert copy_ms == matmul_ms == 4.0
    # every byte is read and written
    assert gbps == pytest.approx(2 * target.nbytes / 4e-3 / 1e9)
    n = product.shape[0]
    assert product.shape == (n, n)
    # n^2 sums of n products
    assert tflops == pytest.approx(2 * n**3 / 4e-3 / 1e12)


def test_a_round_that_waited_for_the_host_does_not_count(monkeypatch):
    sleeps = []

    def timed(state):
        # the host needs longer than it did before the device's sleep was chosen
        FakeEvent.now += 9.0 if FakeEvent.early else 3.0

    def sleep(cycles):
        sleeps.append(cycles)
        FakeEvent.early = len(sleeps) in (1, 3)

    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "early", False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    assert timing.milliseconds([0], lambda x: x, timed, "cuda", 0.0) == 3.0
    first = sleeps[0]
    assert sleeps == [first, 2 * first, 2 * first, 4 * first, 4 * first]
    # a host that is slower than the longest sleep is measured all the same
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(FakeEvent, "early", True))
    assert timing.milliseconds([0], lambda x: x, timed, "cuda", 0.0) == 9.0


def test_sets_are_larger_than_l2(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def sets(mib: int) -> int:
        tensor = torch.empty(mib << 20, dtype=torch.uint8, device="meta")
        return timing.num_sets((tensor,), "cuda")

    assert sets(801) == 1
    assert sets(800) == 3
    assert sets(50) == 4
    assert sets(1) == 48


def test_commands_name_no_folder_of_a_machine():
    command = (
        f"python -m benchmarks.gpu_suite second --out {record.ROOT}/benchmarks/results "
        "--published /home/me/SRA --budget 0.1"
    )
    expected = "python -m benchmarks.gpu_suite second --out benchmarks/results --published SRA --budget 0.1"
    assert record.environment("cpu", command)["command"] == expected


def test_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SRA_FAST_COMMIT", raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv("SRA_FAST_COMMIT", "0123abc")
    assert record.commit() == "0123abc"
