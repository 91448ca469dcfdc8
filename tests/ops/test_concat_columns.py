"""Matrices side by side, and the sums of their columns."""

import pytest
import torch
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES

from sra_fast.kernels import concat_columns as kernels
from sra_fast.ops.concat_columns import concat_columns, concat_columns_ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, D, K", [(1, 8, 1), (5, 1, 2), (7, 100, 3), (40, 128, 2), (33, 1152, 3)]
)
def test_columns_side_by_side(M, D, K, dtype):
    """Contiguous parts, and parts with rows further apart that begin in the middle of a vector."""
    room = torch.randn(K, M, D + 9, device=DEVICE).to(dtype)
    contiguous = [part[:, :D].contiguous() for part in room]
    misaligned = [part[:, 1 : D + 1] for part in room]
    for parts in (contiguous, misaligned):
        out, sums = concat_columns(parts)
        assert torch.equal(out, torch.cat(parts, dim=1)) and sums.dtype == dtype
        _, exact = concat_columns_ref([part.double() for part in parts])
        assert_kernel_close(sums, out.sum(0), exact.float(), floor=1e-5)


def test_splits_change_only_the_order_of_sums(monkeypatch):
    parts = [*torch.randn(3, 41, 72, device=DEVICE)]
    expected_out, expected_sums = concat_columns(parts)
    for splits in (1, 2, 3):
        monkeypatch.setattr(kernels, "num_splits", lambda *args, splits=splits: splits)
        out, sums = concat_columns(parts)
        assert torch.equal(out, expected_out)
        torch.testing.assert_close(sums, expected_sums, atol=1e-5, rtol=1e-5)


def test_operator_registration():
    torch.library.opcheck(concat_columns, ([*torch.randn(3, 6, 32, device=DEVICE)],))
