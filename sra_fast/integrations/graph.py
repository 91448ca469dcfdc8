"""What a rewrite must know about Dynamo's graph: values, casts, views, changes in place.

Dynamo hands a backend a graph of the calls that the model's Python code made (torch functions and
tensor methods, not yet decomposed). Every node carries a fake tensor: shape, dtype and storage
without data. A question that these do not answer is answered "no", and the graph stays as it is.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:
    # its name in torch 2.11
    from torch.fx.experimental.symbolic_shapes import size_hint as optimization_hint

# where Dynamo keeps a node's fake tensor
VALUE = "example_value"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous")
_VIEWS = ("unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "expand", "expand_as")
PART_FUNCTIONS = (torch.chunk, torch.split, torch.unbind, torch.tensor_split)
PARTS = ("chunk", "split", "unbind", "tensor_split")
# calls with subgraphs that are run as they stand: activation checkpointing, and regions that were
# compiled once for several calls
_WRAPPERS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph")


def value(node: object) -> Tensor | None:
    """The fake tensor of a node whose result is one plain tensor; None for anything else.

    Subclasses (DTensor, quantized weights) have rules of their own and count as unknown.
    """
    found = node.meta.get(VALUE) if isinstance(node, Node) else None
    return found if type(found) is FakeTensor and _has_strides(found) else None


def tensors(node: Node) -> Iterator[Tensor]:
    """Every fake tensor in a node's result, also inside tuples and lists; none that is sparse or
    nested.
    """
    for item in _flat(node.meta.get(VALUE)):
        if isinstance(item, Tensor) and _has_strides(item):
            yield item


def _has_strides(tensor: Tensor) -> bool:
    """Whether a tensor is an array in one storage."""
    if is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.layout == torch.strided and not tensor.is_nested


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input of the graph; adds no guard."""
    return statically_known_true(a == b)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape for every input of the graph."""
    return a.dim() == b.dim() and all(same(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def number(argument: object) -> float | None:
    """A number in the graph as a constant.

    With dynamic shapes also numbers may vary, as a norm's eps that is an attribute of a module. The
    graph is then made for this value and guarded by it.
    """
    found = argument.meta.get(VALUE) if isinstance(argument, Node) else argument
    if isinstance(found, torch.SymFloat):
        return found.node.guard_float(__file__, 0)
    return float(found) if type(found) in (int, float) else None


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; with dynamic shapes, of the one that was traced."""
    numel = 1
    for size in tensor.shape:
        numel *= optimization_hint(size, fallback=1)
    return numel * tensor.element_size()


