"""Tables of addresses and sizes on the device, built once per set of tensors and cached."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# sets of tensors that one operator remembers
MAX_PLANS = 8


class Plans:
    """A cache of what an operator built for the sets of tensors it saw last.

    Args:
        name: the operator's name, for error messages.
    """

    def __init__(self, name: str):
        self.name = name
        self.held: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the plan for ``key``; call ``make`` if the key is new.

        Raises:
            RuntimeError: the key is new and a CUDA graph is being captured.
        """
        if key not in self.held:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self.name}: call it once on these tensors before a CUDA graph captures it"
                )
            self.held[key] = make()
        self.held.move_to_end(key)
        # evict the least recently used plan
        if len(self.held) > MAX_PLANS:
            self.held.popitem(last=False)
        return self.held[key]


def mark_in_use(*tables: Tensor) -> None:
    """Tell the allocator that the current stream reads the tables.

    A table may be dropped from the cache while a stream other than its own still reads it.
    """
    for table in tables:
        if table.is_cuda:
            table.record_stream(torch.cuda.current_stream())
