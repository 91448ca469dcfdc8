import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES, WIDTHS, OpLog, bitwise_equal, check_against_fp64, far_apart, run

from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops import gated_residual as public_residual
from sra_fast.ops import gated_residual_adaln as public_fused
from sra_fast.ops.adaln import adaln
from sra_fast.ops.gated_residual import (
    _bwd,
    _fused_bwd,
    _fused_fwd,
    _fwd,
    gated_residual,
    gated_residual_adaln,
    gated_residual_adaln_ref,
    gated_residual_ref,
)


def make(B, T, D, dtype=torch.float32, groups=0, bias=False, seed=0):
    """Two [B, T, D] tensors, gate, shift and scale (column slices of one projection), bias, group, two gradients."""
    torch.manual_seed(seed)
    x, y, dx, dh = (torch.randn(B, T, D, device=DEVICE, dtype=dtype) for _ in range(4))
    shape = (B, groups, 6 * D) if groups else (B, 6 * D)
    shift, scale, gate = torch.randn(shape, device=DEVICE, dtype=dtype).chunk(6, dim=-1)[2:5]
    bias = torch.randn(D, device=DEVICE, dtype=dtype) if bias else None
    group = torch.randint(0, groups, (B, T), device=DEVICE) if groups else None
    return (x, y, gate, shift, scale, bias), group, (dx, dh)


def pick(modulation, group):
    return (
        modulation[:, None]
        if group is None
        else torch.stack([m[g] for m, g in zip(modulation, group, strict=True)])
    )


def naive(norm, group):
    """What a DiT codebase writes, in the dtype it is given: sets the error budget."""

    def fn(x, y, gate, shift, scale, bias):
        x = x + pick(gate, group) * (y if bias is None else y + bias)
        xhat = (
            F.layer_norm(x, x.shape[-1:], eps=1e-6)
            if norm == "layer"
            else F.rms_norm(x, x.shape[-1:], eps=1e-6)
        )
        return x, xhat * (1 + pick(scale, group)) + pick(shift, group)

    return fn


def fused(backend="triton", norm="layer", group=None, eps=1e-6):
    return lambda x, y, gate, shift, scale, bias: gated_residual_adaln(
        x, y, gate, shift, scale, eps, norm=norm, bias=bias, group=group, backend=backend
    )


def plain(backend="triton", group=None):
    return lambda x, y, gate, bias: gated_residual(
        x, y, gate, bias=bias, group=group, backend=backend
    )


