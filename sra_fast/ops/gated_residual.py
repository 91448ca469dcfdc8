"""The residual update of an adaLN-Zero block (DiT, arXiv 2212.09748), alone and with the modulated norm after it."""

import torch
from torch import Tensor

from sra_fast.kernels import gated_residual as kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._modulation import check, in_place, runs_kernel, spread
from sra_fast.ops._register import apply, once, register, wants_grad
from sra_fast.ops.adaln import adaln_ref, check_norm


def gated_residual_ref(
    x: Tensor, y: Tensor, gate: Tensor, *, bias: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """The definition, in fp32, rounded once."""
    y = upcast(y) if bias is None else upcast(y) + upcast(bias)
    return (upcast(x) + spread(gate, group) * y).to(x.dtype)


def gated_residual_adaln_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: x' is rounded to x's dtype, and it is the rounded x' that is normalised."""
    x = gated_residual_ref(x, y, gate, bias=bias, group=group)
    return x, adaln_ref(x, shift, scale, eps, norm=norm, group=group, dtype=dtype)


def _empty_or(like: Tensor, shape: Tensor | None) -> Tensor:
    return like.new_empty(0) if shape is None else shape.new_empty(shape.shape)


_fwd = register(
    "gated_residual_fwd(Tensor x, Tensor y, Tensor? bias, Tensor gate, Tensor? group) -> Tensor",
    kernels.gated_residual_fwd,
    lambda x, y, bias, gate, group: x.new_empty(x.shape),
)
_bwd = register(
    "gated_residual_bwd(Tensor dx_new, Tensor y, Tensor? bias, Tensor gate, Tensor? group) -> (Tensor, Tensor, Tensor)",
    kernels.gated_residual_bwd,
    lambda dx_new, y, bias, gate, group: (
        y.new_empty(y.shape),
        gate.new_empty(gate.shape),
        _empty_or(y, bias),
    ),
)
_fused_fwd = register(
    "gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? bias, Tensor gate, Tensor shift, Tensor scale, Tensor? group,"
    " float eps, bool rms, ScalarType? dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    fused_kernels.gated_residual_adaln_fwd,
    lambda x, y, bias, gate, shift, scale, group, eps, rms, dtype=None: (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype or x.dtype),
        x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32),
        x.new_empty(x.shape[:2], dtype=torch.float32),
    ),
)
_fused_bwd = register(
    "gated_residual_adaln_bwd(Tensor? dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? bias, Tensor gate,"
    " Tensor scale, Tensor? group, Tensor mean, Tensor rstd, Tensor? shift)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fused_kernels.gated_residual_adaln_bwd,
    lambda dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd, shift: (
        *(t.new_empty(t.shape) for t in (x_new, y, gate, scale, scale)),
        _empty_or(y, bias),
        dh.new_empty(0 if shift is None else x_new.shape),
    ),
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, group):
        y = y.contiguous()
        ctx.save_for_backward(y, bias, gate, group)
        return _fwd(x.contiguous(), y, bias, gate, group)

    @staticmethod
    def backward(ctx, dx_new):
        y, bias, gate, group = ctx.saved_tensors
        dx_new = dx_new.contiguous()
        dy, dgate, dbias = once(_bwd, dx_new, y, bias, gate, group)
        return dx_new, dy, None if bias is None else dbias, dgate, None


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, group, eps, rms, dtype):
        y = y.contiguous()
        x_new, h, mean, rstd = _fused_fwd(
            x.contiguous(), y, bias, gate, shift, scale, group, eps, rms, dtype
        )
        ctx.save_for_backward(x_new, y, bias, gate, scale, group, mean, rstd)
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    def backward(ctx, dx_new, dh):
        x_new, *saved = ctx.saved_tensors
        dx_new = None if dx_new is None else dx_new.contiguous()
        dh = torch.zeros_like(x_new) if dh is None else dh.contiguous()
        dx, dy, dgate, dshift, dscale, dbias, _ = once(_fused_bwd, dx_new, dh, x_new, *saved, None)
        return (
            dx,
            dy,
            None if saved[1] is None else dbias,
            dgate,
            dshift,
            dscale,
            None,
            None,
            None,
            None,
        )


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * (y + bias)``, computed in fp32 and rounded once.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous.  The kernel takes D <= 6144:
            fp64 and wider rows run the reference, the latter logged once.
        y: ``[B, T, D]`` output of the attention or the MLP, any of these dtypes; copied first unless contiguous.
        gate: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice of the 6*D adaLN projection is used in place.
        bias: ``[D]`` or None; the bias of the linear that made ``y``, if that left it out: its gradient then comes out
            of the backward pass over ``y`` and needs none of its own.
        group: ``[B, T]`` integers in [0, G): which of an image's G vectors a token takes.  The reference raises on
            others, the kernel takes the nearest.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    check(x, {"y": y}, {"gate": gate}, group, bias=bias)
    if not runs_kernel(kernels, backend, x, y, gate):
        return gated_residual_ref(x, y, gate, bias=bias, group=group)
    group = None if group is None else group.contiguous()
    bias = None if bias is None else in_place(bias)
    args = bias, in_place(gate), group
    if wants_grad(x, y, bias, gate):
        return apply(_GatedResidual, x, y, *args)
    return _fwd(x.contiguous(), y.contiguous(), *args)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate * (y + bias)`` and ``h = norm(x') * (1 + scale) + shift``, in one pass each way.

    The gate is that of the half-block that ends, shift and scale those of the one that begins, in the same block or the
    next.  For the backward pass it keeps ``x'``, ``y`` and two numbers per token.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous.  The kernel takes D <= 3072:
            fp64 and wider rows run the reference, the latter logged once.
        y: ``[B, T, D]`` output of the half-block that ends, any of these dtypes; copied first unless contiguous.
        gate: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice of the 6*D adaLN projection is used in place.
        shift: shaped as ``gate``, with strides of its own.
        scale: shaped as ``gate``, with strides of its own.
        eps: added to the variance (of RMS: to the mean square).
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
        bias: ``[D]`` or None; see ``gated_residual``.
        group: ``[B, T]`` integers in [0, G) or None; see ``gated_residual``.
        dtype: of h, which a product in half precision reads where x is a residual stream in fp32; default: x's.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x', h)``, each ``[B, T, D]``, x' in ``x.dtype``, h in ``dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``norm`` or ``backend`` is unknown.
    """
    check(
        x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale}, group, bias=bias, dtype=dtype
    )
    check_norm(norm)
    if not runs_kernel(fused_kernels, backend, x, y, gate, shift, scale, dtype=dtype):
        return gated_residual_adaln_ref(
            x, y, gate, shift, scale, eps, norm=norm, bias=bias, group=group, dtype=dtype
        )
    group = None if group is None else group.contiguous()
    gate, shift, scale = in_place(gate), in_place(shift), in_place(scale)
    bias = None if bias is None else in_place(bias)
    args = bias, gate, shift, scale, group, eps, norm == "rms", dtype
    if wants_grad(x, y, bias, gate, shift, scale):
        return apply(_GatedResidualAdaLN, x, y, *args)
    return _fused_fwd(x.contiguous(), y.contiguous(), *args)[:2]
