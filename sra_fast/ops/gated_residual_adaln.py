"""The residual update of an adaLN-Zero block and the modulated norm after it (DiT, arXiv
2212.09748).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sra_fast.kernels import gated_residual_adaln as kernels
from sra_fast.kernels import per_token as per_token_kernels
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import (
    Vector,
    check_inputs,
    fold_affine,
    frames_as_images,
    in_one_dtype,
    is_per_token,
    name_second,
    runs_kernel,
)
from sra_fast.ops._per_token import run_per_token
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad
from sra_fast.ops.adaln import adaln_ref, check_norm, run_adaln
from sra_fast.ops.gated_residual import gated_residual_ref, run_gated_residual


def gated_residual_adaln_ref(
    x: Tensor,
    y: Tensor,
    gate: Vector | None = None,
    shift: Vector | None = None,
    scale: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: tuple[Vector, Vector] | None = None,
) -> tuple[Tensor, ...]:
    """The definition: x' is rounded to x's dtype, and the norm reads the rounded x'.

    Returns (x', h), with ``second`` (x', h, h2).
    """
    x = gated_residual_ref(x, y, gate, bias=bias, group=group)
    h = adaln_ref(
        *(x, shift, scale, eps),
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        group=group,
        dtype=dtype,
        second=second,
    )
    return (x, h) if second is None else (x, *h)


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


def _fake_two_fwd(
    x, y, bias, gate, shift, scale, shift2, scale2, eps, rms, dtype=None, is_factor=False
):
    x_new, h, mean, rstd = _fake_fwd(x, y, bias, gate, shift, scale, None, eps, rms, dtype)
    return x_new, h, h.new_empty(h.shape), mean, rstd


def _fake_two_bwd(
    dx_new, dh, dh2, x_new, y, bias, gate, scale, scale2, mean, rstd, is_factor=False
):
    dx, dy, dgate, dshift, dscale, dbias, _ = _fake_bwd(
        dx_new, dh, x_new, y, bias, gate, scale, None, mean, rstd, None
    )
    dshift2 = scale2.new_empty(scale2.shape)
    dscale2 = scale2.new_empty(scale2.shape)
    return dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias


gated_residual_adaln_fwd = register(
    "gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? bias, Tensor? gate, Tensor? shift,"
    " Tensor? scale, Tensor? group, float eps, bool rms, ScalarType? dtype=None,"
    " bool is_factor=False) -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_fwd,
    _fake_fwd,
)
gated_residual_adaln_bwd = register(
    "gated_residual_adaln_bwd(Tensor? dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? bias,"
    " Tensor? gate, Tensor? scale, Tensor? group, Tensor mean, Tensor rstd, Tensor? shift,"
    " bool has_shift=True, bool is_factor=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_bwd,
    _fake_bwd,
)
_two_fwd = register(
    "gated_residual_adaln_two_fwd(Tensor x, Tensor y, Tensor? bias, Tensor? gate, Tensor shift,"
    " Tensor scale, Tensor shift2, Tensor scale2, float eps, bool rms, ScalarType? dtype=None,"
    " bool is_factor=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_two_fwd,
    _fake_two_fwd,
)
_two_bwd = register(
    "gated_residual_adaln_two_bwd(Tensor? dx_new, Tensor dh, Tensor dh2, Tensor x_new, Tensor y,"
    " Tensor? bias, Tensor? gate, Tensor scale, Tensor scale2, Tensor mean, Tensor rstd,"
    " bool is_factor=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_two_bwd,
    _fake_two_bwd,
)


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, group, eps, rms, dtype, is_factor):
        x = x.contiguous()
        y = y.contiguous()
        x_new, h, mean, rstd = gated_residual_adaln_fwd(
            x, y, bias, gate, shift, scale, group, eps, rms, dtype, is_factor
        )
        # neither x nor h: the backward works from x'
        ctx.save_for_backward(x_new, y, bias, gate, scale, group, mean, rstd)
        ctx.flags = (shift is not None, is_factor)
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:4]):
            ctx.mark_non_differentiable(x_new)
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
            gated_residual_adaln_bwd,
            *(dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd),
            *(None, *ctx.flags),
        )
        dbias = None if bias is None else dbias
        dgate = None if gate is None else dgate
        # shift and scale only enter h
        dshift = dshift if ctx.flags[0] and has_h else None
        dscale = dscale if scale is not None and has_h else None
        return dx, dy, dbias, dgate, dshift, dscale, None, None, None, None, None


class _TwoModulations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, shift2, scale2, eps, rms, dtype, is_factor):
        x = x.contiguous()
        y = y.contiguous()
        x_new, h, h2, mean, rstd = _two_fwd(
            x, y, bias, gate, shift, scale, shift2, scale2, eps, rms, dtype, is_factor
        )
        ctx.save_for_backward(x_new, y, bias, gate, scale, scale2, mean, rstd)
        ctx.is_factor = is_factor
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:4]):
            ctx.mark_non_differentiable(x_new)
        return x_new, h, h2

    @staticmethod
    def backward(ctx, dx_new, dh, dh2):
        x_new, y, bias, gate, scale, scale2, mean, rstd = ctx.saved_tensors
        dx_new = None if dx_new is None else dx_new.contiguous()
        run = partial(guard_double_backward, "gated_residual_adaln")
        first = (None, None)
        second = (None, None)
        if dh is not None and dh2 is not None:
            dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias = run(
                _two_bwd,
                *(dx_new, dh.contiguous(), dh2.contiguous(), x_new, y, bias, gate),
                *(scale, scale2, mean, rstd, ctx.is_factor),
            )
            first = (dshift, dscale)
            second = (dshift2, dscale2)
        else:
            # nobody used one of the two: what is left is the backward of one modulation
            used = dh if dh2 is None else dh2
            used_scale = scale if dh2 is None else scale2
            used = torch.zeros_like(x_new) if used is None else used.contiguous()
            dx, dy, dgate, dshift, dscale, dbias, _ = run(
                gated_residual_adaln_bwd,
                *(dx_new, used, x_new, y, bias, gate, used_scale, None, mean, rstd),
                *(None, True, ctx.is_factor),
            )
            if dh is not None:
                first = (dshift, dscale)
            if dh2 is not None:
                second = (dshift, dscale)
        dbias = None if bias is None else dbias
        dgate = None if gate is None else dgate
        return dx, dy, dbias, dgate, *first, *second, None, None, None, None


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Vector | None = None,
    shift: Vector | None = None,
    scale: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: tuple[Vector, Vector] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``x' = x + gate * (y + bias)`` and ``h = (norm(x') * norm_weight + norm_bias) * (1 + scale) +
    shift``, in one pass each way; with ``second`` also ``h2``, another modulation of the same norm.

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
            D]`` or ``[B, T, D]``, one per frame or token; ``[B, G, D]`` with ``group``; or a pair
            ``(vectors, table)``; see ``adaln``. A column slice of the 6*D adaLN projection is used
            in place. None: 1.
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
        second: ``(shift2, scale2)``, each as ``shift``, of ``h2 = (norm(x') * norm_weight +
            norm_bias) * (1 + scale2) + shift2``, as two attentions of one block read it (SD3.5);
            shift and scale must be there too. The kernel takes vectors per image and per frame,
            and D <= 3072, or 2304 where y or h is fp32. With a group, vectors per token or wider
            rows, h2 is a pass of its own. None: no h2.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x', h)``, each ``[B, T, D]``, x' in ``x.dtype``, h in ``dtype``; with ``second`` ``(x',
        h, h2)``, h2 as h.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    operator = "gated_residual_adaln"
    others = name_second(operator, second, shift, scale)
    gate, shift, scale, *second_vectors = check_inputs(
        operator,
        x,
        {"y": y},
        {"gate": gate, "shift": shift, "scale": scale, **others},
        group,
        channels={"norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias},
        optional=("gate", "shift", "scale"),
        within_image=True,
        dtype=dtype,
    )
    check_norm(operator, norm, eps)
    affine = (norm_weight, norm_bias)
    options = (group, eps, norm, dtype, backend, affine)
    if second is not None:
        vectors = (gate, shift, scale, *second_vectors)
        return _run_two(operator, x, y, bias, vectors, *options)
    return run_gated_residual_adaln(operator, x, y, bias, gate, shift, scale, *options)


def run_gated_residual_adaln(
    operator: str,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Any,
    shift: Any,
    scale: Any,
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
        has_tables = any(isinstance(t, tuple) for t in (gate, shift, scale))
        has_sums = has_tables or any(t is not None for t in (bias, *affine))
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
    bias, gate, shift, scale = (with_dense_columns(t) for t in (bias, gate, shift, scale))
    group = None if group is None else group.contiguous()
    args = (bias, gate, shift, scale, group, eps, norm == "rms", dtype, is_factor)
    if wants_grad(x, y, bias, gate, shift, scale):
        x_new, h = apply(_GatedResidualAdaLN, *rows, *args)
    else:
        x_new, h, _, _ = gated_residual_adaln_fwd(rows[0].contiguous(), rows[1].contiguous(), *args)
    if x_new.shape != x.shape:
        return x_new.view_as(x), h.view_as(x)
    return x_new, h


def _run_two(
    operator: str,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    vectors: tuple[Any, ...],
    group: Tensor | None,
    eps: float,
    norm: str,
    dtype: torch.dtype | None,
    backend: str | None,
    affine: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """x', h and h2 of ``gated_residual_adaln``, of inputs that it has checked.

    ``vectors`` are the gate, and shift and scale of both modulations.
    """
    gate, shift, scale, shift2, scale2 = vectors
    if (
        group is not None
        or is_per_token(vectors, x, group)
        or x.shape[2] > kernels.widest_with_two(y.dtype, dtype or x.dtype)
        or not runs_kernel(operator, kernels, backend, x, y, *vectors, *affine, dtype=dtype)
    ):
        options = (group, eps, norm, dtype, backend, affine)
        x, h = run_gated_residual_adaln(operator, x, y, bias, gate, shift, scale, *options)
        return x, h, run_adaln(operator, x, shift2, scale2, *options)
    # both modulations multiply the weights: in fp32 the sum of their gradients is rounded once
    weight, norm_bias = (None if t is None else t.float() for t in affine)
    folded = fold_affine(x, shift, scale, weight, norm_bias)
    folded2 = fold_affine(x, shift2, scale2, weight, norm_bias)
    is_factor = folded[2]
    modulation = [gate, *in_one_dtype(*folded[:2]), *in_one_dtype(*folded2[:2])]
    rows, modulation = frames_as_images((x, y), modulation)
    # the kernel takes any strides of the modulation but the last
    given = [with_dense_columns(t) for t in (bias, *modulation)]
    args = (*given, eps, norm == "rms", dtype, is_factor)
    if wants_grad(x, y, *given):
        x_new, h, h2 = apply(_TwoModulations, *rows, *args)
    else:
        x_new, h, h2, _, _ = _two_fwd(rows[0].contiguous(), rows[1].contiguous(), *args)
    if x_new.shape != x.shape:
        return x_new.view_as(x), h.view_as(x), h2.view_as(x)
    return x_new, h, h2
