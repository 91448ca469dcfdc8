"""Replaces the patterns in a graph by calls of the operators.

First every pattern is found, then what may be replaced is decided, then the graph is changed. A
gated residual and the modulated norm of its result become one call, also across half-blocks,
blocks and streams. For that the call must stand before every other use of x', so the modulation is
computed earlier where that is legal.
"""

import copy
import logging
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from sra_fast import ops
from sra_fast.integrations.facts import Facts, replace_in_place
from sra_fast.integrations.graph import (
    bodies,
    insert,
    is_cast,
    is_mul,
    is_transformed,
    is_view,
    nbytes,
    same,
    tensors,
    value,
    where,
)
from sra_fast.integrations.norms import Miss, find_norm
from sra_fast.integrations.patterns import (
    Modulated,
    Residual,
    find_residual,
    follow_norm,
    plain_residual,
)
from sra_fast.integrations.refusals import refusal
from sra_fast.integrations.tables import Part, find_part, is_step, steps_from_sum, take_apart
from sra_fast.integrations.tokens import other, scale_of, users_after_casts, vector_kind

_logger = logging.getLogger("sra_fast.integrations")

# calls that may be made earlier: their results depend on their arguments alone. No random numbers,
# no collectives, nothing that waits for the device.
_MOVABLE_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem),
    *(torch.add, torch.sub, torch.mul, torch.chunk, torch.split, torch.unbind, torch.unsqueeze),
    *(torch.squeeze, torch.flatten, torch.reshape, torch.tanh, torch.sigmoid, torch.cat),
    *(torch.stack, torch.sin, torch.cos, torch.exp),
    *(F.linear, torch._C._nn.linear, F.silu, F.gelu, torch._C._nn.gelu, F.layer_norm),
    *(torch.layer_norm, F.rms_norm, torch.rms_norm),
}
_MOVABLE_METHODS = {
    *("chunk", "split", "unbind", "unsqueeze", "squeeze", "view", "reshape", "flatten"),
    *("unflatten", "expand", "expand_as", "permute", "transpose", "to", "type", "type_as", "float"),
    *("half", "bfloat16", "contiguous", "tanh", "sigmoid", "add", "mul", "size"),
}


# nothing is summed over tokens, so inductor fuses norm, residual and what makes the vectors. An
# operator reads vectors that were written before, unless they are slices of a product or a sum with
# a table, and then it moves as many bytes forward as inductor's kernel. Which is faster has not
# been measured.
LEFT_PER_TOKEN = "a vector per token: left to inductor, which fuses it with what makes it"


@dataclass(frozen=True)
class Rewrite:
    """One call of an operator that took the place of a pattern.

    Attributes:
        operator: its name in ``sra_fast.ops``.
        where: the line of the user's code.
        bytes_before: read and written by the calls that it replaces, each by itself.
        bytes_after: read and written by the operator.
    """

    operator: str
    where: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like a pattern and was left alone.

    Attributes:
        where: the line of the user's code.
        reason: what was different.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class _Pair:
    """A residual, and the norm of its result with one modulation or two: one call."""

    residual: Residual
    norms: list[Modulated]

    @property
    def root(self) -> Node:
        """The first call whose value is that of a modulated norm."""
        return self.norms[0].root

    @property
    def inside(self) -> list[Node]:
        """The calls that it replaces; two modulations share those of their norm."""
        found = [*self.residual.inside]
        for norm in self.norms:
            found += [node for node in norm.inside if node not in found]
        return found


@dataclass
class Result:
    """What was done to one graph, and what was not."""

    rewrites: list[Rewrite] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)


def rewrite(graph_module: GraphModule, vectors_per_token: bool = True) -> Result:
    """Rewrite a graph of Dynamo's, and the bodies of the checkpoints in it, in place.

    A model runs with or without the operators. So a graph that this code cannot rewrite, which is a
    fault of this code, stays as it was, with a warning.

    Args:
        graph_module: to be changed.
        vectors_per_token: False leaves patterns with one vector per token as they are.
    """
    result = Result()
    for body in bodies(graph_module):
        if is_transformed(body.graph):
            continue
        untouched = copy.deepcopy(body.graph)
        of_body = Result()
        try:
            replace_in_place(body.graph)
            _Rewriter(body.graph, of_body, vectors_per_token).run()
            body.graph.lint()
        except Exception as error:
            body.graph = untouched
            what = f"{type(error).__name__}: {error}"
            _logger.warning(
                "a graph was not rewritten, please report this: %s", what, exc_info=True
            )
            of_body = Result(near_misses=[NearMiss("a whole graph", f"not rewritten: {what}")])
        body.recompile()
        result.rewrites += of_body.rewrites
        result.near_misses += [
            miss for miss in of_body.near_misses if miss not in result.near_misses
        ]
    return result


