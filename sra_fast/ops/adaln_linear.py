"""The modulated norm and the linear layer that reads it, the residual update before them included: what a half-block begins with."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.kernels import concat_columns as concat_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops._backend import autocast, log_once
from sra_fast.ops._modulation import check, in_place, runs_kernel
from sra_fast.ops._register import apply, once, register, wants_grad
from sra_fast.ops.adaln import _bwd, _fwd, adaln, check_norm
from sra_fast.ops.gated_residual import _fused_bwd, _fused_fwd, gated_residual_adaln

# what a half-block adds to the residual stream: its output [B, T, D], its gate, and the bias [D] its output lacks, or None
Residual = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]

_concat = register(
    "concat_columns(Tensor[] parts) -> (Tensor, Tensor)",
    concat_kernels.concat_columns,
    lambda parts: tuple(parts[0].new_empty(shape) for shape in (
        (parts[0].shape[0], len(parts) * parts[0].shape[1]), (len(parts) * parts[0].shape[1],)
    )),
)  # fmt: skip


def normed(
    x, y, y_bias, gate, shift, scale, group, eps, rms, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (without y: x itself), h of ``dtype``, mean and rstd, by the kernels."""
    if y is None:
        return x, *_fwd(x, shift, scale, group, eps, rms, dtype)
    return _fused_fwd(x, y, y_bias, gate, shift, scale, group, eps, rms, dtype)


