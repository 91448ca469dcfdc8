"""adaLN-Zero building block: LayerNorm without affine, then per-image shift and scale (DiT, arXiv 2212.09748, Sec. 3.2)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.ops._backend import upcast, use_triton
from sra_fast.ops._register import register


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, in fp32.  Tests, benchmarks and backend="torch" all use this one function."""
    xhat = F.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    return (xhat * (1 + upcast(scale)[:, None]) + upcast(shift)[:, None]).to(x.dtype)


_fwd = register(
    "adaln_fwd(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    kernels.adaln_fwd,
    lambda x, shift, scale, eps: (
        x.new_empty(x.shape),
        *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)),
    ),
)
_bwd = register(
    "adaln_bwd(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    kernels.adaln_bwd,
    lambda dy, x, scale, mean, rstd: (x.new_empty(x.shape), *(scale.new_empty(scale.shape) for _ in range(2))),
)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        y, mean, rstd = _fwd(x, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, scale, mean, rstd = ctx.saved_tensors
        return *_bwd(dy.contiguous(), x, scale, mean, rstd), None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` with one read and one write of ``x``.

    Args:
        x: ``[B, T, D]`` tokens, bf16/fp16/fp32 (fp64 runs the reference).
        shift: ``[B, D]``; may be a column slice of the 6*D adaLN projection.
        scale: ``[B, D]``; same strides as ``shift``.
        eps: added to the variance.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: the shapes do not fit, or ``backend`` is unknown.
    """
    if x.dim() != 3 or shift.shape != (x.shape[0], x.shape[2]) or scale.shape != shift.shape:
        raise ValueError(
            f"expected x [B, T, D] and shift, scale [B, D], got {[*x.shape]}, {[*shift.shape]}, {[*scale.shape]}"
        )
    if not use_triton(x, backend):
        return adaln_ref(x, shift, scale, eps)
    if shift.stride() != scale.stride() or shift.stride(-1) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    return _AdaLN.apply(x.contiguous(), shift, scale, eps)