class _Rewriter:
    """Finds and replaces the patterns of one graph."""

    def __init__(self, graph: Graph, result: Result, vectors_per_token: bool):
        self.graph = graph
        self.result = result
        self.vectors_per_token = vectors_per_token
        self.facts = Facts(graph)
        self.residuals: dict[Node, Residual] = {}
        self.modulated: list[Modulated] = []
        # nodes that belong to a pattern
        self.taken: set[Node] = set()
        # what took the place of a node that was replaced
        self.replaced: dict[Node, Node] = {}
        # vectors per token and a row of a table, in place of a vector
        self.pairs: dict[Node, tuple[Node, Node]] = {}
        # bytes that a sum moves, by the first of its vectors; those that the next call saves
        self.sum_bytes: dict[Node, int] = {}
        self.saved = 0

    def run(self) -> None:
        self._find()
        self._drop_what_is_used_elsewhere()
        pairs = self._pair()
        for found in [*self._all(), *pairs]:
            self.taken.update(found.inside)
        sums = self._take_sums_apart(pairs)
        paired = {id(part) for pair in pairs for part in (pair.residual, *pair.norms)}
        alone = [found for found in self._all() if id(found) not in paired]
        # in the order of execution, so that operands are replaced before they are used
        for found in sorted([*pairs, *alone], key=lambda found: self.facts.position[found.root]):
            if isinstance(found, _Pair):
                self._replace_pair(found)
            else:
                self._replace_one(found)
        for node in reversed(list(self.graph.nodes)):
            if node in sums and not node.users:
                self.graph.erase_node(node)

    def _miss(self, node: Node, reason: str) -> None:
        miss = NearMiss(where(node), reason)
        if miss not in self.result.near_misses:
            self.result.near_misses.append(miss)

    def _accept(self, found: Modulated | Residual) -> bool:
        """Whether a pattern may be replaced; if not, that is a near miss."""
        reason = refusal(found, self.facts)
        if reason is None and not self.vectors_per_token and found.has_vector_per_token:
            reason = LEFT_PER_TOKEN
        if reason is not None:
            self._miss(found.root, reason)
        return reason is None

    def _find(self) -> None:
        """Every pattern of the graph; plain norms are kept until it is known whether a residual
        comes before them.
        """
        for node in list(self.graph.nodes):
            norm = find_norm(node)
            if isinstance(norm, Miss):
                # norms of queries and keys have no modulation and are no near misses
                if any(_is_modulation(user, path[-1]) for user, path in users_after_casts(node)):
                    self._miss(norm.node, norm.reason)
                continue
            if norm is None:
                continue
            for found in follow_norm(norm):
                if isinstance(found, Miss):
                    self._miss(found.node, found.reason)
                elif found.root not in self._roots() and self._accept(found):
                    if isinstance(found, Modulated):
                        self.modulated.append(found)
                    else:
                        self.residuals[found.root] = found
        inside = self._inside()
        for node in list(self.graph.nodes):
            if node in inside:
                continue
            found = find_residual(node)
            if isinstance(found, Miss):
                self._miss(found.node, found.reason)
            elif found is not None and not inside & set(found.inside) and self._accept(found):
                self.residuals[found.root] = found

    def _all(self) -> list[Modulated | Residual]:
        return [*self.modulated, *self.residuals.values()]

    def _roots(self) -> set[Node]:
        return {found.root for found in self._all()}

    def _inside(self) -> set[Node]:
        """The calls of all patterns."""
        return {node for found in self._all() for node in found.inside}

    def _drop_what_is_used_elsewhere(self) -> None:
        """Leave the patterns alone whose intermediate results something else reads, too.

        Two modulations of one norm share its calls; if one of them stays, so must the other.
        """
        while True:
            inside = self._inside()
            shared = [
                found
                for found in self._all()
                if any(set(node.users) - inside for node in found.inside if node is not found.root)
            ]
            if not shared:
                return
            for found in shared:
                if isinstance(found, Residual) or not found.is_plain:
                    self._miss(found.root, "an intermediate result has another use")
                if isinstance(found, Modulated):
                    self.modulated.remove(found)
                else:
                    del self.residuals[found.root]

    def _pair(self) -> list[_Pair]:
        """Residuals with the norm of their result: each residual once, with the first such norm."""
        pairs = []
        used: set[Node] = set()
        in_order = sorted(self.modulated, key=lambda found: self.facts.position[found.root])
        for norm in in_order:
            x = norm.norm.x
            residual = self.residuals.get(x)
            if residual is None and not norm.is_plain:
                residual = self._plain_before(x)
            fits = residual is not None and residual.norm is None and x not in used
            if fits and self.facts.one_grad_mode([residual.root, norm.root]):
                used.add(x)
                second = next((other for other in in_order if self._goes_along(other, norm)), None)
                pairs.append(_Pair(residual, [norm] if second is None else [norm, second]))
        paired = {id(norm) for pair in pairs for norm in pair.norms}
        # a norm without modulation is PyTorch's, unless a residual takes it along
        self.modulated = [
            found for found in self.modulated if id(found) in paired or not found.is_plain
        ]
        return pairs

    def _goes_along(self, second: Modulated, first: Modulated) -> bool:
        """Whether one call may compute both: modulations of one norm, with vectors per image."""
        if second is first or second.norm is not first.norm:
            return False
        x = value(first.norm.x)
        vectors = [first.scale, first.shift, second.scale, second.shift]
        if any(vector_kind(vector, x) != "image" for vector in vectors):
            return False
        same_dtype = value(second.root).dtype == value(first.root).dtype
        return same_dtype and self.facts.one_grad_mode([first.root, second.root])

    def _plain_before(self, x: Node) -> Residual | None:
        """The sum x of two arrays of tokens, if it may be replaced."""
        total = x.args[0] if is_cast(x) and isinstance(x.args[0], Node) else x
        found = plain_residual(total)
        if found is None or found.root is not x or refusal(found, self.facts) is not None:
            return None
        # the sum may be part of another pattern, and its cast must be its only user
        taken = self._inside() & set(found.inside)
        others = [n for n in found.inside if n is not x and set(n.users) - set(found.inside)]
        return None if taken or others else found

    def _take_sums_apart(self, pairs: list[_Pair]) -> set[Node]:
        """Prepare vectors and a row of a table in place of each vector per token that was cut out
        of ``table + vectors``.

        A sum is taken apart if the operators replace whatever reads it.

        Returns:
            The calls of these sums, to be erased once the patterns are replaced.
        """
        parts: dict[Node, Part] = {}
        stay: set[Node] = set()
        for found in self._all():
            for vector in found.vectors:
                source = steps_from_sum(vector)
                if source is None:
                    continue
                part = None
                if vector_kind(vector, value(found.root)) == "token" and not _is_viewed(found):
                    part = find_part(vector, found.root, self.facts)
                if part is None or not self.taken.isdisjoint([part.total, *part.steps]):
                    stay.add(source[0])
                else:
                    parts[vector] = part
        others = {
            node
            for found in [*self._all(), *(pair.residual for pair in pairs)]
            for node in found.others
        }
        parts = {
            vector: part
            for vector, part in parts.items()
            if part.total not in stay and self._goes_away(part.total, others)
        }
        self.pairs = take_apart(self.graph, parts, self.facts)
        calls: set[Node] = set()
        for vector, part in parts.items():
            if part.total not in calls:
                self.sum_bytes[vector] = _traffic(part.total)
            calls.update([part.total, *part.steps, *part.casts])
        return calls

    def _goes_away(self, node: Node, others: set[Node]) -> bool:
        """Whether only vectors of patterns are made of a node; ``others`` are what these read
        besides.
        """
        return node not in others and all(
            user in self.taken
            or (is_step(user) or scale_of(user) is not None)
            and self._goes_away(user, others)
            for user in node.users
        )

    def _now(self, node: Node | None) -> Node | None:
        """The node that holds a value now."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _replace_one(self, found: Modulated | Residual) -> None:
        root = found.root
        with self.graph.inserting_before(root):
            if isinstance(found, Modulated):
                x = self._now(found.norm.x)
                vectors = self._norm_arguments(found, found.norm.x)
                name = "adaln"
                args = (x,)
            else:
                x, y = self._operands(found)
                gate = self._vector(found.gate, found.x)
                name = "gated_residual"
                args = (x, y, gate)
                vectors = {}
                if found.norm is not None:
                    name = "gated_residual_norm"
                    vectors = self._affine(found.norm)
            new = self._call(name, args, vectors, root, value(root))
        self._finish(name, [(root, new)], found.inside, [*new.all_input_nodes, new])

    def _replace_pair(self, pair: _Pair) -> None:
        residual = pair.residual
        norm, *seconds = pair.norms
        anchor = self._place(pair)
        if anchor is None and seconds:
            # the second by itself: it may be what cannot be computed earlier
            self._replace_pair(_Pair(residual, [norm]))
            self._replace_one(seconds[0])
            return
        if anchor is None:
            self._miss(norm.root, "its modulation cannot be computed before another use of x'")
            # each by itself, where that is worth a call
            if residual.gate is not None:
                self._replace_one(residual)
            if not norm.is_plain:
                self._replace_one(norm)
            return
        roots = [found.root for found in (residual, *pair.norms)]
        with self.graph.inserting_before(anchor):
            x, y = self._operands(residual)
            gate = self._vector(residual.gate, residual.x)
            arguments = self._norm_arguments(norm, residual.x)
            for second in seconds:
                vectors = self._norm_arguments(second, residual.x)
                arguments["second"] = (vectors["shift"], vectors["scale"])
            name = "gated_residual_adaln"
            results = tuple(value(root) for root in roots)
            call = self._call(name, (x, y, gate), arguments, norm.root, results)
            outputs = []
            for i, root in enumerate(roots):
                output = insert(
                    self.graph, operator.getitem, call, i, like=root, result=value(root)
                )
                outputs.append((root, output))
        moved = [*call.all_input_nodes, *(output for _, output in outputs)]
        self._finish(name, outputs, pair.inside, moved)

    def _place(self, pair: _Pair) -> Node | None:
        """The node before which the call for a pair may stand, or None if there is no such place.

        Before the norm's last call every argument is there, but for a second modulation's. If x' is
        used earlier, the call must stand where x' was computed. What it needs and comes later must
        be moved there.
        """
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        inside = {node for norm in pair.norms for node in norm.inside}
        total = pair.residual.root
        anchor = pair.root
        users = [user for user in total.users if not _goes_with(user, inside)]
        if any(order[user] < order[anchor] for user in users):
            anchor = total
        needed: list[Node | None] = []
        for norm in pair.norms:
            # what the operator reads
            base = None if norm.scale is None else scale_of(norm.scale)[0]
            needed += self.pairs.get(base, (norm.scale,))
            needed += self.pairs.get(norm.shift, (norm.shift,))
        needed += [pair.norms[0].norm.weight, pair.norms[0].norm.bias]
        late: set[Node] = set()
        waiting = [self._now(node) for node in needed if node is not None]
        if _depends(waiting, total, order):
            # x' is an argument of its own norm: the call would read its own result
            return None
        while waiting:
            node = waiting.pop()
            if node is None or node in late or order[node] < order[anchor]:
                continue
            late.add(node)
            waiting += node.all_input_nodes
        if not all(self._is_movable(node) for node in late):
            return None
        # one mode from x' to the last of them: autocast decides what a product computes
        moved = sorted(late, key=order.__getitem__)
        between = [total, *moved]
        if not self.facts.one_mode([node for node in between if node in self.facts.position]):
            return None
        for node in moved:
            anchor.prepend(node)
        return anchor

    def _is_movable(self, node: Node) -> bool:
        if node in self.taken or node not in self.facts.position or self.facts.is_changed(node):
            return False
        if any(self.facts.is_changed(argument) for argument in node.all_input_nodes):
            return False
        if node.op == "call_function":
            return node.target in _MOVABLE_FUNCTIONS
        return node.op == "get_attr" or node.op == "call_method" and node.target in _MOVABLE_METHODS

    def _operands(self, found: Residual) -> tuple[Node | None, Node | None]:
        """x, in the dtype of the sum, and y."""
        x = self._now(found.x)
        dtype = value(found.root).dtype
        if value(found.x).dtype != dtype:
            x = insert(self.graph, "to", x, dtype, like=found.root)
        return x, self._now(found.y)

    def _norm_arguments(self, found: Modulated, tokens: Node) -> dict[str, Any]:
        """The keyword arguments of a modulated norm; ``tokens`` has the shape of its input."""
        norm = found.norm
        shift = self._vector(found.shift, tokens)
        scale = None
        if found.scale is not None:
            base, views = scale_of(found.scale)
            scale = self._vector(self._view_again(base, views), tokens)
        arguments = {"shift": shift, "scale": scale, **self._affine(norm)}
        dtype = value(found.root).dtype
        if dtype != value(norm.x).dtype:
            arguments["dtype"] = dtype
        return arguments

    def _affine(self, norm: Any) -> dict[str, Any]:
        """The keyword arguments that say which norm it is."""
        arguments = {"eps": norm.eps, "norm": norm.kind, "norm_weight": self._now(norm.weight)}
        if norm.bias is not None:
            arguments["norm_bias"] = self._now(norm.bias)
        return {name: given for name, given in arguments.items() if given is not None}

    def _view_again(self, base: Node, views: list[Node]) -> Node:
        """The scale in the shape that the views gave 1 + scale; without the casts."""
        node = self._now(base)
        for view in reversed(views):
            if is_view(view):
                target = view.target
                rest = view.args[1:]
                node = insert(
                    self.graph,
                    target,
                    node,
                    *rest,
                    like=view,
                    **view.kwargs,
                )
        return node

    def _vector(self, node: Node | None, tokens: Node) -> Any:
        """A vector in a shape that the operators take; with a table as a pair."""
        node = self._now(node)
        if node is None:
            return None
        if node not in self.pairs:
            return self._in_shape(node, tokens)
        self.saved += self.sum_bytes.pop(node, 0)
        vectors, row = map(self._now, self.pairs[node])
        return self._in_shape(vectors, tokens), row

    def _in_shape(self, node: Node, tokens: Node) -> Node:
        """A vector in a shape that the operators take."""
        x = value(tokens)
        vector = value(node)
        if vector.dim() == 4:
            # [B, F, 1, D], one per frame
            return insert(self.graph, "squeeze", node, 2, like=node)
        if vector.dim() == 1 or vector.dim() == 3 and same(vector.shape[0], x.shape[0]):
            return node
        if vector_kind(node, x) == "image":
            # one vector for all images: [1, D] or [1, 1, D]
            return insert(self.graph, "flatten", node, like=node)
        if vector.dim() == 2:
            node = insert(self.graph, "unsqueeze", node, 0, like=node)
        images = self._size(tokens)
        return insert(self.graph, "expand", node, images, -1, -1, like=node)

    def _size(self, tokens: Node) -> Any:
        """The number of images, as an integer or a node."""
        images = value(tokens).shape[0]
        if isinstance(images, int):
            return images
        return insert(self.graph, "size", self._now(tokens), 0, like=tokens)

    def _call(
        self, name: str, args: tuple, options: dict[str, Any], like: Node, result: Any
    ) -> Node:
        function = getattr(ops, name)
        given = {key: held for key, held in options.items() if held is not None}
        return insert(self.graph, function, *args, like=like, result=result, **given)

    def _finish(
        self, name: str, outputs: list[tuple[Node, Node]], inside: list[Node], after: list[Node]
    ) -> None:
        """Connect the users of the pattern to the operator, and erase what nobody uses now."""
        before = sum(_traffic(node) for node in set(inside))
        before += self.saved
        self.saved = 0
        first = where(outputs[-1][0])
        moved = sum(nbytes(tensor) for node in set(after) for tensor in tensors(node))
        for old, new in outputs:
            old.replace_all_uses_with(new)
            self.replaced[old] = new
        self._erase(inside)
        self.result.rewrites.append(Rewrite(name, first, before, moved))

    def _erase(self, nodes: list[Node]) -> None:
        """Erase nodes of patterns without users, and casts, views and ``1 + scale`` that only they
        read.
        """
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node.users or node._erased or node.op == "placeholder":
                continue
            if node not in nodes and not (is_cast(node) or is_view(node) or scale_of(node)):
                continue
            before = node.all_input_nodes
            self.graph.erase_node(node)
            waiting += before


def _depends(nodes: Iterable[Node | None], on: Node, order: dict[Node, int]) -> bool:
    """Whether one of these nodes is ``on``, or is computed from it. ``order``: of execution."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is on:
            return True
        # nothing before a node is computed from it; new nodes are read through
        if node is None or node in seen or order.get(node, order[on]) < order[on]:
            continue
        seen.add(node)
        waiting += node.all_input_nodes
    return False


def _goes_with(node: Node, inside: set[Node]) -> bool:
    """Whether a node is one of a pattern's, or a cast that only the pattern reads."""
    if node in inside:
        return True
    return is_cast(node) and all(_goes_with(user, inside) for user in node.users)


def _is_viewed(found: Modulated | Residual) -> bool:
    """Whether ``1 + scale`` is read in another shape than the scale has."""
    if isinstance(found, Residual) or found.scale is None:
        return False
    return any(is_view(node) for node in scale_of(found.scale)[1])


def _is_modulation(product: Node, norm: Node) -> bool:
    """Whether a node multiplies a norm's result by ``1 + scale``."""
    return is_mul(product) and scale_of(other(product, norm)) is not None


def _traffic(node: Node) -> int:
    """Bytes that a call reads and writes by itself; 0 for a view."""
    if node.op not in ("call_function", "call_method") or is_view(node):
        return 0
    touched = [*node.all_input_nodes, node]
    return sum(nbytes(tensor) for item in touched for tensor in tensors(item))
