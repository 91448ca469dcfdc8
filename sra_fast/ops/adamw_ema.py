"""The whole optimizer step of SRA training over flat buffers: clip, AdamW, bf16 weights, EMA, bf16 teacher."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adamw_ema as kernels
from sra_fast.ops._backend import FLOAT_DTYPES, use_triton
from sra_fast.ops._register import register
from sra_fast.ops.fp8 import E4M3, Fp8Copy

# a gradient in one piece, or (first element, tensor of any shape) of each of its pieces
Gradient = Tensor | Sequence[tuple[int, Tensor]]
HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)


def _whole(grad: Gradient, param: Tensor) -> Tensor:
    """The gradient in one piece."""
    if isinstance(grad, Tensor):
        return grad
    whole = grad[0][1].new_zeros(param.shape)
    for begin, piece in grad:
        whole.view(-1)[begin : begin + piece.numel()].copy_(piece.reshape(-1))
    return whole


@torch.no_grad()
def adamw_ema_ref_(
    param: Tensor,
    grad: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_scale: Tensor | None = None,
    weights: Tensor | None = None,
    ema: Tensor | None = None,
    ema_copy: Tensor | Fp8Copy | None = None,
    decay: float = 0.9999,
) -> None:
    """The definition, in the dtype of ``param``: AdamW (arXiv 1711.05101, Alg. 2) in torch's order, then the EMA."""
    beta1, beta2 = betas
    grad = _whole(grad, param).to(param.dtype)
    if clip_scale is not None:
        grad = grad * clip_scale.to(param.dtype)
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if weights is not None:
        weights.copy_(param)
    if ema is not None:
        ema.lerp_(param, 1 - decay)
    if isinstance(ema_copy, Fp8Copy):
        ema_copy.measure_(ema)
        ema_copy.store_(ema)
    elif ema_copy is not None:
        ema_copy.copy_(ema)


def _run(param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy, multiplier, amax, *rest) -> None:
    grad = grad[0] if rest[-1] is None else grad
    kernels.adamw_ema_(
        param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy, multiplier, amax, *rest
    )
    # autograd must see the change: a graph that saved the old value would be wrong in silence
    written = (param, exp_avg, exp_avg_sq, weights, ema, ema_copy, amax)
    torch.autograd.graph.increment_version([x for x in written if x is not None])


_op = register(
    "adamw_ema_(Tensor(a!) param, Tensor[] grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? weights,"
    " Tensor(e!)? ema, Tensor(f!)? ema_copy, Tensor? multiplier, Tensor(g!)? amax, Tensor? ends, Tensor? clip_scale,"
    " int step, float lr, float beta1, float beta2, float eps, float weight_decay, float decay,"
    " int[]? begins) -> ()",
    _run,
    lambda *args: None,
)


def _in_place(grad: Gradient) -> tuple[list[Tensor], list[int] | None]:
    """What the kernel reads: one vector and None, or pieces and their begins, all at multiples of 16 bytes: the others as copies
    with zeros around them."""
    if isinstance(grad, Tensor):
        return [grad.view(-1)], None
    vector, pieces, begins = kernels.ALIGNMENT // grad[0][1].element_size(), [], []
    for begin, piece in grad:
        before, after = begin % vector, -(begin + piece.numel()) % vector
        if before or after:
            piece = F.pad(piece.reshape(-1), (before, after))
        elif piece.data_ptr() % kernels.ALIGNMENT:
            piece = piece.clone()
        pieces.append(piece)
        begins.append(begin - before)
    return pieces, begins


def _kinds(grad) -> str:
    return (
        f"{type(grad).__name__} of {[type(each).__name__ for each in grad][:3]}"
        if isinstance(grad, list | tuple)
        else str(type(grad))
    )


def _check_pieces(grad: Sequence[tuple[int, Tensor]], param: Tensor) -> None:
    """ValueError unless the pieces can be parts of one gradient of ``param``."""
    pairs = isinstance(grad, list | tuple) and all(
        isinstance(each, tuple) and len(each) == 2 for each in grad
    )
    if (
        not pairs
        or not grad
        or not all(type(begin) is int and isinstance(piece, Tensor) for begin, piece in grad)
    ):
        raise ValueError(
            f"expected grad as a tensor or as a list of (first element, tensor), at least one, got {_kinds(grad)}"
        )
    dtype, end = grad[0][1].dtype, 0
    for i, (begin, piece) in enumerate(grad):
        if begin < end or begin + piece.numel() > param.numel():
            raise ValueError(f"expected pieces in ascending order that do not overlap, within {param.numel()} elements: "
                             f"piece {i} is [{begin}, {begin + piece.numel()}), the one before ends at {end}")  # fmt: skip
        if piece.dtype != dtype or piece.device != param.device or not piece.is_contiguous():
            raise ValueError(f"expected contiguous pieces of {dtype} on {param.device}, got piece {i}: {piece.dtype}, "
                             f"{piece.device}, contiguous {piece.is_contiguous()}")  # fmt: skip
        end = begin + piece.numel()


def _check_buffers(
    full: dict[str, Tensor | None], grad: Gradient, half: dict[str, Tensor | None]
) -> None:
    param, whole = full["param"], isinstance(grad, Tensor)
    if not whole:
        _check_pieces(grad, param)
    dtype = grad.dtype if whole else grad[0][1].dtype
    given = {
        k: v for k, v in {**full, "grad": grad if whole else None, **half}.items() if v is not None
    }
    if any(
        x.shape != param.shape or x.device != param.device or not x.is_contiguous()
        for x in given.values()
    ):
        got = {k: (list(x.shape), str(x.device), x.is_contiguous()) for k, x in given.items()}
        raise ValueError(
            f"expected contiguous buffers of one shape and device, got (shape, device, contiguous) {got}"
        )
    bad = param.dtype not in FULL or any(
        x is not None and x.dtype != param.dtype for x in full.values()
    )
    if (
        bad
        or dtype not in FLOAT_DTYPES
        or any(x is not None and x.dtype not in HALF for x in half.values())
    ):
        got = {k: str(x.dtype) for k, x in given.items()} | {"grad": str(dtype)}
        raise ValueError(
            "expected param, exp_avg, exp_avg_sq, ema of one dtype, fp32 or fp64, grad fp32, bf16 or fp16, and "
            f"weights, ema_copy bf16 or fp16, got {got}"
        )


