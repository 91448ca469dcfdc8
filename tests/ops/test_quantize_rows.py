"""Rows in e4m3 against fp32, and what the kernel costs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from codegen import ARCHS, compile_kernels, record_launches
from fp8_rows import BACKENDS, assert_rounded, random, unrounded  # noqa: F401 (a fixture)
from rows import count_bytes
from triton import knobs

from sra_fast.kernels import quantize_rows as kernels
from sra_fast.ops.quantize_rows import quantize_rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("K", [64, 130, 384, 1152, 4608, 1200, 2500])
def test_quantize_rows(device, backend, gelu, K):
    magnitudes = torch.tensor([1e-6, 0.1, 1.0, 30.0, 0.0], device=device)
    x = random(5, K, device=device) * magnitudes[:, None]
    expected = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    assert_rounded(quantize_rows(x, gelu=gelu, backend=backend), expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_layout(device, backend):
    x = random(4, 3, 32, device=device).transpose(0, 1)
    assert_rounded(quantize_rows(x, backend=backend), x)


def test_gelu_far_from_zero(device):
    """GELU tends to 0 and to x, although the kernel's intermediate values overflow."""
    values = [-1e4, -50.0, -20.0, -6.0, 0.0, 6.0, 20.0, 1e4]
    x = torch.tensor([values] * 2, device=device).repeat(1, 8)
    rows = quantize_rows(x, gelu=True, backend="triton")
    assert_rounded(rows, F.gelu(x.double(), approximate="tanh").float())
    first = rows.dequantize()[0]
    assert first[0] == 0
    assert first[7].item() == pytest.approx(1e4, rel=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="floating-point"):
        quantize_rows(torch.zeros(3, 4, dtype=torch.int64))


def test_operator_registration(monkeypatch, device):
    # with the kernel's own e4m3: a fake has the dtypes of the schema
    monkeypatch.undo()
    op = torch.ops.sra_fast.quantize_rows.default
    inputs = (random(8, 32, device=device), True)
    torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_spills_and_with_wide_accesses(monkeypatch):
    monkeypatch.undo()
    meta = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
    with record_launches(kernels) as launches:
        for D in (384, 768, 1024, 1152):
            for dtype in (torch.bfloat16, torch.float32):
                kernels.quantize_rows(meta(1024, 4 * D, dtype=dtype), True)
                kernels.quantize_rows(meta(3 * D, D, dtype=dtype), False)
    requests = [replace(launch, arch=arch) for launch in launches for arch in ARCHS if arch >= 90]
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        told = (request.arch, request.args, report)
        assert report.spills == 0, told
        assert report.registers <= kernels.REGISTERS[request.kernel], told
        # 8 columns of each block per thread: 128 bits of bf16 in, 64 bits of e4m3 out
        blocks = request.args["NUM_BLOCKS"]
        assert report.loads == {128: blocks * request.bits("x") // 16}, told
        assert report.stores == {64: blocks, 32: 1} and report.barriers <= 2, told


@pytest.mark.skipif(not knobs.runtime.interpret, reason="counts in the interpreter")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("K", [200, 4608])
def test_bytes(K, gelu, monkeypatch):
    monkeypatch.undo()
    M = 3
    with count_bytes(monkeypatch) as seen:
        kernels.quantize_rows(random(M, K, dtype=torch.bfloat16), gelu)
    assert sum(seen.values()) == 3 * M * K + 4 * M
