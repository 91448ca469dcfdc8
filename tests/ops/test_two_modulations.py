"""One norm with two modulations: `second` of `gated_residual_adaln` and of `adaln`, forward and
gradients, against plain PyTorch in fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import (
    DTYPES,
    OpLog,
    bitwise_equal,
    check_against_fp64,
    count_bytes,
    launchers_of_two,
    noncontiguous,
    run,
)
from test_gated_residual import pick
from test_rows import chosen_splits

from sra_fast import ops
from sra_fast.kernels import gated_residual_adaln as kernels
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.gated_residual_adaln import _two_bwd, _two_fwd, gated_residual_adaln_ref

B, T, D, FRAMES, GROUPS = 2, 6, 72, 3, 2
NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}
# gate, shift, scale and those of the second modulation
SHAPES = {
    "image": [(B, D)] * 5,
    "shared": [(D,), (1, D), (B, 1, D), (B, D), (1, 1, D)],
    "frame": [(B, D), (B, FRAMES, D), (D,), (1, FRAMES, D), (B, FRAMES, D)],
    "token": [(B, T, D), (B, D), (D,), (1, T, D), (B, FRAMES, D)],
    "group": [(B, GROUPS, D)] * 5,
}
FUSED = ["gated_residual_adaln_two_fwd"]
# what runs forward
RUNS = {
    "image": FUSED,
    "shared": FUSED,
    "frame": FUSED,
    "token": ["per_token_fwd", "per_token_fwd"],
    "group": ["gated_residual_adaln_fwd", "adaln_fwd"],
}


def make(B=B, T=T, D=D, dtype=torch.float32, vectors="image", bias=False, affine=False):
    """(x, y, five vectors, norm's weight and bias, bias) and gradients of x', h and h2; vectors of
    every image are slices of one projection.
    """
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    x, y, *douts = (random(B, T, D) for _ in range(5))
    given = random(B, 9 * D).chunk(9, dim=1)[2:7]
    if vectors != "image":
        given = [random(*shape) for shape in SHAPES[vectors]]
    weights = [random(D), random(D)] if affine else [None, None]
    return (x, y, *given, *weights, random(D) if bias else None), douts


def groups(vectors):
    return torch.randint(0, GROUPS, (B, T), device=DEVICE) if vectors == "group" else None


def naive(norm="layer", group=None):
    """What a codebase writes, in the dtype it is given: one norm, two modulations."""

    def spread(vector, x):
        if group is not None:
            return pick(vector, group)
        if vector.dim() < 3:
            return vector if vector.dim() == 1 else vector[:, None]
        count = vector.shape[1]
        return vector if count == 1 else vector.repeat_interleave(x.shape[1] // count, 1)

    def fn(x, y, gate, shift, scale, shift2, scale2, weight, norm_bias, bias):
        y = y if bias is None else y + bias
        x = x + (y if gate is None else spread(gate, x) * y)
        normed = NORMS[norm](x, x.shape[-1:], eps=1e-6)
        normed = normed if weight is None else normed * weight
        normed = normed if norm_bias is None else normed + norm_bias
        pairs = ((shift, scale), (shift2, scale2))
        return x, *(normed * (1 + spread(c, x)) + spread(s, x) for s, c in pairs)

    return fn


def kernel(norm="layer", group=None, backend="triton", dtype=None, function=None):
    """The operator, or another ``function``, of the tensors of ``make``."""
    options = {"norm": norm, "group": group, "dtype": dtype}
    if function is None:
        function = ops.gated_residual_adaln
        options["backend"] = backend

    def fn(x, y, gate, shift, scale, shift2, scale2, weight, norm_bias, bias):
        channels = {"norm_weight": weight, "norm_bias": norm_bias, "bias": bias}
        second = (shift2, scale2)
        return function(x, y, gate, shift, scale, second=second, **channels, **options)

    return fn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, norm", [(64, "layer"), (72, "rms"), (384, "layer")])
def test_forward_and_gradients(width, norm, dtype):
    inputs, douts = make(2, 3, width, dtype)
    written = naive(norm)
    check_against_fp64(kernel(norm), written, written, inputs, douts)
    # without a gradient, as in the teacher
    with_grad = run(kernel(norm), inputs, douts)[:3]
    with torch.no_grad():
        assert bitwise_equal(kernel(norm)(*inputs), with_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm, bias, affine", [("layer", True, True), ("rms", False, True)])
def test_weights_of_the_norm_and_a_bias(norm, bias, affine, dtype):
    inputs, douts = make(2, 5, 88, dtype, bias=bias, affine=affine)
    check_against_fp64(kernel(norm), naive(norm), naive(norm), inputs, douts)


@pytest.mark.parametrize("width", [1152, 1536])
def test_widths_of_models(width):
    inputs, douts = make(1, 3, width, bias=True)
    check_against_fp64(kernel(), naive(), naive(), inputs, douts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vectors", SHAPES)
def test_vectors_of_every_shape(vectors, backend):
    """In one pass or composed: the same results, gradients in the shapes that were given."""
    group = groups(vectors)
    inputs, douts = make(vectors=vectors, bias=True, affine=vectors != "group")
    fn = kernel(group=group, backend=backend)
    check_against_fp64(fn, naive(group=group), naive(group=group), inputs, douts)
    if backend == "triton":
        with OpLog() as log:
            fn(*inputs)
        ran = [name for name in log.names if "sra_fast" in name]
        assert ran == [f"sra_fast::{name}" for name in RUNS[vectors]]


def test_without_a_gate():
    (x, y, _, *others), douts = make(bias=True)
    check_against_fp64(kernel(), naive(), naive(), (x, y, None, *others), douts)


@pytest.mark.parametrize("dtype, widest", [(torch.float32, 2304), (torch.float16, 3072)], ids=str)
def test_wider_rows_take_two_passes(dtype, widest):
    for width in (widest, widest + 8):
        inputs, _ = make(1, 1, width, dtype)
        with OpLog() as log:
            kernel()(*inputs)
        ran = [name for name in log.names if "sra_fast" in name]
        # rows above 3072 take the kernels of the update and of each norm
        composed = ["gated_residual_adaln_fwd", "adaln_fwd"]
        if width > kernels.MAX_WIDTH:
            composed = ["gated_residual_fwd", "adaln_fwd", "adaln_fwd"]
        expected = FUSED if width == widest else composed
        assert ran == [f"sra_fast::{name}" for name in expected]


def test_a_composition_of_wide_rows(monkeypatch):
    monkeypatch.setattr(kernels, "TWO_WIDTH_FP32", 64)
    inputs, douts = make(bias=True)
    check_against_fp64(kernel(), naive(), naive(), inputs, douts)


@pytest.mark.parametrize(
    "used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=lambda used: "".join(map(str, used))
)
def test_outputs_that_nobody_used(used):
    """The gradients that are left are right, and vectors of an unused output have none."""
    # with weights of the norm, whose gradients come from both modulations
    inputs, douts = make(B, 4, affine=len(used) > 1)

    def gradients(fn, dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
        out = fn(*leaves)
        wanted = [t for t in leaves if t is not None]
        outs = [out[i] for i in used]
        given = [douts[i].to(dtype) for i in used]
        return torch.autograd.grad(outs, wanted, given, allow_unused=True)

    ours = gradients(kernel(), torch.float32)
    truth = gradients(naive(), torch.float64)
    for a, c in zip(ours, truth, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            torch.testing.assert_close(a.double(), c, atol=3e-5, rtol=1e-5)


def test_mixed_dtypes():
    """An fp32 stream and fp16 everything else, the norms too: results in their inputs' dtypes."""
    (x, *others), douts = make(bias=True, affine=True)
    inputs = (x, *(t.half() for t in others))
    half = torch.float16
    ours = run(kernel(dtype=half), inputs, douts)
    truth = run(naive(), inputs, douts, torch.float64)
    wide = torch.float32
    assert [t.dtype for t in ours] == [wide, half, half, wide] + [half] * 9
    for a, c in zip(ours, truth, strict=True):
        rounding = 4e-3 if a.dtype == half else 2e-3
        torch.testing.assert_close(a.double(), c, atol=rounding, rtol=rounding)


def test_the_gradient_of_a_wide_shift_keeps_its_digits():
    """Shifts in fp32 beside scales in half precision; each pair has a dtype of its own."""
    (x, y, gate, shift, scale, shift2, scale2, *_), (_, dh, dh2) = make(dtype=torch.float16)
    for wide in (shift, shift2):
        leaf = wide.float().requires_grad_()
        first = leaf if wide is shift else shift
        second = leaf if wide is shift2 else shift2
        out = ops.gated_residual_adaln(
            x, y, gate, first, scale, second=(second, scale2), backend="triton"
        )
        torch.autograd.backward(out[1:], [dh, dh2])
        expected = (dh if wide is shift else dh2).float().sum(1)
        torch.testing.assert_close(leaf.grad, expected, atol=1e-5, rtol=1e-6)


def test_gradients_of_weights_are_rounded_once():
    """The two modulations nearly cancel: rounded one by one, two digits would be left."""
    inputs, (dx, dh, _) = make(dtype=torch.float16, affine=True)
    x, y, gate, shift, scale, _, _, *rest = inputs
    inputs = (x, y, gate, shift, scale, shift, scale, *rest)
    douts = (dx, dh, -dh * (63 / 64))
    ours = run(kernel(), inputs, douts)[-2:]
    truth = run(naive(), inputs, douts, torch.float64)[-2:]
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=2e-3, rtol=1e-3)


