"""What ``adamw_ema_`` takes, and one line for what it does not take."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, HALF, check_tensors
from sra_fast.ops._dtensors import check_whole
from sra_fast.ops._memory import first_overlap
from sra_fast.ops.fp8 import Fp8Copy
from sra_fast.ops.quantize_rows import E4M3

# a gradient in one piece, or (first element, tensor of any shape) of each of its pieces
Gradient = Tensor | Sequence[tuple[int, Tensor]]
FULL = (torch.float32, torch.float64)
# segments whose ends one program loads at once
MAX_SEGMENTS = 1024


class DeviceStep(NamedTuple):
    """The number of an update, and whether it is taken, on the device: nobody waits to know them.

    Attributes:
        numbers: ``[4]`` fp64 for update k: ``1 / (1 - beta1^k)``, ``1 / sqrt(1 - beta2^k)``, what
            multiplies the learning rate, and 1 if the update is taken, else 0.
    """

    numbers: Tensor

    @classmethod
    def of(
        cls,
        count: Tensor,
        betas: tuple[float, float],
        taken: Tensor,
        lr_factor: Tensor | None = None,
    ) -> "DeviceStep":
        """Make the numbers in a few launches. All parameters of an optimizer step can share them.

        Args:
            count: 0-d fp64, the number of this update, from 1 if it is taken.
            betas: decay rates of the two moments.
            taken: 0-d bool: whether the update is taken. If not, nothing changes.
            lr_factor: 0-d fp64, multiplies the learning rate; None: 1.
        """
        beta1, beta2 = betas
        # an update that is not taken may be number 0
        count = count.clamp(min=1)
        factor = torch.ones_like(count) if lr_factor is None else lr_factor
        bias1 = 1 - torch.pow(beta1, count)
        bias2 = 1 - torch.pow(beta2, count)
        return cls(
            torch.stack([bias1.reciprocal(), bias2.rsqrt(), factor, taken.to(torch.float64)])
        )


def dtype_of(grad: Gradient) -> torch.dtype:
    return grad.dtype if isinstance(grad, Tensor) else grad[0][1].dtype


def _describe(grad: object) -> str:
    """What was given instead of a gradient, for an error message."""
    if not isinstance(grad, list | tuple):
        return str(type(grad))
    kinds = [type(item).__name__ for item in grad[:3]]
    return f"{type(grad).__name__} of {kinds}"


def _check_pieces(grad: Sequence[tuple[int, Tensor]], param: Tensor) -> None:
    """Raise ValueError unless the pieces can be parts of one gradient of ``param``."""
    pieces = list(grad) if isinstance(grad, list | tuple) else []
    if not pieces or not all(_is_piece(item) for item in pieces):
        raise ValueError(
            "adamw_ema_: expected grad as a tensor or as a list of (first element, tensor), at least one, "
            f"got {_describe(grad)}"
        )
    if {type(piece) for _, piece in pieces} != {Tensor}:
        named = {f"piece {i} of grad": piece for i, (_, piece) in enumerate(pieces)}
        check_whole("adamw_ema_", named)
    N = param.numel()
    dtype = pieces[0][1].dtype
    # one past the last element of the piece before
    end = 0
    for i, (begin, piece) in enumerate(pieces):
        # there may be hundreds, and only a bad one needs its name
        if piece.layout is not torch.strided or piece.is_nested:
            check_tensors("adamw_ema_", {f"piece {i} of grad": piece})
        stop = begin + piece.numel()
        if begin < end or stop > N:
            raise ValueError(
                f"adamw_ema_: expected pieces of grad in ascending order that do not overlap, within {N} elements: "
                f"piece {i} is [{begin}, {stop}), the one before ends at {end}"
            )
        if piece.dtype != dtype or piece.device != param.device or not piece.is_contiguous():
            raise ValueError(
                f"adamw_ema_: expected contiguous pieces of grad, {dtype} on {param.device}, got piece {i}: "
                f"{piece.dtype}, {piece.device}, contiguous {piece.is_contiguous()}"
            )
        end = stop


def _is_piece(item: object) -> bool:
    if not isinstance(item, tuple) or len(item) != 2:
        return False
    begin, piece = item
    return type(begin) is int and isinstance(piece, Tensor)


def check_buffers(
    param: Tensor, full: dict[str, Tensor | None], grad: Gradient, half: dict[str, Tensor | None]
) -> None:
    """Raise ValueError unless the buffers have one layout and the dtypes of their kind."""
    if isinstance(grad, Tensor):
        check_tensors("adamw_ema_", {"grad": grad})
    else:
        _check_pieces(grad, param)
    grad_dtype = dtype_of(grad)
    candidates = {"param": param, **full, **half}
    if isinstance(grad, Tensor):
        candidates["grad"] = grad
    given = {name: x for name, x in candidates.items() if x is not None}

    # one shape, one device, contiguous
    if any(
        x.shape != param.shape or x.device != param.device or not x.is_contiguous()
        for x in given.values()
    ):
        got = {k: (list(x.shape), str(x.device), x.is_contiguous()) for k, x in given.items()}
        raise ValueError(
            "adamw_ema_: expected contiguous buffers of one shape and device, "
            f"got (shape, device, contiguous) {got}"
        )
    # full precision for the state, half precision for the copies
    full_fits = param.dtype in FULL and all(
        x is None or x.dtype == param.dtype for x in full.values()
    )
    half_fits = all(x is None or x.dtype in HALF for x in half.values())
    if not full_fits or not half_fits or grad_dtype not in FLOAT_DTYPES:
        got = {k: str(x.dtype) for k, x in given.items()} | {"grad": str(grad_dtype)}
        raise ValueError(
            "adamw_ema_: expected param, exp_avg, exp_avg_sq, ema of one dtype, fp32 or fp64, "
            f"grad fp32, bf16 or fp16, and weights, ema_copy bf16 or fp16, got {got}"
        )


def check_memory(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Raise ValueError if a buffer that is written lies in the memory of another: the kernel and
    the reference would write it in different orders.
    """
    given = {name: x for name, x in (written | read).items() if x is not None}
    found = first_overlap(
        [x for name, x in given.items() if name in written],
        [x for name, x in given.items() if name in read],
    )
    if found is not None:
        names = list(given)
        first, second = found
        raise ValueError(
            "adamw_ema_: expected every buffer in memory of its own, "
            f"got {names[second]} in the memory of {names[first]}"
        )


