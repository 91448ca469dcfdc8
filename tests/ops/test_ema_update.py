"""The moving average of many tensors: kernel, copies, layouts, plans, the choice of a backend."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, assert_kernel_close
from rows import OpLog
from sra_fast.kernels._plans import MAX_PLANS
from torch._subclasses.fake_tensor import FakeTensorMode

from sra_fast.kernels import ema_update as kernels
from sra_fast.ops.ema_update import _choose, _op, ema_update_, ema_update_ref_

# a whole chunk; chunks and a ragged end; a scalar; nothing; fewer than 16; a 1152-wide bias
SHAPES = [(4096,), (3, 2999), (), (0, 4), (5,), (1152,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the operator and its file have one name
module = sys.modules[ema_update_.__module__]


def make(dtypes, device, shapes=SHAPES):
    torch.manual_seed(0)
    ema = [torch.randn(s, device=device) for s in shapes]
    params = [
        torch.randn(s, device=device).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)
    ]
    return ema, params


def check(ema, params, decay, copies=None):
    """Two updates of the kernel against fp64, with torch.lerp in fp32 as the yardstick.

    Copies are the rounded EMA.
    """
    truth = [e.double() for e in ema]
    same = [e.clone() for e in ema]
    for _ in range(2):
        ema_update_ref_(truth, [p.double() for p in params], decay)
        ema_update_ref_(same, params, decay)
        ema_update_(ema, params, decay, copies, backend="triton")
    for e, s, t in zip(ema, same, truth, strict=True):
        if e.numel():
            assert_kernel_close(e.double(), s.double(), t, floor=1e-7)
    for c, e in zip(copies or [], ema if copies else [], strict=True):
        # the interpreter truncates to bf16, a GPU rounds
        unit = 2**-7 if c.dtype == torch.bfloat16 else 2**-11
        torch.testing.assert_close(c.float(), e, rtol=unit, atol=1e-7)


@pytest.mark.parametrize("decay", [0.9999, 0.3])
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[1:2]], ids=["mixed", "bf16"])
def test_update(dtypes, decay, device):
    check(*make(dtypes, device), decay)


def on_device(decay, device):
    return torch.tensor(decay, dtype=torch.float64, device=device)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("decay", [0.9999, 0.3, 0.0])
def test_a_decay_on_the_device_gives_the_same_bits(decay, backend, device):
    ema, params = make(DTYPES, device)
    copies = [torch.full_like(e, float("nan"), dtype=torch.bfloat16) for e in ema]
    same = [e.clone() for e in ema]
    same_copies = [c.clone() for c in copies]
    ema_update_(ema, params, on_device(decay, device), copies, backend=backend)
    ema_update_(same, params, decay, same_copies, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ema + copies, same + same_copies, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_with_decay_1_on_the_device_nothing_moves(backend, device):
    """Whatever the parameters, and the copies, which need not be the rounded average."""
    ema, params = make(DTYPES, device)
    for p in params:
        p.fill_(float("nan"))
    ema[0][:7] = -0.0
    copies = [torch.full_like(e, 7.0, dtype=torch.bfloat16) for e in ema]
    before = [x.clone().view(-1).view(torch.uint8) for x in ema + copies]
    one = on_device(1.0, device)
    # fp64 and another order in memory go to the reference
    ema_update_(ema, params, one, copies, backend=backend)
    assert all(
        torch.equal(x.view(-1).view(torch.uint8), old)
        for x, old in zip(ema + copies, before, strict=True)
    )
    for e in (torch.ones(3, 4, device=device).t(), torch.ones(5, device=device).double()):
        p = torch.full(e.shape, float("nan"), device=device)
        ema_update_([e], [p], one, backend=backend)
        assert (e == 1).all()


@pytest.mark.parametrize("copy_dtype", DTYPES[1:], ids=str)
def test_copies(copy_dtype, device):
    ema, params = make(DTYPES, device)
    copies = [torch.full_like(e, float("nan"), dtype=copy_dtype) for e in ema]
    check(ema, params, 0.75, copies)


def test_neighbours_stay_untouched(device):
    """Slices of one buffer, aligned and not: nothing outside them is read or written."""
    for offset, numel in ((16, 100), (1, 4096), (3, 17), (16, 4112)):
        buffers = [torch.full((offset + numel + 8,), 7.0, device=device) for _ in range(3)]
        buffers[2] = buffers[2].bfloat16()
        ema, p, copy = (b[offset : offset + numel] for b in buffers)
        p.copy_(torch.randn(numel))
        check([ema], [p], 0.5, [copy])
        for b in buffers:
            assert (b[:offset] == 7).all() and (b[offset + numel :] == 7).all()


def test_the_ends_are_exact(device):
    """decay 0 copies the parameters and decay 1 keeps the average, bit for bit."""
    ema, params = make([torch.float32], device, [(300,), (4096,)])
    before = [e.clone() for e in ema]
    ema_update_(ema, params, 1.0, backend="triton")
    assert all(map(torch.equal, ema, before))
    ema_update_(ema, params, 0.0, backend="triton")
    assert all(map(torch.equal, ema, params))


def test_layouts(device, caplog):
    """One common dense order is used in place.

    Different orders and gaps go through the reference, which is logged once.
    """
    torch.manual_seed(0)
    ema = [torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)]
    ema += [torch.randn(6, 4, device=device), torch.randn(4, 6, device=device).t()]
    ema += [torch.randn(9, 8, device=device)[:, ::2]]
    params = [
        torch.randn_like(ema[0]),
        torch.randn(4, 6, device=device).t(),
        torch.randn(6, 4, device=device),
    ]
    params += [torch.randn(9, 4, device=device)]
    check(ema[:1], params[:1], 0.9)
    assert not caplog.records
    check(ema, params, 0.9)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "3 of 4 tensors run unfused" in said


def test_another_set_of_tensors_at_the_same_address(device):
    """A plan belongs to a set of tensors: views of one storage with another length or dtype are
    another set.
    """
    # pairs of bf16 numbers are fp32 numbers, of any size but finite
    ema = torch.randn(200, device=device)
    storage = torch.randn(400, device=device).bfloat16().view(torch.float32)
    for view in (storage[:50], storage, storage.view(torch.bfloat16)[:200]):
        check([ema[: view.numel()]], [view], 0.9)
    for i in range(MAX_PLANS + 2):
        ema_update_([storage[i:]], [torch.ones(200 - i, device=device)], 0.9, backend="triton")
    assert len(module._known.held) <= MAX_PLANS


def test_promises_to_the_compiler_hold(device):
    """Addresses and counts of a wide launch are multiples of 16, as it promises; every other
    element is covered once elsewhere.
    """
    buffer = torch.zeros(20000, device=device)
    numels = [16, 4096, 4103, 5, 9000]
    starts = [0, 32, 4200, 8401, 10000]
    ema = [buffer[i : i + n] for i, n in zip(starts, numels, strict=True)]
    params = [torch.zeros(n, dtype=torch.bfloat16, device=device) for n in numels]
    plan = kernels.plan(ema, params, [])
    wide = torch.cat([table for table, _, vector in plan if vector])
    assert (
        (wide[:, :2] % 16 == 0).all()
        and (wide[:, 3] % 16 == 0).all()
        and (wide[:, 3] <= kernels.CHUNK).all()
    )
    covered = sorted((line[0].item(), line[3].item()) for table, _, _ in plan for line in table)
    flat = [
        a // 4 + i
        for a, count in ((a - buffer.data_ptr(), n) for a, n in covered)
        for i in range(count)
    ]
    assert flat == [i + k for i, n in zip(starts, numels, strict=True) for k in range(n)]


def test_addresses_beyond_32_bits(device):
    """Table lines past 2^31 elements; nothing is read, so no memory is needed."""
    tensor = torch.zeros(1, device=device)
    lines = kernels._lines((tensor, tensor.bfloat16()), 2**31 + 16, 2**31 + 16 + kernels.CHUNK + 5)
    assert (lines[:, 0] - tensor.data_ptr()).tolist() == [
        4 * (2**31 + 16),
        4 * (2**31 + 16 + kernels.CHUNK),
    ]
    assert (lines[1, 1] - lines[0, 1]).item() == 2 * kernels.CHUNK
    assert lines[:, 2].tolist() == [0, 0] and lines[:, 3].tolist() == [kernels.CHUNK, 5]


def test_fp64_goes_to_the_reference(device):
    ema = torch.randn(9, device=device).double()
    p = torch.randn(9, device=device).double()
    expected = 0.9 * ema + 0.1 * p
    ema_update_([ema], [p], 0.9, backend="triton")
    torch.testing.assert_close(ema, expected, rtol=1e-14, atol=1e-14)


def test_parameters_that_require_grad(device):
    """The usual call: a model's parameters, outside any graph."""
    model = torch.nn.Linear(7, 5).to(device)
    teacher = torch.nn.Linear(7, 5).to(device)
    expected = [
        e.detach() + 0.1 * (p.detach() - e.detach())
        for e, p in zip(teacher.parameters(), model.parameters(), strict=True)
    ]
    version = teacher.weight._version
    ema_update_(teacher.parameters(), model.parameters(), 0.9, backend="triton")
    for e, x in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(e.detach(), x)
    assert teacher.weight._version > version and teacher.weight.is_leaf


