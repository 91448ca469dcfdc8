"""The sum over the rows of a matrix."""

import pytest
import torch
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES

from sra_fast.kernels import column_sums as kernels
from sra_fast.ops.column_sums import column_sums, column_sums_ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N", [(1, 8), (5, 1), (7, 100), (40, 128), (100, 1152), (64, 4608)])
def test_sums(M, N, dtype):
    x = torch.randn(M, N, device=DEVICE).to(dtype)
    sums = column_sums(x)
    assert sums.dtype == dtype and sums.shape == (N,)
    assert_kernel_close(sums, x.sum(0), column_sums_ref(x.double()).float(), floor=1e-5)


def test_splits_change_only_the_order_of_sums(monkeypatch):
    x = torch.randn(75, 200, device=DEVICE)
    expected = column_sums(x)
    for splits in (1, 2, 3):
        monkeypatch.setattr(kernels, "num_splits", lambda *args, splits=splits: splits)
        torch.testing.assert_close(column_sums(x), expected, atol=1e-5, rtol=1e-5)


def test_operator_registration():
    torch.library.opcheck(column_sums, (torch.randn(6, 32, device=DEVICE),))
