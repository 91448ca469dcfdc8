"""Tables of addresses and sizes on the device, made once for a set of tensors."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# sets of tensors that an operator remembers
MAX_PLANS = 8


class Plans:
    """What an operator has made for the sets of tensors that it saw last.

    Args:
        name: of the operator.
    """

    def __init__(self, name: str):
        self.name, self.held = name, OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives for ``key``; made now if the key is new."""
        if key not in self.held:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self.name}: call it once on these tensors before a CUDA graph captures it"
                )
            self.held[key] = make()
        self.held.move_to_end(key)
        if len(self.held) > MAX_PLANS:
            self.held.popitem(last=False)
        return self.held[key]


def in_use(*tables: Tensor) -> None:
    """Another stream than the one that made a table may still read it when it is dropped."""
    for table in tables:
        if table.is_cuda:
            table.record_stream(torch.cuda.current_stream())
