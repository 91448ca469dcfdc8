"""The residual update of an adaLN-Zero block (DiT, arXiv 2212.09748, Sec. 3.2)."""

from typing import Any

import torch
from torch import Tensor

from sra_fast.kernels import gated_residual as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import (
    Vector,
    broadcast_to_tokens,
    check_inputs,
    frames_as_images,
    is_per_token,
    runs_kernel,
)
from sra_fast.ops._per_token import run_per_token, with_tables_that_fit
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad


def gated_residual_ref(
    x: Tensor,
    y: Tensor,
    gate: Vector | None,
    *,
    bias: Tensor | None = None,
    group: Tensor | None = None,
) -> Tensor:
    """The definition, in fp32, rounded once."""
    y = upcast(y) if bias is None else upcast(y) + upcast(bias)
    if gate is not None:
        y = broadcast_to_tokens(gate, x, group) * y
    return (upcast(x) + y).to(x.dtype)


def _fake_bwd(dx_new, y, bias, gate, group):
    dy = y.new_empty(y.shape)
    dgate = gate.new_empty(gate.shape)
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dy, dgate, dbias


gated_residual_fwd = register(
    "gated_residual_fwd(Tensor x, Tensor y, Tensor? bias, Tensor? gate, Tensor? group) -> Tensor",
    kernels.gated_residual_fwd,
    lambda x, y, bias, gate, group: x.new_empty(x.shape),
)
gated_residual_bwd = register(
    "gated_residual_bwd(Tensor dx_new, Tensor y, Tensor? bias, Tensor gate, Tensor? group)"
    " -> (Tensor, Tensor, Tensor)",
    kernels.gated_residual_bwd,
    _fake_bwd,
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, group):
        y = y.contiguous()
        # not x: no gradient depends on it, nor without a gate on y
        ctx.save_for_backward(None if gate is None else y, bias, gate, group)
        ctx.y_dtype = y.dtype
        return gated_residual_fwd(x.contiguous(), y, bias, gate, group)

    @staticmethod
    def backward(ctx, dx_new):
        y, bias, gate, group = ctx.saved_tensors
        if gate is None:
            # a sum: every gradient is that of x' itself
            dbias = None if bias is None else dx_new.sum((0, 1)).to(bias.dtype)
            return dx_new, dx_new.to(ctx.y_dtype), dbias, None, None
        dx_new = dx_new.contiguous()
        dy, dgate, dbias = guard_double_backward(
            "gated_residual", gated_residual_bwd, dx_new, y, bias, gate, group
        )
        # the gradient of x is that of x' itself
        return dx_new, dy, None if bias is None else dbias, dgate, None


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Vector | None,
    *,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * (y + bias)``, computed in fp32 and rounded once.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous. The
            kernel takes D <= 8192. fp64 and wider rows run the reference; wider rows are logged
            once.
        y: ``[B, T, D]`` output of the attention or the MLP, any of these dtypes; copied first
            unless contiguous.
        gate: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; ``[B, F,
            D]`` with F a divisor of T, one for each T / F tokens in a row (a frame of a video);
            ``[B, T, D]``, one per token; or ``[B, G, D]`` with ``group``. A column slice of the
            6*D adaLN projection is used in place. A function of it, such as ``tanh(gate)``, costs
            one small operation on ``[B, D]``. Or a pair ``(vectors, table)``; see ``adaln``. None:
            1, the plain residual.
        bias: ``[D]`` or None. The bias of the linear layer that made ``y``, if that layer left it
            out. Its gradient then comes out of the backward pass over ``y`` and needs no pass of
            its own.
        group: ``[B, T]`` integers in [0, G): which of an image's G vectors a token takes. Out of
            range the reference raises and the kernel takes the nearest vector.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    (gate,) = check_inputs(
        "gated_residual",
        x,
        {"y": y},
        {"gate": gate},
        group,
        channels={"bias": bias},
        optional=("gate",),
        within_image=True,
    )
    return run_gated_residual("gated_residual", x, y, bias, gate, group, backend)


def run_gated_residual(
    operator: str,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Any,
    group: Tensor | None,
    backend: str | None,
) -> Tensor:
    """``gated_residual`` of inputs that ``operator`` has checked; errors begin with its name."""
    # fp64, empty tensors and very wide rows
    if not runs_kernel(operator, kernels, backend, x, y, gate):
        # as a kernel would return it, whatever strides x has
        return gated_residual_ref(x, y, gate, bias=bias, group=group).contiguous()
    if is_per_token([gate], x, group):
        (gate,) = with_tables_that_fit((gate,), x, has_affine=False)
        return run_per_token(operator, x, y, bias, gate, None, None)[0]
    # without a gate a group says nothing
    group = None if gate is None else group
    rows = (x, y)
    if group is None:
        rows, (gate,) = frames_as_images(rows, [gate])
    # the kernel takes any strides of the gate but the last
    gate = with_dense_columns(gate)
    bias = with_dense_columns(bias)
    group = None if group is None else group.contiguous()
    if wants_grad(x, y, bias, gate):
        out = apply(_GatedResidual, *rows, bias, gate, group)
    else:
        out = gated_residual_fwd(rows[0].contiguous(), rows[1].contiguous(), bias, gate, group)
    return out.view_as(x) if out.shape != x.shape else out