def test_layouts():
    """Permuted and sliced rows and gradients, strided and expanded vectors."""
    (x, y, gate, shift, scale, shift2, scale2, *rest), douts = make(B, 4)
    shift2 = torch.stack([shift2, shift2], dim=-1)[..., 0]
    scale2 = scale2[:1].expand(B, D)
    strided = (noncontiguous(x), noncontiguous(y), gate, shift, scale, shift2, scale2, *rest)
    strided_douts = [noncontiguous(t) for t in douts]
    dense = [None if t is None else t.contiguous() for t in strided]
    expected = run(kernel(), dense, douts)
    assert bitwise_equal(run(kernel(), strided, strided_douts), expected)


def test_slices_of_a_projection_are_used_in_place():
    """Nine vectors of one projection, as SD3.5 has them: only our own operator runs."""
    inputs, _ = make()
    with OpLog() as log:
        kernel()(*inputs)
    assert [name for name in log.names if "empty" not in name] == [f"sra_fast::{FUSED[0]}"]


def test_saves_only_what_backward_needs():
    """x', y and vectors: neither x nor h nor h2."""
    inputs, _ = make()
    saved = []
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x_new, _, _ = kernel()(*leaves)
    big = {t.data_ptr() for t in saved if t.numel() == x_new.numel()}
    assert big == {x_new.data_ptr(), inputs[1].data_ptr()}
    # gate and both scales; mean and rstd
    rest = sum(t.numel() for t in saved if t.numel() != x_new.numel())
    assert rest == 3 * B * D + 2 * B * T


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize("bias", [False, True])
def test_bytes(bias, monkeypatch):
    """Exactly what the docstring of the kernel states."""
    make = lambda *shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE)
    forward, backward = launchers_of_two(B, T, D, torch.float32, bias=bias, make=make)
    S = 4
    for launch, arrays, vectors, per_program, sums in (
        (forward, 5, 5, 5, 0),
        (backward, 7, 8, 3, 5),
    ):
        with count_bytes(monkeypatch) as total, chosen_splits() as splits:
            launch()
        P = splits[0]
        expected = S * B * D * (arrays * T + vectors + per_program * (P - 1)) + 8 * B * T
        expected += 8 * sums * P * B * D
        if bias:
            # every program reads it; its gradient is one partial sum more
            expected += S * P * B * D + (8 * P * B * D + S * D if sums else 0)
        assert sum(total.values()) == expected


