"""adaLN-Zero building block: norm without affine, then shift and scale.

DiT, arXiv 2212.09748, Sec. 3.2.
"""

import math
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as kernels
from sra_fast.kernels import per_token as per_token_kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import (
    Vector,
    broadcast_to_tokens,
    check_inputs,
    fold_affine,
    frames_as_images,
    in_one_dtype,
    is_per_token,
    name_second,
    runs_kernel,
)
from sra_fast.ops._per_token import run_per_token, with_tables_that_fit
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad

NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}


def check_norm(operator: str, norm: str, eps: float) -> None:
    """Raise ValueError unless ``norm`` is one of ``NORMS`` and ``eps`` is a number >= 0."""
    # a tuple: a list as a key of the dict would be a TypeError
    if norm not in tuple(NORMS):
        raise ValueError(f"{operator}: norm must be one of {tuple(NORMS)}, got {norm!r}")
    # a NaN compares with nothing
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"{operator}: expected a finite eps >= 0, got {eps!r}")


def adaln_ref(
    x: Tensor,
    shift: Vector | None = None,
    scale: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: tuple[Vector, Vector] | None = None,
) -> Any:
    """The definition, in fp32. Tests, benchmarks and backend="torch" all use this one function.

    Returns h, with ``second`` (h, h2).
    """
    normed = NORMS[norm](upcast(x), x.shape[-1:], eps=eps)
    if norm_weight is not None:
        normed = normed * upcast(norm_weight)
    if norm_bias is not None:
        normed = normed + upcast(norm_bias)

    def modulated(shift: Vector | None, scale: Vector | None) -> Tensor:
        h = normed
        if scale is not None:
            h = h * (1 + broadcast_to_tokens(scale, x, group))
        if shift is not None:
            h = h + broadcast_to_tokens(shift, x, group)
        return h.to(dtype or x.dtype)

    h = modulated(shift, scale)
    return h if second is None else (h, modulated(*second))


def _fake_fwd(x, shift, scale, group, eps, rms, dtype=None, is_factor=False, residual=None):
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    mean = x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    return y, mean, rstd


def _fake_bwd(dy, x, scale, group, mean, rstd, shift, has_shift=True, is_factor=False):
    dx = x.new_empty(x.shape)
    dscale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    dshift = dscale.new_empty(dscale.shape if has_shift else 0)
    y = dy.new_empty(0 if shift is None else x.shape)
    return dx, dshift, dscale, y


adaln_fwd = register(
    "adaln_fwd(Tensor x, Tensor? shift, Tensor? scale, Tensor? group, float eps, bool rms,"
    " ScalarType? dtype=None, bool is_factor=False, Tensor? residual=None)"
    " -> (Tensor, Tensor, Tensor)",
    kernels.adaln_fwd,
    _fake_fwd,
)
adaln_bwd = register(
    "adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? group, Tensor mean, Tensor rstd,"
    " Tensor? shift, bool has_shift=True, bool is_factor=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.adaln_bwd,
    _fake_bwd,
)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, group, eps, rms, dtype, is_factor):
        x = x.contiguous()
        y, mean, rstd = adaln_fwd(x, shift, scale, group, eps, rms, dtype, is_factor)
        # neither y nor shift: no gradient depends on them
        ctx.save_for_backward(x, scale, group, mean, rstd)
        ctx.flags = (shift is not None, is_factor)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, group, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale, _ = guard_double_backward(
            "adaln", adaln_bwd, dy.contiguous(), x, scale, group, mean, rstd, None, *ctx.flags
        )
        dshift = dshift if ctx.flags[0] else None
        dscale = None if scale is None else dscale
        return dx, dshift, dscale, None, None, None, None, None


