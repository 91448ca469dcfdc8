"""The operators of an fp8 forward pass without gradients, and an fp8 copy of a flat buffer.

The input of a linear layer is quantized by the pass that makes it: the modulated norm here, or the
GELU in ``quantize_rows``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.ops._backend import use_triton
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._modulation import check_inputs
from sra_fast.ops._register import register
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.gated_residual import gated_residual_ref
from sra_fast.ops.quantize_rows import E4M3_MAX, Rows, empty_rows, quantize_rows_ref


class Fp8Copy(NamedTuple):
    """An e4m3 copy of a flat buffer ``[N]`` cut into S segments with one multiplier each.

    ``adamw_ema_`` can write it; its kernel needs compute capability 8.9. ``Fp8Copy.of`` makes one.

    values: ``[N]`` e4m3; buffer times multiplier, rounded, at most 448 in magnitude (NaN stays
    NaN).
    multiplier: ``[S]`` fp32, read.
    amax: ``[S]`` fp32, raised to the largest magnitude in each segment: the next multiplier is
        chosen from it. Whether a NaN counts is undefined.
    ends: ``[S]`` int64, one past each segment's last element; never decreasing, the last one is N.
    bounds: the same numbers on the host.
    """

    values: Tensor
    multiplier: Tensor
    amax: Tensor
    ends: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(
        cls, values: Tensor, multiplier: Tensor, amax: Tensor, bounds: Sequence[int]
    ) -> "Fp8Copy":
        """Make ``ends`` from ``bounds``."""
        ends = torch.tensor(bounds, device=values.device)
        return cls(values, multiplier, amax, ends, tuple(bounds))

    def _segments(self, x: Tensor) -> dict[int, Tensor]:
        """``{index of the segment: its part of x}``, without the empty segments."""
        # a segment begins where the one before ends
        begins = (0, *self.bounds[:-1])
        return {
            i: x.view(-1)[begin:end]
            for i, (begin, end) in enumerate(zip(begins, self.bounds, strict=True))
            if begin < end
        }

    @torch.no_grad()
    def measure_(self, x: Tensor) -> None:
        """``amax <- max(amax, |x|)`` over each segment of ``x [N]``."""
        segments = self._segments(x)
        # torch's type hints leave out private functions
        norms = torch._foreach_norm(  # pyright: ignore[reportPrivateImportUsage]
            list(segments.values()), math.inf
        )
        for i, largest in zip(segments, norms, strict=True):
            self.amax[i].copy_(torch.maximum(self.amax[i], largest))

    @torch.no_grad()
    def store_(self, x: Tensor) -> None:
        """``values <- x`` times the current multipliers."""
        targets = self._segments(self.values)
        for i, segment in self._segments(x).items():
            scaled = segment.float() * self.multiplier[i]
            targets[i].copy_(scaled.clamp(-E4M3_MAX, E4M3_MAX))


def power_of_two_multiplier(amax: Tensor) -> Tensor:
    """For each ``amax`` (fp32) the power of two that brings it into [64, 128).

    e4m3 ends at 448, which leaves room for values 3.5 times as large. A change of such a
    multiplier changes no mantissa, so the copy of a slowly moving buffer is steady.
    """
    # frexp's mantissa is in [0.5, 1): 2^(7 - exponent) brings amax into [64, 128)
    exponent = (7 - torch.frexp(amax).exponent).clamp(-126, 120)
    # assembled from its bits: exact on every device
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _launch_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, group: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    h, _, _ = adaln_kernels.adaln_fwd(x, shift, scale, group, eps, False, y_scale=h_scale)
    return h, h_scale


def _launch_fused(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    group: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    x_new, h, _, _ = fused_kernels.gated_residual_adaln_fwd(
        x, y, None, gate, shift, scale, group, eps, False, h_scale=h_scale
    )
    return x_new, h, h_scale


_adaln_op = register(
    "adaln_fp8(Tensor x, Tensor shift, Tensor scale, Tensor? group, float eps) -> (Tensor, Tensor)",
    _launch_adaln,
    lambda x, shift, scale, group, eps: empty_rows(x),
)
_fused_op = register(
    "gated_residual_adaln_fp8(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale,"
    " Tensor? group, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_fused,
    lambda x, y, gate, shift, scale, group, eps: (x.new_empty(x.shape), *empty_rows(x)),
)


@torch.no_grad()
def adaln_fp8(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    group: Tensor | None = None,
    backend: str | None = None,
) -> Rows:
    """``ops.adaln`` with its output in e4m3, in the same pass; no gradient.

    Args:
        x: ``[B, T, D]`` bf16/fp16/fp32; copied first unless contiguous.
        shift: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice is used in place.
        scale: as ``shift``.
        eps: added to the variance.
        group: ``[B, T]`` integers in [0, G) or None; see ``adaln``.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``Rows``, ``[B, T, D]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    modulation = {"shift": shift, "scale": scale}
    shift, scale = check_inputs("adaln_fp8", x, {}, modulation, group)
    if not use_triton("adaln_fp8", x, backend) or x.numel() == 0:
        return quantize_rows_ref(adaln_ref(x.float(), shift, scale, eps, group=group))
    values, h_scale = _adaln_op(
        x.contiguous(),
        with_dense_columns(shift),
        with_dense_columns(scale),
        None if group is None else group.contiguous(),
        eps,
    )
    return Rows(values, h_scale)


