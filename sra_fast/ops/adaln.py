"""adaLN-Zero building block: norm without affine, then shift and scale (DiT, arXiv 2212.09748, Sec. 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._modulation import check, in_place, runs_kernel, spread
from sra_fast.ops._register import apply, once, register, wants_grad

NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}


def check_norm(norm: str) -> None:
    """Raise ValueError unless ``norm`` is one of ``NORMS``."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {tuple(NORMS)}, got {norm!r}")


def adaln_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in fp32.  Tests, benchmarks and backend="torch" all use this one function."""
    xhat = NORMS[norm](upcast(x), x.shape[-1:], eps=eps)
    return (xhat * (1 + spread(scale, group)) + spread(shift, group)).to(dtype or x.dtype)


def _fake_bwd(dy, x, scale, group, mean, rstd, shift):
    per_token = group is None and scale.dim() == 3
    dshift = x.new_empty(0) if per_token else scale.new_empty(scale.shape)
    return (
        x.new_empty(x.shape),
        dshift,
        scale.new_empty(scale.shape),
        dy.new_empty(0 if shift is None else x.shape),
    )


_fwd = register(
    "adaln_fwd(Tensor x, Tensor shift, Tensor scale, Tensor? group, float eps, bool rms, ScalarType? dtype=None)"
    " -> (Tensor, Tensor, Tensor)",
    kernels.adaln_fwd,
    lambda x, shift, scale, group, eps, rms, dtype=None: (
        x.new_empty(x.shape, dtype=dtype or x.dtype),
        x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32),
        x.new_empty(x.shape[:2], dtype=torch.float32),
    ),
)
_bwd = register(
    "adaln_bwd(Tensor dy, Tensor x, Tensor scale, Tensor? group, Tensor mean, Tensor rstd, Tensor? shift)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.adaln_bwd,
    _fake_bwd,
)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, group, eps, rms, dtype):
        x = x.contiguous()
        y, mean, rstd = _fwd(x, shift, scale, group, eps, rms, dtype)
        ctx.save_for_backward(x, scale, group, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, group, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dshift, dscale, _ = once(_bwd, dy, x, scale, group, mean, rstd, None)
        dshift = dy.to(scale.dtype) if group is None and scale.dim() == 3 else dshift
        return dx, dshift, dscale, None, None, None, None


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with one read and one write of ``x``; statistics in fp32.

    Args:
        x: ``[B, T, D]`` tokens, bf16/fp16/fp32; copied first unless contiguous.  The kernel takes D <= 5120: fp64 and
            wider rows run the reference, the latter logged once.
        shift: ``[B, D]``, or ``[B, T, D]`` for one per token, or ``[B, G, D]`` with ``group``; a column slice of the
            6*D adaLN projection is used in place.
        scale: shaped as ``shift``, with strides of its own.
        eps: added to the variance (of RMS: to the mean square).
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
        group: ``[B, T]`` integers in [0, G): which of an image's G vectors a token takes (two noise levels per image:
            G = 2).  The reference raises on others, the kernel takes the nearest.  None: one vector per image or token.
        dtype: of the output, which a product in half precision reads where x is a residual stream in fp32; default: x's.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``norm`` or ``backend`` is unknown.
    """
    check(x, {}, {"shift": shift, "scale": scale}, group, per_token=True, dtype=dtype)
    check_norm(norm)
    if not runs_kernel(kernels, backend, x, shift, scale, dtype=dtype):
        return adaln_ref(x, shift, scale, eps, norm=norm, group=group, dtype=dtype)
    group = None if group is None else group.contiguous()
    args = x, in_place(shift), in_place(scale), group, eps, norm == "rms", dtype
    return (
        apply(_AdaLN, *args) if wants_grad(x, shift, scale) else _fwd(x.contiguous(), *args[1:])[0]
    )
