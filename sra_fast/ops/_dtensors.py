"""DTensors, as FSDP2 makes them of a model's parameters, in operators that work element by element:
the result of a shard is the shard of the result.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> "TypeGuard[DTensor]":
    # the class takes a second to import, and plain tensors do not need it
    if type(x) in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor):
        return False
    # some builds of torch have none
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _describe(x: object) -> str:
    """What an argument is, for an error message."""
    if not is_dtensor(x):
        return f"a {type(x).__name__}"
    return f"a DTensor {[*x.shape]} {x.placements} on {x.device_mesh}"


def _layout(x: object) -> tuple[object, ...] | None:
    """Where the elements of a DTensor lie; None if it is none, or if ranks hold summands."""
    if not is_dtensor(x) or any(placement.is_partial() for placement in x.placements):
        return None
    return x.device_mesh, x.placements, x.shape


def local_shards(operator: str, given: Mapping[str, object]) -> list[Tensor]:
    """This rank's shards of DTensors that belong together, in the order of ``given``.

    Raises:
        ValueError: they do not all lie in the same way, or not all of them are DTensors.
    """
    wanted = _layout(next(x for x in given.values() if is_dtensor(x)))
    shards = []
    for x in given.values():
        if not is_dtensor(x) or wanted is None or _layout(x) != wanted:
            got = ", ".join(f"{name} {_describe(x)}" for name, x in given.items())
            raise ValueError(
                f"{operator}: expected DTensors of one shape, mesh and placements, none of them "
                f"partial, for all of {', '.join(given)} or for none, got {got}"
            )
        shards.append(x.to_local())
    return shards


def check_whole(operator: str, given: Mapping[str, object]) -> None:
    """Raise ValueError if one of the arguments, given by name, is a DTensor."""
    for name, x in given.items():
        if is_dtensor(x):
            raise ValueError(
                f"{operator}: expected {name} as a plain tensor, as full_tensor() returns it, "
                f"got {_describe(x)}"
            )
