"""The first half of an MLP: a linear layer and tanh-GELU, for inference in one product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops._backend import autocast, check_linear, use_triton
from sra_fast.ops._register import register, wants_grad


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``gelu_tanh(x @ weight^T + bias)``; without a gradient, on CUDA, GELU is the product's
    epilogue.

    That is how the teacher and a sampler run it. Where a gradient is wanted, GELU's backward needs
    the product before GELU, so two operators run.

    Args:
        x: ``[..., K]`` fp32/bf16/fp16/fp64.
        weight: ``[N, K]`` of x's dtype.
        bias: ``[N]`` of x's dtype or None.
        backend: ``"triton"`` (here: the epilogue), ``"torch"`` or ``"auto"``; default:
            ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    shapes = "x [..., K], weight [N, K] and bias [N]"
    check_linear("linear_gelu", x, weight, bias, shapes)
    return run_linear_gelu("linear_gelu", x, weight, bias, backend)


def run_linear_gelu(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None
) -> Tensor:
    """``linear_gelu`` of inputs that ``operator`` has checked; errors begin with its name."""
    kernel = use_triton(operator, x, backend) and not autocast(x)
    # on a CPU the product's epilogue is another GELU
    if not kernel or not x.is_cuda or x.numel() == 0 or wants_grad(x, weight, bias):
        return linear_gelu_ref(x, weight, bias)
    # the epilogue always adds a bias
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return _op(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
