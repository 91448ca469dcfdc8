"""What the tests of e4m3 rows share."""

import pytest
import torch
from triton import knobs

from sra_fast.kernels import adaln, gated_residual_adaln, quantize_rows
from sra_fast.ops.quantize_rows import E4M3, Rows

BACKENDS = ["torch", "triton"]


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    """The interpreter rounds to e4m3 wrongly (0.0306 becomes 0.0156): there kernels store fp32
    instead.
    """
    if knobs.runtime.interpret:
        for module in (adaln, gated_residual_adaln, quantize_rows):
            monkeypatch.setattr(module, "E4M3", torch.float32)


def assert_rounded(rows: Rows, expected: torch.Tensor) -> None:
    """The values are the nearest e4m3 numbers, and each row uses e4m3's whole range."""
    assert rows.values.dtype in (E4M3, torch.float32) and rows.values.shape == expected.shape
    assert rows.scale.dtype == torch.float32 and rows.scale.shape == (*expected.shape[:-1], 1)
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    torch.testing.assert_close(rows.scale, scale, rtol=1e-5, atol=0)
    if rows.values.dtype == E4M3:
        # half a step of normal numbers, and of subnormal ones
        step = 2**-4 * expected.abs() + 2**-10 * rows.scale
    else:
        step = 1e-5 * expected.abs() + 1e-6 * rows.scale * 448
    assert ((rows.dequantize() - expected).abs() <= step * 1.01).all()