def check_fp8(copy: Fp8Copy, param: Tensor) -> None:
    """Raise ValueError unless the e4m3 copy fits the buffer."""
    values = copy.values
    # one entry per segment in each of the small tensors
    small = {"multiplier": copy.multiplier, "amax": copy.amax, "ends": copy.ends}
    named = {f"ema_copy.{name}": x for name, x in {"values": values, **small}.items()}
    check_tensors("adamw_ema_", named)
    check_whole("adamw_ema_", named)
    if (
        values.dtype != E4M3
        or values.shape != param.shape
        or values.device != param.device
        or not values.is_contiguous()
    ):
        raise ValueError(
            "adamw_ema_: expected ema_copy.values as param, contiguous and e4m3, "
            f"got {[*values.shape]} {values.dtype} {values.device}"
        )
    S = len(copy.bounds)
    got = [([*x.shape], x.dtype, x.device, x.is_contiguous()) for x in small.values()]
    dtypes = (torch.float32, torch.float32, torch.int64)
    if not 0 < S <= MAX_SEGMENTS or got != [([S], dtype, param.device, True) for dtype in dtypes]:
        raise ValueError(
            "adamw_ema_: expected ema_copy.multiplier, amax [S] fp32 and ends [S] int64, contiguous on "
            f"{param.device}, S in [1, {MAX_SEGMENTS}], got {got}"
        )
    ascending = all(begin <= end for begin, end in pairwise((0, *copy.bounds)))
    if copy.bounds[-1] != param.numel() or not ascending:
        raise ValueError(
            f"adamw_ema_: expected ema_copy.bounds that never decrease and end at {param.numel()}, "
            f"got {copy.bounds}"
        )


