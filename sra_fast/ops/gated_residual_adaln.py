"""The residual update of an adaLN-Zero block and the modulated norm after it (DiT, arXiv
2212.09748).
"""

import torch
from torch import Tensor

from sra_fast.kernels import gated_residual_adaln as kernels
from sra_fast.ops._modulation import check_inputs, runs_kernel, with_dense_rows
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad
from sra_fast.ops.adaln import adaln_ref, check_norm
from sra_fast.ops.gated_residual import gated_residual_ref


def gated_residual_adaln_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: x' is rounded to x's dtype, and the norm reads the rounded x'."""
    x = gated_residual_ref(x, y, gate, bias=bias, group=group)
    return x, adaln_ref(x, shift, scale, eps, norm=norm, group=group, dtype=dtype)


def _fake_fwd(x, y, bias, gate, shift, scale, group, eps, rms, dtype=None):
    x_new = x.new_empty(x.shape)
    h = x.new_empty(x.shape, dtype=dtype or x.dtype)
    mean = x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x_new, h, mean, rstd


def _fake_bwd(dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd, shift):
    dx, dy, dgate, dshift, dscale = (t.new_empty(t.shape) for t in (x_new, y, gate, scale, scale))
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    h = dh.new_empty(0 if shift is None else x_new.shape)
    return dx, dy, dgate, dshift, dscale, dbias, h


_fwd = register(
    "gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? bias, Tensor gate, Tensor shift,"
    " Tensor scale, Tensor? group, float eps, bool rms, ScalarType? dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_fwd,
    _fake_fwd,
)
_bwd = register(
    "gated_residual_adaln_bwd(Tensor? dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? bias,"
    " Tensor gate, Tensor scale, Tensor? group, Tensor mean, Tensor rstd, Tensor? shift)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.gated_residual_adaln_bwd,
    _fake_bwd,
)


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, group, eps, rms, dtype):
        x = x.contiguous()
        y = y.contiguous()
        x_new, h, mean, rstd = _fwd(x, y, bias, gate, shift, scale, group, eps, rms, dtype)
        # neither x nor h: the backward works from x'
        ctx.save_for_backward(x_new, y, bias, gate, scale, group, mean, rstd)
        # an unused output then has gradient None instead of zeros
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    def backward(ctx, dx_new, dh):
        x_new, y, bias, gate, scale, group, mean, rstd = ctx.saved_tensors
        # an output that nobody used has no gradient: the kernel can do without dx', not without dh
        dx_new = None if dx_new is None else dx_new.contiguous()
        dh = torch.zeros_like(x_new) if dh is None else dh.contiguous()
        dx, dy, dgate, dshift, dscale, dbias, _ = guard_double_backward(
            "gated_residual_adaln",
            _bwd,
            *(dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd),
            None,
        )
        dbias = None if bias is None else dbias
        return dx, dy, dbias, dgate, dshift, dscale, None, None, None, None


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    bias: Tensor | None = None,
    group: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate * (y + bias)`` and ``h = norm(x') * (1 + scale) + shift``, in one pass each
    way.

    The gate belongs to the half-block that ends; shift and scale to the one that begins, in the
    same block or the next. The backward pass needs ``x'``, ``y`` and two numbers per token.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous. The
            kernel takes D <= 3072. fp64 and wider rows run the reference; wider rows are logged
            once.
        y: ``[B, T, D]`` output of the half-block that ends, any of these dtypes; copied first
            unless contiguous.
        gate: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; or ``[B, G,
            D]`` with ``group``. A column slice of the 6*D adaLN projection is used in place.
        shift: as ``gate``; its strides may differ.
        scale: as ``gate``; its strides may differ.
        eps: added to the variance, or to the mean square of RMS.
        norm: ``"layer"`` (LayerNorm without affine) or ``"rms"``.
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
        bias={"bias": bias},
        dtype=dtype,
    )
    check_norm(operator, norm, eps)
    return run_gated_residual_adaln(
        operator, x, y, bias, gate, shift, scale, group, eps, norm, dtype, backend
    )


def run_gated_residual_adaln(
    operator: str,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    group: Tensor | None,
    eps: float,
    norm: str,
    dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``gated_residual_adaln`` of inputs that ``operator`` has checked; errors begin with its
    name.
    """
    # fp64, empty tensors and very wide rows
    if not runs_kernel(operator, kernels, backend, x, y, gate, shift, scale, dtype=dtype):
        return gated_residual_adaln_ref(
            x, y, gate, shift, scale, eps, norm=norm, bias=bias, group=group, dtype=dtype
        )
    # the kernel takes any strides of the modulation but the last
    gate = with_dense_rows(gate)
    shift = with_dense_rows(shift)
    scale = with_dense_rows(scale)
    bias = None if bias is None else with_dense_rows(bias)
    group = None if group is None else group.contiguous()
    args = (bias, gate, shift, scale, group, eps, norm == "rms", dtype)
    if wants_grad(x, y, bias, gate, shift, scale):
        return apply(_GatedResidualAdaLN, x, y, *args)
    x_new, h, _, _ = _fwd(x.contiguous(), y.contiguous(), *args)
    return x_new, h
