"""The residual update of an adaLN-Zero block and the modulated norm after it (DiT, arXiv
2212.09748).
"""

import torch
from torch import Tensor

from sra_fast.kernels import gated_residual_adaln as kernels
from sra_fast.kernels import per_token as per_token_kernels
from sra_fast.ops._modulation import (
    check_inputs,
    fold_affine,
    frames_as_images,
    in_one_dtype,
    is_per_token,
    runs_kernel,
    with_dense_rows,
)
from sra_fast.ops._per_token import run_per_token
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad
from sra_fast.ops.adaln import adaln_ref, check_norm, run_adaln
from sra_fast.ops.gated_residual import gated_residual_ref, run_gated_residual


def gated_residual_adaln_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: x' is rounded to x's dtype, and the norm reads the rounded x'."""
    x = gated_residual_ref(x, y, gate, bias=bias, group=group)
    h = adaln_ref(
        *(x, shift, scale, eps),
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        group=group,
        dtype=dtype,
    )
    return x, h


def _fake_fwd(x, y, bias, gate, shift, scale, group, eps, rms, dtype=None, is_factor=False):
    x_new = x.new_empty(x.shape)
    h = x.new_empty(x.shape, dtype=dtype or x.dtype)
    mean = x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x_new, h, mean, rstd


def _fake_bwd(
    dx_new,
    dh,
    x_new,
    y,
    bias,
    gate,
    scale,
    group,
    mean,
    rstd,
    shift,
    has_shift=True,
    is_factor=False,
):
    dx = x_new.new_empty(x_new.shape)
    dy = y.new_empty(y.shape)
    dgate = y.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    dscale = y.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    dshift = dscale.new_empty(dscale.shape if has_shift else 0)
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    h = dh.new_empty(0 if shift is None else x_new.shape)
    return dx, dy, dgate, dshift, dscale, dbias, h


