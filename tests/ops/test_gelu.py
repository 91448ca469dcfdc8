"""GELU's backward pass, with the gradient of the bias before it and its output once more."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES, bitwise_equal

from sra_fast.kernels import gelu as gelu_kernels
from sra_fast.ops.adaln_mlp import _gelu_bwd


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N", [(1, 16), (7, 100), (33, 512), (5, 640), (12, 4608)])
def test_gelu_backward(M, N, dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(M, N, device=DEVICE) * 4, torch.randn(M, N, device=DEVICE)
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 60.0, -60.0])
    x, dy = x.to(dtype).requires_grad_(), dy.to(dtype)
    naive, wide = F.gelu(x, approximate="tanh"), x.detach().double().requires_grad_()
    (naive_dx,) = torch.autograd.grad(naive, x, dy)
    exact = F.gelu(wide, approximate="tanh")
    (exact_dx,) = torch.autograd.grad(exact, wide, dy.double())
    dx, dbias, y = _gelu_bwd(dy, x.detach(), True)
    for ours, theirs, truth in (
        (dx, naive_dx, exact_dx),
        (dbias, naive_dx.sum(0), exact_dx.sum(0)),
        (y, naive, exact),
    ):
        assert ours.dtype == dtype
        assert_kernel_close(
            ours, theirs.detach(), truth.float(), floor=4e-6 * truth.abs().max().item()
        )
    again = _gelu_bwd(dy, x.detach(), False)
    assert bitwise_equal(again[:2], (dx, dbias)) and again[2].numel() == 0


def test_splits_change_nothing_but_the_order_of_sums(monkeypatch):
    dy, x = torch.randn(2, 23, 640, device=DEVICE)
    few = _gelu_bwd(dy, x, True)
    for splits in (1, 5, 12):
        monkeypatch.setattr(gelu_kernels, "num_splits", lambda *args, splits=splits: splits)
        dx, dbias, y = _gelu_bwd(dy, x, True)
        assert bitwise_equal((dx, y), (few[0], few[2]))
        torch.testing.assert_close(dbias, few[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_operator_registration(again):
    torch.library.opcheck(_gelu_bwd, (*torch.randn(2, 6, 32, device=DEVICE), again))
