"""The row operators with vectors per token: one kernel each way serves all of them."""

from typing import Any

import torch
from torch import Tensor

from sra_fast.kernels import per_token as kernels
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import Vector, split_tables, summed
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad


def _fake_fwd(
    x,
    y,
    bias,
    gate,
    weight,
    norm_bias,
    shift,
    scale,
    residual,
    eps,
    rms,
    has_norm,
    dtype=None,
    is_factor=False,
    gate_table=None,
    shift_table=None,
    scale_table=None,
):
    x_new = x.new_empty(0 if y is None else x.shape)
    h = x.new_empty(x.shape if has_norm else 0, dtype=dtype or x.dtype)
    mean = x.new_empty(x.shape[:2] if has_norm and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2] if has_norm else 0, dtype=torch.float32)
    return x_new, h, mean, rstd


def _fake_bwd(
    dx_new,
    dh,
    z,
    y,
    bias,
    gate,
    weight,
    norm_bias,
    scale,
    mean,
    rstd,
    is_factor=False,
    gate_table=None,
    shift_table=None,
    scale_table=None,
):
    first = next(t for t in (dx_new, dh) if t is not None)
    like = lambda t: first.new_empty(0) if t is None else t.new_empty(t.shape)
    grads = [like(t) for t in (z, y, gate, scale, weight, norm_bias, bias, gate_table)]
    dshift_table = first.new_empty(0 if shift_table is None else first.shape[2], dtype=shift_table)
    return *grads, dshift_table, like(scale_table)


_fwd = register(
    "per_token_fwd(Tensor x, Tensor? y, Tensor? bias, Tensor? gate, Tensor? weight,"
    " Tensor? norm_bias, Tensor? shift, Tensor? scale, Tensor? residual, float eps, bool rms,"
    " bool has_norm, ScalarType? dtype=None, bool is_factor=False, Tensor? gate_table=None,"
    " Tensor? shift_table=None, Tensor? scale_table=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.per_token_fwd,
    _fake_fwd,
)
_bwd = register(
    "per_token_bwd(Tensor? dx_new, Tensor? dh, Tensor? z, Tensor? y, Tensor? bias, Tensor? gate,"
    " Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor mean, Tensor rstd,"
    " bool is_factor=False, Tensor? gate_table=None, ScalarType? shift_table=None,"
    " Tensor? scale_table=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
    kernels.per_token_bwd,
    _fake_bwd,
)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        y,
        bias,
        gate,
        weight,
        norm_bias,
        shift,
        scale,
        residual,
        gate_table,
        shift_table,
        scale_table,
        eps,
        rms,
        has_norm,
        dtype,
        is_factor,
        operator,
    ):
        tables = (gate_table, shift_table, scale_table)
        x = x.contiguous()
        y = _contiguous(y)
        x_new, h, mean, rstd = _fwd(
            *(x, y, bias, gate, weight, norm_bias, shift, scale, _contiguous(residual)),
            *(eps, rms, has_norm, dtype, is_factor, *tables),
        )
        # neither h nor shift: no gradient depends on them, nor without a norm on x'
        z = x if y is None else x_new
        z = z if has_norm else None
        vectors = (bias, gate, weight, norm_bias, scale)
        ctx.save_for_backward(z, y, *vectors, gate_table, scale_table, mean, rstd)
        # nothing but its dtype is needed of what is only added
        ctx.dtypes = [None if t is None else t.dtype for t in (shift, residual, shift_table)]
        ctx.is_factor = is_factor
        ctx.operator = operator
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        if y is None:
            return h
        if not any((*ctx.needs_input_grad[:4], ctx.needs_input_grad[9])):
            ctx.mark_non_differentiable(x_new)
        return (x_new, h) if has_norm else x_new

    @staticmethod
    def backward(ctx, *grads):
        z, y, *vectors, gate_table, scale_table, mean, rstd = ctx.saved_tensors
        *added, shift_table = ctx.dtypes
        dx_new = None if y is None else _contiguous(grads[0])
        dh = None
        if z is not None:
            # the kernel can do without dx', not without dh
            dh = torch.zeros_like(z) if grads[-1] is None else grads[-1].contiguous()
        dx, dy, dgate, dscale, dweight, dnorm_bias, dbias, *dtables = guard_double_backward(
            *(ctx.operator, _bwd, dx_new, dh, z, y, *vectors, mean, rstd, ctx.is_factor),
            *(gate_table, shift_table, scale_table),
        )
        dgate_table, dshift_table, dscale_table = dtables
        bias, gate, weight, norm_bias, scale = vectors
        if grads[-1] is None and z is not None:
            # nobody used h, into which alone these enter
            dh = None
            dweight = None
            dnorm_bias = None
            dscale = None
            dshift_table = None
            dscale_table = None
        # the gradients of what is only added are those of the sums
        dx = dx_new if z is None else dx
        dshift, dresidual = (
            None if dh is None or dtype is None else dh.to(dtype) for dtype in added
        )
        found = zip(
            (y, bias, gate, weight, norm_bias),
            (dy, dbias, dgate, dweight, dnorm_bias),
            strict=True,
        )
        return (
            dx,
            *(None if given is None else gradient for given, gradient in found),
            dshift,
            None if scale is None else dscale,
            dresidual,
            None if gate_table is None else dgate_table,
            None if shift_table is None else dshift_table,
            None if scale_table is None else dscale_table,
            # eps, rms, has_norm, dtype, is_factor and operator have none
            *[None] * 6,
        )


def with_tables_that_fit(
    vectors: tuple[Vector | None, ...], x: Tensor, has_affine: bool
) -> tuple[Vector | None, ...]:
    """The vectors of a norm or of an update; where the sums for tables do not fit the registers,
    the tables are added in a pass over the vectors.
    """
    widest = kernels.TABLE_WIDTH_AFFINE if has_affine else kernels.TABLE_WIDTH
    return vectors if x.shape[2] <= widest else tuple(summed(vector) for vector in vectors)


def run_per_token(
    operator: str,
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Vector | None,
    shift: Vector | None,
    scale: Vector | None,
    *,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    norm: str | None = None,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    is_factor: bool = False,
) -> tuple[Any, Any]:
    """x' and h with the kernels; x' is None without y, h without a norm.

    Args:
        operator: whose errors these are.
        x: ``[B, T, D]``, as are y and residual.
        y: output of the half-block that ends, or None.
        bias: ``[D]``, added to y, or None.
        gate: ``[B, T, D]``, or with its table ``[D]`` as a pair, or None, as are shift and scale.
        shift: see ``gate``.
        scale: see ``gate``.
        affine: weight and bias ``[D]`` of the norm.
        eps: added to the variance.
        norm: None for no norm.
        dtype: of h; default: x's.
        residual: added to h, or None.
        is_factor: the norm is multiplied with ``scale``, not with 1 + scale.
    """
    (gate, shift, scale), tables = split_tables((gate, shift, scale))
    vectors = [with_dense_columns(t) for t in (bias, gate, *affine, shift, scale)]
    tables = [with_dense_columns(t) for t in tables]
    options = (eps, norm == "rms", norm is not None, dtype, is_factor)
    if wants_grad(x, y, *vectors, residual, *tables):
        out = apply(_PerToken, x, y, *vectors, residual, *tables, *options, operator)
        if y is None or norm is None:
            return (out, None) if norm is None else (None, out)
        return out
    x_new, h, _, _ = _fwd(
        *(x.contiguous(), _contiguous(y), *vectors, _contiguous(residual)), *options, *tables
    )
    return x_new if y is not None else None, h if norm is not None else None