def reference(norm, group):
    return lambda x, y, gate, shift, scale, bias: gated_residual_adaln_ref(
        x, y, gate, shift, scale, norm=norm, bias=bias, group=group
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_fused_forward_and_gradients(D, dtype):
    inputs, _, douts = make(2, 5, D, dtype)
    check_against_fp64(fused(), naive("layer", None), reference("layer", None), inputs, douts)


@pytest.mark.parametrize("B, T, D", [(1, 17, 72), (3, 4, 1152), (5, 1, 100), (2, 3, 88)])
@pytest.mark.parametrize(
    "norm, groups, bias",
    [("rms", 0, False), ("layer", 2, False), ("layer", 0, True), ("rms", 3, True)],
)
def test_fused_variants(B, T, D, norm, groups, bias):
    inputs, group, douts = make(B, T, D, groups=groups, bias=bias)
    kernel, truth = fused(norm=norm, group=group), reference(norm, group)
    check_against_fp64(kernel, naive(norm, group), truth, inputs, douts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, D, groups, bias",
    [(2, 5, 64, 0, False), (1, 17, 72, 2, True), (3, 4, 1152, 0, True), (2, 3, 768, 2, False)],
)
def test_plain_forward_and_gradients(B, T, D, groups, bias, dtype):
    (x, y, gate, _, _, bias), group, douts = make(B, T, D, dtype, groups, bias)
    check_against_fp64(
        plain(group=group),
        lambda x, y, gate, bias: x + pick(gate, group) * (y if bias is None else y + bias),
        lambda x, y, gate, bias: gated_residual_ref(x, y, gate, bias=bias, group=group),
        (x, y, gate, bias),
        douts[:1],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_pass_variance(dtype):
    """Rows whose mean is a thousand times their deviation: E[x^2] - E[x]^2 has no correct digit left in fp32, nor has
    a mean that is stored in half precision.  Two right means may differ by a unit in the last place of 1000: 6e-5.
    """
    inputs, _, douts = make(1, 3, 1152, dtype)
    inputs = (inputs[0] + 1000, *inputs[1:])
    check_against_fp64(
        fused(), naive("layer", None), reference("layer", None), inputs, douts, floor=1e-4
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eps_is_added_to_the_variance(norm):
    """Rows as small as the root of eps, where eps is half of what is under the square root."""
    (x, y, *vectors), _, douts = make(2, 3, 72)
    inputs = (x / 10, y / 100, *vectors)
    results = [
        run(fused(backend, norm, eps=1e-2), inputs, douts) for backend in ("triton", "torch")
    ]
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, atol=2e-5, rtol=1e-5)


def test_mixed_dtypes():
    """fp32 residual, fp16 everything else, as under autocast: each result in the dtype of its input, rounded once."""
    inputs, _, douts = make(2, 5, 72, bias=True)
    inputs = (inputs[0], *(t.half() for t in inputs[1:]))
    ours = run(fused(), inputs, douts)
    truth = run(reference("layer", None), inputs, douts, torch.float64)
    assert [t.dtype for t in ours] == [torch.float32] * 3 + [torch.float16] * 5
    for a, c in zip(ours, truth, strict=True):
        assert_kernel_close(a, c.to(a.dtype), c, factor=1.01, floor=1e-5)


def noncontiguous(t):
    """The same values behind a permuted and sliced view."""
    return torch.stack([t, t], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]


def test_layouts():
    """Permuted, sliced and expanded inputs, groups and output gradients."""
    inputs, group, douts = make(2, 5, 72, groups=2, bias=True)
    x, y, gate, shift, scale, bias = inputs
    gate, scale = gate[:1].expand(2, 2, 72), scale[..., :1].expand(2, 2, 72)
    shift = shift.transpose(0, 2).contiguous().transpose(0, 2)
    odd, group = (
        (noncontiguous(x), noncontiguous(y), gate, shift, scale, bias),
        group.t().contiguous().t(),
    )
    odd_douts = noncontiguous(douts[0]), douts[1][:, :1].expand(2, 5, 72)
    assert not any(t.is_contiguous() for t in (*odd[:5], group, *odd_douts))
    dense = [t.contiguous() for t in odd], [t.contiguous() for t in odd_douts]
    same = group.contiguous()
    assert bitwise_equal(run(fused(group=group), odd, odd_douts), run(fused(group=same), *dense))
    check_against_fp64(
        fused(group=group), naive("layer", group), reference("layer", group), odd, odd_douts
    )
    odd, dense = (odd[0], odd[1], odd[4], bias), (dense[0][0], dense[0][1], dense[0][4], bias)
    assert bitwise_equal(
        run(plain(group=group), odd, odd_douts[1:]), run(plain(group=same), dense, odd_douts[1:])
    )


def test_an_index_outside_takes_the_nearest_group():
    """No row is left unwritten, forward or backward, whatever the indices."""
    inputs, _, douts = make(1, 5, 64, groups=3)
    group = torch.tensor([[-1, 1, 3, -(2**31), 2**31 - 1]], device=DEVICE)
    inside = group.clamp(0, 2)
    assert bitwise_equal(
        run(fused(group=group), inputs, douts), run(fused(group=inside), inputs, douts)
    )
    args = (*inputs[:3], None)
    assert bitwise_equal(
        run(plain(group=group), args, douts[:1]), run(plain(group=inside), args, douts[:1])
    )


def test_modulation_is_used_in_place():
    """Slices of a projection reach the kernel as they are: nothing runs but views and our own operators."""
    (x, y, gate, shift, scale, _), _, _ = make(2, 4, 72)
    with OpLog() as log:
        gated_residual_adaln(x, y, gate, shift, scale, backend="triton")
        gated_residual(x, y, gate, backend="triton")
    ran = [name for name in log.names if "empty" not in name]
    assert ran == ["sra_fast::gated_residual_adaln_fwd", "sra_fast::gated_residual_fwd"]


def test_offsets_beyond_32_bits():
    """Modulation rows 2^29 and 2^30 elements apart: the last one lies at offset 2^31, past what 32 bits hold."""
    (x, y, gate, shift, scale, _), _, douts = make(5, 2, 64)
    inputs = [x, y, *far_apart(2**29, gate.half(), shift.half(), scale.half())]
    assert all(t.stride(0) == 2**29 for t in inputs[2:])
    dense = [t.contiguous() for t in inputs]
    assert bitwise_equal(run(fused(), [*inputs, None], douts), run(fused(), [*dense, None], douts))
    assert bitwise_equal(
        run(plain(), [*inputs[:3], None], douts[:1]), run(plain(), [*dense[:3], None], douts[:1])
    )


@pytest.mark.parametrize("B, T", [(0, 4), (3, 0)])
def test_empty_batch(B, T):
    inputs, _, douts = make(B, T, 64, bias=True)
    for t, like in zip(run(fused(), inputs, douts)[2:], inputs, strict=True):
        assert t.shape == like.shape and not t.any()
    for t in run(plain(), (*inputs[:3], inputs[5]), douts[:1])[1:]:
        assert not t.any()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    inputs, _, douts = make(2, 5, 72)
    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    wide = [t.detach().double().requires_grad_() for t in inputs[:5]]
    ours = torch.autograd.grad(fused()(*leaves, None)[used], leaves, douts[used])
    out = reference("layer", None)(*wide, None)[used]
    truth = torch.autograd.grad(
        out, wide, douts[used].double(), materialize_grads=True, allow_unused=True
    )
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=2e-5, rtol=1e-5)


def test_h_is_recomputed_by_adaln():
    """What is not saved can be had again: adaln of x' is h, the same rounding included."""
    (x, y, gate, shift, scale, _), _, _ = make(2, 5, 1152)
    x_new, h = gated_residual_adaln(x, y, gate, shift, scale, backend="triton")
    torch.testing.assert_close(
        adaln(x_new, shift, scale, backend="triton"), h, atol=1e-6, rtol=1e-6
    )


def test_saves_only_what_backward_needs():
    """x', y, gate, scale (views), mean and rstd: neither x nor h, and nothing in fp32 of the size of x."""
    (x, y, gate, shift, scale, _), _, _ = make(2, 6, 72)
    saved = []
    leaves = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x_new, h = gated_residual_adaln(*leaves, backend="triton")
    big = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert big == {x_new.data_ptr(), y.data_ptr()}
    assert sum(t.numel() for t in saved if t.numel() != x.numel()) == 2 * 6 * 2 + 2 * 2 * 72


def test_splits_do_not_change_rows(monkeypatch):
    """However many programs share an image, every row is computed alike; the sums are repeatable bit for bit."""
    inputs, _, douts = make(1, 9, 72, bias=True)
    few = run(fused(), inputs, douts)
    assert bitwise_equal(few, run(fused(), inputs, douts))
    for partition in [(1, 10), (5, 2), (2, 6)]:
        split_rows = lambda x, groups, num_loads, partition=partition: partition
        monkeypatch.setattr(fused_kernels, "split_rows", split_rows)
        other = run(fused(), inputs, douts)
        assert bitwise_equal(few[:4], other[:4])
        for a, b in zip(few[4:], other[4:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_fp64_runs_the_reference():
    inputs, _, _ = make(1, 3, 8, torch.float64, bias=True)
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(fused(), leaves)
    assert torch.autograd.gradcheck(plain(), (*leaves[:3], leaves[5]))


def test_operator_registration():
    (x, y, gate, shift, scale, bias), group, (dx, dh) = make(2, 4, 64, groups=2, bias=True)
    for b, g, mods in [
        (None, None, [t[:, 0] for t in (gate, shift, scale)]),
        (bias, group, [gate, shift, scale]),
    ]:
        torch.library.opcheck(_fwd, (x, y, b, mods[0], g))
        torch.library.opcheck(_bwd, (dx, y, b, mods[0], g))
        torch.library.opcheck(_fused_fwd, (x, y, b, *mods, g, 1e-6, b is not None))
        x_new, _, mean, rstd = _fused_fwd(x, y, b, *mods, g, 1e-6, b is not None)
        saved = (x_new, y, b, mods[0], mods[2], g, mean, rstd)
        for shift_again in (None, mods[1]):
            torch.library.opcheck(_fused_bwd, (None if b is None else dx, dh, *saved, shift_again))


def test_compiles_without_graph_breaks():
    inputs, _, douts = make(2, 4, 64, bias=True)
    fn = lambda *a: tuple(t.sin() for t in fused()(*a))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    single = torch.compile(plain(), fullgraph=True, backend="aot_eager")
    args = (*inputs[:3], inputs[5])
    assert bitwise_equal(run(single, args, douts[:1]), run(plain(), args, douts[:1]))


def test_auto_runs_the_reference_on_a_cpu():
    x, gate = torch.randn(2, 4, 64), torch.randn(2, 64)
    with OpLog() as log:
        public_residual(x, x, gate)
        public_fused(x, x, gate, gate, gate)
    assert log.names and not any(name.startswith("sra_fast") for name in log.names)


def test_rejects_bad_input():
    (x, y, gate, shift, scale, bias), group, _ = make(2, 4, 64, groups=2, bias=True)
    per_image = gate[:, 0]
    cases = [
        ((x, y[:, 1:], per_image), {}, "expected x, y .*got .*y \\[2, 3, 64\\]"),
        ((x[0], y[0], per_image), {}, "expected x, y"),
        ((x, y, per_image[:1]), {}, "gate.* \\[B, D\\]"),
        ((x, y, gate), {}, "gate.* \\[B, D\\]"),
        ((x, y, per_image), {"group": group}, "with a group"),
        ((x, y, gate), {"group": group[:, 1:]}, "group \\[2, 3\\]"),
        ((x, y, gate), {"group": group.float()}, "integer group"),
        ((x, y, gate), {"group": group > 0}, "integer group"),
        ((x, y, per_image), {"bias": bias[1:]}, "bias \\[63\\]"),
        ((x.long(), y, per_image), {}, "floating-point"),
        ((x, y.to("meta"), per_image), {}, "one device"),
        ((x, y, per_image), {"backend": "cuda"}, "backend must be one of"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            gated_residual(*args, **kwargs)
        with pytest.raises(ValueError, match=message):
            gated_residual_adaln(*args, args[2], args[2], **kwargs)
    with pytest.raises(ValueError, match="expected x, y"):
        gated_residual_adaln(x, y, per_image, shift[:, 0, 1:], scale[:, 0])
    with pytest.raises(ValueError, match="norm must be one of"):
        gated_residual_adaln(x, y, per_image, shift[:, 0], scale[:, 0], norm="batch")