def test_splits_change_only_the_order_of_sums(monkeypatch):
    inputs, douts = make(1, 9, D, bias=True)
    expected = run(kernel(), inputs, douts)
    monkeypatch.setattr(kernels, "split_rows", lambda x, groups, num_loads: (2, 6))
    found = run(kernel(), inputs, douts)
    # x', h, h2, dx and dy
    assert bitwise_equal(expected[:5], found[:5])
    for a, b in zip(expected[5:], found[5:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_definition(dtype):
    """Two calls of the reference with one modulation each, and fp64 runs it."""
    inputs, _ = make(1, 3, 8, dtype, bias=True, affine=True)
    x, y, gate, shift, scale, shift2, scale2, weight, norm_bias, bias = inputs
    expected = kernel(function=gated_residual_adaln_ref)(*inputs)
    affine = {"norm_weight": weight, "norm_bias": norm_bias}
    first = gated_residual_adaln_ref(x, y, gate, shift, scale, bias=bias, **affine)
    alone = adaln_ref(first[0], shift2, scale2, **affine)
    assert bitwise_equal(expected, (*first, alone))
    assert bitwise_equal(kernel(backend="torch")(*inputs), expected)
    if dtype == torch.float64:
        assert bitwise_equal(kernel()(*inputs), expected)
        leaves = [t.detach().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(kernel(), leaves)


def adaln(norm, group=None, backend="triton"):
    def fn(x, shift, scale, shift2, scale2, weight, norm_bias):
        return ops.adaln(
            *(x, shift, scale),
            norm=norm,
            norm_weight=weight,
            norm_bias=norm_bias,
            group=group,
            second=(shift2, scale2),
            backend=backend,
        )

    return fn


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vectors, norm", [("shared", "layer"), ("group", "rms")])
def test_adaln(vectors, norm, backend):
    """The first block of a model, where nothing is added before the norm."""
    (x, _, _, *rest, _), (_, *douts) = make(vectors=vectors, affine=True)
    group = groups(vectors)
    written = naive(norm, group)
    plain = lambda x, *rest: written(x, torch.zeros_like(x), None, *rest, None)[1:]
    check_against_fp64(adaln(norm, group, backend), plain, plain, (x, *rest), douts)


def test_operator_registration():
    (x, y, gate, shift, scale, shift2, scale2, _, _, bias), (dx, dh, dh2) = make(1, 2, bias=True)
    full = (x, y, bias, gate, shift, scale, shift2, scale2, 1e-6, False, None, True)
    torch.library.opcheck(_two_fwd, full)
    x_new, _, _, mean, rstd = _two_fwd(*full)
    torch.library.opcheck(
        _two_bwd, (dx, dh, dh2, x_new, y, bias, gate, scale, scale2, mean, rstd, True)
    )


def test_compiles_without_graph_breaks():
    inputs, douts = make(bias=True, affine=True)
    fn = lambda *a: tuple(t.sin() for t in kernel()(*a))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, T, D), (B, 0, D)], ids=str)
