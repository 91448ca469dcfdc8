"""fp8 rows and the operators that make and read them, against fp32; what the kernels cost on an sm_90 and sm_100."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from codegen import compile_kernels, record_launches
from rows import count_bytes
from triton import knobs

from sra_fast import ops
from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.kernels import quantize_rows as quantize_kernels
from sra_fast.ops.fp8 import (
    E4M3,
    Rows,
    adaln_fp8,
    gated_residual_adaln_fp8,
    linear_fp8,
    quantize_rows,
)

BACKENDS = ["torch", "triton"]
# registers per thread
BUDGET = {
    "_adaln_fwd_kernel": 144,
    "_gated_residual_adaln_fwd_kernel": 144,
    **quantize_kernels.REGISTERS,
}


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    """The interpreter rounds to e4m3 wrongly (0.0306 becomes 0.0156): there the kernels store what they would round in fp32."""
    if knobs.runtime.interpret:
        for module in (adaln_kernels, fused_kernels, quantize_kernels):
            monkeypatch.setattr(module, "E4M3", torch.float32)


def assert_rounded(rows: Rows, expected):
    """The nearest e4m3 numbers, in rows that use its range."""
    assert rows.values.dtype in (E4M3, torch.float32) and rows.values.shape == expected.shape
    assert rows.scale.dtype == torch.float32 and rows.scale.shape == (*expected.shape[:-1], 1)
    torch.testing.assert_close(
        rows.scale, expected.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448, rtol=1e-5, atol=0
    )
    if rows.values.dtype == E4M3:  # half a step of normal numbers, and of subnormal ones
        step = 2**-4 * expected.abs() + 2**-10 * rows.scale
    else:
        step = 1e-5 * expected.abs() + 1e-6 * rows.scale * 448
    assert ((rows.dequantize() - expected).abs() <= step * 1.01).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("K", [64, 130, 384, 1152, 4608, 1200, 2500])
def test_quantize_rows(device, backend, gelu, K):
    x = (
        random(5, K, device=device)
        * torch.tensor([1e-6, 0.1, 1.0, 30.0, 0.0], device=device)[:, None]
    )
    expected = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    assert_rounded(quantize_rows(x, gelu=gelu, backend=backend), expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_layout(device, backend):
    x = random(4, 3, 32, device=device).transpose(0, 1)
    assert_rounded(quantize_rows(x, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [64, 384, 1152])
def test_modulated_norms_in_fp8(device, backend, D):
    B, T = 2, 7
    x, y, mod = (
        random(B, T, D, device=device),
        random(B, T, D, seed=1, device=device),
        random(B, 6 * D, seed=2, device=device),
    )
    gate, shift, scale = mod.chunk(6, dim=1)[2:5]
    assert_rounded(
        adaln_fp8(x, shift, scale, backend=backend), ops.adaln(x, shift, scale, backend="torch")
    )
    x_new, h = gated_residual_adaln_fp8(x, y, gate, shift, scale, backend=backend)
    x_ref, h_ref = ops.gated_residual_adaln(x, y, gate, shift, scale, backend="torch")
    torch.testing.assert_close(x_new, x_ref)
    assert_rounded(h, h_ref)


def test_linear_against_the_product_of_what_was_quantised(device):
    x, weight = (
        quantize_rows(t, backend="torch")
        for t in (random(2, 5, 64, device=device), random(48, 64, seed=1, device=device))
    )
    bias = random(48, seed=2, device=device).bfloat16()
    for b in (bias, None):
        out = linear_fp8(x, weight, b)
        expected = x.dequantize().double() @ weight.dequantize().double().t() + (
            0 if b is None else b.double()
        )
        assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 48)
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=0.02)


def test_error_of_a_linear_layer_in_fp8(device):
    """Two roundings of at most 1/16 each: about 4 % in norm for random data, not more."""
    x, weight = random(256, 512, device=device), random(256, 512, seed=1, device=device)
    exact = x.double() @ weight.double().t()
    error = (
        linear_fp8(quantize_rows(x), quantize_rows(weight)).double() - exact
    ).norm() / exact.norm()
    assert 0.01 < error < 0.05, error


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="floating-point"):
        quantize_rows(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_fp8(quantize_rows(random(4, 24)), quantize_rows(random(16, 24)))
    with pytest.raises(ValueError, match=r"expected x \[B, T, D\]"):
        adaln_fp8(random(4, 24), random(4, 24), random(4, 24))


def test_schemas(monkeypatch, device):
    monkeypatch.undo()
    x, mod = random(2, 4, 32, device=device), random(2, 32, device=device)
    torch.library.opcheck(
        torch.ops.sra_fast.quantize_rows.default,
        (x.view(8, 32), True),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.sra_fast.adaln_fp8.default,
        (x, mod, mod, 1e-6),
        test_utils=("test_schema", "test_faketensor"),
    )
    fused = torch.ops.sra_fast.gated_residual_adaln_fp8.default
    torch.library.opcheck(
        fused, (x, x, mod, mod, mod, 1e-6), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_spills_and_with_wide_accesses(monkeypatch):
    monkeypatch.undo()
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    with record_launches(adaln_kernels, fused_kernels, quantize_kernels) as launches:
        for D in (384, 768, 1024, 1152):
            x, mod, scale = (
                meta(4, 256, D),
                meta(4, 6 * D)[:, :D],
                meta(4, 256, 1, dtype=torch.float32),
            )
            adaln_kernels.adaln_fwd(x, mod, mod, None, 1e-6, False, y_scale=scale)
            fused_kernels.gated_residual_adaln_fwd(
                x, x, None, mod, mod, mod, None, 1e-6, False, h_scale=scale
            )
            for dtype in (torch.bfloat16, torch.float32):
                quantize_kernels.quantize_rows(meta(1024, 4 * D, dtype=dtype), True)
                quantize_kernels.quantize_rows(meta(3 * D, D, dtype=dtype), False)
    requests = [replace(launch, arch=arch) for launch in launches for arch in (90, 100)]
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        told = (request.module, request.arch, request.args, report)
        assert report.spills == 0 and report.registers <= BUDGET[request.kernel], told
        # 8 columns of the head, or of a piece, per thread: 128 bits of bf16 in, 64 bits of e4m3 out
        assert (
            report.loads[128] + report.loads[64] >= 1
            and report.stores[64] + report.stores[128] >= 1
        ), told
        if request.kernel == "_quantize_rows_kernel":
            pieces = request.args["PIECES"]
            assert report.loads == {128: pieces * request.bits("x") // 16}, told
            assert report.stores == {64: pieces, 32: 1} and report.barriers <= 2, told


@pytest.mark.skipif(not knobs.runtime.interpret, reason="counts in the interpreter")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("K", [200, 4608])
def test_bytes_of_quantize_rows(K, gelu, monkeypatch):
    monkeypatch.undo()
    M = 3
    with count_bytes(monkeypatch) as seen:
        quantize_kernels.quantize_rows(random(M, K, dtype=torch.bfloat16), gelu)
    assert sum(seen.values()) == 3 * M * K + 4 * M


def test_gelu_far_from_zero(device):
    """What it tends to: 0 and x, although its intermediate values overflow."""
    x = torch.tensor([[-1e4, -50.0, -20.0, -6.0, 0.0, 6.0, 20.0, 1e4]] * 2, device=device).repeat(
        1, 8
    )
    rows = quantize_rows(x, gelu=True, backend="triton")
    expected = F.gelu(x.double(), approximate="tanh").float()
    assert_rounded(rows, expected)
    assert rows.dequantize()[0, 0] == 0 and rows.dequantize()[0, 7].item() == pytest.approx(
        1e4, rel=1e-6
    )
