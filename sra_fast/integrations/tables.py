"""``table + vectors`` behind a vector per token, taken apart, so that the operator adds the table.

PixArt-alpha (arXiv 2310.00426), Wan and LTX-Video learn a table per block, add it to the embedding
of the time and cut the sum into gates, shifts and scales. With a time per token the sum is an array
of six vectors per token, in fp32 for an fp32 table. Table and embedding are cut alike instead.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.facts import Facts
from sra_fast.integrations.graph import (
    DTYPES,
    PART_FUNCTIONS,
    PARTS,
    is_add,
    is_call,
    is_cast,
    operands,
    same,
    same_shape,
    uncast,
    value,
)


@dataclass(frozen=True)
class Sum:
    """A vector per token that is a part of ``table + vectors``.

    Attributes:
        total: the addition.
        vectors: its operand that differs between tokens, before exact casts.
        table: its operand that all tokens share, before exact casts.
        steps: the calls that cut the vector out of the sum, first to last, and casts.
    """

    total: Node
    vectors: Node
    table: Node
    steps: tuple[Node, ...]


def find_sum(vector: Node, used_by: Iterable[Node], facts: Facts) -> Sum | None:
    """The sum that a vector per token was cut out of, if it may be taken apart.

    Args:
        vector: ``[B, T, D]``, ``[1, T, D]`` or ``[T, D]``.
        used_by: calls that read it, all of which the operator replaces.
        facts: of the graph.
    """
    steps: list[Node] = []
    node = vector
    while _is_step(node):
        steps.insert(0, node)
        node = node.args[0]
    if not is_add(node):
        return None
    for table, vectors in operands(node):
        if not isinstance(table, Node) or not isinstance(vectors, Node):
            continue
        found = Sum(node, uncast(vectors), uncast(table), tuple(steps))
        if _fits(found, vector):
            passed = [*_casts(vectors), *_casts(table), node, *steps]
            return found if _may_be_moved(passed, used_by, facts) else None
    return None


def _is_step(node: Node) -> bool:
    """Whether a call cuts a tensor, whatever the sizes of dimensions that it leaves alone, or is a
    cast.
    """
    if is_cast(node):
        return True
    if not node.args or not isinstance(node.args[0], Node) or len(node.all_input_nodes) > 1:
        return False
    if is_call(node, (operator.getitem,), ()):
        index = node.args[1]
        # one of several parts, or some of a tensor's dimensions
        if value(node.args[0]) is None:
            return isinstance(index, int)
        index = index if isinstance(index, tuple) else (index,)
        return all(isinstance(i, int | slice) or i is Ellipsis for i in index)
    if is_call(node, PART_FUNCTIONS, PARTS):
        return True
    functions = (torch.squeeze, torch.unsqueeze, torch.select, torch.narrow)
    return is_call(node, functions, ("squeeze", "unsqueeze", "select", "narrow"))


def _fits(found: Sum, vector: Node) -> bool:
    """Whether both operands, cut alike, are the vector's summands: all of it, and ``D`` numbers."""
    whole = value(vector)
    total = value(found.total)
    vectors = value(found.vectors)
    table = value(found.table)
    tensors = (whole, total, vectors, table)
    if any(t is None or t.dtype not in DTYPES or t.device != whole.device for t in tensors):
        return False
    # the operator would compute in fp64, too
    if whole.dtype != torch.float64 and torch.float64 in (vectors.dtype, table.dtype):
        return False
    shape = sizes_of_table(table, total)
    if shape is None or vectors.dim() != total.dim():
        return False
    for given, of_table, result in zip(vectors.shape, shape, total.shape, strict=True):
        if not same(given, result) and not (same(given, 1) and same(of_table, result)):
            return False
    try:
        # autograd refuses views whose base was changed, and fake tensors remember that
        with torch.no_grad():
            cut_vectors = _cut(expanded(vectors, shape), found.steps)
            cut_table = _cut(table.reshape(shape), found.steps)
    except (IndexError, RuntimeError, ValueError):
        # a step cuts where the table has one row for all
        return False
    sizes = cut_table.shape
    is_one_row = same(sizes[-1], whole.shape[-1]) and all(same(n, 1) for n in sizes[:-1])
    return is_one_row and same_shape(cut_vectors, whole)


def sizes_of_table(table: Tensor, total: Tensor) -> list[int] | None:
    """The shape of a table with as many dimensions as the sum; None if it is no table.

    The sizes are 1 or those of the sum, and integers.
    """
    shape = [1] * (total.dim() - table.dim()) + [*table.shape]
    if len(shape) != total.dim() or not all(isinstance(n, int) for n in shape):
        return None
    fits = all(n == 1 or same(n, result) for n, result in zip(shape, total.shape, strict=True))
    return shape if fits else None


def expanded(vectors: Tensor, shape: list[int]) -> Tensor:
    """The vectors, expanded where only the table has several rows: one embedding for shift and
    scale.
    """
    sizes = sizes_of_vectors(vectors, shape)
    return vectors if sizes is None else vectors.expand(sizes)


def sizes_of_vectors(vectors: Tensor, shape: list[int]) -> list[int] | None:
    """The sizes to which vectors must be expanded, -1 for those that stay; None if all do."""
    sizes = [
        of_table if of_table != 1 and same(given, 1) else -1
        for given, of_table in zip(vectors.shape, shape, strict=True)
    ]
    return None if set(sizes) == {-1} else sizes


def _cut(tensor: Any, steps: Iterable[Node]) -> Any:
    """Take the steps with another tensor, without the casts."""
    for step in steps:
        if is_cast(step):
            continue
        if step.op == "call_method":
            tensor = getattr(tensor, str(step.target))(*step.args[1:], **step.kwargs)
        else:
            tensor = step.target(tensor, *step.args[1:], **step.kwargs)
    return tensor


def _casts(node: Node) -> list[Node]:
    """A node and the exact casts before it, down to what ``uncast`` gives."""
    found = [node]
    while found[-1] is not uncast(node):
        found.append(found[-1].args[0])
    return found


def _may_be_moved(passed: list[Node], used_by: Iterable[Node], facts: Facts) -> bool:
    """Whether the operands hold what they did, and autograd sees them as it saw the sum."""
    if any(node not in facts.position or facts.is_changed(node) for node in passed):
        return False
    return facts.one_grad_mode([*passed, *used_by])
