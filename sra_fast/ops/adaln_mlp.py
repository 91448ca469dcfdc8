"""The second half of a block up to its gate: residual update, modulated norm and MLP with tanh-GELU."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import gelu as kernels
from sra_fast.ops._backend import autocast
from sra_fast.ops._register import apply, once, register
from sra_fast.ops.adaln_linear import (
    Residual,
    check_layer,
    compose,
    dtype_of_rows,
    normed,
    normed_backward,
    prepare,
    unflatten,
    upstream_gradients,
    weight_gradient,
)
from sra_fast.ops.linear_gelu import linear_gelu

_gelu_bwd = register(
    "gelu_bwd(Tensor dy, Tensor x, bool again) -> (Tensor, Tensor, Tensor)",
    kernels.gelu_bwd,
    lambda dy, x, again: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[1]),
        x.new_empty(x.shape if again else 0),
    ),
)


def _backward(wanted, dx_new, dout, weight1, weight2, a, h, hidden, *saved):
    """Gradients of everything but the numbers; ``wanted`` are those of the layers' four, whose inputs are None where they come
    again."""
    dout = dout.flatten(0, 1)
    da, dbias1, hidden_again = _gelu_bwd(
        (dout @ weight2).contiguous(), a, hidden is None and wanted[2]
    )
    dweight2 = (
        weight_gradient(dout, hidden_again if hidden is None else hidden) if wanted[2] else None
    )
    dh = (da @ weight1).view(saved[0].shape)
    *grads, h_again = normed_backward(h is None and wanted[0], dx_new, dh, *saved)
    dweight1 = weight_gradient(da, h_again if h is None else h) if wanted[0] else None
    return (
        *grads,
        None,
        dweight1,
        dbias1 if wanted[1] else None,
        dweight2,
        dout.sum(0) if wanted[3] else None,
    )


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
    ):
        x_new, h, mean, rstd = normed(
            x, y, y_bias, gate, shift, scale, group, eps, rms, weight1.dtype
        )
        a = F.linear(h.flatten(0, 1), weight1, bias1)
        hidden = F.gelu(a, approximate="tanh")
        first, _, second, _ = ctx.needs_input_grad[7:11]
        kept = (None, None) if recompute else (h if first else None, hidden if second else None)
        ctx.save_for_backward(
            weight1, weight2, a, *kept, x_new, y, y_bias, gate, shift, scale, group, mean, rstd
        )
        ctx.set_materialize_grads(False)
        out = unflatten(F.linear(hidden, weight2, bias2), x)
        return out if y is None else (x_new, out)

    @staticmethod
    def backward(ctx, *grads):
        weight1, weight2, *saved = ctx.saved_tensors
        upstream = upstream_gradients(grads, saved[3], weight2)
        found = once(
            partial(_backward, ctx.needs_input_grad[7:11]), *upstream, weight1, weight2, *saved
        )
        return *found, None, None, None


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
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate (y + y_bias)`` and ``gelu_tanh(h @ weight1^T + bias1) @ weight2^T + bias2``, h the modulated norm of x'.

    The gradient of ``bias1`` comes out of GELU's backward pass.  With ``recompute`` neither h nor GELU's output is kept: the
    backward passes over the norm and over GELU write them again, 2 bytes per element more in half precision, and of nine arrays
    ``[B, T, D]`` that an MLP of four times the width keeps (h, GELU's input and output) four are left.  Without a gradient GELU is the
    first product's epilogue (``linear_gelu``).

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        shift: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice of the 6*D adaLN projection is used in place.
        scale: shaped as ``shift``.
        weight1: ``[K, D]`` of x's dtype, or of any if x is fp32: everything inside is then of the weight's.
        bias1: ``[K]`` or None.
        weight2: ``[N, K]``.
        bias2: ``[N]``, or None: what adds the output to the residual stream can add it, and have its gradient for free.
        eps, residual, norm, group, recompute, backend: see ``adaln_linear``.

    Returns:
        ``(x' [B, T, D], out [B, T, N])``, x' in x's dtype, out in the weights' (under autocast in autocast's).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``norm`` or ``backend`` is unknown.
    """
    layers = weight1, bias1, weight2, bias2
    check_layer(
        x,
        check_layer(x, None, *layers[:2]),
        *layers[2:],
        dtype=None if autocast(x) else weight1.dtype,
    )
    given = prepare(x, residual, shift, scale, group, norm, backend, recompute, *layers)
    if given is None:
        x, h = compose(
            x,
            residual,
            shift,
            scale,
            eps,
            norm=norm,
            group=group,
            dtype=dtype_of_rows(x, weight1),
            backend=backend,
        )
        zero = bias1 if bias1 is not None else weight1.new_zeros(weight1.shape[0])
        return x, F.linear(linear_gelu(h, weight1, zero, backend=backend), weight2, bias2)
    out = apply(_AdaLNMlp, *given, *layers, eps, norm == "rms", recompute)
    return (x, out) if residual is None else out
