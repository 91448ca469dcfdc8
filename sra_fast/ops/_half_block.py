"""What ``adaln_linear`` and ``adaln_mlp`` share: the residual update, the norm, the rules of the
layers.

Each of the two has two implementations. ``unfused`` composes ``gated_residual_adaln`` (or
``adaln``) and PyTorch's linear layers. The autograd Function calls the kernels and decides itself
what the backward pass keeps; it runs where a gradient is wanted, with the kernels and without
autocast.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops._backend import autocast, check_tensors, log_once
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import check_inputs, runs_kernel
from sra_fast.ops._register import wants_grad
from sra_fast.ops.adaln import adaln_bwd, adaln_fwd, check_norm, run_adaln
from sra_fast.ops.gated_residual import gated_residual_bwd, gated_residual_fwd
from sra_fast.ops.gated_residual_adaln import (
    gated_residual_adaln_bwd,
    gated_residual_adaln_fwd,
    run_gated_residual_adaln,
)

# what a half-block adds to the residual stream: its output [B, T, D], its gate, and the bias [D]
# that its output lacks, or None
Residual = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def norm_forward(
    x, y, y_bias, gate, shift, scale, group, eps, rms, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (without y: x itself), h of ``dtype``, mean and rstd, with the kernels.

    Rows that are too wide for one pass take two.
    """
    if y is not None and x.shape[2] > fused_kernels.MAX_WIDTH:
        x = gated_residual_fwd(x, y, y_bias, gate, group)
        y = None
    if y is None:
        h, mean, rstd = adaln_fwd(x, shift, scale, group, eps, rms, dtype)
        return x, h, mean, rstd
    return gated_residual_adaln_fwd(x, y, y_bias, gate, shift, scale, group, eps, rms, dtype)


