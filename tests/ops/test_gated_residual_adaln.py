"""The residual update and the modulated norm after it, in one pass: forward, gradients, layouts,
what it keeps.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import (
    DTYPES,
    WIDTHS,
    OpLog,
    bitwise_equal,
    check_against_fp64,
    far_apart,
    noncontiguous,
    run,
)
from test_gated_residual import bad_inputs, make, pick

from sra_fast import ops
from sra_fast.kernels import gated_residual_adaln as kernels
from sra_fast.ops.gated_residual_adaln import (
    gated_residual_adaln,
    gated_residual_adaln_bwd,
    gated_residual_adaln_fwd,
    gated_residual_adaln_ref,
)


def naive(norm, group):
    """What a DiT codebase writes, in the dtype it is given: sets the error budget."""
    norms = {"layer": F.layer_norm, "rms": F.rms_norm}

    def fn(x, y, gate, shift, scale, bias):
        x = x + pick(gate, group) * (y if bias is None else y + bias)
        xhat = norms[norm](x, x.shape[-1:], eps=1e-6)
        return x, xhat * (1 + pick(scale, group)) + pick(shift, group)

    return fn


def kernel(backend="triton", norm="layer", group=None, eps=1e-6):
    """The operator as a function of the tensors of ``make``."""
    return lambda x, y, gate, shift, scale, bias: gated_residual_adaln(
        x, y, gate, shift, scale, eps, norm=norm, bias=bias, group=group, backend=backend
    )


def reference(norm="layer", group=None):
    return lambda x, y, gate, shift, scale, bias: gated_residual_adaln_ref(
        x, y, gate, shift, scale, norm=norm, bias=bias, group=group
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_forward_and_gradients(D, dtype):
    inputs, _, douts = make(2, 5, D, dtype)
    check_against_fp64(kernel(), naive("layer", None), reference(), inputs, douts)


@pytest.mark.parametrize("B, T, D", [(1, 17, 72), (3, 4, 1152), (5, 1, 100), (2, 3, 88)])
@pytest.mark.parametrize(
    "norm, groups, bias",
    [("rms", 0, False), ("layer", 2, False), ("layer", 0, True), ("rms", 3, True)],
)
def test_variants(B, T, D, norm, groups, bias):
    inputs, group, douts = make(B, T, D, groups=groups, bias=bias)
    ours = kernel(norm=norm, group=group)
    check_against_fp64(ours, naive(norm, group), reference(norm, group), inputs, douts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_pass_variance(dtype):
    """Rows whose mean is a thousand times their deviation.

    E[x^2] - E[x]^2 has no correct digit left in fp32, nor has a mean stored in half precision. Two
    correct means may differ by a unit in the last place of 1000: 6e-5.
    """
    (x, *others), _, douts = make(1, 3, 1152, dtype)
    inputs = (x + 1000, *others)
    check_against_fp64(kernel(), naive("layer", None), reference(), inputs, douts, floor=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eps_is_added_to_the_variance(norm):
    """Rows as small as the root of eps, where eps is half of what is under the square root."""
    (x, y, *vectors), _, douts = make(2, 3, 72)
    inputs = (x / 10, y / 100, *vectors)
    ours = run(kernel("triton", norm, eps=1e-2), inputs, douts)
    expected = run(kernel("torch", norm, eps=1e-2), inputs, douts)
    for a, c in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, c, atol=2e-5, rtol=1e-5)


def test_mixed_dtypes():
    """fp32 residual, fp16 everything else, as under autocast: results in their inputs' dtypes,
    rounded once.
    """
    (x, *others), _, douts = make(2, 5, 72, bias=True)
    inputs = (x, *(t.half() for t in others))
    ours = run(kernel(), inputs, douts)
    truth = run(reference(), inputs, douts, torch.float64)
    assert [t.dtype for t in ours] == [torch.float32] * 3 + [torch.float16] * 5
    for a, c in zip(ours, truth, strict=True):
        assert_kernel_close(a, c.to(a.dtype), c, factor=1.01, floor=1e-5)


def test_layouts():
    """Permuted, sliced and expanded inputs, groups and output gradients."""
    (x, y, gate, shift, scale, bias), group, (dx, dh) = make(2, 5, 72, groups=2, bias=True)
    gate = gate[:1].expand(2, 2, 72)
    scale = scale[..., :1].expand(2, 2, 72)
    shift = shift.transpose(0, 2).contiguous().transpose(0, 2)
    group = group.t().contiguous().t()
    strided = (noncontiguous(x), noncontiguous(y), gate, shift, scale, bias)
    strided_douts = (noncontiguous(dx), dh[:, :1].expand(2, 5, 72))
    assert not any(t.is_contiguous() for t in (*strided[:5], group, *strided_douts))

    dense = [t.contiguous() for t in strided]
    dense_douts = [t.contiguous() for t in strided_douts]
    expected = run(kernel(group=group.contiguous()), dense, dense_douts)
    assert bitwise_equal(run(kernel(group=group), strided, strided_douts), expected)
    check_against_fp64(
        kernel(group=group),
        naive("layer", group),
        reference(group=group),
        strided,
        strided_douts,
    )


def test_an_index_outside_takes_the_nearest_group():
    """No row is left unwritten, forward or backward, whatever the indices."""
    inputs, _, douts = make(1, 5, 64, groups=3)
    group = torch.tensor([[-1, 1, 3, -(2**31), 2**31 - 1]], device=DEVICE)
    found = run(kernel(group=group), inputs, douts)
    assert bitwise_equal(found, run(kernel(group=group.clamp(0, 2)), inputs, douts))


def test_modulation_is_used_in_place():
    """Slices of a projection reach the kernel as they are: only our own operator runs."""
    (x, y, gate, shift, scale, _), _, _ = make(2, 4, 72)
    with OpLog() as log:
        gated_residual_adaln(x, y, gate, shift, scale, backend="triton")
    ran = [name for name in log.names if "empty" not in name]
    assert ran == ["sra_fast::gated_residual_adaln_fwd"]


def test_offsets_beyond_32_bits():
    """Rows of the modulation 2^29 elements apart: the last one is at offset 2^31, past what 32
    bits hold.
    """
    (x, y, gate, shift, scale, _), _, douts = make(5, 2, 64)
    far = far_apart(2**29, gate.half(), shift.half(), scale.half())
    assert all(t.stride(0) == 2**29 for t in far)
    dense = [t.contiguous() for t in far]
    found = run(kernel(), [x, y, *far, None], douts)
    assert bitwise_equal(found, run(kernel(), [x, y, *dense, None], douts))


@pytest.mark.parametrize("B, T", [(0, 4), (3, 0)])
def test_empty_batch(B, T):
    inputs, _, douts = make(B, T, 64, bias=True)
    for grad, like in zip(run(kernel(), inputs, douts)[2:], inputs, strict=True):
        assert grad.shape == like.shape and not grad.any()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    inputs, _, douts = make(2, 5, 72)
    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    wide = [t.detach().double().requires_grad_() for t in inputs[:5]]
    unused = {"materialize_grads": True, "allow_unused": True}
    ours = torch.autograd.grad(kernel()(*leaves, None)[used], leaves, douts[used], **unused)
    out = reference()(*wide, None)[used]
    truth = torch.autograd.grad(out, wide, douts[used].double(), **unused)
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=2e-5, rtol=1e-5)


def test_adaln_of_the_stored_residual_is_h():
    """The backward recomputes h from x': it must be the same h, its rounding included."""
    (x, y, gate, shift, scale, _), _, _ = make(2, 5, 1152)
    x_new, h = gated_residual_adaln(x, y, gate, shift, scale, backend="triton")
    recomputed = ops.adaln(x_new, shift, scale, backend="triton")
    torch.testing.assert_close(recomputed, h, atol=1e-6, rtol=1e-6)