def test_empty_batch(shape):
    inputs, douts = make(*shape, bias=True)
    given = [t for t in inputs if t is not None]
    for grad, like in zip(run(kernel(), inputs, douts)[3:], given, strict=True):
        assert grad.shape == like.shape and not grad.any()


@pytest.mark.parametrize("name", ["adaln", "gated_residual_adaln"])
def test_rejects_bad_input(name):
    x, y = torch.randn(2, B, T, D)
    v = torch.randn(B, D)
    fn = {
        "adaln": ops.adaln,
        "gated_residual_adaln": lambda x, *a, **kw: ops.gated_residual_adaln(x, y, v, *a, **kw),
    }[name]
    pair = r"expected second \(shift, scale\), got"
    cases = [
        ((v, v), v, f"{pair} Tensor$"),
        ((v, v), (v,), rf"{pair} \['Tensor'\]$"),
        ((v, v), (v, None), "expected second scale as a tensor, got NoneType$"),
        ((v, None), (v, v), "expected shift and scale beside second, got None$"),
        ((None, v), (v, v), "expected shift and scale beside second, got None$"),
        ((v, v), (v[:, 1:], v), r"expected x.* second shift, second scale .*shift \[2, 71\]"),
        ((v, v), (v, torch.randn(B, 4, D)), r"expected x.*second scale \[2, 4, 72\]$"),
        ((v, v), (v.long(), v), "expected floating-point tensors, got .*second shift torch.int64"),
    ]
    for first, second, message in cases:
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            fn(x, *first, second=second)
