"""``table + vectors`` behind vectors per token, taken apart, so that the operators add the table.

PixArt-alpha (arXiv 2310.00426), Wan and LTX-Video learn a table per block, add it to the embedding
of the time and cut the sum into gates, shifts and scales. With a time per token the sum is an array
of six vectors per token, in fp32 for an fp32 table. Instead the embedding is cut as the sum was,
and the operators get a row of the table with each part. A sum of which anything else reads a part
stays, because then it would be computed all the same.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sra_fast.integrations.facts import Facts
from sra_fast.integrations.graph import (
    DTYPES,
    PART_FUNCTIONS,
    PARTS,
    insert,
    is_add,
    is_call,
    is_cast,
    is_exact_cast,
    is_view,
    operands,
    same,
    storage,
    value,
)


@dataclass(frozen=True)
class Part:
    """A vector per token that was cut out of ``table + vectors``.

    Attributes:
        total: the addition.
        vectors: its operand that differs between tokens, before exact casts that serve it alone.
        table: its operand that all tokens share, likewise.
        sizes: of the table, one for each dimension of the sum.
        width: D.
        row: of the table, as a matrix ``[rows, D]``, that is added to this vector.
        steps: the calls that cut the vector out of the sum, first to last, and casts.
        casts: those between operands and sum.
    """

    total: Node
    vectors: Node
    table: Node
    sizes: tuple[int, ...]
    width: int
    row: int
    steps: tuple[Node, ...]
    casts: tuple[Node, ...]


def steps_from_sum(vector: Node) -> tuple[Node, list[Node]] | None:
    """The addition that a vector was cut out of, and the calls that did it; None without one."""
    steps: list[Node] = []
    node = vector
    while is_step(node):
        steps.insert(0, node)
        node = node.args[0]
    return (node, steps) if is_add(node) else None


def find_part(vector: Node, root: Node, facts: Facts) -> Part | None:
    """How a vector per token was cut out of a sum, if its operands may be read in place of it.

    Args:
        vector: ``[B, T, D]``, ``[1, T, D]`` or ``[T, D]``.
        root: the pattern that reads it.
        facts: of the graph.
    """
    found = steps_from_sum(vector)
    if found is None:
        return None
    total, steps = found
    for table, vectors in operands(total):
        if not isinstance(table, Node) or not isinstance(vectors, Node):
            continue
        vectors, casts = _before_casts(vectors)
        table, more_casts = _before_casts(table)
        casts = [*casts, *more_casts]
        passed = [total, *steps, *casts]
        if any(facts.is_changed(node) for node in [*passed, vectors, table]):
            return None
        # autograd would see the operands where it has not seen the sum
        if not facts.one_grad_mode([*passed, root]):
            return None
        sizes = _sizes_of_table(value(table), value(vectors), value(total))
        row = None if sizes is None else _row(value(table), sizes, value(total), steps)
        if row is not None and _same_precision(vector, vectors, table):
            return Part(total, vectors, table, sizes, *row, tuple(steps), tuple(casts))
    return None


def is_step(node: Node) -> bool:
    """Whether a call cuts a tensor, sees it in another shape, or casts it; nothing else decides
    what comes out.
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
        return all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index)
    if is_call(node, PART_FUNCTIONS, PARTS):
        return True
    return is_view(node) or is_call(node, (torch.select, torch.narrow), ("select", "narrow"))


def _before_casts(node: Node) -> tuple[Node, list[Node]]:
    """The node before exact casts, and these; a cast that something else reads stays.

    Behind such a cast the gradients of several sums are added up, in its dtype.
    """
    casts = []
    while is_exact_cast(node) and len(node.users) == 1:
        casts.append(node)
        node = node.args[0]
    return node, casts


def _same_precision(vector: Node, vectors: Node, table: Node) -> bool:
    """Whether the operator computes the sum on the vector's device and, if in fp64, as it was."""
    whole = value(vector)
    tensors = (value(vectors), value(table))
    if any(t.dtype not in DTYPES or t.device != whole.device for t in tensors):
        return False
    return whole.dtype == torch.float64 or all(t.dtype != torch.float64 for t in tensors)