@torch.no_grad()
def gated_residual_adaln_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    group: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Rows]:
    """``ops.gated_residual_adaln`` with h in e4m3, in the same pass; no gradient.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous.
        y: ``[B, T, D]`` output of the half-block that ends; copied first unless contiguous.
        gate: ``[B, D]``, or ``[B, G, D]`` with ``group``; a column slice is used in place, as of
            shift and scale.
        shift: as ``gate``.
        scale: as ``gate``.
        eps: added to the variance.
        group: ``[B, T]`` integers in [0, G) or None; see ``adaln``.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x' [B, T, D] in x.dtype, h: Rows [B, T, D])``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    operator = "gated_residual_adaln_fp8"
    modulation = {"gate": gate, "shift": shift, "scale": scale}
    gate, shift, scale = check_inputs(operator, x, {"y": y}, modulation, group)
    if not use_triton(operator, x, backend) or x.numel() == 0:
        x = gated_residual_ref(x, y, gate, group=group)
        return x, quantize_rows_ref(adaln_ref(x.float(), shift, scale, eps, group=group))
    x_new, values, h_scale = _fused_op(
        x.contiguous(),
        y.contiguous(),
        with_dense_columns(gate),
        with_dense_columns(shift),
        with_dense_columns(scale),
        None if group is None else group.contiguous(),
        eps,
    )
    return x_new, Rows(values, h_scale)


@torch.no_grad()
def linear_fp8(x: Rows, weight: Rows, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` on the fp8 matrix units, accumulated in fp32; no gradient.

    It is ``torch._scaled_mm``; on a CPU the product is computed in fp32.

    Args:
        x: ``[..., K]``, K a multiple of 16.
        weight: ``[N, K]``, N a multiple of 16, one scale per output.
        bias: ``[N]`` bf16 or None.

    Returns:
        ``[..., N]`` bf16.

    Raises:
        ValueError: K or N does not fit.
    """
    N, K = weight.values.shape
    rows = x.values.reshape(-1, x.values.shape[-1])
    if rows.shape[1] != K or K % 16 or N % 16:
        raise ValueError(
            "linear_fp8: expected x [..., K] and weight [N, K], multiples of 16, "
            f"got {[*x.values.shape]} and {[N, K]}"
        )
    if rows.is_cuda:
        # torch's type hints leave out private functions
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows,
            weight.values.t(),
            scale_a=x.scale.view(-1, 1),
            scale_b=weight.scale.view(1, -1),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    else:
        # the definition, in fp32
        out = x.dequantize().view(-1, K) @ weight.dequantize().t()
        out = (out if bias is None else out + bias).bfloat16()
    return out.view(*x.values.shape[:-1], N)