def test_saves_only_what_backward_needs():
    """x', y, gate, scale (views), mean and rstd: neither x nor h, and nothing in fp32 of the size
    of x.
    """
    (x, y, gate, shift, scale, _), _, _ = make(2, 6, 72)
    saved = []
    leaves = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x_new, _ = gated_residual_adaln(*leaves, backend="triton")
    big = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert big == {x_new.data_ptr(), y.data_ptr()}
    statistics = 2 * 2 * 6
    vectors = 2 * 2 * 72
    assert sum(t.numel() for t in saved if t.numel() != x.numel()) == statistics + vectors


def test_splits_do_not_change_rows(monkeypatch):
    """Every row is computed alike, however many programs share an image; the sums are repeatable."""
    inputs, _, douts = make(1, 9, 72, bias=True)
    expected = run(kernel(), inputs, douts)
    assert bitwise_equal(expected, run(kernel(), inputs, douts))
    for partition in [(1, 10), (5, 2), (2, 6)]:
        split_rows = lambda x, groups, num_loads, partition=partition: partition
        monkeypatch.setattr(kernels, "split_rows", split_rows)
        found = run(kernel(), inputs, douts)
        # x', h, dx and dy; then the sums over tokens
        assert bitwise_equal(expected[:4], found[:4])
        for a, b in zip(expected[4:], found[4:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_fp64_runs_the_reference():
    inputs, _, _ = make(1, 3, 8, torch.float64, bias=True)
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(kernel(), leaves)


@pytest.mark.parametrize("grouped", [False, True])
def test_operator_registration(grouped):
    (x, y, gate, shift, scale, bias), group, (dx, dh) = make(2, 4, 64, groups=2, bias=True)
    rms = grouped
    if not grouped:
        gate = gate[:, 0]
        shift = shift[:, 0]
        scale = scale[:, 0]
        bias = None
        group = None
        dx = None
    forward = (x, y, bias, gate, shift, scale, group, 1e-6, rms)
    torch.library.opcheck(gated_residual_adaln_fwd, forward)
    x_new, _, mean, rstd = gated_residual_adaln_fwd(*forward)
    backward = (dx, dh, x_new, y, bias, gate, scale, group, mean, rstd)
    # without and with h recomputed
    torch.library.opcheck(gated_residual_adaln_bwd, (*backward, None))
    torch.library.opcheck(gated_residual_adaln_bwd, (*backward, shift))


def test_compiles_without_graph_breaks():
    inputs, _, douts = make(2, 4, 64, bias=True)
    fn = lambda *a: tuple(t.sin() for t in kernel()(*a))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_auto_runs_the_reference_on_a_cpu():
    x = torch.randn(2, 4, 64)
    gate = torch.randn(2, 64)
    with OpLog() as log:
        ops.gated_residual_adaln(x, x, gate, gate, gate)
    assert log.names and not any(name.startswith("sra_fast") for name in log.names)


def test_rejects_bad_input():
    for (x, y, gate), options, message in bad_inputs():
        with pytest.raises(ValueError, match=message):
            gated_residual_adaln(x, y, gate, gate, gate, **options)
    (x, y, gate, shift, scale, _), _, _ = make(2, 4, 64)
    with pytest.raises(ValueError, match="expected x, y"):
        gated_residual_adaln(x, y, gate, shift[:, 1:], scale)
    with pytest.raises(ValueError, match="norm must be one of"):
        gated_residual_adaln(x, y, gate, shift, scale, norm="batch")
