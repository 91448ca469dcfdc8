"""SwiGLU: its two kernels, after a linear layer, and as the activation of ``adaln_mlp``."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES, OpLog, bitwise_equal, check_against_fp64, run
from test_adaln_linear import make
from torch.utils.checkpoint import checkpoint

from sra_fast import ops
from sra_fast.kernels import swiglu as kernels
from sra_fast.ops.linear_swiglu import linear_swiglu_ref
from sra_fast.ops.swiglu import run_swiglu, swiglu_bwd, swiglu_bwd_ref, swiglu_fwd


def naive(x):
    """What a codebase writes, in the dtype it is given."""
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def exact(x):
    """The formula, not PyTorch's silu."""
    first, second = x.chunk(2, dim=-1)
    return first / (1 + (-first).exp()) * second


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N", [(1, 16), (7, 100), (33, 256), (3, 640)])
def test_both_passes(M, N, dtype):
    """Against fp64, with plain PyTorch in the same dtype as the yardstick."""
    x = torch.randn(M, 2 * N, device=DEVICE) * 4
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    # zeros, the slope around them, and the flat end
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 60.0, -60.0])
    x = x.to(dtype)
    results = []
    for fn, given, up in ((naive, x, dy), (exact, x.double(), dy.double())):
        leaf = given.detach().requires_grad_()
        y = fn(leaf)
        (dx,) = torch.autograd.grad(y, leaf, up)
        results.append((y.detach(), dx, dx.sum(0), y.detach()))
    ours = (swiglu_fwd(x), *swiglu_bwd(dy, x, True, True))
    assert bitwise_equal(ours[:1], ours[3:])
    for a, b, c in zip(ours, *results, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert_kernel_close(a, b, c.float(), floor=4e-6 * c.abs().max().item())
    for a, c in zip(
        swiglu_bwd_ref(dy.double(), x.double(), True, True), results[1][1:], strict=True
    ):
        torch.testing.assert_close(a, c, atol=1e-9, rtol=1e-9)


def test_sum_and_output_are_optional():
    x = torch.randn(7, 200, device=DEVICE)
    dy = torch.randn(7, 100, device=DEVICE)
    dx, dbias, y = swiglu_bwd(dy, x, True, True)
    for recompute_y in (False, True):
        for needs_dbias in (False, True):
            found = swiglu_bwd(dy, x, recompute_y, needs_dbias)
            assert torch.equal(found[0], dx)
            assert torch.equal(found[1], dbias if needs_dbias else dbias[:0])
            assert torch.equal(found[2], y if recompute_y else y.new_empty(0))
            fake = swiglu_bwd_ref(dy, x, recompute_y, needs_dbias)
            assert [t.shape for t in fake] == [t.shape for t in found]


def test_splits_change_only_the_order_of_sums(monkeypatch):
    x = torch.randn(23, 96, device=DEVICE)
    dy = torch.randn(23, 48, device=DEVICE)
    expected = swiglu_bwd(dy, x, True, True)
    expected_y = swiglu_fwd(x)
    for splits in (1, 5, 12):
        monkeypatch.setattr(kernels, "num_splits", lambda *args, splits=splits: splits)
        dx, dbias, y = swiglu_bwd(dy, x, True, True)
        assert bitwise_equal((dx, y, swiglu_fwd(x)), (expected[0], expected[2], expected_y))
        torch.testing.assert_close(dbias, expected[1], atol=1e-5, rtol=1e-5)


def test_operator_registration():
    x = torch.randn(6, 64, device=DEVICE)
    torch.library.opcheck(swiglu_fwd, (x,))
    for flags in ((False, True), (True, False)):
        torch.library.opcheck(swiglu_bwd, (x[:, :32].contiguous(), x, *flags))


# with a linear layer before it


def layer(*lead, D=24, K=40, dtype=torch.float32):
    randn = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    return randn(*lead, D), randn(2 * K, D) / D**0.5, randn(2 * K)


def triton(x, weight, bias=None):
    return ops.linear_swiglu(x, weight, bias, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(7,), (2, 5), (1,), ()], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(with_bias, lead, dtype):
    x, weight, bias = layer(*lead, dtype=dtype)
    inputs = [x, weight, bias if with_bias else None]
    dout = torch.randn(*lead, 40, device=DEVICE, dtype=dtype)
    plain = lambda x, w, b=None: naive(F.linear(x, w, b))
    truth = lambda x, w, b=None: exact(F.linear(x, w, b))
    check_against_fp64(triton, plain, truth, inputs, [dout], floor=2e-5)
    with torch.no_grad():
        out = triton(*inputs)
    assert torch.equal(out, run(triton, inputs, [dout])[0])
    torch.testing.assert_close(out, linear_swiglu_ref(*inputs), atol=1e-2, rtol=1e-2)


def test_linear_keeps_the_product_only():
    """And runs without an autograd.Function where no gradient is wanted; fp64 has the reference."""
    x, weight, bias = layer(5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_swiglu("linear_swiglu", F.linear(x, weight, bias).requires_grad_(), "triton")
    assert [t.shape for t in saved] == [(5, 80)]
    with OpLog() as log:
        triton(x, weight, bias)
        triton(*(t.double() for t in (x, weight, bias)))
        triton(x[:0], weight, bias)
        ops.linear_swiglu(x, weight, bias, backend="torch")
    assert log.names.count("sra_fast::swiglu_fwd") == 1


def test_linear_follows_autocast():
    x, weight, bias = layer(5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ops.linear_swiglu(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_linear_second_derivative_raises():
    x, weight, bias = layer(5)
    out = triton(x.requires_grad_(), weight, bias)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^linear_swiglu: can be differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[:, :23], w, b),
        lambda x, w, b: (x, w[:79], b[:79]),
        lambda x, w, b: (x, w, b[:40]),
        lambda x, w, b: (x.half(), w, b),
        lambda x, w, b: (x, w.to("meta"), b),
        lambda x, w, b: (x, w[0], b),
    ],
)
def test_bad_input_is_named(change):
    message = r"^linear_swiglu: expected x \[\.\.\., D\], weight \[2 K, D\] and bias \[2 K\]"
    with pytest.raises(ValueError, match=message):
        ops.linear_swiglu(*change(*layer(4)))


# as the activation of the half-block


def half_block(K=48, dtype=torch.float32, **kw):
    """The tensors of ``adaln_mlp`` with K hidden columns, and gradients of both outputs."""
    inputs, group, douts = make("mlp", K=K, dtype=dtype, **kw)
    D = inputs[0].shape[2]
    randn = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    inputs[6:8] = randn(2 * K, D) / D**0.5, randn(2 * K)
    return inputs, group, douts


def mlp(backend="triton", **options):
    def fn(x, y, y_bias, gate, shift, scale, *layers):
        residual = None if y is None else (y, gate, y_bias)
        options_ = options | {"activation": "swiglu", "residual": residual, "backend": backend}
        out = ops.adaln_mlp(x, shift, scale, *layers, **options_)
        return out if residual else out[1]

    return fn


def naive_mlp(x, y, y_bias, gate, shift, scale, w1, b1, w2, b2=None):
    """What LightningDiT's block computes, with LayerNorm."""
    x = x + gate[:, None] * (y + y_bias)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return x, F.linear(naive(F.linear(h, w1, b1)), w2, b2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp(dtype, recompute):
    inputs, _, douts = half_block(dtype=dtype)
    check_against_fp64(mlp(recompute=recompute), naive_mlp, mlp("torch"), inputs, douts, floor=2e-5)
    # and the definition is what a codebase writes
    wide = [t.double() for t in inputs]
    for a, b in zip(mlp("torch")(*wide), naive_mlp(*wide), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_mlp_of_groups_with_rms_norm(recompute):
    inputs, group, douts = half_block(groups=2)
    options = {"norm": "rms", "group": group}
    ours = run(mlp(recompute=recompute, **options), inputs, douts)
    truth = run(mlp("torch", **options), inputs, douts, torch.float64)
    for a, c in zip(ours, truth, strict=True):
        size = max(1.0, c.abs().max().item())
        torch.testing.assert_close(a.double(), c, atol=2e-5 * size, rtol=1e-5)


def test_mlp_without_biases_and_residual():
    inputs, _, douts = half_block()
    inputs[1:4] = [None] * 3
    x, y, y_bias, gate, shift, scale, w1, _, w2, _ = inputs
    fn = lambda backend: (
        lambda x, w1, w2: mlp(backend)(x, None, None, None, shift, scale, w1, None, w2)
    )
    double = lambda x, w1, w2: mlp("torch")(
        x, None, None, None, shift.double(), scale.double(), w1, None, w2
    )
    ours = run(fn("triton"), [x, w1, w2], douts[1:])
    truth = run(double, [x, w1, w2], douts[1:], torch.float64)
    for a, c in zip(ours, truth, strict=True):
        size = max(1.0, c.abs().max().item())
        torch.testing.assert_close(a.double(), c, atol=2e-5 * size, rtol=1e-5)


@pytest.mark.parametrize("recompute, arrays", [(False, 3), (True, 2)])
def test_mlp_keeps_what_it_must(recompute, arrays):
    """The product [B T, 2 K], and the hidden layer [B T, K] unless it is recomputed."""
    inputs, _, _ = half_block(K=48)
    leaves = [t.detach().requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(recompute=recompute)(*leaves)
    hidden = [t for t in saved if t.shape[-1] in (48, 96) and t.numel() in (10 * 48, 10 * 96)]
    assert sum(t.numel() for t in hidden) == arrays * 10 * 48


@pytest.mark.parametrize("frozen", [[6, 7], [8, 9], [6, 7, 8, 9]], ids=str)
def test_mlp_with_frozen_layers(frozen):
    """Gradients of the others are the same, and nothing is recomputed for a weight without one."""
    inputs, _, douts = half_block()
    all_grads = run(mlp(recompute=True), inputs, douts)[2:]
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    out = mlp(recompute=True)(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(out, wanted, douts)
    expected = [grad for i, grad in enumerate(all_grads) if i not in frozen]
    assert bitwise_equal(found, expected)


def test_mlp_in_a_checkpoint_and_compiled():
    inputs, _, douts = half_block()
    expected = run(mlp(), inputs, douts)
    checkpointed = lambda *a: checkpoint(mlp(recompute=True), *a, use_reentrant=False)
    for a, b in zip(run(checkpointed, inputs, douts), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(mlp(), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_mlp_refuses_what_does_not_fit():
    x, y, y_bias, gate, shift, scale, w1, b1, w2, b2 = half_block()[0]
    call = lambda w1, b1, w2, activation: ops.adaln_mlp(
        x, shift, scale, w1, b1, w2, b2, activation=activation
    )
    for args, message in (
        ((w1, b1, w2, "silu"), r"activation must be one of \('gelu_tanh', 'swiglu'\), got 'silu'"),
        (
            (w1[:95], b1[:95], w2, "swiglu"),
            r"expected weight1 \[2 K, D\] for swiglu, got \[95, 72\]",
        ),
        ((w1, b1, w2[:, :47], "swiglu"), r"expected weight2 \[N, 48\]"),
        ((w1, b1, w2, "gelu_tanh"), r"expected weight2 \[N, 96\]"),
    ):
        with pytest.raises(ValueError, match=f"^adaln_mlp: {message}"):
            call(*args)