def normed_backward(
    again, dx_new, dh, x_new, y, y_bias, gate, shift, scale, group, mean, rstd
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, y_bias, gate, shift and scale, and with ``again`` h, by the kernels."""
    shift = shift if again else None
    if y is None:
        dx, dshift, dscale, h = _bwd(dh, x_new, scale, group, mean, rstd, shift)
        return dx, None, None, None, dshift, dscale, h
    dx, dy, dgate, dshift, dscale, dbias, h = _fused_bwd(
        dx_new, dh, x_new, y, y_bias, gate, scale, group, mean, rstd, shift
    )
    return dx, dy, None if y_bias is None else dbias, dgate, dshift, dscale, h


def unflatten(out: Tensor, x: Tensor) -> Tensor:
    """``out [B T, N]`` as ``[B, T, N]`` for ``x [B, T, D]``: no view to autograd, which forbids to change views of a Function."""
    return torch.ops.aten._unsafe_view(out, [*x.shape[:2], out.shape[1]])


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """Of a linear layer that maps ``x [..., K]`` to something of gradient ``dout [M, N]``."""
    return dout.t() @ x.view(-1, x.shape[-1])


def _backward(wanted, parts, dx_new, *tensors):
    """Gradients of everything but the numbers; ``wanted`` are those of weight and bias."""
    douts, (weight, h, *saved) = tensors[:parts], tensors[parts:]
    if parts > 1:  # side by side, and summed for the bias on the way
        dout, dbias = _concat([rows_of(part) for part in douts])
    else:
        dout = douts[0].flatten(0, 1)
        dbias = dout.sum(0) if wanted[1] else None
    again = h is None and wanted[0]
    *grads, h_again = normed_backward(again, dx_new, (dout @ weight).view(saved[0].shape), *saved)
    dweight = weight_gradient(dout, h_again if again else h) if wanted[0] else None
    return *grads, None, dweight, dbias if wanted[1] else None


class _AdaLNLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, y, y_bias, gate, shift, scale, group, weight, bias, eps, rms, recompute, parts
    ):
        x_new, h, mean, rstd = normed(
            x, y, y_bias, gate, shift, scale, group, eps, rms, weight.dtype
        )
        kept = None if recompute or not ctx.needs_input_grad[7] else h
        ctx.save_for_backward(weight, kept, x_new, y, y_bias, gate, shift, scale, group, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        out = unflatten(F.linear(h.flatten(0, 1), weight, bias), x)
        out = out.chunk(parts, dim=2) if parts > 1 else (out,)
        return out if y is None else (x_new, *out)

    @staticmethod
    def backward(ctx, *grads):
        weight, *saved = ctx.saved_tensors
        upstream = upstream_gradients(grads, saved[1], weight, ctx.parts)
        backward = partial(_backward, ctx.needs_input_grad[7:9], ctx.parts)
        found = once(backward, *upstream, weight, *saved)
        return *found, None, None, None, None


def rows_of(x: Tensor) -> Tensor:
    """``[B, T, D]`` as ``[B T, D]`` with dense columns, in place where it can be."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()


def upstream_gradients(
    grads: tuple[Tensor | None, ...], x_new: Tensor, weight: Tensor, parts: int = 1
) -> list[Tensor | None]:
    """Those of x' (None without one) and of the ``parts`` of the output of the layer with ``weight [N, K]``."""
    dx_new = grads[0].contiguous() if len(grads) > parts and grads[0] is not None else None
    shape = *x_new.shape[:2], weight.shape[0] // parts
    return [dx_new, *(weight.new_zeros(shape) if grad is None else grad for grad in grads[-parts:])]


def parts_of(residual: Residual | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """y, gate and bias; ValueError if they are none."""
    if residual is None:
        return None, None, None
    given = tuple(residual) if isinstance(residual, list | tuple) else (residual,)
    wanted = len(given) in (2, 3) and all(isinstance(t, Tensor) for t in given[:2])
    if not wanted or not all(t is None or isinstance(t, Tensor) for t in given[2:]):
        raise ValueError(
            f"expected residual (y, gate) or (y, gate, y_bias), got {[type(t).__name__ for t in given]}"
        )
    return (*given, None)[:3]


def compose(
    x: Tensor, residual: Residual | None, shift: Tensor, scale: Tensor, eps: float, **options
) -> tuple[Tensor, Tensor]:
    """x' and h by the operators of one pass each."""
    if residual is None:
        return x, adaln(x, shift, scale, eps, **options)
    y, gate, bias = parts_of(residual)
    return gated_residual_adaln(x, y, gate, shift, scale, eps, bias=bias, **options)


def dtype_of_rows(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the normed rows: what the product reads.  Autocast rounds them itself."""
    return x.dtype if autocast(x) else weight.dtype


def check_layer(
    x: Tensor,
    in_features: int | None,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> int:
    """ValueError unless they are those of a linear layer for so many features (None: those of ``x``); its number of outputs.

    Its dtype is ``dtype``; without one x's, or any under a residual stream in fp32.
    """
    if x.dim() != 3:
        raise ValueError(f"expected x [B, T, D], got {[*x.shape]}")
    in_features = x.shape[2] if in_features is None else in_features
    given = [weight] if bias is None else [weight, bias]
    fits = (
        weight.dim() == 2
        and weight.shape[1] == in_features
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if dtype is None:
        dtype = weight.dtype if x.dtype == torch.float32 and weight.is_floating_point() else x.dtype
    if not fits or any(
        t.device != x.device or (t.dtype != dtype and not autocast(x)) for t in given
    ):
        got = [([*t.shape], str(t.dtype), str(t.device)) for t in given]
        raise ValueError(
            f"expected weight [N, {in_features}] and bias [N] of dtype {dtype} on {x.device}, got {got}"
        )
    return weight.shape[0]


def prepare(
    x: Tensor,
    residual: Residual | None,
    shift: Tensor,
    scale: Tensor,
    group: Tensor | None,
    norm: str,
    backend: str | None,
    recompute: bool,
    *layers: Tensor | None,
) -> tuple | None:
    """The arguments of ``normed`` but its last three, checked, if the Function runs: where a gradient is wanted, with the kernels
    and without autocast.  None: ``compose``, which checks for itself."""
    y, gate, bias = parts_of(residual)
    vectors = bias, gate, shift, scale
    per_token = group is None and shift.dim() == 3  # which adaln alone would take
    if not wants_grad(x, y, *vectors, *layers) and not per_token:
        return None
    gated = {} if residual is None else {"gate": gate}
    check(
        x,
        {} if y is None else {"y": y},
        {**gated, "shift": shift, "scale": scale},
        group,
        bias=bias,
    )
    check_norm(norm)
    used = [t for t in (y, *vectors, *layers) if t is not None]
    empty = any(t is not None and t.numel() == 0 for t in layers)
    if (
        empty
        or autocast(x)
        or not runs_kernel(kernels if y is None else fused_kernels, backend, x, *used)
    ):
        if recompute:
            log_once("recompute: without the kernels, or under autocast, every activation is kept")
        return None
    vectors = [None if t is None else in_place(t) for t in vectors]
    return (
        x.contiguous(),
        None if y is None else y.contiguous(),
        *vectors,
        None if group is None else group.contiguous(),
    )


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

    ``gated_residual_adaln`` (without ``residual``: ``adaln``) and a linear layer, with one difference: with ``recompute`` the
    normed rows are not kept for the gradient of ``weight``; the backward pass over the norm writes them again, 2 bytes per
    element more in half precision.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        shift: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice of the 6*D adaLN projection is used in place.
        scale: shaped as ``shift``.
        weight: ``[N, D]`` of x's dtype, or of any if x is fp32: the normed rows are then written in the weight's.
        bias: ``[N]`` of the weight's dtype or None.
        eps: added to the variance (of RMS: to the mean square).
        residual: ``(y, gate)`` or ``(y, gate, y_bias)``: output ``[B, T, D]`` and gate (shaped as ``shift``) of the half-block
            that ends, and the bias ``[D]`` that its last layer left out; None: x' is x.
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
        group: ``[B, T]`` integers in [0, G) or None; see ``adaln``.
        recompute: write the normed rows again instead of keeping them (by the kernels alone).
        parts: 1, 2 or 3: the output in so many equal parts, such as queries, keys and values: views of one tensor, which as
            views of ``chunk`` cannot be changed in place.  Their gradients are put side by side in one pass, which makes that
            of ``bias`` too.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x' [B, T, D], out [B, T, N])``, x' in x's dtype, out in the weight's (under autocast in autocast's), as a tuple of
        ``parts`` if they are several.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``norm`` or ``backend`` is unknown.
    """
    N = check_layer(x, None, weight, bias)
    if type(parts) is not int or parts not in (1, 2, 3) or N % parts:
        raise ValueError(
            f"expected parts 1, 2 or 3 that divide the {N} outputs of weight, got {parts}"
        )
    given = prepare(x, residual, shift, scale, group, norm, backend, recompute, weight, bias)
    if given is None:
        x, h = compose(
            x,
            residual,
            shift,
            scale,
            eps,
            norm=norm,
            group=group,
            dtype=dtype_of_rows(x, weight),
            backend=backend,
        )
        out = F.linear(h, weight, bias)
        out = out.chunk(parts, dim=2) if parts > 1 else (out,)
    else:
        out = apply(_AdaLNLinear, *given, weight, bias, eps, norm == "rms", recompute, parts)
        x, out = (x, out) if residual is None else (out[0], out[1:])
    return x, out if parts > 1 else out[0]