def norm_backward(
    recompute_h, dx_new, dh, x_new, y, y_bias, gate, shift, scale, group, mean, rstd
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Gradients of x, y, y_bias, gate, shift and scale; and h (empty unless ``recompute_h``)."""
    # the kernels recompute h if they get the shift
    shift = shift if recompute_h else None
    if y is None:
        dx, dshift, dscale, h = adaln_bwd(dh, x_new, scale, group, mean, rstd, shift)
        return (dx, None, None, None, dshift, dscale), h
    if x_new.shape[2] > fused_kernels.MAX_WIDTH:
        dx, dshift, dscale, h = adaln_bwd(dh, x_new, scale, group, mean, rstd, shift)
        dx = dx if dx_new is None else dx + dx_new
        dy, dgate, dbias = gated_residual_bwd(dx, y, y_bias, gate, group)
        return (dx, dy, None if y_bias is None else dbias, dgate, dshift, dscale), h
    dx, dy, dgate, dshift, dscale, dbias, h = gated_residual_adaln_bwd(
        dx_new, dh, x_new, y, y_bias, gate, scale, group, mean, rstd, shift
    )
    dbias = None if y_bias is None else dbias
    return (dx, dy, dbias, dgate, dshift, dscale), h


def layer_backward(
    needs_norm: bool,
    recompute_h: bool,
    dx_new: Tensor | None,
    dout: Tensor,
    weight: Tensor,
    x_new: Tensor,
    *saved: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """``norm_backward`` after the input's gradient of a layer with ``weight [N, D]``, output
    gradient ``dout [B T, N]``.

    Unless ``needs_norm``, nobody wants a gradient of x, y or a vector, as before a frozen network:
    they are None, and the product is left out.
    """
    if needs_norm:
        dh = (dout @ weight).view(x_new.shape)
        return norm_backward(recompute_h, dx_new, dh, x_new, *saved)
    h = dout.new_empty(0)
    if recompute_h:
        # h comes out of the pass of the norm's backward
        nothing = x_new.new_zeros(x_new.shape, dtype=weight.dtype)
        _, h = norm_backward(True, None, nothing, x_new, *saved)
    return (None,) * 6, h


def as_tokens(out: Tensor, x: Tensor) -> Tensor:
    """Reshape ``out [B T, N]`` to ``[B, T, N]`` for ``x [B, T, D]``.

    To autograd the result is no view: it forbids in-place changes of a Function's views.
    """
    return torch.ops.aten._unsafe_view(out, [*x.shape[:2], out.shape[1]])


def as_rows(x: Tensor) -> Tensor:
    """Reshape ``[B, T, D]`` to ``[B T, D]`` with dense columns; copies only if it must."""
    return with_dense_columns(x.flatten(0, 1))


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """Weight gradient of a linear layer with input ``x [..., K]`` and output gradient ``dout [M,
    N]``.
    """
    return dout.t() @ x.view(-1, x.shape[-1])


def upstream_gradients(
    grads: tuple[Tensor | None, ...], x_new: Tensor, weight: Tensor, parts: int = 1
) -> list[Tensor | None]:
    """The gradients of x' (or None) and of the ``parts`` of the output of the layer with ``weight
    [N, K]``.

    An output that nobody used has gradient None; of the layer's parts it becomes zeros.
    """
    # without a residual x' is no output of the Function
    has_x_new = len(grads) > parts
    dx_new = None
    if has_x_new and grads[0] is not None:
        dx_new = grads[0].contiguous()
    shape = (*x_new.shape[:2], weight.shape[0] // parts)
    douts = [weight.new_zeros(shape) if grad is None else grad for grad in grads[-parts:]]
    return [dx_new, *douts]


def unpack_residual(
    operator: str, residual: Residual | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """y, gate and bias of a residual, all None without one.

    Raises:
        ValueError: it is neither (y, gate) nor (y, gate, y_bias).
    """
    if residual is None:
        return None, None, None
    # a single tensor is a likely mistake: treat it as a tuple of one, which the check below refuses
    given = tuple(residual) if isinstance(residual, list | tuple) else (residual,)
    y, gate, bias = (*given, None, None, None)[:3]
    tensors = isinstance(y, Tensor) and isinstance(gate, Tensor)
    if len(given) not in (2, 3) or not tensors or not (bias is None or isinstance(bias, Tensor)):
        got = [type(t).__name__ for t in given]
        raise ValueError(f"{operator}: expected residual (y, gate) or (y, gate, y_bias), got {got}")
    return y, gate, bias


class NormInputs(NamedTuple):
    """The tensors that ``norm_forward`` reads; without a residual y, y_bias and gate are None."""

    x: Tensor
    y: Tensor | None
    y_bias: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    group: Tensor | None


def check_norm_inputs(
    operator: str,
    x: Tensor,
    residual: Residual | None,
    shift: Tensor,
    scale: Tensor,
    group: Tensor | None,
    norm: str,
    eps: float,
) -> NormInputs:
    """Check the inputs of the residual update and the norm.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative or ``norm`` unknown.
    """
    y, gate, y_bias = unpack_residual(operator, residual)
    modulation = {"shift": shift, "scale": scale}
    if y is None or gate is None:
        shift, scale = check_inputs(operator, x, {}, modulation, group)
    else:
        # by the names that the caller of the operator knows
        gate, shift, scale = check_inputs(
            operator,
            x,
            {"residual[0]": y},
            {"residual[1]": gate, **modulation},
            group,
            channels={"residual[2]": y_bias},
        )
    check_norm(operator, norm, eps)
    return NormInputs(x, y, y_bias, gate, shift, scale, group)


def unfused(
    operator: str,
    inputs: NormInputs,
    eps: float,
    norm: str,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """x' and h by the operators of one pass each."""
    x, y, y_bias, gate, shift, scale, group = inputs
    if y is None or gate is None:
        return x, run_adaln(operator, x, shift, scale, group, eps, norm, dtype, backend)
    return run_gated_residual_adaln(
        operator, x, y, y_bias, gate, shift, scale, group, eps, norm, dtype, backend
    )


def h_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the norm's output: what the product reads. Autocast rounds it itself."""
    return x.dtype if autocast(x) else weight.dtype


def check_layer(
    operator: str,
    x: Tensor,
    in_features: int | None,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
    number: str = "",
) -> int:
    """Check a linear layer, and return its number of outputs.

    Args:
        operator: its name, for the messages.
        x: ``[B, T, D]`` residual stream.
        in_features: what the layer reads; None: D.
        weight: ``[N, in_features]``.
        bias: ``[N]`` or None.
        dtype: of weight and bias. None: that of x, or any if x is fp32.
        number: what follows "weight" and "bias" in the operator's names of the two.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    weight_name, bias_name = f"weight{number}", f"bias{number}"
    named = {weight_name: weight} | ({} if bias is None else {bias_name: bias})
    check_tensors(operator, {"x": x, **named})
    if x.dim() != 3:
        raise ValueError(f"{operator}: expected x [B, T, D], got {[*x.shape]}")
    in_features = x.shape[2] if in_features is None else in_features
    fits = (
        weight.dim() == 2
        and weight.shape[1] == in_features
        and (bias is None or bias.shape == weight.shape[:1])
    )
    # below an fp32 residual stream the layer's own dtype decides
    if dtype is None:
        dtype = weight.dtype if x.dtype == torch.float32 and weight.is_floating_point() else x.dtype
    one_device = all(t.device == x.device for t in named.values())
    one_dtype = autocast(x) or all(t.dtype == dtype for t in named.values())
    if not (fits and one_device and one_dtype):
        got = [f"{name} {[*t.shape]} {t.dtype} {t.device}" for name, t in named.items()]
        raise ValueError(
            f"{operator}: expected {weight_name} [N, {in_features}] and {bias_name} [N] of dtype "
            f"{dtype} on {x.device}, got {', '.join(got)}"
        )
    return weight.shape[0]


def prepare(
    operator: str,
    inputs: NormInputs,
    backend: str | None,
    recompute: bool,
    *layers: Tensor | None,
) -> NormInputs | None:
    """The inputs as the kernels take them, if the Function runs; else None, for ``unfused``."""
    x, y, bias, gate, shift, scale, group = inputs
    if not wants_grad(x, y, bias, gate, shift, scale, *layers):
        return None
    # whether the kernels take these tensors
    used = [t for t in (y, bias, gate, shift, scale, *layers) if t is not None]
    empty = any(t is not None and t.numel() == 0 for t in layers)
    one_pass = y is not None and x.shape[2] <= fused_kernels.MAX_WIDTH
    kernels = fused_kernels if one_pass else adaln_kernels
    too_wide = recompute and not one_pass and x.shape[2] > adaln_kernels.RECOMPUTE_WIDTH
    takes = runs_kernel(operator, kernels, backend, x, *used)
    if empty or autocast(x) or too_wide or not takes:
        if recompute:
            log_once("recompute: without the kernels, or under autocast, every activation is kept")
        return None
    return NormInputs(
        x.contiguous(),
        None if y is None else y.contiguous(),
        with_dense_columns(bias),
        with_dense_columns(gate),
        with_dense_columns(shift),
        with_dense_columns(scale),
        None if group is None else group.contiguous(),
    )