def _sizes_of_table(
    table: Tensor | None, vectors: Tensor | None, total: Tensor | None
) -> tuple[int, ...] | None:
    """The table's sizes, one for each dimension of the sum; None if the two do not make the sum.

    They are 1 or those of the sum, and integers. The vectors have as many dimensions as the sum.
    """
    if table is None or vectors is None or total is None or vectors.dim() != total.dim():
        return None
    sizes = [1] * (total.dim() - table.dim()) + [*table.shape]
    if len(sizes) != total.dim() or not all(isinstance(n, int) for n in sizes):
        return None
    for n, given, result in zip(sizes, vectors.shape, total.shape, strict=True):
        if not (n == 1 or same(n, result)):
            return None
        # one embedding for several rows of the table is expanded
        if not (same(given, result) or same(given, 1) and same(n, result)):
            return None
    return tuple(sizes)


def _row(
    table: Tensor, sizes: tuple[int, ...], total: Tensor, steps: Iterable[Node]
) -> tuple[int, int] | None:
    """D, and the row of the table that was added to a part of the sum; None if it is not one row.

    The steps are taken with a table that is expanded to the sum's shape, without data: strides and
    offset of the result say which of the table's elements it holds.
    """
    # autograd refuses views whose base was changed, and fake tensors remember that
    with torch.no_grad():
        dense = table.new_empty(sizes)
        part: Any = dense.expand(total.shape)
        for step in steps:
            part = _take(step, part)
    *others, (width, last) = zip(part.shape, part.stride(), strict=True)
    offset = part.storage_offset()
    if storage(part) != storage(dense) or not isinstance(width, int) or not isinstance(offset, int):
        return None
    is_whole = offset % width == 0 and dense.numel() % width == 0
    is_row = same(last, 1) or width == 1
    is_shared = all(same(n, 1) or same(stride, 0) for n, stride in others)
    return (width, offset // width) if is_whole and is_row and is_shared else None


def _take(step: Node, tensor: Any) -> Any:
    """Take a step with another tensor; a cast changes nothing."""
    if is_cast(step):
        return tensor
    target = _target(step)
    if isinstance(target, str):
        return getattr(tensor, target)(*step.args[1:], **step.kwargs)
    return target(tensor, *step.args[1:], **step.kwargs)


def _target(step: Node) -> Any:
    """What a step calls: of a tensor that may lie in memory in another way than the sum did."""
    return "reshape" if step.target == "view" else step.target


def take_apart(graph: Graph, parts: dict[Node, Part], facts: Facts) -> dict[Node, tuple]:
    """Cut the embeddings as the sums were cut; the sums stay, for who erases them.

    The embedding is cut once for all vectors: a gradient for every cut would be as large as the
    embedding.

    Args:
        graph: of the parts.
        parts: by vector.
        facts: of the graph; the new nodes are added.

    Returns:
        Vectors and row of the table, by vector.
    """
    made: dict[tuple, Node] = {}

    def once(key: tuple, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        if key not in made:
            with graph.inserting_before(before):
                made[key] = insert(graph, target, *args, like=before, **kwargs)
            facts.add(made[key], before)
        return made[key]

    pairs = {}
    for vector, part in parts.items():
        total = part.total
        node = part.vectors
        expanded = [
            n if same(given, 1) and n != 1 else -1
            for given, n in zip(value(node).shape, part.sizes, strict=True)
        ]
        if any(n != -1 for n in expanded):
            node = once((total, "expand"), total, "expand", node, *expanded)
        for step in part.steps:
            if not is_cast(step):
                node = once((step,), step, _target(step), node, *step.args[1:], **step.kwargs)
        key = (total, part.width)
        rows = once((*key, "matrix"), total, "reshape", part.table, -1, part.width)
        rows = once((*key, "rows"), total, "unbind", rows, 0)
        row = once((*key, part.row), total, operator.getitem, rows, part.row)
        pairs[vector] = (node, row)
    return pairs
