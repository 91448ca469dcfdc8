"""Multi-tensor exponential moving average, optionally with a copy in half precision.

    ema <- ema + (1 - decay) (p - ema);   copy <- ema

One launch per combination of dtypes updates every tensor. A table on the device holds, for each
chunk of CHUNK elements, the addresses of the three operands and the number of elements left. It is
built once per set of tensors. The decay may lie on the device; if it is 1, nothing is written.

Bytes moved per element: 8 for the fp32 EMA and the size of p, 2 more with a copy: 12 fp32, 10
bf16, 12 bf16 with copy; the table adds 32 bytes per chunk.
Reference: sra_fast/ops/ema_update.py::ema_update_ref_.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._plans import Plans, check_not_capturing, key_of, mark_in_use

# 16 elements per thread at 8 warps; the table is 0.07 % of the traffic
CHUNK = 4096
# upper limit of 32-bit registers per thread, for launches with wide accesses
REGISTERS = {"_ema_kernel": 48}

# the table of one launch, empty tensors of the dtypes, and whether its accesses are wide
Launch = tuple[Tensor, list[Tensor], bool]

_plans = Plans()


@triton.jit
def _ema_kernel(
    table_ptr,  # [num_chunks, 4] int64: addresses of ema, p and copy, number of elements
    ema_like_ptr,  # these three only carry the dtypes
    p_like_ptr,
    copy_like_ptr,
    decay_ptr,  # one fp64 number in place of the next two; or None
    weight,  # 1 - decay
    decay,
    WRITE_COPY: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # this program's line of the table
    entry = table_ptr + tl.program_id(0).to(tl.int64) * 4
    ema_ptr = tl.load(entry).to(ema_like_ptr.dtype)
    p_ptr = tl.load(entry + 1).to(p_like_ptr.dtype)
    copy_ptr = tl.load(entry + 2).to(copy_like_ptr.dtype)
    count = tl.load(entry + 3)
    if decay_ptr is not None:
        # from fp64: 1 - decay loses half of its digits in fp32
        kept = tl.load(decay_ptr)
        decay = kept.to(tl.float32)
        weight = (1.0 - kept).to(tl.float32)
        # with decay 1 no lane is left, and the average and its copy stay as they are
        count = tl.where(kept == 1.0, 0, count)
    # the compiler cannot see into the table; without these hints every access is one element wide
    if VECTOR:
        ema_ptr = tl.multiple_of(ema_ptr, 16)
        p_ptr = tl.multiple_of(p_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
        count = tl.multiple_of(count, 16)

    cols = tl.arange(0, CHUNK)
    mask = cols < count
    ema = tl.load(ema_ptr + cols, mask=mask, other=0.0)
    p = tl.load(p_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    # as torch.lerp: from the nearer end, so that decay 0 returns p exactly
    new = tl.where(weight < 0.5, ema + weight * (p - ema), p - decay * (p - ema))
    tl.store(ema_ptr + cols, new, mask=mask)
    if WRITE_COPY:
        tl.store(copy_ptr + cols, new, mask=mask)


def _lines(operands: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
    """Table lines for elements [start, stop) of one tensor; an absent copy has address 0."""
    first = torch.arange(start, stop, CHUNK, dtype=torch.int64)
    addresses = [t.data_ptr() + first * t.element_size() for t in operands]
    addresses += [torch.zeros_like(first)] * (3 - len(operands))
    count = (stop - first).clamp(max=CHUNK)
    return torch.stack([*addresses, count], dim=1)


def plan(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> list[Launch]:
    """Every launch that these tensors need.

    Misaligned tensors, and the last numel % 16 elements of every tensor, go to a launch whose
    accesses are one element wide.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    check_not_capturing("ema_update_")
    groups: dict[tuple[tuple[torch.dtype, ...], bool], list[Tensor]] = {}
    lists = (ema, params, copies) if copies else (ema, params)
    for operands in zip(*lists, strict=True):
        numel = operands[0].numel()
        dtypes = tuple(t.dtype for t in operands)
        aligned = all(t.data_ptr() % 16 == 0 for t in operands)
        split = numel // 16 * 16 if aligned else 0
        for vector, start, stop in ((True, 0, split), (False, split, numel)):
            if start < stop:
                groups.setdefault((dtypes, vector), []).append(_lines(operands, start, stop))

    # one table per launch
    launches = []
    for (dtypes, vector), lines in groups.items():
        table = torch.cat(lines).to(ema[0].device)
        # the kernel always takes three dtypes; without copies the last one is not used
        like = [table.new_empty(0, dtype=dtype) for dtype in (*dtypes, dtypes[-1])[:3]]
        launches.append((table, like, vector))
    return launches


def launch(launches: list[Launch], write_copies: bool, decay: float | Tensor) -> None:
    """Update the tensors of a plan; ``decay`` as in ``ema_update_``."""
    decay_on_device = None
    if isinstance(decay, Tensor):
        decay_on_device = decay
        decay = 0.0
    for table, like, vector in launches:
        mark_in_use(table)
        _ema_kernel[(table.shape[0],)](
            table,
            *like,
            decay_on_device,
            1 - decay,
            decay,
            WRITE_COPY=write_copies,
            VECTOR=vector,
            CHUNK=CHUNK,
            num_warps=8,
            enable_fp_fusion=True,
        )


def ema_update_(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float | Tensor
) -> None:
    """``copies`` is empty or as long as ``ema``; matching tensors share one dense layout.

    ``decay``: a number, or one of fp64 on the device.
    """
    launches = _plans.get(key_of(ema, params, copies), lambda: plan(ema, params, copies))
    launch(launches, bool(copies), decay)