def is_call(node: object, functions: Iterable[Callable[..., Any]], methods: Iterable[str]) -> bool:
    """Whether a node calls one of these functions or tensor methods."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def arguments(node: Node, *names: str) -> dict[str, Any]:
    """Arguments of a call by name, as far as they were given; {} if there are others."""
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return {}
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def is_cast(node: object) -> bool:
    """Whether a node only changes the dtype or memory format of its first argument."""
    if not is_call(node, (), _CASTS) or not isinstance(node.args[0], Node):
        return False
    result = value(node)
    source = value(node.args[0])
    if result is None or source is None:
        return False
    return (
        result.dtype in DTYPES
        and source.dtype in DTYPES
        and result.device == source.device
        and same_shape(result, source)
    )


def is_exact_cast(node: object) -> bool:
    """Whether a cast keeps every value."""
    if not is_cast(node):
        return False
    result = value(node).dtype
    source = value(node.args[0]).dtype
    return torch.promote_types(source, result) == result


def uncast(node: Node, dtype: torch.dtype | None = None) -> Node:
    """The node before exact casts; with ``dtype`` the first of that dtype, or ``node`` if there is
    none.
    """
    found = node
    while True:
        tensor = value(node)
        if dtype is None or tensor is not None and tensor.dtype == dtype:
            found = node
        if not is_exact_cast(node):
            return found
        node = node.args[0]


def is_view(node: object) -> bool:
    """Whether a node is its first argument in another shape."""
    if is_call(node, (operator.getitem,), ()):
        return value(node.args[0]) is not None and _adds_dimensions(node.args[1])
    if not is_call(node, (torch.unsqueeze, torch.squeeze, torch.flatten), _VIEWS):
        return False
    # view(dtype) reads the same bits as other numbers
    result = value(node)
    source = value(node.args[0]) if node.args else None
    return result is not None and source is not None and result.dtype == source.dtype


def _adds_dimensions(index: object) -> bool:
    """Whether an index is made of ``:``, ``...`` and None, so that nothing is left out."""
    index = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def is_part(node: Node) -> bool:
    """Whether a node, before views and casts, is a part of a larger tensor (chunk, unbind, index).

    An input of the graph may be one, made by who calls it.
    """
    while is_view(node) or is_cast(node):
        node = node.args[0]
    if node.op == "placeholder":
        return True
    if not is_call(node, (operator.getitem,), ("select", "narrow")):
        return False
    source = node.args[0]
    return is_call(source, PART_FUNCTIONS, PARTS) or value(source) is not None


def operands(node: Node) -> list[tuple[Any, Any]]:
    """The two arguments of a commutative call, in both orders; none if there are options."""
    if len(node.args) != 2 or node.kwargs:
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def is_add(node: object) -> bool:
    """Whether a node is ``a + b``."""
    return is_call(node, (operator.add, torch.add), ("add", "__add__", "__radd__"))


def is_mul(node: object) -> bool:
    """Whether a node is ``a * b``."""
    return is_call(node, (operator.mul, torch.mul, torch.multiply), ("mul", "multiply", "__mul__"))


def subgraphs(node: Node) -> list[tuple[str, GraphModule]]:
    """The graphs that a call takes as arguments, each with its name in the owning module."""
    owner = node.graph.owning_module
    found = []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            held = getattr(owner, str(argument.target), None)
            if isinstance(held, GraphModule):
                found.append((str(argument.target), held))
    return found


def bodies(graph_module: GraphModule) -> Iterator[GraphModule]:
    """The graph and the bodies of the checkpoints in it, each once."""
    seen: set[int] = set()
    waiting = [graph_module]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        for node in current.graph.nodes:
            wraps = isinstance(node.target, torch._ops.HigherOrderOperator)
            if wraps and node.target.name() in _WRAPPERS:
                waiting += [graph for _, graph in subgraphs(node)]


def is_transformed(graph: Graph) -> bool:
    """Whether a part of the graph runs under ``torch.func`` (vmap, grad): its tensors have no
    storage that could be followed.
    """
    values = (item for node in graph.nodes for item in _flat(node.meta.get(VALUE)))
    return any(isinstance(v, Tensor) and is_functorch_wrapped_tensor(v) for v in values)


def _flat(found: object) -> Iterable[object]:
    return found if isinstance(found, tuple | list) else (found,)


def storage(tensor: Tensor) -> int:
    """A number for the storage of a fake tensor: views of one tensor share it."""
    return tensor.untyped_storage()._cdata


def insert(
    graph: Graph,
    target: Callable[..., Any] | str,
    *args: Any,
    like: Node | None = None,
    result: Any = None,
    **kwargs: Any,
) -> Node:
    """Add a call at the graph's insert point, with its fake result.

    Args:
        graph: the graph.
        target: a function, or the name of a tensor method.
        args: arguments; nodes stand for their results.
        like: the node whose place in the user's code the new one takes.
        result: the fake result; None: computed from those of the arguments.
        kwargs: keyword arguments.
    """
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
        function = lambda first, *rest, **options: getattr(first, target)(*rest, **options)
    else:
        node = graph.call_function(target, args, kwargs)
        function = target
    if like is not None:
        node.meta = {key: held for key, held in like.meta.items() if key != VALUE}
    if result is None:
        fake = lambda argument: map_arg(argument, lambda n: n.meta[VALUE])
        # autograd refuses views whose base was changed, and fake tensors remember that
        with torch.no_grad():
            result = function(*fake(args), **fake(kwargs))
    node.meta[VALUE] = result
    return node


def where(node: Node) -> str:
    """The line of the user's code that made a node: ``file:line: code``."""
    lines = str(node.meta.get("stack_trace") or node.stack_trace or "").strip().splitlines()
    # the last frame is the call itself
    for i in range(len(lines) - 1, -1, -1):
        found = lines[i].strip()
        if found.startswith('File "') and ", line " in found:
            path, rest = found.removeprefix('File "').split('", line ', 1)
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f"{path}:{rest.split(',')[0]}: {code}"
    return node.name
