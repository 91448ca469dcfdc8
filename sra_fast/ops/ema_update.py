"""In-place exponential moving average of many tensors: the teacher's update (SRA, arXiv 2505.02831, Sec. 3.2)."""
from collections.abc import Iterable

import torch
from torch import Tensor

from sra_fast.kernels import ema_update as kernels
from sra_fast.ops._backend import use_triton
from sra_fast.ops._register import register

HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def ema_update_ref_(ema: list[Tensor], params: list[Tensor], decay: float, copies: list[Tensor] | None = None) -> None:
    """The definition, in the dtype of ``ema``.  Tests, benchmarks and backend="torch" all use this one function."""
    for e, p in zip(ema, params, strict=True):
        e.lerp_(p.to(e.dtype), 1 - decay)
    for c, e in zip(copies or [], ema if copies else [], strict=True):
        c.copy_(e)


def _run_triton(ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float) -> None:
    kernels.ema_update_(ema, params, copies, decay)
    # autograd must see the change: a graph that saved the old value would be wrong in silence
    torch.autograd.graph.increment_version([*ema, *copies])


_op = register(
    "ema_update_(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] copies, float decay) -> ()",
    _run_triton,
    lambda ema, params, copies, decay: None,
)


def _check(ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float) -> None:
    if len(params) != len(ema) or len(copies) not in (0, len(ema)):
        raise ValueError(f"expected as many params and copies as ema, got {len(ema)}, {len(params)}, {len(copies)}")
    if not 0 <= decay <= 1:
        raise ValueError(f"expected decay in [0, 1], got {decay}")
    device = ema[0].device
    for i, operands in enumerate(zip(ema, params, copies, strict=True) if copies else zip(ema, params, strict=True)):
        e, p, *c = operands
        if any(t.shape != e.shape or t.device != device for t in operands):
            got = [(list(t.shape), str(t.device)) for t in operands]
            raise ValueError(f"expected tensors of one shape on {device} at index {i}, got {got}")
        if e.dtype not in (torch.float32, torch.float64) or not p.is_floating_point() or (c and c[0].dtype not in HALF):
            got = [str(t.dtype) for t in operands]
            raise ValueError(f"expected ema fp32 (a bf16 EMA does not move), copies bf16 or fp16, got {got}")


def _is_flat(operands: tuple[Tensor, ...]) -> bool:
    """True if the tensors lie in memory in one common order without gaps, so that the kernels see them as vectors."""
    if torch.float64 in (t.dtype for t in operands):
        return False
    first = operands[0]
    if all(t.is_contiguous() for t in operands):
        return True
    span = 1 + sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True))
    return span == first.numel() and all(t.stride() == first.stride() for t in operands)


def _launch(run, ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float) -> None:
    """Give the tensors that are plain vectors to `run`, the few others to the reference."""
    rows = list(zip(ema, params, copies, strict=True) if copies else zip(ema, params, strict=True))
    flat = [_is_flat(row) for row in rows]
    for row, is_flat in zip(rows, flat, strict=True):
        if not is_flat:
            ema_update_ref_([row[0]], [row[1]], decay, list(row[2:]))
    if not all(flat):
        rows = [row for row, is_flat in zip(rows, flat, strict=True) if is_flat]
        ema, params, copies = ([list(column) for column in zip(*rows, strict=True)] + [[]] * 3)[:3]
    if rows:
        run(ema, params, copies, decay)


@torch.no_grad()
def ema_update_(
    ema: Iterable[Tensor],
    params: Iterable[Tensor],
    decay: float,
    copies: Iterable[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> None:
    """``ema = decay * ema + (1 - decay) * params`` for every tensor, in place, with one launch per mix of dtypes.

    Args:
        ema: fp32 tensors of any shapes (fp64 goes to the reference); no tensor twice.
        params: tensors of the same shapes, bf16/fp16/fp32.
        decay: fraction of the old average that is kept, in [0, 1]; the paper uses 0.9999.
        copies: bf16 or fp16 tensors that receive the new average, rounded, in the same pass; or None.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Raises:
        ValueError: the numbers of tensors, their shapes, dtypes or devices do not fit, or ``decay`` is outside [0, 1].
    """
    ema, params, copies = list(ema), list(params), list(copies or [])
    if not ema and not params and not copies:
        return
    _check(ema, params, copies, decay)
    if not use_triton(ema[0], backend):
        ema_update_ref_(ema, params, decay, copies)
        return
    _launch(_op, ema, params, copies, decay)
