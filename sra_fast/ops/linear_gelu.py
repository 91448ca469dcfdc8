"""The first half of an MLP: a linear layer and tanh-GELU, for inference in one product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, autocast, use_triton
from sra_fast.ops._register import register, wants_grad


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition: two operators, with the product rounded between them."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # cuBLASLt's epilogue adds the bias and takes tanh-GELU of the fp32 sums: GELU needs no pass
    # over [M, N]
    # torch's type hints leave out private functions
    addmm_gelu = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
    return addmm_gelu(bias, x, weight.t(), use_gelu=True)


_op = register(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _product,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu_tanh(x @ weight^T + bias)``; without a gradient, on CUDA, GELU is the product's
    epilogue.

    That is how the teacher and a sampler run it. Where a gradient is wanted, GELU's backward needs
    the product before GELU, so two operators run.

    Args:
        x: ``[..., K]`` fp32/bf16/fp16/fp64.
        weight: ``[N, K]`` of x's dtype.
        bias: ``[N]`` of x's dtype.
        backend: ``"triton"`` (here: the epilogue), ``"torch"`` or ``"auto"``; default:
        ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    fits = (
        x.dim() >= 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
    )
    # autocast chooses the dtypes itself
    if fits and autocast(x):
        return linear_gelu_ref(x, weight, bias)
    given = (x, weight, bias)
    alike = all(t.dtype == x.dtype and t.device == x.device for t in given)
    if not fits or not alike or x.dtype not in FLOAT_DTYPES:
        got = [([*t.shape], str(t.dtype), str(t.device)) for t in given]
        raise ValueError(
            "expected x [..., K], weight [N, K] and bias [N] of one floating dtype and device, "
            f"got {got}"
        )
    # on a CPU the product's epilogue is another GELU
    if not use_triton(x, backend) or not x.is_cuda or x.numel() == 0 or wants_grad(*given):
        return linear_gelu_ref(x, weight, bias)
    return _op(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
