"""Interpreted kernels touch only the tensors they were given.

The interpreter itself would read and write any address.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

# positions of addresses and mask in the arguments of the interpreter's functions for every access
ACCESSES = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_rmw": (1, 3),
}


def ranges(named):
    """(first byte, one past the last byte) of every tensor among a kernel's arguments and of its
    tables' entries.
    """
    for t in named.values():
        if isinstance(t, torch.Tensor) and t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            yield t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
    # the pieces of a gradient (kernels/adamw_ema.py)
    if named.get("address_ptr") is not None:
        size = named["grad_ptr"].element_size()
        addresses = named["address_ptr"].tolist()
        counts = named["count_ptr"].tolist()
        for address, count in zip(addresses, counts, strict=True):
            yield address, address + count * size
    # the chunks of many tensors (kernels/ema_update.py); an absent copy has address 0
    if named.get("table_ptr") is not None:
        like = [named[f"{name}_like_ptr"] for name in ("ema", "p", "copy")]
        for *addresses, count in named["table_ptr"].tolist():
            for address, t in zip(addresses, like, strict=True):
                if address:
                    yield address, address + count * t.element_size()


def outside(ptrs, mask, starts, ends):
    """Addresses of the live lanes whose element is not entirely in one range; starts and ends
    ascend.
    """
    size = np.uint64(ptrs.get_element_ty().primitive_bitwidth // 8)
    live = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
    addresses = ptrs.data[live]
    found = np.searchsorted(starts, addresses, side="right")
    return addresses[(found == 0) | (addresses + size > ends[found - 1])]


@contextmanager
def in_bounds():
    """Launches raise IndexError if an unmasked lane accesses memory outside every tensor of the
    kernel.
    """
    # starts and ends of the ranges of the kernel that runs
    given = []
    launch = GridExecutor.__call__

    def call(self, *args, **kwargs):
        known = sorted(ranges(dict(zip(self.arg_names, args, strict=False)) | kwargs))
        starts, ends = np.array(known, dtype=np.uint64).reshape(-1, 2).T
        # ranges overlap: the end of each is that of everything that begins before it
        given[:] = [starts, np.maximum.accumulate(ends)]
        return launch(self, *args, **kwargs)

    def checked(name):
        access = getattr(InterpreterBuilder, name)
        ptrs_at, mask_at = ACCESSES[name]

        def call(self, *args):
            wrong = outside(args[ptrs_at], args[mask_at], *given)
            if wrong.size:
                raise IndexError(f"{name}: {wrong.size} elements lie in none of the tensors given")
            return access(self, *args)

        return mock.patch.object(InterpreterBuilder, name, call)

    with ExitStack() as stack:
        for patch in [mock.patch.object(GridExecutor, "__call__", call), *map(checked, ACCESSES)]:
            stack.enter_context(patch)
        yield
