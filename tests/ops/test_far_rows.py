"""Rows beyond element 2^31 of the [B, T, D] arrays, in memory that is reserved but hardly touched."""

import pytest
import torch
from conftest import DEVICE
from rows import as_tuple, bitwise_equal, launchers

from sra_fast.kernels import adaln, gated_residual, gated_residual_adaln, per_token

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="needs memory that is only reserved")
# the last image begins at element 2^31
B, T, D = 5, 2**23, 64


def near(*shape, dtype):
    return torch.randn(*(2 if n == T else n for n in shape)).to(dtype)


def far(*shape, dtype):
    """Rows whose first two tokens of every image are those of ``near``."""
    rows = near(*shape, dtype=dtype)
    if T not in shape:
        return rows
    if len(shape) == 3 and shape[-1] > D:
        # slices of one projection, in less memory: images overlap after the first two tokens
        flat = torch.empty(((B - 1) * D + shape[-1]) * T, dtype=dtype)
        x = flat.as_strided(shape, (T * D, shape[-1], 1))
    else:
        x = torch.empty(shape, dtype=dtype)
    x[:, :2] = rows
    return x


@pytest.mark.parametrize("variant", ["image", "token"])
@pytest.mark.parametrize("name", launchers(1, 1, 8, torch.float32))
def test_every_kernel(name, variant, monkeypatch):
    # one program per image, which walks two rows; outputs are not poisoned, which would touch all
    # of them
    for module in (adaln, gated_residual, gated_residual_adaln, per_token):
        monkeypatch.setattr(module, "split_rows", lambda x, groups, num_loads: (1, 2))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    results = []
    for make in (near, far):
        torch.manual_seed(0)
        out = launchers(B, T, D, torch.float16, variant=variant, make=make)[name]()
        results.append([t[:, :2] if t.dim() > 1 else t for t in as_tuple(out)])
    assert bitwise_equal(*results)
