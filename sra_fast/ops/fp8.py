"""The operators of an fp8 forward pass without gradients: e4m3 rows with one scale each, and linear layers on them.

What a linear layer reads is quantised where it is made: in the pass of the modulated norm, or in that of the GELU.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.kernels import quantize_rows as kernels
from sra_fast.ops._backend import use_triton
from sra_fast.ops._modulation import check, in_place
from sra_fast.ops._register import register
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.gated_residual import gated_residual_ref

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


class Rows(NamedTuple):
    """``values * scale``: ``values [..., K]`` e4m3, ``scale [..., 1]`` fp32."""

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """``[..., K]`` fp32."""
        return self.values.float() * self.scale


class Fp8Copy(NamedTuple):
    """An e4m3 copy of a flat buffer ``[N]`` that is cut into S segments, one multiplier each: what ``adamw_ema_`` can write.

    Its kernel needs compute capability 8.9.  ``Fp8Copy.of`` makes one.

    values: ``[N]`` e4m3; buffer times multiplier, rounded, at most 448 in magnitude (NaN stays NaN).
    multiplier: ``[S]`` fp32, read.
    amax: ``[S]`` fp32, raised to the largest magnitude in each segment: what the next multiplier is chosen from.  Whether a NaN
        counts is not defined.
    ends: ``[S]`` int64, the element after each segment's last; never decreasing, the last one N.
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
        """With ``ends`` made of ``bounds``."""
        return cls(
            values, multiplier, amax, torch.tensor(bounds, device=values.device), tuple(bounds)
        )

    def _pieces(self, x: Tensor) -> dict[int, Tensor]:
        """``{number of the segment: its part of x}``, without the empty ones."""
        begins = (0, *self.bounds[:-1])
        return {
            i: x.view(-1)[begin:end]
            for i, (begin, end) in enumerate(zip(begins, self.bounds, strict=True))
            if begin < end
        }

    @torch.no_grad()
    def measure_(self, x: Tensor) -> None:
        """``amax <- max(amax, |x|)`` over each segment of ``x [N]``."""
        pieces = self._pieces(x)
        for i, largest in zip(
            pieces, torch._foreach_norm(list(pieces.values()), math.inf), strict=True
        ):
            self.amax[i].copy_(torch.maximum(self.amax[i], largest))

    @torch.no_grad()
    def store_(self, x: Tensor) -> None:
        """``values <- x``, with the multipliers as they are."""
        for (i, piece), values in zip(
            self._pieces(x).items(), self._pieces(self.values).values(), strict=True
        ):
            values.copy_((piece.float() * self.multiplier[i]).clamp(-E4M3_MAX, E4M3_MAX))


def power_of_two_multiplier(amax: Tensor) -> Tensor:
    """For each ``amax`` (fp32) the power of two that brings it into [64, 128): e4m3's 448 leaves room for 3.5 times as much.

    A change of such a multiplier changes no mantissa, so that a slowly moving buffer has a steady copy.
    """
    exponent = (7 - torch.frexp(amax).exponent).clamp(-126, 120)
    return (
        ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    )  # from its bits: exact on every device


def quantize_rows_ref(x: Tensor, *, gelu: bool = False) -> Rows:
    """The definition, in fp32."""
    v = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = v.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return Rows((v / scale).to(E4M3), scale)


def _rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return adaln_kernels.adaln_fwd(x, shift, scale, None, eps, False, y_scale=h_scale)[0], h_scale


