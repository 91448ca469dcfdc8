"""The products of an MLP's training step with GELU, or its derivative, in their epilogue.

Operators of their own, so that a compiler sees no foreign call. They run where
``_cublaslt.available`` says so; a product for which the library has no algorithm is two operators.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops import _cublaslt
from sra_fast.ops._cublaslt import Epilogue
from sra_fast.ops._register import register


def linear_gelu_keep_ref(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: ``gelu_tanh(a)`` and ``a = x @ weight^T + bias``."""
    a = F.linear(x, weight, bias)
    return F.gelu(a, approximate="tanh"), a


def linear_dgelu_ref(dout: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """The definition: ``(dout @ weight) gelu_tanh'(a)``."""
    return torch.ops.aten.gelu_backward(dout @ weight, a, approximate="tanh")


def _launch_keep(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    a = x.new_empty(x.shape[0], weight.shape[0])
    hidden = torch.empty_like(a)
    epilogue = Epilogue.GELU_AUX_BIAS
    if (
        x.is_cuda
        and _cublaslt.available(x)
        and _cublaslt.multiply(epilogue, weight, x, hidden, aux=a, transpose=True, bias=bias)
    ):
        return hidden, a
    return linear_gelu_keep_ref(x, weight, bias)


def _launch_dgelu(dout: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    dout, weight, a = dout.contiguous(), weight.contiguous(), a.contiguous()
    da = torch.empty_like(a)
    if (
        a.is_cuda
        and _cublaslt.available(a)
        and _cublaslt.multiply(Epilogue.DGELU, weight, dout, da, aux=a)
    ):
        return da
    return linear_dgelu_ref(dout, weight, a)


def _fake_keep(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    a = x.new_empty(x.shape[0], weight.shape[0])
    return torch.empty_like(a), a


# hidden and a, both [M, N], of x [M, K], weight [N, K] and bias [N]: the bias is added, and GELU
# taken, before the sums are rounded
linear_gelu_keep = register(
    "linear_gelu_keep(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    _launch_keep,
    _fake_keep,
)
# da [M, K] of dout [M, N], weight [N, K] and a [M, K]
linear_dgelu = register(
    "linear_dgelu(Tensor dout, Tensor weight, Tensor a) -> Tensor",
    _launch_dgelu,
    lambda dout, weight, a: torch.empty_like(a, memory_format=torch.contiguous_format),
)
