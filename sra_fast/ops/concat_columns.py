"""Matrices side by side and the sums of their columns, for the gradient of queries, keys and
values.
"""

import torch
from torch import Tensor

from sra_fast.kernels import concat_columns as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._register import register


def concat_columns_ref(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition: the parts ``[M, D]`` as ``[M, K D]``, and its sum over rows, in fp32."""
    out = torch.cat(parts, dim=1)
    return out, upcast(out).sum(0).to(out.dtype)


def _fake(parts):
    M, D = parts[0].shape
    columns = len(parts) * D
    return parts[0].new_empty(M, columns), parts[0].new_empty(columns)


# out [M, K D] and sums [K D] of one to three parts [M, D] with dense columns, on a device with
# kernels
concat_columns = register(
    "concat_columns(Tensor[] parts) -> (Tensor, Tensor)", kernels.concat_columns, _fake
)
