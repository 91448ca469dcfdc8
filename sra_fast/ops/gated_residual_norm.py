"""The residual update with a normed branch, "sandwich norm" (Lumina-Image 2.0, Z-Image)."""

import torch
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import (
    Vector,
    broadcast_to_tokens,
    check_inputs,
    frames_as_images,
    is_per_token,
    runs_kernel,
    summed_in_fp32,
)
from sra_fast.ops._per_token import run_per_token, with_tables_that_fit
from sra_fast.ops._register import apply, guard_double_backward, wants_grad
from sra_fast.ops.adaln import NORMS, adaln_bwd, adaln_fwd, check_norm


def gated_residual_norm_ref(
    x: Tensor,
    y: Tensor,
    gate: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> Tensor:
    """The definition, in fp32, rounded once."""
    yhat = NORMS[norm](upcast(y), y.shape[-1:], eps=eps)
    if norm_weight is not None:
        yhat = yhat * upcast(norm_weight)
    if gate is not None:
        yhat = yhat * broadcast_to_tokens(gate, x, group)
    return (upcast(x) + yhat).to(x.dtype)


class _GatedResidualNorm(torch.autograd.Function):
    """The kernels of ``adaln``, whose forward adds the stream to its output."""

    @staticmethod
    def forward(ctx, x, y, factor, group, eps, rms):
        y = y.contiguous()
        out, mean, rstd = adaln_fwd(y, None, factor, group, eps, rms, x.dtype, True, x.contiguous())
        # not x: no gradient depends on it
        ctx.save_for_backward(y, factor, group, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, dout):
        y, factor, group, mean, rstd = ctx.saved_tensors
        dy, _, dfactor, _ = guard_double_backward(
            "gated_residual_norm",
            adaln_bwd,
            *(dout.contiguous(), y, factor, group, mean, rstd, None, False, True),
        )
        # the gradient of x is that of the output itself
        return dout, dy, None if factor is None else dfactor, None, None, None


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    group: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * (norm(y) * norm_weight)``, computed in fp32 and rounded once.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous. The
            kernel takes D <= 8192. fp64 and wider rows run the reference; wider rows are logged
            once.
        y: ``[B, T, D]`` output of the attention or the MLP, any of these dtypes; copied first
            unless contiguous.
        gate: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; ``[B, F,
            D]`` or ``[B, T, D]``, one per frame or token; ``[B, G, D]`` with ``group``; or a pair
            ``(vectors, table)``; see ``adaln``. A function of it, such as ``tanh(gate)``, costs
            one small operation on ``[B, D]``. None: 1.
        eps: added to the mean square, or to the variance of ``"layer"``.
        norm: ``"rms"`` or ``"layer"``, both without weights of their own.
        norm_weight: ``[D]`` or None: 1. It costs no pass over y: it is multiplied with the gate.
        group: ``[B, T]`` integers in [0, G) or None; see ``gated_residual``.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    operator = "gated_residual_norm"
    (vectors,) = check_inputs(
        operator,
        x,
        {"y": y},
        {"gate": gate},
        group,
        channels={"norm_weight": norm_weight},
        optional=("gate",),
        within_image=True,
    )
    check_norm(operator, norm, eps)
    # fp64, empty tensors and very wide rows
    if not runs_kernel(operator, kernels, backend, x, y, vectors, norm_weight):
        out = gated_residual_norm_ref(
            x, y, vectors, eps, norm=norm, norm_weight=norm_weight, group=group
        )
        # as a kernel would return it, whatever strides x has
        return out.contiguous()
    if is_per_token([vectors], x, group):
        affine = (norm_weight, None)
        # a weight and one table: two sums, as of both tables of a modulation
        (vectors,) = with_tables_that_fit((vectors,), x, has_affine=False)
        options = {"eps": eps, "norm": norm, "dtype": x.dtype, "residual": x, "is_factor": True}
        return run_per_token(
            operator, y, None, None, None, None, vectors, affine=affine, **options
        )[1]
    # without a gate a group says nothing
    group = None if vectors is None else group
    factor = vectors
    if norm_weight is not None:
        # as small as the gate, and fp32: no row is read
        if vectors is None:
            factor = summed_in_fp32(norm_weight).expand(x.shape[0], x.shape[2])
        else:
            factor = norm_weight.float() * vectors.float()
    stream, branch = x, y
    if group is None:
        (stream, branch), (factor,) = frames_as_images((x, y), [factor])
    # the kernel takes any strides of the factor but the last
    factor = with_dense_columns(factor)
    group = None if group is None else group.contiguous()
    options = (factor, group, eps, norm == "rms")
    if wants_grad(x, y, factor):
        out = apply(_GatedResidualNorm, stream, branch, *options)
    else:
        stream = stream.contiguous()
        out, _, _ = adaln_fwd(branch.contiguous(), None, *options, x.dtype, True, stream)
    return out.view_as(x) if out.shape != x.shape else out
