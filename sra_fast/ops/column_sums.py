"""The sum over the rows of a matrix: the gradient of a bias."""

from torch import Tensor

from sra_fast.kernels import column_sums as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._register import register


def column_sums_ref(x: Tensor) -> Tensor:
    """The definition, in fp32."""
    return upcast(x).sum(0).to(x.dtype)


# sums [N] of a contiguous x [M, N], on a device with kernels
column_sums = register(
    "column_sums(Tensor x) -> Tensor", kernels.column_sums, lambda x: x.new_empty(x.shape[1])
)