@overload
def adaln(
    x: Tensor,
    shift: Vector | None = None,
    scale: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def adaln(
    x: Tensor,
    shift: Vector,
    scale: Vector,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: tuple[Vector, Vector],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def adaln(
    x: Tensor,
    shift: Vector | None = None,
    scale: Vector | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    second: tuple[Vector, Vector] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(norm(x) * norm_weight + norm_bias) * (1 + scale) + shift`` with one read and one write of
    ``x``; statistics in fp32.

    A vector that is None is left out: without any, this is the plain norm. Vectors per image or
    frame may be any expression, such as ``table + temb``: it costs one small operation on ``[B,
    D]``, a thousandth of the bytes at 256 tokens. An expression per token is a pass of its own, but
    for ``table + temb``, which is ``(temb, table)`` here.

    Args:
        x: ``[B, T, D]`` tokens, bf16/fp16/fp32; copied first unless contiguous. The kernel takes D
            <= 8192. fp64 and wider rows run the reference; wider rows are logged once.
        shift: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; ``[B, F,
            D]`` with F a divisor of T, one for each T / F tokens in a row (a frame of a video);
            ``[B, T, D]``, one per token; or ``[B, G, D]`` with ``group``. A column slice of the
            6*D adaLN projection is used in place. Where shift and scale vary over different
            numbers of tokens, the coarser is expanded. A pair ``(vectors, table)`` is their sum in
            fp32, with vectors as above, a table ``[D]`` or ``[1, D]`` that all tokens share, and
            gradients for both. With vectors per token the kernel adds the table, and its gradient
            is summed in the pass over the rows. None: 0.
        scale: as ``shift``; its strides may differ. None: 0.
        eps: added to the variance, or to the mean square of RMS.
        norm: ``"layer"`` or ``"rms"``, both without weights of their own.
        norm_weight: ``[D]`` or None: 1. It and ``norm_bias`` cost no pass over x: they are
            multiplied with scale and shift in fp32.
        norm_bias: ``[D]`` or None: 0.
        group: ``[B, T]`` integers in [0, G): which of an image's G vectors a token takes (two
            noise levels per image: G = 2). Out of range the reference raises and the kernel takes
            the nearest vector. None: one vector per image, frame or token.
        dtype: of the output; default: x's. Half precision is for a product that reads the output
            of an fp32 residual stream.
        second: shift and scale of a second modulation of the same norm, each as ``shift``, which
            must be there too. This is two calls in one, each with a pass of its own: only the first
            block of a model has no residual update before its norm. The others have
            ``gated_residual_adaln``, where both modulations share a pass. None: one modulation.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``dtype``; with ``second`` two of them, one of each modulation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    others = name_second("adaln", second, shift, scale)
    shift, scale, *second_vectors = check_inputs(
        "adaln",
        x,
        {},
        {"shift": shift, "scale": scale, **others},
        group,
        channels={"norm_weight": norm_weight, "norm_bias": norm_bias},
        optional=("shift", "scale"),
        within_image=True,
        dtype=dtype,
    )
    check_norm("adaln", norm, eps)
    options = (group, eps, norm, dtype, backend, (norm_weight, norm_bias))
    h = run_adaln("adaln", x, shift, scale, *options)
    if second is None:
        return h
    shift2, scale2 = second_vectors
    return h, run_adaln("adaln", x, shift2, scale2, *options)


def run_adaln(
    operator: str,
    x: Tensor,
    shift: Any,
    scale: Any,
    group: Tensor | None,
    eps: float,
    norm: str,
    dtype: torch.dtype | None,
    backend: str | None,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """``adaln`` of inputs that ``operator`` has checked; errors begin with its name.

    ``affine`` is the norm's weight and bias.
    """
    # fp64, empty tensors and very wide rows
    if not runs_kernel(operator, kernels, backend, x, shift, scale, *affine, dtype=dtype):
        weight, bias = affine
        y = adaln_ref(
            *(x, shift, scale, eps),
            norm=norm,
            norm_weight=weight,
            norm_bias=bias,
            group=group,
            dtype=dtype,
        )
        # as a kernel would return it, whatever strides x has
        return y.contiguous()
    if is_per_token((shift, scale), x, group):
        is_factor = False
        has_sums = any(t is not None for t in affine)
        shift, scale = with_tables_that_fit((shift, scale), x, has_sums)
        if has_sums and x.shape[2] > per_token_kernels.AFFINE_WIDTH:
            # a pass over the vectors, where the sums for the two do not fit the registers
            shift, scale, is_factor = fold_affine(x, shift, scale, *affine)
            affine = (None, None)
        options = {"affine": affine, "eps": eps, "norm": norm, "dtype": dtype}
        options["is_factor"] = is_factor
        return run_per_token(operator, x, None, None, None, shift, scale, **options)[1]
    # without vectors a group says nothing
    group = None if shift is None and scale is None else group
    shift, scale, is_factor = fold_affine(x, shift, scale, *affine)
    shift, scale = in_one_dtype(shift, scale)
    rows = x
    if group is None:
        (rows,), (shift, scale) = frames_as_images([x], [shift, scale])
    # the kernel takes any strides of the modulation but the last
    shift = with_dense_columns(shift)
    scale = with_dense_columns(scale)
    group = None if group is None else group.contiguous()
    args = (shift, scale, group, eps, norm == "rms", dtype, is_factor)
    if wants_grad(x, shift, scale):
        y = apply(_AdaLN, rows, *args)
    else:
        y, _, _ = adaln_fwd(rows.contiguous(), *args)
    return y.view_as(x) if y.shape != x.shape else y
