"""The first half of an MLP with a gate: a linear layer and SwiGLU (arXiv 2002.05202, Eq. 6)."""

import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops._backend import check_linear
from sra_fast.ops.swiglu import run_swiglu, swiglu_ref


def linear_swiglu_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: the product, rounded, then SwiGLU in fp32."""
    return swiglu_ref(F.linear(x, weight, bias))


def linear_swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``silu(a1) * a2`` of ``[a1 | a2] = x @ weight^T + bias``: one pass over the product.

    The backward pass is one more, over the product and the gradient. Both layers are one matrix, as
    LightningDiT's ``w12``; two matrices are concatenated before, ``torch.cat([w1, w2])``, silu's
    first.

    Args:
        x: ``[..., D]`` fp32/bf16/fp16/fp64.
        weight: ``[2 K, D]`` of x's dtype.
        bias: ``[2 K]`` of x's dtype or None.
        backend: ``"triton"`` (here: SwiGLU), ``"torch"`` or ``"auto"``; default:
            ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[..., K]`` in x's dtype (under autocast in autocast's).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    shapes = "x [..., D], weight [2 K, D] and bias [2 K]"
    check_linear("linear_swiglu", x, weight, bias, shapes, multiple=2)
    return run_linear_swiglu("linear_swiglu", x, weight, bias, backend)


def run_linear_swiglu(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None
) -> Tensor:
    """``linear_swiglu`` of inputs that ``operator`` has checked; errors begin with its name."""
    return run_swiglu(operator, F.linear(x, weight, bias), backend)
