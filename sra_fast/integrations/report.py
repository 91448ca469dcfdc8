"""What the compiler backend did to a model: rewrites, near misses, and what is left."""

import re
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch._guards import CompileContext
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn import Module

from sra_fast.integrations.graph import bodies, is_view, nbytes, tensors, value
from sra_fast.integrations.rewriting import NearMiss, Result, Rewrite

MIB = 2**20
# kinds of the calls that are left, by a part of their name
_PRODUCTS = ("linear", "matmul", "mm", "conv", "einsum", "addmm")
_ATTENTION = ("scaled_dot_product_attention", "attention", "softmax")


@dataclass(frozen=True)
class Rest:
    """Calls of one kind that no operator replaced.

    Attributes:
        calls: how many there are.
        bytes: that they read and write in one forward pass, each by itself. A compiler fuses some.
    """

    calls: int
    bytes: int


@dataclass
class Report:
    """What was done to the graphs of a model.

    Attributes:
        graphs: how many graphs Dynamo made; more than one per compiled module means graph breaks
            or several shapes.
        rewrites: number of calls by operator.
        calls: every rewrite, with the line of the model's code.
        near_misses: places that look like a pattern and were left alone, with the reason.
        rest: what was left, by kind: products, attention, norms and pointwise calls.
    """

    graphs: int = 0
    rewrites: Counter[str] = field(default_factory=Counter)
    calls: list[Rewrite] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    rest: dict[str, Rest] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.graphs:
            return (
                "sra_fast: nothing was compiled yet for this model; run it once (a model that "
                "shares the graph of another of its class, or has no parameters, is not known)"
            )
        count = ", ".join(f"{number} {name}" for name, number in sorted(self.rewrites.items()))
        before = sum(call.bytes_before for call in self.calls)
        after = sum(call.bytes_after for call in self.calls)
        lines = [
            f"sra_fast: {self.graphs} graph(s); {count or 'nothing rewritten'}",
            f"  rewritten calls move {after / MIB:.2f} MiB forward; the calls that they replace "
            f"moved {before / MIB:.2f} MiB one by one",
        ]
        lines += [
            f"  left alone: {kind}, {rest.calls} calls, {rest.bytes / MIB:.2f} MiB one by one"
            for kind, rest in self.rest.items()
        ]
        lines += [f"  near miss: {miss.reason}\n    {miss.where}" for miss in self.near_misses]
        return "\n".join(lines)


@dataclass(eq=False)
class Record:
    """One compiled graph: what was done, and which parameters it reads.

    Attributes:
        result: rewrites and near misses.
        rest: what was left.
        tensors: the inputs of the graph, parameters among them.
        shapes: of the parameters and buffers that it reads, by their names in the module whose
            ``forward`` was compiled.
        compile_id: Dynamo's number of the compilation.
    """

    result: Result
    rest: dict[str, Rest]
    tensors: list[weakref.ref[Tensor]]
    shapes: dict[str, tuple[int, ...]]
    compile_id: object

    def reads(self, model: Module) -> bool:
        """Whether the graph reads a parameter or buffer of the model."""
        ids = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        alive = (reference() for reference in self.tensors)
        return any(tensor is not None and id(tensor) in ids for tensor in alive)

    def fits(self, model: Module) -> bool:
        """Whether the graph was made for a module like one of the model's.

        Modules that are alike in everything share a graph, which reads the parameters of the first.
        Under FSDP2 a graph reads unsharded copies of the parameters, and hooks split the model into
        several graphs: it is enough that a module has every parameter that the graph reads.
        """
        is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        held = {name: tuple(p.shape) for name, p in model.named_parameters()}
        held |= {name: tuple(b.shape) for name, b in model.named_buffers()}
        prefixes = [f"{name}." if name else "" for name, _ in model.named_modules()]
        for prefix in prefixes if self.shapes else ():
            read = {prefix + name: shape for name, shape in self.shapes.items()}
            inside = {name: shape for name, shape in held.items() if name.startswith(prefix)}
            if read == inside or (is_sharded and read.items() <= inside.items()):
                return True
        return False


# graphs that this process compiled, oldest first
_records: list[Record] = []


def describe(result: Result, graph_module: GraphModule, inputs: Sequence[object]) -> Record:
    """What there is to know of a rewritten graph, before a compiler takes it apart."""
    held = [weakref.ref(tensor) for tensor in inputs if isinstance(tensor, Tensor)]
    held += [weakref.ref(tensor) for tensor in graph_module.parameters()]
    held += [weakref.ref(tensor) for tensor in graph_module.buffers()]
    compile_id = CompileContext.current_compile_id()
    return Record(result, _rest(graph_module), held, _shapes(graph_module), compile_id)