def check_numbers(
    step: int | DeviceStep,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: float,
) -> None:
    """Raise ValueError unless every number is in its range; a NaN is in none."""
    named = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decay": decay}
    for name, number in named.items():
        if not isinstance(number, int | float):
            raise ValueError(f"adamw_ema_: expected {name} as a number, got {number!r}")
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(isinstance(beta, int | float) for beta in betas):
        raise ValueError(f"adamw_ema_: expected betas as two numbers, got {betas!r}")
    counted = isinstance(step, int) and step >= 1
    if not counted and not isinstance(step, DeviceStep):
        raise ValueError(
            "adamw_ema_: expected an integer step >= 1 (the first update is step 1) or a DeviceStep, "
            f"got {step!r}"
        )
    # comparisons, which a compiler also traces of numbers that change
    finite = all(0 <= number < math.inf for number in (lr, eps))
    finite = finite and -math.inf < weight_decay < math.inf
    if not finite or not all(0 <= beta < 1 for beta in betas) or not 0 <= decay <= 1:
        raise ValueError(
            "adamw_ema_: expected finite lr, eps >= 0 and weight_decay, betas in [0, 1), decay in [0, 1], "
            f"got lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}, decay={decay}"
        )


def check_device_step(step: DeviceStep, param: Tensor) -> None:
    """Raise ValueError unless the numbers of the update lie beside the parameter."""
    numbers = step.numbers
    check_tensors("adamw_ema_", {"step.numbers": numbers})
    check_whole("adamw_ema_", {"step.numbers": numbers})
    got = ([*numbers.shape], numbers.dtype, numbers.device, numbers.is_contiguous())
    if got != ([4], torch.float64, param.device, True):
        raise ValueError(
            f"adamw_ema_: expected step.numbers [4] fp64, contiguous on {param.device}, as "
            f"DeviceStep.of makes them, got (shape, dtype, device, contiguous) {got}"
        )


def check_tensor_arguments(
    param: Tensor,
    grad: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | DeviceStep,
    clip_scale: Tensor | None,
    weights: Tensor | None,
    ema: Tensor | None,
    ema_copy: Tensor | Fp8Copy | None,
) -> None:
    """Raise ValueError unless the tensors of a call fit each other; see ``adamw_ema_``."""
    optional = {"clip_scale": clip_scale, "weights": weights, "ema": ema}
    if not isinstance(ema_copy, Fp8Copy):
        optional["ema_copy"] = ema_copy
    given = {name: x for name, x in optional.items() if x is not None}
    state = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_tensors("adamw_ema_", state | given)
    check_whole("adamw_ema_", {"clip_scale": clip_scale})
    if ema_copy is not None and ema is None:
        raise ValueError("adamw_ema_: expected ema where ema_copy is given, got None")
    half: dict[str, Tensor | None] = {"weights": weights}
    # what is written and what is only read
    written = state | {"weights": weights, "ema": ema}
    read = {"clip_scale": clip_scale, "grad": grad if isinstance(grad, Tensor) else None}
    if isinstance(ema_copy, Fp8Copy):
        check_fp8(ema_copy, param)
        written |= {"ema_copy.values": ema_copy.values, "ema_copy.amax": ema_copy.amax}
        read |= {"ema_copy.multiplier": ema_copy.multiplier, "ema_copy.ends": ema_copy.ends}
    else:
        half["ema_copy"] = ema_copy
        written["ema_copy"] = ema_copy
    full = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    check_buffers(param, full, grad, half)
    if isinstance(step, DeviceStep):
        check_device_step(step, param)
        read["step.numbers"] = step.numbers
    if clip_scale is not None and (clip_scale.numel() != 1 or clip_scale.device != param.device):
        raise ValueError(
            f"adamw_ema_: expected clip_scale with one number on {param.device}, "
            f"got {[*clip_scale.shape]} {clip_scale.device}"
        )
    check_memory(written, read)
