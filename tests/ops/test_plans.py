"""Tables of addresses: how long they live, and what a CUDA graph may capture."""

import weakref

import pytest
import torch
from sra_fast.kernels._plans import MAX_PLANS, Plans

from sra_fast.kernels import _plans
from sra_fast.kernels import adamw_ema as adamw_kernels
from sra_fast.kernels import ema_update as ema_kernels
from sra_fast.ops import adamw_ema_, ema_update_


@pytest.fixture(autouse=True)
def nothing_captured(monkeypatch):
    monkeypatch.setattr(_plans, "_captured", {})


@pytest.fixture
def capture(monkeypatch):
    """A function that calls another one as if a CUDA graph captured it."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(_plans, "is_capturing", lambda: True)
            function()

    return call


def ema_call(numel, device):
    """A call of the operator on tensors of its own."""
    ema = [torch.zeros(numel, device=device)]
    params = [torch.ones(numel, device=device)]
    return lambda: ema_update_(ema, params, 0.5, backend="triton")


def adamw_call(numel, device):
    """The same, with a gradient in two pieces."""
    buffers = [torch.zeros(numel, device=device) for _ in range(3)]
    halves = [torch.ones(numel // 2, device=device) for _ in range(2)]
    pieces = [(0, halves[0]), (numel // 2, halves[1])]
    return lambda: adamw_ema_(
        buffers[0], pieces, buffers[1], buffers[2], 1, lr=0.1, backend="triton"
    )


CALLS = {"ema_update_": (ema_call, ema_kernels), "adamw_ema_": (adamw_call, adamw_kernels)}


@pytest.fixture
def tables(monkeypatch):
    """Weak references to the tables that launches have read, in order."""
    seen = []
    whole = _plans.mark_in_use

    def mark(*read):
        seen.extend(map(weakref.ref, read))
        whole(*read)

    for _, kernels in CALLS.values():
        monkeypatch.setattr(kernels, "mark_in_use", mark)
    return seen


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("captured", [True, False])
def test_a_table_outlives_its_plan_if_a_graph_has_captured_it(
    name, captured, capture, tables, device
):
    make, _ = CALLS[name]
    call = make(64, device)
    call()
    if captured:
        capture(call)
        # each table is kept once, however often it is captured
        kept = list(_plans._captured)
        capture(call)
        assert list(_plans._captured) == kept
    count = len(tables)
    for i in range(1, MAX_PLANS + 1):
        make(64 + 64 * i, device)()
    alive = [table() is not None for table in tables[:count]]
    assert alive == [captured] * count


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_does_not_capture_what_is_new(name, capture, device):
    """A table would be copied from the host, whose memory a replay would read."""
    make, _ = CALLS[name]
    call = make(64, device)
    message = f"^{name}: call it once on these tensors before a CUDA graph captures it$"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            capture(call)
    call()
    capture(call)
    # not what has been evicted either
    for i in range(1, MAX_PLANS + 1):
        make(64 + 64 * i, device)()
    with pytest.raises(RuntimeError, match=message):
        capture(call)


def test_a_graph_captures_the_reference(capture, device):
    """It has no tables."""
    ema = [torch.zeros(5, device=device)]
    capture(lambda: ema_update_(ema, [torch.ones(5, device=device)], 0.5, backend="torch"))
    assert (ema[0] == 0.5).all()
    assert not _plans._captured


def test_the_plan_that_was_not_used_for_longest_goes():
    plans = Plans()
    made = []

    def get(key):
        return plans.get(key, lambda: made.append(key) or f"plan of {key}")

    for key in range(MAX_PLANS):
        assert get(key) == f"plan of {key}"
    get(0)
    get(MAX_PLANS)
    # 1 has gone, all others are there
    others = [0, *range(2, MAX_PLANS + 1)]
    assert [get(key) for key in others] == [f"plan of {key}" for key in others]
    assert made == list(range(MAX_PLANS + 1))
    get(1)
    assert made[-1] == 1 and len(plans.held) == MAX_PLANS


def test_a_plan_that_could_not_be_made_is_not_held():
    plans = Plans()
    with pytest.raises(ZeroDivisionError):
        plans.get("key", lambda: 1 / 0)
    assert plans.get("key", lambda: "plan") == "plan"


def test_a_key_tells_lists_apart():
    """Every property of a tensor that the kernels or the checks depend on, and the lists' ends."""
    x = torch.zeros(16)
    keys = [
        _plans.key_of([x], [x]),
        _plans.key_of([x, x], []),
        _plans.key_of([x[1:]], [x]),
        _plans.key_of([x.view(4, 4)], [x]),
        _plans.key_of([x.view(4, 4).t()], [x]),
        _plans.key_of([x.view(torch.int32)], [x]),
        _plans.key_of([x[:8]], [x]),
    ]
    assert all(a != b for i, a in enumerate(keys) for b in keys[i + 1 :])
    assert _plans.key_of([x.view(4, 4)], [x]) == _plans.key_of([x.view(4, 4)], [x[:]])
    for bad in (torch.zeros(2).to_sparse(), torch.nested.nested_tensor([x])):
        with pytest.raises(RuntimeError):
            _plans.key_of([bad], [x])