def remember(record: Record) -> None:
    """Keep what is known of a graph for :func:`report`."""
    # Dynamo may compile a frame a second time with fewer numbers that vary, and drops the first
    repeated = lambda old: old.compile_id is not None and old.compile_id == record.compile_id
    # graphs whose tensors are all gone belong to no model
    _records[:] = [
        old
        for old in _records
        if not repeated(old) and any(reference() is not None for reference in old.tensors)
    ]
    _records.append(record)


def forget_all() -> None:
    """Drop what is known of every graph, as ``torch._dynamo.reset`` drops the graphs."""
    _records.clear()


def forget(model: Module) -> None:
    """Drop what is known of a model's graphs; models alike keep a graph that they share."""
    _records[:] = [record for record in _records if not record.reads(model)]


def _records_of(model: Module) -> list[Record]:
    """The graphs that read a model's tensors; if none does, those of models like it."""
    mine = [record for record in _records if record.reads(model)]
    return mine or [record for record in _records if record.fits(model)]


# how Dynamo names a parameter of the module whose forward it compiles
_PARAMETER = re.compile(
    r"L\['self'\]((?:\._modules\['[^']+'\])*)\._(?:parameters|buffers)\['(.+)'\]"
)


def _shapes(graph_module: GraphModule) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters and buffers that a graph reads."""
    found = {}
    for node in graph_module.graph.nodes:
        source = getattr(node.meta.get("grapharg"), "source", None)
        matched = _PARAMETER.fullmatch(str(getattr(source, "name", "")))
        tensor = value(node)
        if matched and tensor is not None:
            parts = [*re.findall(r"\['([^']+)'\]", matched[1]), matched[2]]
            found[".".join(parts)] = tuple(tensor.shape)
    return found


def report(model: Module) -> Report:
    """What the backend did to the graphs of a model that have been compiled so far.

    A graph belongs to a model if it reads one of its parameters or buffers. Modules alike share the
    graph of the first: it counts once for blocks that are compiled one by one, and belongs to a
    second model of the class, too. ``str(report)`` is text to read;
    :class:`Report` has the numbers.

    Args:
        model: a module compiled with this backend, or one that contains such modules. It must have
            run once: nothing is compiled before.

    Raises:
        ValueError: ``model`` is no module.
    """
    if not isinstance(model, Module):
        raise ValueError(f"sra_fast report: expected a torch.nn.Module, got {type(model).__name__}")
    total = Report()
    for record in _records_of(model):
        total.graphs += 1
        total.calls += record.result.rewrites
        total.rewrites.update(call.operator for call in record.result.rewrites)
        new = [miss for miss in record.result.near_misses if miss not in total.near_misses]
        total.near_misses += new
        for kind, rest in record.rest.items():
            known = total.rest.get(kind, Rest(0, 0))
            total.rest[kind] = Rest(known.calls + rest.calls, known.bytes + rest.bytes)
    return total


def _rest(graph_module: GraphModule) -> dict[str, Rest]:
    """The calls that are not operators of ours, by kind."""
    kinds: dict[str, list[int]] = {}
    for body in bodies(graph_module):
        for node in body.graph.nodes:
            if node.op not in ("call_function", "call_method") or is_view(node):
                continue
            module = getattr(node.target, "__module__", "") or ""
            results = list(tensors(node))
            # parts of a tensor are no calls that move anything
            if module.startswith("sra_fast") or not results or _is_alias(node):
                continue
            touched = [node, *node.all_input_nodes]
            moved = sum(nbytes(tensor) for item in touched for tensor in tensors(item))
            kinds.setdefault(_kind(node), []).append(moved)
    return {kind: Rest(len(sizes), sum(sizes)) for kind, sizes in sorted(kinds.items())}


def _is_alias(node) -> bool:
    """Whether every result of a call lies in the memory of an argument."""
    owned = {t.untyped_storage()._cdata for item in node.all_input_nodes for t in tensors(item)}
    return all(tensor.untyped_storage()._cdata in owned for tensor in tensors(node))


def _kind(node) -> str:
    name = str(getattr(node.target, "__name__", node.target))
    if any(part in name for part in _ATTENTION):
        return "attention"
    if any(part in name for part in _PRODUCTS):
        return "products"
    return "norms and pointwise"