def test_operator_registration_and_compile(device):
    ema, params = make([torch.bfloat16], device, [(40,), (5, 3)])
    copies = [torch.zeros_like(e, dtype=torch.bfloat16) for e in ema]
    on_device = torch.tensor(0.9, dtype=torch.float64, device=device)
    for given, decay in ((([]), None), (copies, None), (copies, on_device)):
        torch.library.opcheck(_op, (ema, params, given, 0.9, False, decay))
    same = [e.clone() for e in ema]
    fn = torch.compile(
        lambda e, p: ema_update_(e, p, 0.9, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    fn(ema, params)
    ema_update_ref_(same, params, 0.9)
    for e, s in zip(ema, same, strict=True):
        torch.testing.assert_close(e, s)


def test_rejects_bad_input(device):
    ema, params = make([torch.float32], device, [(4,), (5,)])
    for bad, match in (
        ((ema, params[:1], 0.9), "as many params"),
        ((ema, params, 0.9, ema[:1]), "as many params"),
        ((ema, params[::-1], 0.9), "one shape"),
        ((ema, [p.to("meta") for p in params], 0.9), "one shape on"),
        (([e.bfloat16() for e in ema], params, 0.9), "expected ema fp32"),
        ((ema, [p.long() for p in params], 0.9), "expected ema fp32.* params .*int64.* at index 0"),
        (
            (ema, [p.to(torch.float8_e4m3fn) for p in params], 0.9),
            "expected ema fp32.* params .*float8_e4m3fn",
        ),
        ((ema, params, 0.9, [e.clone() for e in ema]), "copies bf16 or fp16"),
        ((ema, params, 1.5), r"decay in \[0, 1\], got 1.5"),
        ((ema, params, torch.ones((), device=device)), r"one number, fp64, on .* got .*float32"),
        (
            (ema, params, torch.ones(2, device=device).double()),
            r"one number, fp64, on .* got \[2\]",
        ),
        ((ema, params, on_device(0.9, "meta")), "one number, fp64, on .* got .*meta"),
    ):
        with pytest.raises(ValueError, match=match):
            ema_update_(*bad)
    ema_update_([], [], 0.9)
    with pytest.raises(ValueError, match="decay as a number with backend='cuda', got a tensor"):
        ema_update_(ema, params, on_device(0.9, device), backend="cuda")


@pytest.mark.parametrize(
    "built, asked, choice, level",
    [
        (True, "1", "cuda", "INFO"),
        (False, "0", "triton", "INFO"),
        (False, "1", "triton", "WARNING"),
    ],
)
def test_the_choice_on_a_gpu_is_said_once(built, asked, choice, level, monkeypatch, caplog):
    monkeypatch.setattr(module, "use_triton", lambda operator, x, backend: True)
    monkeypatch.setattr(module, "_ema_cuda", object() if built else None)
    monkeypatch.setenv("SRA_FAST_BUILD_EXT", asked)
    caplog.set_level(logging.INFO)
    assert [_choose(torch.zeros(1), "auto") for _ in range(2)] == [choice] * 2
    # the extension takes no decay on the device; that is not news
    assert _choose(torch.zeros(1), "auto", on_device=True) == "triton"
    (record,) = caplog.records
    assert record.levelname == level
    assert {"cuda": "CUDA extension", "triton": "in Triton"}[choice] in record.getMessage()


def test_a_missing_extension_is_no_warning():
    """Only an extension that exists and does not load is one.

    PyTorch's own messages come before ours.
    """
    program = (
        "import sys, torch, triton; print('ours', file=sys.stderr); import sra_fast.ops.ema_update"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stderr
    assert said.endswith("ours\n"), said


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tensor_that_is_there_twice(backend):
    """As tied weights are in a state dict: the average would move twice."""
    average = torch.nn.Linear(4, 4).to(DEVICE)
    tied = [average.weight.detach(), average.bias.detach(), average.weight.detach()]
    before = [tensor.clone() for tensor in tied]
    params = [torch.zeros_like(tensor) for tensor in tied]
    with pytest.raises(ValueError, match=r"got ema\[2\] in the memory of ema\[0\]$"):
        ema_update_(tied, params, 0.5, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(tied, before, strict=True))
    # empty ones have no elements to share
    empty = [torch.zeros(0, device=DEVICE) for _ in range(2)]
    ema_update_(empty, empty, 0.5, backend=backend)


def in_one_buffer(kind):
    """ema, params, copies, of which some share memory; and what the message says of them."""
    buffer = torch.zeros(64, device=DEVICE)
    half = torch.zeros(64, device=DEVICE, dtype=torch.bfloat16)
    # within the list and out of order in memory
    if kind == "averages":
        return [buffer[20:30], buffer[40:], buffer[6:21]], None, None, "ema[2] .* ema[0]"
    if kind == "an average in the first":
        return [buffer, buffer[50:60].view(2, 5)], None, None, "ema[1] .* ema[0]"
    if kind == "copies":
        return [buffer[:8], buffer[8:16]], None, [half[:8], half[7:15]], "copies[1] .* copies[0]"
    if kind == "one copy":
        return [buffer[:8], buffer[8:16]], None, [half[:8], half[:8]], "copies[1] .* copies[0]"
    if kind == "a copy and a parameter":
        params = [half[:8], half[8:16]]
        return (
            [buffer[:8], buffer[8:16]],
            params,
            [half[24:32], params[0]],
            "params[0] .* copies[1]",
        )
    if kind == "a copy and an average":
        copies = [buffer[8:].view(torch.bfloat16)[4:12]]
        return [buffer[4:12]], None, copies, "copies[0] .* ema[0]"
    if kind == "an average and its parameter":
        return [buffer[:8]], [buffer[:8]], None, "params[0] .* ema[0]"
    if kind == "an average and one number":
        return [buffer[:8]], [buffer[3:4].expand(8)], None, "params[0] .* ema[0]"
    assert kind == "columns of one average"
    wide = buffer.view(8, 8)
    return [wide.t()[2:], wide[:, 2:5]], None, None, "ema[1] .* ema[0]"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "kind",
    [
        "averages",
        "an average in the first",
        "copies",
        "one copy",
        "a copy and a parameter",
        "a copy and an average",
        "an average and its parameter",
        "an average and one number",
        "columns of one average",
    ],
)
def test_tensors_in_the_memory_of_others_are_refused(kind, backend):
    ema, params, copies, names = in_one_buffer(kind)
    params = [torch.ones_like(e) for e in ema] if params is None else params
    first, second = names.split(" .* ")
    message = f"{re.escape(first)} in the memory of {re.escape(second)}$"
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"^ema_update_: expected memory of its own .*{message}"
        ):
            ema_update_(ema, params, 0.5, copies, backend=backend)
    assert not any(e.any() for e in ema)


def test_neighbours_in_one_buffer_are_no_overlap(device):
    """Flat ones, and columns beside each other; parameters may be there twice."""
    buffer = torch.zeros(8, 10, device=device)
    flat = buffer.view(-1)
    one = torch.ones(8, 5, device=device)
    ema_update_([buffer[:, :5], buffer[:, 5:]], [one, one], 0.5, backend="triton")
    assert (buffer == 0.5).all()
    pieces = [flat[40:80], flat[:40]]
    ema_update_(pieces, [flat.new_full((40,), 1.5)] * 2, 0.5, backend="triton")
    assert (buffer == 1.0).all()


def test_what_was_accepted_says_nothing_of_another_call(device):
    """A call is remembered by all that was checked: with anything else at the same addresses it is
    checked again, and computed for what it is.
    """
    ema = [torch.zeros(4, 4, device=device), torch.zeros(16, device=device)]
    params = [torch.ones(4, 4, device=device), torch.ones(16, device=device)]
    copies = [torch.zeros_like(e, dtype=torch.bfloat16) for e in ema]
    good = (ema, params, 0.5, copies)
    ema_update_(*good, backend="triton")
    for bad, match in (
        ((ema, params, 1.5, copies), r"decay in \[0, 1\], got 1.5"),
        ((ema, params, torch.ones(2, device=device).double(), copies), r"got \[2\]"),
        ((ema, params[:1], 0.5, copies), "as many params"),
        ((ema, [params[0].view(2, 8), params[1]], 0.5, copies), "one shape"),
        ((ema, [params[0], params[1].view(torch.int32)], 0.5, copies), "int32"),
        (([ema[0], ema[1][:1].expand(16)], params, 0.5, copies), "expanded"),
        ((ema, params, 0.5, [copies[0], copies[1].view(torch.int16)]), "int16"),
        ((ema, params, 0.5, [*copies[:1], copies[0].view(16)]), r"copies\[1\] in the memory"),
        ((ema, params, 0.5, params), "copies bf16 or fp16"),
        ((ema, [params[0], 1.0], 0.5, copies), "as a tensor, got float"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                ema_update_(*bad, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        ema_update_(*good, backend="numpy")
    assert all((e == 0.5).all() for e in ema)
    # another order in memory, another sign, no copies: the same addresses
    ramp = torch.arange(16.0, device=device)
    params[0].copy_(ramp.view(4, 4))
    ema_update_([ema[0]], [params[0].t()], 0.0, backend="triton")
    assert torch.equal(ema[0], ramp.view(4, 4).t())
    ema_update_([ema[0]], [params[0]], 0.0, backend="triton")
    ema_update_([ema[0]], [torch._neg_view(params[0])], 0.0, backend="triton")
    assert torch.equal(ema[0], -ramp.view(4, 4))
    assert (copies[0] == 0.5).all()


def test_a_call_that_is_known_is_not_checked_again(device, monkeypatch):
    ema, params = make(DTYPES, device)
    copies = [torch.zeros_like(e, dtype=torch.bfloat16) for e in ema]
    checked = []
    monkeypatch.setattr(module, "_check", lambda *lists: checked.append(lists))
    for _ in range(3):
        versions = [x._version for x in ema + copies]
        ema_update_(ema, params, 0.5, copies, backend="triton")
        assert all(x._version > v for x, v in zip(ema + copies, versions, strict=True))
    assert len(checked) == 1


def test_a_dispatch_mode_sees_every_call(device):
    ema, params = make(DTYPES, device)
    for _ in range(2):
        with OpLog() as log:
            ema_update_(ema, params, 0.5, backend="triton")
        assert log.names == ["sra_fast::ema_update_"]
    same = [torch.zeros_like(e) for e in ema]
    for s, e in zip(same, ema, strict=True):
        s.copy_(e)
    ema_update_(ema, params, 0.5, backend="triton")
    ema_update_ref_(same, params, 0.5)
    for e, s in zip(ema, same, strict=True):
        torch.testing.assert_close(e, s)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tensors_without_memory(backend):
    """Fake and meta tensors have no address, and are not taken for one another."""
    with FakeTensorMode():
        ema_update_(*make([torch.float32], "cpu", [(3, 3)] * 3), 0.5, backend=backend)
    ema_update_(*make([torch.float32], "meta", [(3, 3)] * 3), 0.5, backend=backend)


def test_under_a_transform_the_reference_runs(device):
    update = lambda x: (e := x * 0, ema_update_([e], [x], 0.5, backend="triton"))[0]
    assert torch.equal(torch.vmap(update)(torch.ones(2, 3, device=device)), torch.full((2, 3), 0.5))
