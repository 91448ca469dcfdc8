"""The start of a half-block: residual update, modulated norm, and the linear layer after it."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops._half_block import (
    Residual,
    as_rows,
    as_tokens,
    check_layer,
    check_norm_inputs,
    h_dtype,
    layer_backward,
    norm_forward,
    prepare,
    unfused,
    upstream_gradients,
    weight_gradient,
)
from sra_fast.ops._register import apply, guard_double_backward
from sra_fast.ops.concat_columns import concat_columns


def _backward(
    needs_grad: tuple[bool, bool, bool], parts: int, dx_new: Tensor | None, *tensors: Any
):
    """Gradients of every tensor input of ``_AdaLNLinear``, None for the group.

    ``needs_grad`` says whether any input of the norm, the weight and the bias want one.
    """
    needs_norm, needs_weight, needs_bias = needs_grad
    douts = tensors[:parts]
    weight, h, *saved = tensors[parts:]
    # gradient of the whole output as rows, and of the bias
    if parts > 1:
        dout, dbias = concat_columns([as_rows(part) for part in douts])
    else:
        # not flatten, for which vmap (is_grads_batched) has no rule
        dout = douts[0].reshape(-1, weight.shape[0])
        dbias = dout.sum(0) if needs_bias else None
    # through the layer and the norm, which recomputes h if the forward did not keep it
    recompute_h = h is None and needs_weight
    grads, recomputed = layer_backward(needs_norm, recompute_h, dx_new, dout, weight, *saved)
    dweight = None
    if needs_weight:
        dweight = weight_gradient(dout, recomputed if h is None else h)
    return *grads, None, dweight, dbias if needs_bias else None


class _AdaLNLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, y, y_bias, gate, shift, scale, group, weight, bias, eps, rms, recompute, parts
    ):
        x_new, h, mean, rstd = norm_forward(
            x, y, y_bias, gate, shift, scale, group, eps, rms, weight.dtype
        )
        needs_weight, needs_bias = ctx.needs_input_grad[7:9]
        ctx.needs_grad = (any(ctx.needs_input_grad[:6]), needs_weight, needs_bias)
        if y is not None and not any(ctx.needs_input_grad[:4]):
            ctx.mark_non_differentiable(x_new)
        # only the gradient of the weight reads h
        kept = None if recompute or not needs_weight else h
        ctx.save_for_backward(weight, kept, x_new, y, y_bias, gate, shift, scale, group, mean, rstd)
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        out = as_tokens(F.linear(h.flatten(0, 1), weight, bias), x)
        out = out.chunk(parts, dim=2) if parts > 1 else (out,)
        return out if y is None else (x_new, *out)

    @staticmethod
    def backward(ctx, *grads):
        weight, kept, x_new, *rest = ctx.saved_tensors
        upstream = upstream_gradients(grads, x_new, weight, ctx.parts)
        backward = partial(_backward, ctx.needs_grad, ctx.parts)
        gradients = guard_double_backward(
            "adaln_linear", backward, *upstream, weight, kept, x_new, *rest
        )
        # eps, rms, recompute and parts have none
        return *gradients, None, None, None, None


def adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Residual | None = None,
    norm: str = "layer",
    group: Tensor | None = None,
    recompute: bool = False,
    parts: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """``x' = x + gate (y + y_bias)`` and ``(norm(x') (1 + scale) + shift) @ weight^T + bias``.

    It is ``gated_residual_adaln`` (without ``residual``: ``adaln``) and a linear layer, with one
    difference: with ``recompute`` the output of the norm is not kept for the gradient of
    ``weight``. The backward pass over the norm recomputes it, which moves 2 bytes per element more
    in half precision.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        shift: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; or ``[B,
            G, D]`` with ``group``. A column slice of the 6*D adaLN projection is used in place.
        scale: as ``shift``.
        weight: ``[N, D]`` of x's dtype, or of any dtype if x is fp32: the norm then rounds to the
            weight's.
        bias: ``[N]`` of the weight's dtype or None.
        eps: added to the variance, or to the mean square of RMS.
        residual: ``(y, gate)`` or ``(y, gate, y_bias)``: output ``[B, T, D]`` and gate (as
            ``shift``) of the half-block that ends, and the bias ``[D]`` that its last layer left
            out. None: x' is x.
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
        group: ``[B, T]`` integers in [0, G) or None; see ``adaln``.
        recompute: recompute the output of the norm in the backward pass instead of keeping it.
            Only the kernels can.
        parts: 1, 2 or 3: return the output in this many equal parts, such as queries, keys and
            values. They are views of one tensor and, as with ``chunk``, cannot be changed in
            place. One pass puts their gradients side by side and makes the gradient of ``bias``;
            it does not take several gradients at once (``is_grads_batched``).
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x' [B, T, D], out [B, T, N])``, x' in x's dtype, out in the weight's (under autocast in
        autocast's); with several ``parts`` out is a tuple of ``[B, T, N / parts]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    operator = "adaln_linear"
    N = check_layer(operator, x, None, weight, bias)
    if type(parts) is not int or parts not in (1, 2, 3) or N % parts:
        raise ValueError(
            f"{operator}: expected parts 1, 2 or 3 that divide the {N} outputs of weight, got {parts}"
        )
    inputs = check_norm_inputs(operator, x, residual, shift, scale, group, norm, eps)
    prepared = prepare(operator, inputs, backend, recompute, weight, bias)
    if prepared is None:
        x, h = unfused(operator, inputs, eps, norm, h_dtype(x, weight), backend)
        out = F.linear(h, weight, bias)
        outputs = out.chunk(parts, dim=2) if parts > 1 else (out,)
    else:
        outputs = apply(_AdaLNLinear, *prepared, weight, bias, eps, norm == "rms", recompute, parts)
        # with a residual the Function returns x' first
        if residual is not None:
            x, *outputs = outputs
    return x, tuple(outputs) if parts > 1 else outputs[0]
