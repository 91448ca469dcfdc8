"""The residual update x + gate (y + bias): forward, gradients, layouts, what it keeps."""

import pytest
import torch
from conftest import DEVICE
from rows import DTYPES, OpLog, bitwise_equal, check_against_fp64, far_apart, noncontiguous, run

from sra_fast import ops
from sra_fast.ops.gated_residual import (
    gated_residual,
    gated_residual_bwd,
    gated_residual_fwd,
    gated_residual_ref,
)


def make(B, T, D, dtype=torch.float32, groups=0, bias=False, seed=0):
    """Inputs of the residual update with a norm after it, from one seed.

    Returns ``(x, y, gate, shift, scale, bias)``, the group, and gradients of x' and h. The
    modulation vectors are column slices of one projection.
    """
    torch.manual_seed(seed)
    x, y, dx, dh = (torch.randn(B, T, D, device=DEVICE, dtype=dtype) for _ in range(4))
    shape = (B, groups, 6 * D) if groups else (B, 6 * D)
    shift, scale, gate = torch.randn(shape, device=DEVICE, dtype=dtype).chunk(6, dim=-1)[2:5]
    bias = torch.randn(D, device=DEVICE, dtype=dtype) if bias else None
    group = torch.randint(0, groups, (B, T), device=DEVICE) if groups else None
    return (x, y, gate, shift, scale, bias), group, (dx, dh)


def pick(modulation, group):
    """Each token's vector, in plain PyTorch."""
    if group is None:
        return modulation[:, None]
    return torch.stack([m[g] for m, g in zip(modulation, group, strict=True)])


def kernel(group=None):
    """The operator as a function of (x, y, gate, bias)."""
    return lambda x, y, gate, bias: gated_residual(
        x, y, gate, bias=bias, group=group, backend="triton"
    )


def naive(group):
    """What a DiT codebase writes, in the dtype it is given: sets the error budget."""
    return lambda x, y, gate, bias: x + pick(gate, group) * (y if bias is None else y + bias)


def reference(group):
    return lambda x, y, gate, bias: gated_residual_ref(x, y, gate, bias=bias, group=group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, D, groups, bias",
    [(2, 5, 64, 0, False), (1, 17, 72, 2, True), (3, 4, 1152, 0, True), (2, 3, 768, 2, False)],
)
def test_forward_and_gradients(B, T, D, groups, bias, dtype):
    (x, y, gate, _, _, bias), group, (dx, _) = make(B, T, D, dtype, groups, bias)
    inputs = (x, y, gate, bias)
    check_against_fp64(kernel(group), naive(group), reference(group), inputs, [dx])


def test_layouts():
    """Permuted, sliced and expanded inputs, groups and output gradients."""
    (x, y, gate, _, _, bias), group, (_, dx) = make(2, 5, 72, groups=2, bias=True)
    group = group.t().contiguous().t()
    strided = (noncontiguous(x), noncontiguous(y), gate[:1].expand(2, 2, 72), bias)
    strided_dx = dx[:, :1].expand(2, 5, 72)
    assert not any(t.is_contiguous() for t in (*strided[:3], group, strided_dx))
    dense = [t.contiguous() for t in strided]
    found = run(kernel(group), strided, [strided_dx])
    expected = run(kernel(group.contiguous()), dense, [strided_dx.contiguous()])
    assert bitwise_equal(found, expected)


def test_an_index_outside_takes_the_nearest_group():
    """No row is left unwritten, forward or backward, whatever the indices."""
    (x, y, gate, *_), _, (dx, _) = make(1, 5, 64, groups=3)
    group = torch.tensor([[-1, 1, 3, -(2**31), 2**31 - 1]], device=DEVICE)
    inputs = (x, y, gate, None)
    found = run(kernel(group), inputs, [dx])
    assert bitwise_equal(found, run(kernel(group.clamp(0, 2)), inputs, [dx]))


