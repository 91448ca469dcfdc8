"""An fp32 residual stream with half-blocks in half precision: each array is moved once, in its own
dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import check_against_fp64, count_bytes, run

from sra_fast import ops
from sra_fast.kernels import _rows
from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.gated_residual_adaln import gated_residual_adaln_ref

# the interpreter truncates to bf16 where the device rounds
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SIZES = [(2, 5, 64), (1, 17, 72), (3, 4, 1152)]


def make(B, T, D, K=96):
    """x in fp32; y, gate, shift, scale and the layers' parameters in half precision; gradients of
    x' and of the outputs.
    """
    torch.manual_seed(0)
    half = lambda *shape: torch.randn(*shape, device=DEVICE).to(HALF)
    gate, shift, scale = half(B, 6 * D).chunk(6, dim=-1)[2:5]
    layers = [half(K, D) / D**0.5, half(K), half(D, K) / K**0.5, half(D)]
    x, dx = (torch.randn(B, T, D, device=DEVICE) for _ in range(2))
    return (x, half(B, T, D), gate, shift, scale), layers, dx, half(B, T, D), half(B, T, K)


def naive(x, y, gate, shift, scale):
    """What autocast does: stream and norm in fp32, the input of a product in half precision."""
    x = x + gate[:, None].float() * y.float()
    xhat = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x, (xhat * (1 + scale[:, None].float()) + shift[:, None].float()).to(HALF)


def in_double(function):
    """The reference; for fp64 inputs no output dtype is requested."""
    return lambda *inputs: function(
        *inputs, dtype=None if inputs[0].dtype == torch.float64 else HALF
    )


@pytest.mark.parametrize("B, T, D", SIZES)
def test_adaln(B, T, D):
    (x, _, _, shift, scale), _, _, dh, _ = make(B, T, D)
    kernel = lambda *t: ops.adaln(*t, dtype=HALF, backend="triton")
    plain = lambda x, shift, scale: naive(x, torch.zeros_like(x), scale, shift, scale)[1]
    check_against_fp64(kernel, plain, in_double(adaln_ref), (x, shift, scale), [dh])


@pytest.mark.parametrize("B, T, D", SIZES)
def test_gated_residual_adaln(B, T, D):
    inputs, _, dx, dh, _ = make(B, T, D)
    kernel = lambda *t: ops.gated_residual_adaln(*t, dtype=HALF, backend="triton")
    check_against_fp64(kernel, naive, in_double(gated_residual_adaln_ref), inputs, [dx, dh])
    dtypes = [t.dtype for t in run(kernel, inputs, [dx, dh])]
    assert dtypes == [torch.float32, HALF, torch.float32, *[HALF] * 4]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", ["linear", "mlp"])
@pytest.mark.parametrize("B, T, D", SIZES)
def test_half_blocks(op, B, T, D, recompute):
    """The layer's dtype decides the dtype of the norm's output; x' stays fp32."""
    inputs, layers, dx, dh, dout = make(B, T, D)
    operator, layers = (ops.adaln_linear, layers[:2]) if op == "linear" else (ops.adaln_mlp, layers)

    def ours(backend):
        return lambda x, y, gate, shift, scale, *layers: operator(
            x, shift, scale, *layers, residual=(y, gate), recompute=recompute, backend=backend
        )

    def plain(x, y, gate, shift, scale, w1, b1, w2=None, b2=None):
        x, h = naive(x, y, gate, shift, scale)
        out = F.linear(h, w1, b1)
        return x, out if w2 is None else F.linear(F.gelu(out, approximate="tanh"), w2, b2)

    douts = [dx, dout if op == "linear" else dh]
    check_against_fp64(ours("triton"), plain, ours("torch"), (*inputs, *layers), douts, floor=2e-5)
    assert [t.dtype for t in ours("torch")(*inputs, *layers)] == [torch.float32, HALF]


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's accesses")
def test_bytes_per_element(monkeypatch):
    """12 forward and 18 backward: x, x' and their gradients 4 each, y, h and theirs 2.

    Recomputing h adds 2, and 2 for the shift, which every row loads, from the cache.
    """
    monkeypatch.setattr(_rows, "num_splits", lambda *args: 1)
    B, T, D = 1, 64, 128
    (x, y, gate, shift, scale), _, dx, dh, _ = make(B, T, D)
    elements = B * T * D
    found = []
    calls = [
        lambda: fused_kernels.gated_residual_adaln_fwd(
            x, y, None, gate, shift, scale, None, 1e-6, False, HALF
        ),
        lambda: fused_kernels.gated_residual_adaln_bwd(
            dx, dh, x, y, None, gate, scale, None, mean, mean, None
        ),
        lambda: fused_kernels.gated_residual_adaln_bwd(
            dx, dh, x, y, None, gate, scale, None, mean, mean, shift
        ),
        lambda: adaln_kernels.adaln_fwd(x, shift, scale, None, 1e-6, False, HALF),
        lambda: adaln_kernels.adaln_bwd(dh, x, scale, None, mean, mean, None),
    ]
    mean = torch.ones(B, T)
    for call in calls:
        with count_bytes(monkeypatch) as total:
            call()
        found.append(sum(total.values()) / elements)
    # vectors, statistics and partial sums on top: with one program per image less than a byte per
    # element
    assert all(
        0 <= each - exact < 0.9 for each, exact in zip(found, (12, 18, 22, 6, 10), strict=True)
    ), found


def test_a_compiler_and_the_operators_agree():
    inputs, layers, dx, dh, _ = make(2, 5, 72)
    fused = torch.ops.sra_fast.gated_residual_adaln_fwd.default
    single = torch.ops.sra_fast.adaln_fwd.default
    x, y, gate, shift, scale = inputs
    torch.library.opcheck(fused, (x, y, None, gate, shift, scale, None, 1e-6, False, HALF))
    torch.library.opcheck(single, (x, shift, scale, None, 1e-6, False, HALF))
    eager = lambda *t: ops.gated_residual_adaln(*t, dtype=HALF, backend="triton")
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, [dx, dh]), run(eager, inputs, [dx, dh]), strict=True):
        assert torch.equal(a, b)


def test_bad_dtypes():
    (x, y, gate, shift, scale), (w1, b1, w2, b2), *_ = make(2, 5, 72)
    for call in (
        lambda: ops.adaln(x, shift, scale, dtype=torch.int32),
        lambda: ops.gated_residual_adaln(x, y, gate, shift, scale, dtype=torch.int32),
    ):
        with pytest.raises(
            ValueError, match="expected a floating-point dtype of the output, got torch.int32"
        ):
            call()
    with pytest.raises(
        ValueError, match="expected weight .* of dtype"
    ):  # a stream in half precision needs weights of its dtype
        ops.adaln_linear(x.to(HALF), shift, scale, w1.float(), b1.float())
    with pytest.raises(ValueError, match="expected weight2 .* of dtype"):
        ops.adaln_mlp(x, shift, scale, w1, b1, w2.float(), b2.float())
    with pytest.raises(ValueError, match="expected weight .* of dtype"):
        ops.adaln_linear(x, shift, scale, w1, b1.float())
