"""Interpreted kernels touch nothing but what they were given: the interpreter itself reads and writes any address."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

# places of addresses and mask among the arguments of what the interpreter calls for every access
ACCESSES = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_rmw": (1, 3),
}


def ranges(named):
    """First byte, and the one behind the last, of every tensor among a kernel's arguments, and of what its tables name."""
    for t in named.values():
        if isinstance(t, torch.Tensor) and t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            yield t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
    if named.get("address_ptr") is not None:
        for address, count in zip(
            named["address_ptr"].tolist(), named["count_ptr"].tolist(), strict=True
        ):
            yield address, address + count * named["grad_ptr"].element_size()
    if named.get("table_ptr") is not None:
        like = [named[f"{name}_like_ptr"] for name in ("ema", "p", "copy")]
        for *addresses, count in named["table_ptr"].tolist():
            yield from (
                (a, a + count * t.element_size()) for a, t in zip(addresses, like, strict=True) if a
            )


def outside(ptrs, mask, starts, ends):
    """Addresses of the live lanes of which not the whole element lies in a range; starts ascend, as do ends."""
    size = np.uint64(ptrs.get_element_ty().primitive_bitwidth // 8)
    at = ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]
    found = np.searchsorted(starts, at, side="right")
    return at[(found == 0) | (at + size > ends[found - 1])]


@contextmanager
def in_bounds():
    """Launches raise IndexError where a lane that is not masked leaves every tensor of the kernel."""
    given, launch = [], GridExecutor.__call__

    def call(self, *args, **kwargs):
        known = sorted(ranges(dict(zip(self.arg_names, args, strict=False)) | kwargs))
        starts, ends = np.array(known, dtype=np.uint64).reshape(-1, 2).T
        # the end of all that began until there
        given[:] = starts, np.maximum.accumulate(ends)
        return launch(self, *args, **kwargs)

    def checked(name):
        access, (ptrs_at, mask_at) = getattr(InterpreterBuilder, name), ACCESSES[name]

        def call(self, *args):
            if (wrong := outside(args[ptrs_at], args[mask_at], *given)).size:
                raise IndexError(f"{name}: {wrong.size} elements lie in none of the tensors given")
            return access(self, *args)

        return mock.patch.object(InterpreterBuilder, name, call)

    with ExitStack() as stack:
        for patch in [mock.patch.object(GridExecutor, "__call__", call), *map(checked, ACCESSES)]:
            stack.enter_context(patch)
        yield
