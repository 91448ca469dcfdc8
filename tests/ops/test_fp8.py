"""The operators that make and read fp8 rows, against fp32; what the kernels cost on sm_90 and
sm_100.
"""

from dataclasses import replace

import pytest
import torch
from codegen import ARCHS, compile_kernels, record_launches
from fp8_rows import BACKENDS, assert_rounded, random, unrounded  # noqa: F401 (a fixture)

from sra_fast import ops
from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops.fp8 import adaln_fp8, gated_residual_adaln_fp8, linear_fp8
from sra_fast.ops.quantize_rows import quantize_rows

# upper limit of registers per thread
REGISTERS = 144


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [64, 384, 1152])
def test_modulated_norms_in_fp8(device, backend, D):
    B, T = 2, 7
    x = random(B, T, D, device=device)
    y = random(B, T, D, seed=1, device=device)
    gate, shift, scale = random(B, 6 * D, seed=2, device=device).chunk(6, dim=1)[2:5]
    expected = ops.adaln(x, shift, scale, backend="torch")
    assert_rounded(adaln_fp8(x, shift, scale, backend=backend), expected)
    x_new, h = gated_residual_adaln_fp8(x, y, gate, shift, scale, backend=backend)
    x_ref, h_ref = ops.gated_residual_adaln(x, y, gate, shift, scale, backend="torch")
    torch.testing.assert_close(x_new, x_ref)
    assert_rounded(h, h_ref)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modulated_norms_of_groups_in_fp8(device, backend):
    B, T, D = 2, 7, 384
    x = random(B, T, D, device=device)
    y = random(B, T, D, seed=1, device=device)
    gate, shift, scale = random(B, 3, 6 * D, seed=2, device=device).chunk(6, dim=2)[2:5]
    group = (torch.arange(B * T, device=device).view(B, T) * 5 % 3).int()
    expected = ops.adaln(x, shift, scale, group=group, backend="torch")
    assert_rounded(adaln_fp8(x, shift, scale, group=group, backend=backend), expected)
    x_new, h = gated_residual_adaln_fp8(x, y, gate, shift, scale, group=group, backend=backend)
    x_ref, h_ref = ops.gated_residual_adaln(x, y, gate, shift, scale, group=group, backend="torch")
    torch.testing.assert_close(x_new, x_ref)
    assert_rounded(h, h_ref)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_multiplies_the_quantized_numbers(device, with_bias):
    x = quantize_rows(random(2, 5, 64, device=device), backend="torch")
    weight = quantize_rows(random(48, 64, seed=1, device=device), backend="torch")
    bias = random(48, seed=2, device=device).bfloat16() if with_bias else None
    out = linear_fp8(x, weight, bias)
    expected = x.dequantize().double() @ weight.dequantize().double().t()
    if bias is not None:
        expected += bias.double()
    assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 48)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=0.02)


def test_error_of_a_linear_layer_in_fp8(device):
    """Two roundings of at most 1/16 each: about 4 % in norm for random data, not more."""
    x = random(256, 512, device=device)
    weight = random(256, 512, seed=1, device=device)
    exact = x.double() @ weight.double().t()
    out = linear_fp8(quantize_rows(x), quantize_rows(weight)).double()
    error = (out - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05, error


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_fp8(quantize_rows(random(4, 24)), quantize_rows(random(16, 24)))
    with pytest.raises(ValueError, match=r"expected x \[B, T, D\]"):
        adaln_fp8(random(4, 24), random(4, 24), random(4, 24))


def test_operator_registration(monkeypatch, device):
    # with the kernels' own e4m3: a fake has the dtypes of the schema
    monkeypatch.undo()
    x = random(2, 4, 32, device=device)
    mod = random(2, 32, device=device)
    tests = ("test_schema", "test_faketensor")
    adaln = torch.ops.sra_fast.adaln_fp8.default
    torch.library.opcheck(adaln, (x, mod, mod, None, 1e-6), test_utils=tests)
    fused = torch.ops.sra_fast.gated_residual_adaln_fp8.default
    torch.library.opcheck(fused, (x, x, mod, mod, mod, None, 1e-6), test_utils=tests)
    mod = mod.view(2, 1, 32).expand(2, 3, 32).contiguous()
    group = torch.zeros(2, 4, dtype=torch.int32, device=device)
    torch.library.opcheck(fused, (x, x, mod, mod, mod, group, 1e-6), test_utils=tests)


def test_compiles_without_spills_and_with_wide_accesses(monkeypatch):
    monkeypatch.undo()
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    with record_launches(adaln_kernels, fused_kernels) as launches:
        for D in (384, 768, 1024, 1152):
            x = meta(4, 256, D)
            mod = meta(4, 6 * D)[:, :D]
            scale = meta(4, 256, 1, dtype=torch.float32)
            adaln_kernels.adaln_fwd(x, mod, mod, None, 1e-6, False, y_scale=scale)
            fused_kernels.gated_residual_adaln_fwd(
                x, x, None, mod, mod, mod, None, 1e-6, False, h_scale=scale
            )
        # two groups of tokens per image
        mod = meta(4, 2, 6 * D)[:, :, :D]
        group = meta(4, 256, dtype=torch.int32)
        adaln_kernels.adaln_fwd(x, mod, mod, group, 1e-6, False, y_scale=scale)
        fused_kernels.gated_residual_adaln_fwd(
            x, x, None, mod, mod, mod, group, 1e-6, False, h_scale=scale
        )
    requests = [replace(launch, arch=arch) for launch in launches for arch in ARCHS if arch >= 90]
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        told = (request.module, request.arch, request.args, report)
        assert report.spills == 0 and report.registers <= REGISTERS, told
        # 8 columns of the head per thread: 128 bits of bf16 in, 64 bits of e4m3 out
        assert report.loads[128] + report.loads[64] >= 1, told
        assert report.stores[64] + report.stores[128] >= 1, told
