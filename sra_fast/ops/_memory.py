"""How tensors lie in memory: with which strides, and what of it two of them share. An operator that
writes in place must not write what another of its arguments holds.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a range of memory without gaps, in whatever order."""
    if x.is_contiguous():
        return True
    # from the innermost dimension out, each stride is the product of the sizes
    dims = sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n != 1)
    return all(s == math.prod(n for _, n in dims[:i]) for i, (s, _) in enumerate(dims))


@overload
def with_dense_columns(x: Tensor) -> Tensor: ...
@overload
def with_dense_columns(x: None) -> None: ...
def with_dense_columns(x: Tensor | None) -> Tensor | None:
    """The tensor itself if its last stride is 1, as of a column slice of a projection; else a
    copy.
    """
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


# what subclasses without memory of their own replace; type checkers take it for a method
_PLAIN_DISPATCH = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]


def _range(x: Tensor) -> tuple[int, int] | None:
    """The first byte of the elements and one past the last; None where they have no memory of
    their own: nothing, meta and fake tensors, and what wraps other tensors.

    Of a tensor with gaps, where others may lie, the first element alone.
    """
    # most are plain tensors, whose address is 0 if there is nothing
    dispatch = type(x).__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    if dispatch is not _PLAIN_DISPATCH:
        return None
    try:
        begin = x.data_ptr()
    except RuntimeError:
        # inside a transform of torch.func
        return None
    num = x.numel() if is_dense(x) else 1
    if begin == 0 or num == 0:
        return None
    return begin, begin + num * x.element_size()


def first_overlap(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices in ``(*written, *read)`` of two tensors with common memory, the smaller first, of
    which at least one is written; None if there are none.

    Every tensor is a dense one on one device. Of tensors with gaps, overlaps are found only where
    the first element of one lies in the other.
    """
    # a compiler's tensors have no address
    if torch.compiler.is_compiling():
        return None
    ranges = []
    for i, x in enumerate((*written, *read)):
        found = _range(x)
        if found is not None:
            ranges.append((*found, i))
    ranges.sort()
    # nearly always every range ends before the next begins
    if all(end <= begin for (_, end, _), (begin, _, _) in pairwise(ranges)):
        return None
    # from low addresses to high: the one that ends last, and the last one that is written, which
    # also ends after the other written ones
    last = (0, -1)
    last_written = (0, -1)
    for begin, end, i in ranges:
        is_written = i < len(written)
        before = last if is_written else last_written
        if begin < before[0]:
            return min(before[1], i), max(before[1], i)
        last = max(last, (end, i))
        if is_written:
            last_written = (end, i)
    return None
