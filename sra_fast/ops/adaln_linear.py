"""The modulated norm and the linear layer that reads it, the residual update before them included: what a half-block begins with."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops._backend import log_once
from sra_fast.ops._modulation import check, in_place, runs_kernel
from sra_fast.ops._register import apply, once, wants_grad
from sra_fast.ops.adaln import _bwd, _fwd, adaln, check_norm
from sra_fast.ops.gated_residual import _fused_bwd, _fused_fwd, gated_residual_adaln

# what a half-block adds to the residual stream: its output [B, T, D], its gate, and the bias [D] its output lacks, or None
Residual = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def normed(x, y, y_bias, gate, shift, scale, group, eps, rms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (without y: x itself), h, mean and rstd, by the kernels."""
    if y is None:
        return x, *_fwd(x, shift, scale, group, eps, rms)
    return _fused_fwd(x, y, y_bias, gate, shift, scale, group, eps, rms)


def normed_backward(again, dx_new, dh, x_new, y, y_bias, gate, shift, scale, group, mean, rstd) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, y_bias, gate, shift and scale, and with ``again`` h, by the kernels."""
    shift = shift if again else None
    if y is None:
        dx, dshift, dscale, h = _bwd(dh, x_new, scale, group, mean, rstd, shift)
        return dx, None, None, None, dshift, dscale, h
    dx, dy, dgate, dshift, dscale, dbias, h = _fused_bwd(
        dx_new, dh, x_new, y, y_bias, gate, scale, group, mean, rstd, shift
    )
    return dx, dy, None if y_bias is None else dbias, dgate, dshift, dscale, h


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """Of a linear layer that maps ``x [..., K]`` to something of gradient ``dout [M, N]``."""
    return dout.t() @ x.view(-1, x.shape[-1])


def _backward(wanted, dx_new, dout, weight, h, *saved):
    """Gradients of everything but the numbers; ``wanted`` are those of weight and bias, ``h`` is None where it comes again."""
    dout, again = dout.flatten(0, 1), h is None and wanted[0]
    *grads, h_again = normed_backward(again, dx_new, (dout @ weight).view(saved[0].shape), *saved)
    dweight = weight_gradient(dout, h_again if again else h) if wanted[0] else None
    return *grads, None, dweight, dout.sum(0) if wanted[1] else None


class _AdaLNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, y_bias, gate, shift, scale, group, weight, bias, eps, rms, recompute):
        x_new, h, mean, rstd = normed(x, y, y_bias, gate, shift, scale, group, eps, rms)
        kept = None if recompute else h
        ctx.save_for_backward(weight, kept, x_new, y, y_bias, gate, shift, scale, group, mean, rstd)
        ctx.set_materialize_grads(False)
        out = F.linear(h, weight, bias)
        return out if y is None else (x_new, out)

    @staticmethod
    def backward(ctx, *grads):
        weight, *saved = ctx.saved_tensors
        dx_new, dout = both_gradients(grads, saved[1], weight)
        return *once(partial(_backward, ctx.needs_input_grad[7:9]), dx_new, dout, weight, *saved), None, None, None


def both_gradients(grads: tuple[Tensor | None, ...], x_new: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The upstream gradients of x' (None without one) and of the output of the layer with ``weight [N, K]``."""
    dx_new = grads[0].contiguous() if len(grads) == 2 and grads[0] is not None else None
    dout = grads[-1] if grads[-1] is not None else x_new.new_zeros(*x_new.shape[:2], weight.shape[0])
    return dx_new, dout


def compose(x: Tensor, residual: Residual | None, shift: Tensor, scale: Tensor, eps: float, **options) -> tuple[Tensor, Tensor]:
    """x' and h by the operators of one pass each."""
    if residual is None:
        return x, adaln(x, shift, scale, eps, **options)
    y, gate, bias = *residual[:2], residual[2] if len(residual) == 3 else None
    return gated_residual_adaln(x, y, gate, shift, scale, eps, bias=bias, **options)


def autocast(x: Tensor) -> bool:
    """Whether dtypes are autocast's to choose."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_layer(x: Tensor, in_features: int, weight: Tensor, bias: Tensor | None) -> int:
    """ValueError unless they are those of a linear layer that ``x`` can be given to; its number of outputs."""
    given = [weight] if bias is None else [weight, bias]
    fits = weight.dim() == 2 and weight.shape[1] == in_features and (bias is None or bias.shape == weight.shape[:1])
    if not fits or any(t.device != x.device or (t.dtype != x.dtype and not autocast(x)) for t in given):
        got = [([*t.shape], str(t.dtype), str(t.device)) for t in given]
        raise ValueError(f"expected weight [N, {in_features}] and bias [N] of dtype {x.dtype} on {x.device}, got {got}")
    return weight.shape[0]


def prepare(
    x: Tensor, residual: Residual | None, shift: Tensor, scale: Tensor, group: Tensor | None, norm: str, backend: str | None,
    recompute: bool, *layers: Tensor | None,
) -> tuple | None:
    """The arguments of ``normed`` but its last two, checked, if the Function runs: where a gradient is wanted, with the kernels
    and without autocast.  None: ``compose``, which checks for itself."""
    y, gate, bias = (None, None, None) if residual is None else (*residual, None)[:3]
    vectors = bias, gate, shift, scale
    if not wants_grad(x, y, *vectors, *layers):
        return None
    gated = {} if residual is None else {"gate": gate}
    check(x, {} if y is None else {"y": y}, {**gated, "shift": shift, "scale": scale}, group, bias=bias)
    check_norm(norm)
    used = [t for t in (y, *vectors, *layers) if t is not None]
    if autocast(x) or not runs_kernel(kernels if y is None else fused_kernels, backend, x, *used):
        if recompute:
            log_once("recompute: without the kernels, or under autocast, every activation is kept")
        return None
    vectors = [None if t is None else in_place(t) for t in vectors]
    return x.contiguous(), None if y is None else y.contiguous(), *vectors, None if group is None else group.contiguous()


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate (y + y_bias)`` and ``(norm(x') (1 + scale) + shift) @ weight^T + bias``.

    ``gated_residual_adaln`` (without ``residual``: ``adaln``) and a linear layer, with one difference: with ``recompute`` the
    normed rows are not kept for the gradient of ``weight``; the backward pass over the norm writes them again, 2 bytes per
    element more in half precision.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        shift: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice of the 6*D adaLN projection is used in place.
        scale: shaped as ``shift``.
        weight: ``[N, D]`` of x's dtype.
        bias: ``[N]`` or None.
        eps: added to the variance (of RMS: to the mean square).
        residual: ``(y, gate)`` or ``(y, gate, y_bias)``: output ``[B, T, D]`` and gate (shaped as ``shift``) of the half-block
            that ends, and the bias ``[D]`` that its last layer left out; None: x' is x.
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
        group: ``[B, T]`` integers in [0, G) or None; see ``adaln``.
        recompute: write the normed rows again instead of keeping them (by the kernels alone).
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x' [B, T, D], out [B, T, N])`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``norm`` or ``backend`` is unknown.
    """
    check_layer(x, x.shape[-1], weight, bias)
    given = prepare(x, residual, shift, scale, group, norm, backend, recompute, weight, bias)
    if given is None:
        x, h = compose(x, residual, shift, scale, eps, norm=norm, group=group, backend=backend)
        return x, F.linear(h, weight, bias)
    out = apply(_AdaLNLinear, *given, weight, bias, eps, norm == "rms", recompute)
    return (x, out) if residual is None else out
