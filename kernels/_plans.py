"""Tables of addresses and sizes on the device, built once per set of tensors and cached."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

# sets of tensors that one operator remembers
MAX_PLANS = 8

# tables that CUDA graphs have captured, by address. A replay reads them whenever it comes, and a
# graph does not say when it is gone: they are kept until the process ends
_captured: dict[int, Tensor] = {}


@dataclass
class _Entry:
    plan: Any
    # the number of the call that used it last
    last_call: int = 0


class Plans:
    """A cache of what an operator built for the sets of tensors it saw last."""

    def __init__(self) -> None:
        self.held: dict[Hashable, _Entry] = {}
        self.calls = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the plan for ``key``; call ``make`` if the key is new."""
        # a plan that is there costs one look-up: keys are long
        entry = self.held.get(key)
        if entry is None:
            entry = _Entry(make())
            self.held[key] = entry
        self.calls += 1
        entry.last_call = self.calls
        # evict the least recently used plan
        if len(self.held) > MAX_PLANS:
            oldest, _ = min(self.held.items(), key=lambda item: item[1].last_call)
            del self.held[oldest]
        return entry.plan


def key_of(*lists: list[Tensor]) -> Hashable:
    """What tells these lists of tensors from others: address, shape, strides, dtype and device of
    every tensor.

    Raises:
        RuntimeError: a tensor has no address or no strides, as a sparse or a nested one.
    """
    tensors = list(chain(*lists))
    return (
        *map(len, lists),
        *map(Tensor.data_ptr, tensors),
        *map(Tensor.size, tensors),
        *map(Tensor.stride, tensors),
        *map(attrgetter("dtype"), tensors),
        *map(attrgetter("device"), tensors),
    )


def is_capturing() -> bool:
    """Whether the current stream captures a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_not_capturing(operator: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured: a new table is copied from the host."""
    if is_capturing():
        raise RuntimeError(
            f"{operator}: call it once on these tensors before a CUDA graph captures it"
        )


def mark_in_use(*tables: Tensor) -> None:
    """Keep the memory of the tables for the launch that the current stream is about to get.

    A table may be dropped from the cache while a stream other than its own still reads it, or
    before a CUDA graph replays the launch.
    """
    for table in tables:
        if table.is_cuda:
            table.record_stream(torch.cuda.current_stream())
    if is_capturing():
        _captured.update((table.data_ptr(), table) for table in tables)
