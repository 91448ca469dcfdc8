"""GELU's backward pass, with the gradient of the bias before it and GELU's output recomputed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES, bitwise_equal

from sra_fast.kernels import gelu as kernels
from sra_fast.ops.gelu import gelu_bwd, gelu_bwd_ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N", [(1, 16), (7, 100), (33, 512), (5, 640), (12, 4608)])
def test_gelu_backward(M, N, dtype):
    """Against fp64, with plain PyTorch in the same dtype as the yardstick."""
    x = torch.randn(M, N, device=DEVICE) * 4
    dy = torch.randn(M, N, device=DEVICE)
    # zeros, the linear part around them, and the flat ends
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 60.0, -60.0])
    x = x.to(dtype).requires_grad_()
    dy = dy.to(dtype)
    y = F.gelu(x, approximate="tanh")
    (dx,) = torch.autograd.grad(y, x, dy)
    naive = (dx, dx.sum(0), y.detach())
    ours = gelu_bwd(dy, x.detach(), True)
    exact = gelu_bwd_ref(dy.double(), x.double(), True)
    for a, b, c in zip(ours, naive, exact, strict=True):
        assert a.dtype == dtype
        assert_kernel_close(a, b, c.float(), floor=4e-6 * c.abs().max().item())


def test_the_output_is_optional():
    x, dy = torch.randn(2, 7, 100, device=DEVICE)
    dx, dbias, y = gelu_bwd(dy, x, True)
    without = gelu_bwd(dy, x, False)
    assert bitwise_equal(without[:2], (dx, dbias)) and without[2].numel() == 0
    torch.testing.assert_close(y, F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-5)


def test_splits_change_only_the_order_of_sums(monkeypatch):
    dy, x = torch.randn(2, 23, 640, device=DEVICE)
    expected_dx, expected_dbias, expected_y = gelu_bwd(dy, x, True)
    for splits in (1, 5, 12):
        monkeypatch.setattr(kernels, "num_splits", lambda *args, splits=splits: splits)
        dx, dbias, y = gelu_bwd(dy, x, True)
        assert bitwise_equal((dx, y), (expected_dx, expected_y))
        torch.testing.assert_close(dbias, expected_dbias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute_y", [False, True])
def test_operator_registration(recompute_y):
    torch.library.opcheck(gelu_bwd, (*torch.randn(2, 6, 32, device=DEVICE), recompute_y))
