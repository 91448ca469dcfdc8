"""Columns side by side, and their sums."""

import pytest
import torch
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES

from sra_fast.kernels import concat_columns as concat_kernels
from sra_fast.ops.adaln_linear import _concat


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, D, K", [(1, 8, 1), (5, 1, 2), (7, 100, 3), (40, 128, 2), (33, 1152, 3)]
)
def test_columns_side_by_side(M, D, K, dtype):
    """Also of parts with rows further apart, and that begin in the middle of a vector."""
    torch.manual_seed(0)
    room = torch.randn(K, M, D + 9, device=DEVICE).to(dtype)
    for parts in (
        [part[:, :D].contiguous() for part in room],
        [part[:, 1 : D + 1] for part in room],
    ):
        out, sums = _concat(parts)
        assert torch.equal(out, torch.cat(parts, dim=1)) and sums.dtype == dtype
        assert_kernel_close(sums, out.sum(0), out.double().sum(0).float(), floor=1e-5)


def test_partial_sums_of_columns(monkeypatch):
    parts = [*torch.randn(3, 41, 72, device=DEVICE)]
    few = _concat(parts)
    for splits in (1, 2, 3):
        monkeypatch.setattr(concat_kernels, "num_splits", lambda *args, splits=splits: splits)
        out, sums = _concat(parts)
        assert torch.equal(out, few[0])
        torch.testing.assert_close(sums, few[1], atol=1e-5, rtol=1e-5)


def test_columns_are_an_operator():
    torch.library.opcheck(_concat, ([*torch.randn(3, 6, 32, device=DEVICE)],))
