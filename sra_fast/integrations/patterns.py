"""What the rewrite looks for: modulated norms, gated residuals, sandwich norms.

    modulated norm    norm(x) (1 + scale) + shift            DiT (arXiv 2212.09748), Sec. 3.2
    gated residual    x + gate y                             the same
    sandwich norm     x + gate norm(y)                       Lumina-Next (arXiv 2406.18583)

A pattern is found from its norm, or from its sum, and then followed through the graph. What begins
like a pattern and ends differently is a near miss, and its reason goes into the report.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.graph import (
    is_add,
    is_call,
    is_cast,
    is_mul,
    is_part,
    operands,
    same_shape,
    uncast,
    value,
)
from sra_fast.integrations.norms import Miss, Norm, is_weight
from sra_fast.integrations.tokens import (
    is_frame_vector,
    is_tokens,
    merges_frames,
    only_user,
    only_users,
    other,
    scale_of,
    splits_frames,
    users_after_casts,
    vector_kind,
)


@dataclass
class Modulated:
    """``norm(x) (1 + scale) + shift``; without scale and shift a plain norm.

    Attributes:
        root: the node whose value it is.
        inside: the calls that it replaces, those of the norm included.
    """

    root: Node
    norm: Norm
    scale: Node | None
    shift: Node | None
    inside: list[Node]

    @property
    def is_plain(self) -> bool:
        """Whether the norm is not modulated."""
        return self.scale is None and self.shift is None

    @property
    def vectors(self) -> list[Node]:
        """Shift and scale, as the operator reads them."""
        scale = None if self.scale is None else scale_of(self.scale)[0]
        return [vector for vector in (self.shift, scale) if vector is not None]

    @property
    def others(self) -> list[Node]:
        """What the operator reads besides."""
        return self.norm.reads

    @property
    def has_vector_per_token(self) -> bool:
        """Whether scale or shift is ``[B, T, D]``."""
        return _has_vector_per_token([self.scale, self.shift], self.norm.x)


@dataclass
class Residual:
    """``x + gate y``; without a gate ``x + y``; with a norm ``x + gate norm(y)``."""

    root: Node
    x: Node
    y: Node
    gate: Node | None
    norm: Norm | None
    inside: list[Node]

    @property
    def vectors(self) -> list[Node]:
        """The gate, if there is one."""
        return [] if self.gate is None else [self.gate]

    @property
    def others(self) -> list[Node]:
        """What the operator reads besides."""
        return [self.x, self.y, *([] if self.norm is None else self.norm.reads)]

    @property
    def has_vector_per_token(self) -> bool:
        """Whether the gate is ``[B, T, D]``."""
        return _has_vector_per_token([self.gate], self.x)


def _has_vector_per_token(vectors: list[Node | None], tokens: Node) -> bool:
    return any(vector_kind(vector, value(tokens)) == "token" for vector in vectors)


def follow_norm(norm: Norm) -> list[Modulated | Residual | Miss]:
    """What is done with a norm's result.

    A pattern for every user if all of them are patterns. Otherwise the norm's result is needed
    anyway, and what is found is a plain norm (:class:`Modulated` without scale and shift) after the
    reasons why it is not more.
    """
    weighted = _with_weight(norm)
    if weighted is not None:
        norm = weighted
    found = [_follow_user(norm, user, path) for user, path in users_after_casts(norm.node)]
    misses = [m for m in found if isinstance(m, Miss)]
    matches = [m for m in found if m is not None and not isinstance(m, Miss)]
    if found and len(matches) == len(found):
        return list(matches)
    if matches and not misses:
        misses = [Miss(norm.node, "the norm's result has another use")]
    return [*misses, _rounded(Modulated(norm.node, norm, None, None, list(norm.inside)))]


def _with_weight(norm: Norm) -> Norm | None:
    """The norm with the weight that multiplies its result and nothing else does."""
    if norm.weight is not None or norm.bias is not None:
        return None
    users = users_after_casts(norm.node)
    if len(users) != 1 or not is_mul(users[0][0]):
        return None
    product, path = users[0]
    weight = other(product, path[-1])
    if not is_weight(weight, value(norm.x)) or scale_of(weight) is not None:
        return None
    inside = [*norm.inside, *path[1:], product]
    return Norm(product, norm.x, norm.kind, norm.eps, weight, None, inside)


def _follow_user(norm: Norm, user: Node, path: list[Node]) -> Modulated | Residual | Miss | None:
    """The pattern that a user of the norm belongs to."""
    x: Tensor = value(norm.x)
    inside = [*norm.inside, *path[1:]]
    if splits_frames(user):
        return _follow_frames(norm, user, [*inside, user])
    if not is_mul(user):
        return _sandwich(norm, user, path[-1], None, inside)
    factor = other(user, path[-1])
    one_plus = scale_of(factor)
    kind = vector_kind(factor, x)
    # any two activations could be multiplied: a gate is a part of a larger tensor
    if kind == "token" and one_plus is None and not is_part(factor):
        kind = None
    if kind is None or not is_tokens(value(user)):
        if value(factor) is None or one_plus is None:
            return None
        return Miss(user, f"the scale is {[*value(factor).shape]}, of x {[*x.shape]}")
    inside.append(user)
    if one_plus is None:
        # norm(y) gate, then + x
        result = only_user(user)
        last = next(iter(user.users)) if result is not None and result not in user.users else user
        steps = [last] if last is not user else []
        found = None
        if result is not None:
            found = _sandwich(norm, result, last, factor, [*inside, *steps])
        return found or Miss(user, "the scale is not added to 1")
    return _with_shift(norm, user, factor, kind, inside)


def _follow_frames(norm: Norm, split: Node, inside: list[Node]) -> Modulated | None:
    """``norm(x)`` as frames, modulated with a vector for each, and as tokens again."""
    chain = [split, *only_users(split)]
    # the product, perhaps a sum, the view: in this order, with casts in between
    calls = [i for i, node in enumerate(chain) if i > 0 and not is_cast(node)][:3]
    factor = _other_in(chain, calls, 0, is_mul)
    shift = _other_in(chain, calls, 1, is_add)
    last = 1 if shift is None else 2
    if scale_of(factor) is None or len(calls) <= last:
        return None
    merge = chain[calls[last]]
    x: Tensor = value(norm.x)
    frames = value(split).shape[1]
    vectors = [vector for vector in (factor, shift) if vector is not None]
    if not merges_frames(merge) or not all(is_frame_vector(v, x, frames) for v in vectors):
        return None
    inside = [*inside, *chain[1 : calls[last] + 1]]
    return _rounded(Modulated(merge, norm, factor, shift, inside))


def _other_in(
    chain: list[Node], calls: list[int], which: int, is_kind: Callable[[object], bool]
) -> object:
    """The operand that one of the calls of a chain adds or multiplies to what comes before it."""
    if which >= len(calls) or not is_kind(chain[calls[which]]):
        return None
    return other(chain[calls[which]], chain[calls[which] - 1])


def _with_shift(
    norm: Norm, product: Node, factor: Node, kind: str, inside: list[Node]
) -> Modulated | Residual:
    """``norm(x) (1 + scale)``, with the shift if one is added to it and nothing else uses it."""
    x: Tensor = value(norm.x)
    plain = Modulated(product, norm, factor, None, inside)
    users = users_after_casts(product)
    if len(users) != 1 or not is_add(users[0][0]):
        return _rounded(plain)
    total, path = users[0]
    shift = other(total, path[-1])
    steps = [*inside, *path[1:]]
    if vector_kind(shift, x) == kind and is_tokens(value(total)):
        return _rounded(Modulated(total, norm, factor, shift, [*steps, total]))
    # x + norm(y) (1 + gate)
    return _sandwich(norm, total, path[-1], factor, steps) or _rounded(plain)


def _rounded(found: Modulated) -> Modulated:
    """With the cast to a narrower dtype, if that is all that reads the result."""
    users = list(found.root.users)
    if len(users) == 1 and is_cast(users[0]) and _is_narrower(users[0], found.root):
        return Modulated(users[0], found.norm, found.scale, found.shift, [*found.inside, users[0]])
    return found


def _is_narrower(cast: Node, source: Node) -> bool:
    narrow = value(cast).dtype
    return narrow.itemsize < value(source).dtype.itemsize


def _sandwich(
    norm: Norm, total: Node, term: Node, gate: Node | None, inside: list[Node]
) -> Residual | None:
    """``x + gate norm(y)`` if ``total`` adds tokens x to ``term``."""
    if not is_add(total):
        return None
    x = other(total, term)
    # the operator has no bias of the norm
    if norm.bias is not None:
        return None
    if not is_tokens(value(x)) or not same_shape(value(x), value(norm.x)):
        return None
    residual = Residual(total, x, norm.x, gate, norm, [*inside, total])
    return _in_dtype_of_x(residual)


def find_residual(total: Node) -> Residual | Miss | None:
    """``x + gate y`` if the node is such a sum."""
    if is_call(total, (torch.addcmul,), ("addcmul",)):
        if len(total.args) != 3 or total.kwargs:
            return None
        x, *factors = total.args
        return _gated(total, x, factors, [total])
    if not is_add(total):
        return None
    reason = None
    for x, term in operands(total):
        steps = []
        while is_cast(term) and len(term.users) == 1:
            steps.append(term)
            term = term.args[0]
        if merges_frames(term) and len(term.users) == 1:
            found = _gated_frames(total, x, term, [*steps, total])
            if found is not None:
                return found
        if not is_mul(term) or not is_tokens(value(x)) or len(term.args) != 2 or term.kwargs:
            continue
        found = _gated(total, x, term.args, [term, *steps[::-1], total])
        if isinstance(found, Residual) and len(term.users) > 1:
            found = Miss(total, "gate * y has another use")
        if isinstance(found, Residual):
            return found
        reason = reason or found
    return reason


def _gated_frames(total: Node, x: object, merge: Node, inside: list[Node]) -> Residual | None:
    """``x + gate y`` with y seen as frames, and a gate for each."""
    tokens = value(x)
    product = merge.args[0]
    if not is_mul(product) or len(product.users) != 1 or not is_tokens(tokens):
        return None
    if not same_shape(tokens, value(total)):
        return None
    for gate, frames in operands(product):
        if not splits_frames(frames) or not same_shape(value(frames.args[0]), tokens):
            continue
        if is_frame_vector(gate, tokens, value(frames).shape[1]):
            inside = [product, merge, *inside]
            return _in_dtype_of_x(Residual(total, x, frames.args[0], gate, None, inside))
    return None


def _gated(total: Node, x: object, factors: object, inside: list[Node]) -> Residual | Miss | None:
    """The gated residual of x and the two factors, either of which may be the gate."""
    tokens = value(x)
    if not is_tokens(tokens) or not is_tokens(value(total)):
        return None
    if not same_shape(tokens, value(total)):
        return None
    first, second = factors
    for gate, y in ((first, second), (second, first)):
        full = value(y)
        if not is_tokens(full) or not same_shape(full, tokens):
            continue
        kind = vector_kind(gate, tokens)
        # of two arrays of tokens the gate is the one that is a part of a larger tensor
        if kind == "image" or (kind == "token" and is_part(gate) and not is_part(y)):
            return _in_dtype_of_x(Residual(total, x, y, gate, None, inside))
        vector = value(gate)
        if vector is not None and vector.dim() in (2, 3) and not same_shape(vector, full):
            return Miss(total, f"the gate is {[*vector.shape]}, of x {[*tokens.shape]}")
    return None


def plain_residual(total: Node) -> Residual | None:
    """``x + y`` of two arrays of tokens, as after a cross attention without a gate."""
    if not is_add(total) or total.kwargs or len(total.args) != 2:
        return None
    x, y = total.args
    result = value(total)
    if not is_tokens(result) or x is y:
        return None
    for operand in (x, y):
        if not is_tokens(value(operand)) or not same_shape(value(operand), result):
            return None
    # x is the operand in the dtype of the sum
    if value(x).dtype != result.dtype:
        x, y = y, x
    return _in_dtype_of_x(Residual(total, x, y, None, None, [total]))


def _in_dtype_of_x(found: Residual) -> Residual:
    """The sum is rounded once, to the dtype in which x is stored, if the model rounds it there."""
    total = found.root
    dtype = value(total).dtype
    users = list(total.users)
    if len(users) == 1 and is_cast(users[0]) and _is_narrower(users[0], total):
        stored = uncast(found.x, value(users[0]).dtype)
        if value(stored).dtype == value(users[0]).dtype:
            found.inside.append(users[0])
            return Residual(users[0], stored, found.y, found.gate, found.norm, found.inside)
    return Residual(total, uncast(found.x, dtype), found.y, found.gate, found.norm, found.inside)