def test_gate_is_used_in_place():
    """A slice of a projection reaches the kernel as it is: only our own operator runs."""
    (x, y, gate, *_), _, _ = make(2, 4, 72)
    with OpLog() as log:
        gated_residual(x, y, gate, backend="triton")
    assert [name for name in log.names if "empty" not in name] == ["sra_fast::gated_residual_fwd"]


def test_offsets_beyond_32_bits():
    """Rows of the gate 2^29 elements apart: the last one is at offset 2^31, past what 32 bits
    hold.
    """
    (x, y, gate, *_), _, (dx, _) = make(5, 2, 64)
    (far,) = far_apart(2**29, gate.half())
    assert far.stride(0) == 2**29
    found = run(kernel(), (x, y, far, None), [dx])
    assert bitwise_equal(found, run(kernel(), (x, y, far.contiguous(), None), [dx]))


@pytest.mark.parametrize("B, T", [(0, 4), (3, 0)])
def test_empty_batch(B, T):
    (x, y, gate, _, _, bias), _, (dx, _) = make(B, T, 64, bias=True)
    inputs = (x, y, gate, bias)
    for grad, like in zip(run(kernel(), inputs, [dx])[1:], inputs, strict=True):
        assert grad.shape == like.shape and not grad.any()


def test_fp64_runs_the_reference():
    (x, y, gate, _, _, bias), _, _ = make(1, 3, 8, torch.float64, bias=True)
    leaves = [t.detach().requires_grad_() for t in (x, y, gate, bias)]
    assert torch.autograd.gradcheck(kernel(), leaves)


@pytest.mark.parametrize("grouped", [False, True])
def test_operator_registration(grouped):
    (x, y, gate, _, _, bias), group, (dx, _) = make(2, 4, 64, groups=2, bias=True)
    options = (bias, gate, group) if grouped else (None, gate[:, 0], None)
    torch.library.opcheck(gated_residual_fwd, (x, y, *options))
    torch.library.opcheck(gated_residual_bwd, (dx, y, *options))


def test_compiles_without_graph_breaks():
    (x, y, gate, _, _, bias), _, (dx, _) = make(2, 4, 64, bias=True)
    inputs = (x, y, gate, bias)
    compiled = torch.compile(kernel(), fullgraph=True, backend="aot_eager")
    assert bitwise_equal(run(compiled, inputs, [dx]), run(kernel(), inputs, [dx]))


def test_auto_runs_the_reference_on_a_cpu():
    x = torch.randn(2, 4, 64)
    with OpLog() as log:
        ops.gated_residual(x, x, torch.randn(2, 64))
    assert log.names and not any(name.startswith("sra_fast") for name in log.names)


def bad_inputs():
    """(positional arguments x, y, gate; options; what the message must say), for both operators."""
    (x, y, gate, _, _, bias), group, _ = make(2, 4, 64, groups=2, bias=True)
    per_image = gate[:, 0]
    return [
        ((x, y[:, 1:], per_image), {}, "expected x, y .*got .*y \\[2, 3, 64\\]"),
        ((x[0], y[0], per_image), {}, "expected x, y"),
        ((x, y, per_image[:, 1:]), {}, "gate.* \\[B, D\\]"),
        ((x, y, gate[:, :1].expand(2, 3, 64)), {}, "gate.* \\[B, D\\]"),
        ((x, y, per_image), {"group": group}, "with a group"),
        ((x, y, gate), {"group": group[:, 1:]}, "group \\[2, 3\\]"),
        ((x, y, gate), {"group": group.float()}, "integer group"),
        ((x, y, gate), {"group": group > 0}, "integer group"),
        ((x, y, per_image), {"bias": bias[1:]}, "bias \\[63\\]"),
        ((x.long(), y, per_image), {}, "floating-point"),
        ((x, y.to("meta"), per_image), {}, "one device"),
        ((x, y, per_image), {"backend": "cuda"}, "backend must be one of"),
    ]


def test_rejects_bad_input():
    for args, options, message in bad_inputs():
        with pytest.raises(ValueError, match=message):
            gated_residual(*args, **options)