def _check_fp8(copy: Fp8Copy, param: Tensor) -> None:
    values, *small, bounds = copy
    if (
        values.dtype != E4M3
        or values.shape != param.shape
        or values.device != param.device
        or not values.is_contiguous()
    ):
        raise ValueError(
            f"expected ema_copy.values as param, contiguous and e4m3, got {[*values.shape]} {values.dtype} {values.device}"
        )
    got = [([*x.shape], x.dtype, x.device, x.is_contiguous()) for x in small]
    S, dtypes = len(bounds), (torch.float32, torch.float32, torch.int64)
    if not 0 < S <= 1024 or got != [([S], dtype, param.device, True) for dtype in dtypes]:
        raise ValueError(
            f"expected ema_copy.multiplier, amax [S] fp32 and ends [S] int64, contiguous on {param.device}, S in [1, 1024], got {got}"
        )
    if bounds[-1] != param.numel() or any(end < begin for begin, end in pairwise((0, *bounds))):
        raise ValueError(
            f"expected ema_copy.bounds that never decrease and end at {param.numel()}, got {bounds}"
        )


def _check_numbers(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decay: float
) -> None:
    if step < 1:
        raise ValueError(f"expected step >= 1 (the first update is step 1), got {step}")
    finite = all(0 <= number < math.inf for number in (lr, eps)) and math.isfinite(weight_decay)
    if not finite or not all(0 <= beta < 1 for beta in betas) or not 0 <= decay <= 1:
        raise ValueError(
            "expected finite lr, eps >= 0 and weight_decay, betas in [0, 1), decay in [0, 1], "
            f"got lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}, decay={decay}"
        )


@torch.no_grad()
def adamw_ema_(
    param: Tensor,
    grad: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_scale: Tensor | None = None,
    weights: Tensor | None = None,
    ema: Tensor | None = None,
    ema_copy: Tensor | Fp8Copy | None = None,
    decay: float = 0.9999,
    backend: str | None = None,
) -> None:
    """One optimizer step in place: the update of ``torch.optim.AdamW``, then of the EMA, in one pass.

    ``param``, ``exp_avg``, ``exp_avg_sq`` and ``step`` are the state of ``torch.optim.AdamW``; either can continue the
    other's run.  40 bytes per element with an fp32 gradient, weights, EMA and copy; the host reads nothing back.

    Args:
        param: ``[N]`` fp32 master weights, contiguous (fp64 goes to the reference); a slice of a flat buffer will do.
        grad: ``[N]`` gradient, fp32/bf16/fp16; or ``[(first element, tensor of any shape), ...]``, contiguous pieces of it in
            ascending order, zero between them: read where they are if they begin and end at multiples of 16 bytes, as copies else.
        exp_avg: ``[N]`` first moment, fp32.
        exp_avg_sq: ``[N]`` second moment, fp32.
        step: number of this update, from 1.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; the parameter shrinks by ``lr * weight_decay``.
        clip_scale: one number on the device that multiplies the gradient: ``min(1, max_norm / norm)``, and
            ``1 / loss_scale`` where there is one; or None.
        weights: ``[N]`` bf16 or fp16, receives the rounded parameters; or None.
        ema: ``[N]`` fp32, moves towards the new parameters; or None.
        ema_copy: ``[N]`` bf16 or fp16, or an ``Fp8Copy``, receives the rounded EMA; needs ``ema``; or None.
        decay: fraction of the old EMA that is kept, in [0, 1].
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit, or a number outside its range.
    """
    if ema_copy is not None and ema is None:
        raise ValueError("expected ema where ema_copy is given, got None")
    full, fp8 = (
        {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema},
        isinstance(ema_copy, Fp8Copy),
    )
    _check_buffers(full, grad, {"weights": weights, "ema_copy": None if fp8 else ema_copy})
    if fp8:
        _check_fp8(ema_copy, param)
    _check_numbers(step, lr, betas, eps, weight_decay, decay)
    if clip_scale is not None and (clip_scale.numel() != 1 or clip_scale.device != param.device):
        raise ValueError(f"expected clip_scale with one number on {param.device}, got {clip_scale}")
    wide = torch.float64 in (
        param.dtype,
        grad.dtype if isinstance(grad, Tensor) else grad[0][1].dtype,
    )
    if param.numel() and not wide and use_triton(param, backend):
        copy, *scaling = ema_copy[:4] if fp8 else (ema_copy, None, None, None)
        first, *buffers = [
            x if x is None else x.view(-1) for x in (param, exp_avg, exp_avg_sq, weights, ema, copy)
        ]
        grads, begins = _in_place(grad)
        _op(
            first,
            grads,
            *buffers,
            *scaling,
            clip_scale,
            step,
            lr,
            *betas,
            eps,
            weight_decay,
            decay,
            begins,
        )
        return
    outputs = {"weights": weights, "ema": ema, "ema_copy": ema_copy, "decay": decay}
    numbers = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "clip_scale": clip_scale,
    }
    adamw_ema_ref_(param, grad, exp_avg, exp_avg_sq, step, **numbers, **outputs)
