"""Why a pattern may not be replaced, although it is one."""

import torch
from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.facts import Facts
from sra_fast.integrations.graph import is_cast, is_view, same, storage, tensors, value
from sra_fast.integrations.patterns import Modulated, Residual
from sra_fast.integrations.tokens import scale_of


def refusal(found: Modulated | Residual, facts: Facts) -> str | None:
    """Why a pattern may not be replaced, or None if it may."""
    # the inputs of the operator that would replace the pattern
    read = [*found.others, *found.vectors]
    inside = [*found.inside, *_passed_over(found, read)]
    if any(facts.is_changed(node) for node in [*inside, *read]):
        return "a tensor that it reads is changed in place"
    if not facts.one_grad_mode(inside):
        return "autograd is switched on or off inside of it"
    dtypes = {value(node).dtype for node in [*read, found.root]}
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "fp64 and other dtypes are mixed"
    devices = {value(node).device for node in [*read, found.root]}
    if len(devices) > 1:
        return "its tensors are on several devices"
    if _depends_on_strides(found.root):
        return "a view of its result depends on how it lies in memory"
    return None


def _passed_over(found: Modulated | Residual, read: list[Node]) -> list[Node]:
    """Casts, views and ``1 + scale`` between what is read and the pattern."""
    known = {*found.inside, *read}
    passed: list[Node] = []
    waiting = [argument for node in found.inside for argument in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in known or not (is_cast(node) or is_view(node) or scale_of(node)):
            continue
        known.add(node)
        passed.append(node)
        waiting += node.all_input_nodes
    return passed


def is_dense(tensor: Tensor) -> bool:
    """Whether ``[B, T, D]`` is contiguous for every input of the graph."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not same(stride, expected):
            return False
        expected = expected * size
    return True


# calls whose result depends on how their argument lies in memory
_BY_STRIDES = ("view", "view_as", "stride", "is_contiguous", "unfold", "data_ptr")


def _depends_on_strides(node: Node) -> bool:
    """Whether something reads how a result lies in memory that is not contiguous, as the operators'
    results are.

    Pointwise calls hand strides on, so it may be a user of a user.
    """
    if is_dense(value(node)):
        return False
    seen: set[Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        target = user.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in _BY_STRIDES or "as_strided" in name:
            return True
        if not _lies_by_itself(user):
            waiting += user.users
    return False


def _lies_by_itself(node: Node) -> bool:
    """Whether a result is contiguous in memory of its own, however its arguments lie."""
    result = value(node)
    if result is None or not is_dense(result):
        return False
    owned = {storage(tensor) for argument in node.all_input_nodes for tensor in tensors(argument)}
    return storage(result) not in owned
