"""The second half of a block up to its gate: residual update, modulated norm and MLP with tanh-GELU
or SwiGLU.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops import _cublaslt
from sra_fast.ops._backend import autocast
from sra_fast.ops._half_block import (
    Residual,
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
from sra_fast.ops.gelu import gelu_bwd
from sra_fast.ops.gelu_products import linear_dgelu, linear_gelu_keep
from sra_fast.ops.linear_gelu import run_linear_gelu
from sra_fast.ops.linear_swiglu import run_linear_swiglu
from sra_fast.ops.swiglu import swiglu_bwd, swiglu_fwd

ACTIVATIONS = ("gelu_tanh", "swiglu")


def _activation_backward(swiglu, needs_bias1, recompute_hidden, dout, weight2, a):
    """Gradients of the activation's input ``a`` and of bias1; and the activation's output (empty
    unless ``recompute_hidden``).
    """
    if not swiglu and _cublaslt.available(a) and not recompute_hidden:
        da = linear_dgelu(dout, weight2, a)
        # a pass of its own: the epilogues that also give this sum cost more
        dbias1 = da.sum(0) if needs_bias1 else None
        return da, dbias1, a.new_empty(0)
    dhidden = (dout @ weight2).contiguous()
    if swiglu:
        da, dbias1, hidden = swiglu_bwd(dhidden, a, recompute_hidden, needs_bias1)
    else:
        da, dbias1, hidden = gelu_bwd(dhidden, a, recompute_hidden)
    return da, dbias1 if needs_bias1 else None, hidden


def _backward(swiglu, needs_grad, dx_new, dout, weight1, weight2, a, h, hidden, *saved):
    """Gradients of every tensor input of ``_AdaLNMlp``, None for the group.

    ``needs_grad`` says whether any input of the norm, weight1, bias1, weight2 and bias2 want one.
    ``a`` is the input of the activation, SwiGLU or GELU. ``h`` and ``hidden``, the inputs of the
    two layers, are None if the forward did not keep them.
    """
    needs_norm, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = needs_grad
    # not flatten, for which vmap (is_grads_batched) has no rule
    dout = dout.reshape(-1, weight2.shape[0])
    # second layer and activation, which recomputes its output if it was not kept
    input2 = hidden
    recompute_hidden = hidden is None and needs_weight2
    # empty where nobody reads it
    da = dout.new_empty(0)
    dbias1 = None
    if needs_norm or needs_weight1 or needs_bias1 or recompute_hidden:
        da, dbias1, recomputed_hidden = _activation_backward(
            swiglu, needs_bias1, recompute_hidden, dout, weight2, a
        )
        if recompute_hidden:
            input2 = recomputed_hidden
    dweight2 = weight_gradient(dout, input2) if needs_weight2 else None
    dbias2 = dout.sum(0) if needs_bias2 else None

    # first layer and norm, which recomputes h if it was not kept
    grads = (None,) * 6
    dweight1 = None
    if needs_norm or needs_weight1:
        recompute_h = h is None and needs_weight1
        grads, recomputed_h = layer_backward(needs_norm, recompute_h, dx_new, da, weight1, *saved)
        if needs_weight1:
            dweight1 = weight_gradient(da, recomputed_h if h is None else h)
    return *grads, None, dweight1, dbias1, dweight2, dbias2


class _AdaLNMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        y,
        y_bias,
        gate,
        shift,
        scale,
        group,
        weight1,
        bias1,
        weight2,
        bias2,
        eps,
        rms,
        recompute,
        swiglu,
    ):
        x_new, h, mean, rstd = norm_forward(
            x, y, y_bias, gate, shift, scale, group, eps, rms, weight1.dtype
        )
        # as rows: the products then need no reshape of their gradients
        rows = h.flatten(0, 1)
        if swiglu:
            a = F.linear(rows, weight1, bias1)
            hidden = swiglu_fwd(a)
        elif bias1 is not None and _cublaslt.available(rows):
            hidden, a = linear_gelu_keep(rows, weight1, bias1)
        else:
            a = F.linear(rows, weight1, bias1)
            hidden = F.gelu(a, approximate="tanh")
        ctx.swiglu = swiglu
        ctx.needs_grad = (any(ctx.needs_input_grad[:6]), *ctx.needs_input_grad[7:11])
        if y is not None and not any(ctx.needs_input_grad[:4]):
            ctx.mark_non_differentiable(x_new)
        # only the gradients of the weights read h and hidden
        _, needs_weight1, _, needs_weight2, _ = ctx.needs_grad
        kept_h = h if needs_weight1 and not recompute else None
        kept_hidden = hidden if needs_weight2 and not recompute else None
        norm_inputs = (x_new, y, y_bias, gate, shift, scale, group, mean, rstd)
        ctx.save_for_backward(weight1, weight2, a, kept_h, kept_hidden, *norm_inputs)
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        out = as_tokens(F.linear(hidden, weight2, bias2), x)
        return out if y is None else (x_new, out)

    @staticmethod
    def backward(ctx, *grads):
        weight1, weight2, a, kept_h, kept_hidden, x_new, *rest = ctx.saved_tensors
        upstream = upstream_gradients(grads, x_new, weight2)
        backward = partial(_backward, ctx.swiglu, ctx.needs_grad)
        gradients = guard_double_backward(
            "adaln_mlp", backward, *upstream, weight1, weight2, a, kept_h, kept_hidden, x_new, *rest
        )
        # eps, rms, recompute and swiglu have none
        return *gradients, None, None, None, None


def adaln_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Residual | None = None,
    norm: str = "layer",
    group: Tensor | None = None,
    activation: str = "gelu_tanh",
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate (y + y_bias)`` and ``gelu_tanh(h @ weight1^T + bias1) @ weight2^T + bias2``.

    h is the modulated norm of x'. With ``activation="swiglu"`` the hidden layer is
    ``silu(a1) * a2`` of ``[a1 | a2] = h @ weight1^T + bias1`` (arXiv 2002.05202): one pass over the
    product forward, and one backward, which also gives the gradient of ``bias1``.

    In half precision on CUDA, GELU is the epilogue of the first product and its derivative that of
    the second one's input gradient (``SRA_FAST_CUBLASLT=0`` switches both off); otherwise the
    gradient of ``bias1`` comes out of GELU's backward pass. Without a gradient GELU is the epilogue
    of the first product (``linear_gelu``).

    With ``recompute`` neither h nor the activation's output is kept: the backward passes over the
    norm and over the activation recompute them, which moves 2 bytes per element more in half
    precision. An MLP of four times the width keeps nine arrays ``[B, T, D]`` with GELU (h, GELU's
    input and output); recompute leaves four.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        shift: see ``adaln_linear``.
        scale: see ``adaln_linear``.
        weight1: ``[K, D]`` of x's dtype, or of any dtype if x is fp32: everything inside then has
            the weight's. With SwiGLU ``[2 K, D]``, silu's half first, as LightningDiT's ``w12``.
        bias1: ``[K]``, with SwiGLU ``[2 K]``, or None.
        weight2: ``[N, K]``.
        bias2: ``[N]``. Or None: whoever adds the output to the residual stream can add the bias
            too, and gets its gradient in the same pass.
        eps: see ``adaln_linear``, also for the remaining arguments.
        residual: see ``adaln_linear``.
        norm: see ``adaln_linear``.
        group: see ``adaln_linear``.
        activation: ``"gelu_tanh"`` or ``"swiglu"``.
        recompute: recompute h and the activation's output in the backward pass instead of keeping
            them.
        backend: see ``adaln_linear``.

    Returns:
        ``(x' [B, T, D], out [B, T, N])``, x' in x's dtype, out in the weights' (under autocast in
        autocast's).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm``,
            ``activation`` or ``backend`` is unknown.
    """
    operator = "adaln_mlp"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    swiglu = activation == "swiglu"
    K = check_layer(operator, x, None, weight1, bias1, number="1")
    if swiglu and K % 2:
        raise ValueError(
            f"{operator}: expected weight1 [2 K, D] for swiglu, got {[*weight1.shape]}"
        )
    K = K // 2 if swiglu else K
    # the second layer has the dtype of the first
    dtype = None if autocast(x) else weight1.dtype
    check_layer(operator, x, K, weight2, bias2, dtype, number="2")
    layers = (weight1, bias1, weight2, bias2)
    inputs = check_norm_inputs(operator, x, residual, shift, scale, group, norm, eps)
    prepared = prepare(operator, inputs, backend, recompute, *layers)
    if prepared is None:
        x, h = unfused(operator, inputs, eps, norm, h_dtype(x, weight1), backend)
        first_half = run_linear_swiglu if swiglu else run_linear_gelu
        hidden = first_half(operator, h, weight1, bias1, backend)
        return x, F.linear(hidden, weight2, bias2)
    out = apply(_AdaLNMlp, *prepared, *layers, eps, norm == "rms", recompute, swiglu)
    # with a residual the Function returns x' first
    return (x, out) if residual is None else out
