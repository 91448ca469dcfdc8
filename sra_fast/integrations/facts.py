"""What changes in a graph: tensors in place, and the modes of autograd and autocast."""

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from sra_fast.integrations.graph import (
    VALUE,
    same_shape,
    storage,
    subgraphs,
    tensors,
    value,
)

# `a += b` and its kind, as functions and as methods
_IN_PLACE_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
)
_IN_PLACE = {getattr(operator, name) for name in _IN_PLACE_NAMES}
_IN_PLACE_METHODS = {f"__{name}__" for name in _IN_PLACE_NAMES} | {"__setitem__", "__delitem__"}
# functions that change what they read, though their names do not say so: running statistics, and
# rows of a table that are longer than max_norm
_CHANGING = {"batch_norm", "instance_norm", "embedding", "embedding_bag"}
# where Dynamo's stand-ins for numpy are
_NUMPY = "torch._dynamo.utils"


def changed_in_place(node: Node) -> list[Node]:
    """The nodes whose tensors a call changes."""
    if node.op == "call_method":
        name = str(node.target)
        changes = name.endswith("_") and not name.endswith("__") or name in _IN_PLACE_METHODS
        return _nodes(node.args[:1]) if changes and name != "requires_grad_" else []
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        return _nodes(node.args) if getattr(module, "inplace", False) else []
    if node.op != "call_function":
        return []
    target = node.target
    if "out" in node.kwargs:
        return _nodes(node.kwargs["out"])
    if target in _IN_PLACE or target in (operator.setitem, operator.delitem):
        return _nodes(node.args[:1])
    if isinstance(target, torch._ops.HigherOrderOperator):
        bodies = [graph for _, graph in subgraphs(node)]
        changes = any(changed_in_place(inner) for body in bodies for inner in body.graph.nodes)
        return _nodes(node.args) if changes else []
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _nodes((node.args, node.kwargs)) if _has_mutable_schema(target) else []
    name = getattr(target, "__name__", "")
    if name in _CHANGING or _is_numpy(target):
        # which of the arguments it changes is not asked: few graphs have such a call
        return _nodes((node.args, node.kwargs))
    if name.endswith("_") and not name.endswith("__") or _asks_for_in_place(node):
        # the tensor may have been given by its name
        return _nodes(node.args[:1] or tuple(node.kwargs.values()))
    return []


def _is_numpy(target: Any) -> bool:
    """Whether a call is one of numpy, whose arrays share the memory of tensors."""
    return _NUMPY in (getattr(target, "__module__", ""), type(target).__module__)


def _nodes(argument: object) -> list[Node]:
    found: list[Node] = []
    map_arg(argument, found.append)
    return found


def _has_mutable_schema(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return any(getattr(target, name)._schema.is_mutable for name in target.overloads())


def _asks_for_in_place(node: Node) -> bool:
    """Whether a function such as ``F.silu`` was called with ``inplace=True``."""
    if node.kwargs.get("inplace"):
        return True
    if getattr(F, getattr(node.target, "__name__", ""), None) is not node.target:
        return False
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):
        return False
    return "inplace" in names[: len(node.args)] and bool(node.args[names.index("inplace")])


class Facts:
    """What holds for one graph as it is now.

    Attributes:
        position: the place of every node in the order of execution.
        changed: storages that some call of the graph changes in place.
    """

    def __init__(self, graph: Graph):
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.changed = {
            storage(tensor)
            for node in graph.nodes
            for changed in changed_in_place(node)
            for tensor in tensors(changed)
        }
        # nodes between two changes of the mode of autograd have one number
        self._grad_region: dict[Node, int] = {}
        self._region: dict[Node, int] = {}
        grad_region = 0
        region = 0
        for node in graph.nodes:
            if _is_switch(node):
                region += 1
                grad_region += not _is_autocast(node)
            self._grad_region[node] = grad_region
            self._region[node] = region

    def add(self, new: Node, like: Node) -> None:
        """Let a new node stand where another does."""
        self.position[new] = self.position[like]
        self._grad_region[new] = self._grad_region[like]
        self._region[new] = self._region[like]

    def is_changed(self, node: Node) -> bool:
        """Whether anything changes the node's tensor in place."""
        return any(storage(tensor) in self.changed for tensor in tensors(node))

    def one_grad_mode(self, nodes: Iterable[Node]) -> bool:
        """Whether autograd is on, or off, for all of these nodes alike."""
        return len({self._grad_region[node] for node in nodes}) <= 1

    def one_mode(self, nodes: Iterable[Node]) -> bool:
        """Whether autograd and autocast are the same for all of these nodes."""
        return len({self._region[node] for node in nodes}) <= 1


def _is_autocast(node: Node) -> bool:
    return "autocast" in getattr(node.target, "__name__", "")


def _is_switch(node: Node) -> bool:
    """Whether a call has no result: as far as we know it switches a mode."""
    is_call_node = node.op in ("call_function", "call_method")
    return is_call_node and VALUE not in node.meta and not changed_in_place(node)


# what takes the place of a change in place
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul}
_OUT_OF_PLACE_METHODS = {"add_": operator.add, "mul_": operator.mul}


def replace_in_place(graph: Graph) -> None:
    """Turn ``x += y`` and ``x *= y`` into ``x + y`` and ``x * y`` where nothing can tell the two
    apart.

    That is where x is no input of the graph, no other name of its storage is read afterwards, the
    sum has the dtype and shape of x, and autograd is on, or off, for both.
    """
    facts = Facts(graph)
    position = facts.position
    names: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for tensor in tensors(node):
            names.setdefault(storage(tensor), []).append(node)
    for node in list(graph.nodes):
        table = _OUT_OF_PLACE if node.op == "call_function" else _OUT_OF_PLACE_METHODS
        in_call = node.op in ("call_function", "call_method")
        new_target = table.get(node.target) if in_call else None
        if new_target is None or len(node.args) != 2 or node.kwargs:
            continue
        x = node.args[0]
        if value(x) is None or value(node) is None:
            continue
        earlier = [n for n in names[storage(value(x))] if position[n] < position[node]]
        fresh = all(n.op not in ("placeholder", "get_attr") for n in earlier)
        read_later = any(position[user] > position[node] for name in earlier for user in name.users)
        if not fresh or read_later or not _keeps_its_type(new_target, node):
            continue
        # without autograd a change in place keeps the gradient of x, and a sum has none
        if not facts.one_grad_mode([x, node]):
            continue
        with graph.inserting_before(node):
            replacement = graph.call_function(new_target, node.args)
        # the fake tensor keeps the old storage: whatever shares it later still counts as the same
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        facts.add(replacement, node)
        names[storage(value(x))] = [
            replacement if n is node else n for n in names[storage(value(x))]
        ]


def _keeps_its_type(target: Callable[..., Any], node: Node) -> bool:
    """Whether the call out of place has the dtype and shape of the one in place."""
    # autograd refuses views whose base was changed, and fake tensors remember that
    with torch.no_grad():
        result = target(*map_arg(node.args, lambda n: n.meta[VALUE]))
    expected = value(node)
    return (
        expected is not None
        and result.dtype == expected.dtype
        and same_shape(result, expected)
        # in place keeps the strides of x, and a later view may count on them
        and result.stride() == expected.stride()
    )