_fwd = register(
    "gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? bias, Tensor? gate, Tensor? shift,"
    " Tensor? scale, Tensor? group, float eps, bool rms, ScalarType? dtype=None,"
    " bool is_factor=False) -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_fwd,
    _fake_fwd,
)
_bwd = register(
    "gated_residual_adaln_bwd(Tensor? dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? bias,"
    " Tensor? gate, Tensor? scale, Tensor? group, Tensor mean, Tensor rstd, Tensor? shift,"
    " bool has_shift=True, bool is_factor=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_bwd,
    _fake_bwd,
)


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, group, eps, rms, dtype, is_factor):
        x = x.contiguous()
        y = y.contiguous()
        x_new, h, mean, rstd = _fwd(
            x, y, bias, gate, shift, scale, group, eps, rms, dtype, is_factor
        )
        # neither x nor h: the backward works from x'
        ctx.save_for_backward(x_new, y, bias, gate, scale, group, mean, rstd)
        ctx.flags = (shift is not None, is_factor)
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    def backward(ctx, dx_new, dh):
        x_new, y, bias, gate, scale, group, mean, rstd = ctx.saved_tensors
        # an output that nobody used has no gradient: the kernel can do without dx', not without dh
        dx_new = None if dx_new is None else dx_new.contiguous()
        has_h = dh is not None
        dh = torch.zeros_like(x_new) if dh is None else dh.contiguous()
        dx, dy, dgate, dshift, dscale, dbias, _ = guard_double_backward(
            "gated_residual_adaln",
            _bwd,
            *(dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd),
            *(None, *ctx.flags),
        )
        dbias = None if bias is None else dbias
        dgate = None if gate is None else dgate
        # shift and scale only enter h
        dshift = dshift if ctx.flags[0] and has_h else None
        dscale = dscale if scale is not None and has_h else None
        return dx, dy, dbias, dgate, dshift, dscale, None, None, None, None, None


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate * (y + bias)`` and ``h = (norm(x') * norm_weight + norm_bias) * (1 + scale) +
    shift``, in one pass each way.

    The gate belongs to the half-block that ends; shift and scale to the one that begins, in the
    same block or the next. The backward pass needs ``x'``, ``y`` and two numbers per token. A
    vector that is None is left out.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous. The
            kernel takes D <= 3072; wider rows take the kernels of ``gated_residual`` and
            ``adaln``, which read x' once more each way, and with x' their gradients. fp64 runs the
            reference.
        y: ``[B, T, D]`` output of the half-block that ends, any of these dtypes; copied first
            unless contiguous.
        gate: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; ``[B, F,
            D]`` or ``[B, T, D]``, one per frame or token; or ``[B, G, D]`` with ``group``; see
            ``adaln``. A column slice of the 6*D adaLN projection is used in place. None: 1.
        shift: as ``gate``; its strides may differ. None: 0.
        scale: as ``gate``; its strides may differ. None: 0.
        eps: added to the variance, or to the mean square of RMS.
        norm: ``"layer"`` or ``"rms"``, both without weights of their own.
        norm_weight: ``[D]`` or None: 1; see ``adaln``.
        norm_bias: ``[D]`` or None: 0.
        bias: ``[D]`` or None; see ``gated_residual``.
        group: ``[B, T]`` integers in [0, G) or None; see ``gated_residual``.
        dtype: of h; default: x's. Half precision is for a product that reads the output of an fp32
            residual stream.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x', h)``, each ``[B, T, D]``, x' in ``x.dtype``, h in ``dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    operator = "gated_residual_adaln"
    gate, shift, scale = check_inputs(
        operator,
        x,
        {"y": y},
        {"gate": gate, "shift": shift, "scale": scale},
        group,
        channels={"norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias},
        optional=("gate", "shift", "scale"),
        within_image=True,
        dtype=dtype,
    )
    check_norm(operator, norm, eps)
    affine = (norm_weight, norm_bias)
    return run_gated_residual_adaln(
        operator, x, y, bias, gate, shift, scale, group, eps, norm, dtype, backend, affine
    )


def run_gated_residual_adaln(
    operator: str,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    group: Tensor | None,
    eps: float,
    norm: str,
    dtype: torch.dtype | None,
    backend: str | None,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """``gated_residual_adaln`` of inputs that ``operator`` has checked; errors begin with its
    name.

    ``affine`` is the norm's weight and bias.
    """
    vectors = (gate, shift, scale, *affine)
    per_token = is_per_token((gate, shift, scale), x, group)
    widest = kernels.MAX_WIDTH
    if per_token:
        has_sums = any(t is not None for t in (bias, *affine))
        widest = (
            per_token_kernels.FUSED_WIDTH_WITH_SUMS if has_sums else per_token_kernels.FUSED_WIDTH
        )
    if x.shape[2] > widest:
        x = run_gated_residual(operator, x, y, bias, gate, group, backend)
        h = run_adaln(operator, x, shift, scale, group, eps, norm, dtype, backend, affine)
        return x, h
    # fp64, empty tensors and very wide rows
    limits = per_token_kernels if per_token else kernels
    if not runs_kernel(operator, limits, backend, x, y, *vectors, dtype=dtype):
        weight, norm_bias = affine
        x_new, h = gated_residual_adaln_ref(
            *(x, y, gate, shift, scale, eps),
            norm=norm,
            norm_weight=weight,
            norm_bias=norm_bias,
            bias=bias,
            group=group,
            dtype=dtype,
        )
        # as a kernel would return them, whatever strides x has
        return x_new.contiguous(), h.contiguous()
    if per_token:
        options = {"affine": affine, "eps": eps, "norm": norm, "dtype": dtype}
        return run_per_token(operator, x, y, bias, gate, shift, scale, **options)
    # without vectors a group says nothing
    group = None if gate is None and shift is None and scale is None else group
    shift, scale, is_factor = fold_affine(x, shift, scale, *affine, gate)
    shift, scale = in_one_dtype(shift, scale)
    rows = (x, y)
    if group is None:
        rows, (gate, shift, scale) = frames_as_images(rows, [gate, shift, scale])
    # the kernel takes any strides of the modulation but the last
    bias, gate, shift, scale = map(with_dense_rows, (bias, gate, shift, scale))
    group = None if group is None else group.contiguous()
    args = (bias, gate, shift, scale, group, eps, norm == "rms", dtype, is_factor)
    if wants_grad(x, y, bias, gate, shift, scale):
        x_new, h = apply(_GatedResidualAdaLN, *rows, *args)
    else:
        x_new, h, _, _ = _fwd(rows[0].contiguous(), rows[1].contiguous(), *args)
    if x_new.shape != x.shape:
        return x_new.view_as(x), h.view_as(x)
    return x_new, h