def _fused(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    x_new, h, *_ = fused_kernels.gated_residual_adaln_fwd(
        x, y, None, gate, shift, scale, None, eps, False, h_scale=h_scale
    )
    return x_new, h, h_scale


_quantize_op = register(
    "quantize_rows(Tensor x, bool gelu) -> (Tensor, Tensor)",
    kernels.quantize_rows,
    lambda x, gelu: _rows_like(x),
)
_adaln_op = register(
    "adaln_fp8(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _adaln,
    lambda x, shift, scale, eps: _rows_like(x),
)
_fused_op = register(
    "gated_residual_adaln_fp8(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _fused,
    lambda x, y, gate, shift, scale, eps: (x.new_empty(x.shape), *_rows_like(x)),
)


@torch.no_grad()
def quantize_rows(x: Tensor, *, gelu: bool = False, backend: str | None = None) -> Rows:
    """Each row of ``x`` in e4m3, with the scale that puts its largest element at 448.

    Args:
        x: ``[..., K]`` bf16/fp16/fp32; copied first unless contiguous.
        gelu: take tanh-GELU of x first.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``Rows`` of the shape of ``x``.

    Raises:
        ValueError: ``x`` is no floating-point tensor with rows, or ``backend`` is unknown.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"expected x [..., K] of a floating-point dtype, got {[*x.shape]} {x.dtype}"
        )
    if not use_triton(x, backend) or x.numel() == 0 or x.dtype == torch.float64:
        return quantize_rows_ref(x, gelu=gelu)
    values, scale = _quantize_op(x.reshape(-1, x.shape[-1]).contiguous(), gelu)
    return Rows(values.view(x.shape), scale.view(*x.shape[:-1], 1))


@torch.no_grad()
def adaln_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> Rows:
    """``ops.adaln`` with its output in e4m3, in the same pass; no gradient.

    Args:
        x: ``[B, T, D]`` bf16/fp16/fp32; copied first unless contiguous.
        shift: ``[B, D]``; a column slice is used in place.
        scale: as ``shift``.
        eps: added to the variance.
        backend: see ``quantize_rows``.

    Returns:
        ``Rows``, ``[B, T, D]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    check(x, {}, {"shift": shift, "scale": scale}, None)
    if not use_triton(x, backend) or x.numel() == 0:
        return quantize_rows_ref(adaln_ref(x.float(), shift, scale, eps))
    return Rows(*_adaln_op(x.contiguous(), in_place(shift), in_place(scale), eps))


@torch.no_grad()
def gated_residual_adaln_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Rows]:
    """``ops.gated_residual_adaln`` with h in e4m3, in the same pass; no gradient.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32; copied first unless contiguous.
        y: ``[B, T, D]`` output of the half-block that ends; copied first unless contiguous.
        gate: ``[B, D]``; a column slice is used in place, as of shift and scale.
        shift: ``[B, D]``.
        scale: ``[B, D]``.
        eps: added to the variance.
        backend: see ``quantize_rows``.

    Returns:
        ``(x' [B, T, D] in x.dtype, h: Rows [B, T, D])``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``backend`` is unknown.
    """
    check(x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale}, None)
    if not use_triton(x, backend) or x.numel() == 0:
        x = gated_residual_ref(x, y, gate)
        return x, quantize_rows_ref(adaln_ref(x.float(), shift, scale, eps))
    x_new, *rows = _fused_op(
        x.contiguous(), y.contiguous(), in_place(gate), in_place(shift), in_place(scale), eps
    )
    return x_new, Rows(*rows)


@torch.no_grad()
def linear_fp8(x: Rows, weight: Rows, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` on the fp8 matrix units (``torch._scaled_mm``; on a CPU in fp32), accumulated in fp32; no gradient.

    Args:
        x: ``[..., K]``, K a multiple of 16.
        weight: ``[N, K]``, N a multiple of 16, one scale per output.
        bias: ``[N]`` bf16 or None.

    Returns:
        ``[..., N]`` bf16.

    Raises:
        ValueError: K or N does not fit.
    """
    (N, K), rows = weight.values.shape, x.values.reshape(-1, x.values.shape[-1])
    if rows.shape[1] != K or K % 16 or N % 16:
        raise ValueError(
            f"expected x [..., K] and weight [N, K], multiples of 16, got {[*x.values.shape]} and {[N, K]}"
        )
    if not rows.is_cuda:  # the definition, in fp32
        out = x.dequantize().view(-1, K) @ weight.dequantize().t()
        out = (out if bias is None else out + bias).bfloat16()
    else:
        out = torch._scaled_mm(
            rows,
            weight.values.t(),
            scale_a=x.scale.view(-1, 1),
            scale_b=weight.scale.view(1, -1),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return out.view(*x.values.shape[:-1], N)
