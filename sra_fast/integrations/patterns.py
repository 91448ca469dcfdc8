"""What the rewrite looks for: modulated norms, gated residuals, sandwich norms.

    modulated norm    norm(x) (1 + scale) + shift            DiT (arXiv 2212.09748), Sec. 3.2
    gated residual    x + gate y                             the same
    sandwich norm     x + gate norm(y)                       Lumina-Next (arXiv 2406.18583)

A pattern is found from its norm, or from its sum, and then followed through the graph. What begins
like a pattern and ends differently is a near miss, and its reason goes into the report.
"""

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.graph import (
    DTYPES,
    Facts,
    arguments,
    is_add,
    is_call,
    is_cast,
    is_mul,
    is_part,
    is_view,
    number,
    operands,
    same,
    same_shape,
    storage,
    tensors,
    uncast,
    value,
)


@dataclass
class Norm:
    """A norm over the last dimension of ``x [B, T, D]``.

    Attributes:
        node: its result, after its weight.
        x: what it normalizes, before exact casts.
        kind: "layer" or "rms".
        eps: added to the variance or mean square.
        weight: ``[D]`` or None, as is bias.
        inside: its calls, from the first to ``node``.
    """

    node: Node
    x: Node
    kind: str
    eps: float
    weight: Node | None = None
    bias: Node | None = None
    inside: list[Node] = field(default_factory=list)


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


@dataclass
class Residual:
    """``x + gate y``; without a gate ``x + y``; with a norm ``x + gate norm(y)``."""

    root: Node
    x: Node
    y: Node
    gate: Node | None
    norm: Norm | None
    inside: list[Node]


@dataclass(frozen=True)
class Miss:
    """A node that begins like a pattern and does not end like one."""

    node: Node
    reason: str


def is_tokens(tensor: Tensor | None) -> bool:
    """Whether a value is ``[B, T, D]`` of a dtype that the operators take."""
    return tensor is not None and tensor.dim() == 3 and tensor.dtype in DTYPES


def vector_kind(node: object, x: Tensor) -> str | None:
    """Whether a node is one vector per image, ``"image"``, or per token, ``"token"``, of x.

    The shape decides, as broadcasting reads it: ``[T, D]`` is one vector per token that all images
    share.
    """
    vector = value(node)
    if vector is None or vector.dim() > 3 or vector.dim() == 0 or vector.dtype not in DTYPES:
        return None
    images, tokens, width = (*[1] * (3 - vector.dim()), *vector.shape)
    if not same(width, x.shape[2]) or not (same(images, 1) or same(images, x.shape[0])):
        return None
    if same(tokens, 1):
        return "image"
    return "token" if same(tokens, x.shape[1]) else None


def is_frame_vector(node: object, x: Tensor, frames: Any) -> bool:
    """Whether a node is ``[B, F, 1, D]``, one vector per frame of x; B and F may be 1."""
    vector = value(node)
    if vector is None or vector.dim() != 4 or vector.dtype not in DTYPES:
        return False
    images, count, tokens, width = vector.shape
    fits = same(images, 1) or same(images, x.shape[0])
    fits = fits and (same(count, 1) or same(count, frames))
    return fits and same(tokens, 1) and same(width, x.shape[2])


def splits_frames(node: object) -> bool:
    """Whether a node is tokens ``[B, T, D]`` seen as ``[B, F, T / F, D]``."""
    return is_view(node) and _is_split(value(node), value(node.args[0]))  # pyright: ignore


def merges_frames(node: object) -> bool:
    """Whether a node is ``[B, F, T / F, D]`` seen as tokens ``[B, T, D]``."""
    return is_view(node) and _is_split(value(node.args[0]), value(node))  # pyright: ignore


def _is_split(frames: Tensor | None, tokens: Tensor | None) -> bool:
    if frames is None or tokens is None or frames.dim() != 4 or not is_tokens(tokens):
        return False
    return (
        same(frames.shape[0], tokens.shape[0])
        and same(frames.shape[1] * frames.shape[2], tokens.shape[1])
        and same(frames.shape[3], tokens.shape[2])
    )


def only_user(node: Node) -> Node | None:
    """The one user of a node, after a cast that is its only user, or None."""
    users = list(node.users)
    if len(users) == 1 and is_cast(users[0]):
        users = list(users[0].users)
    return users[0] if len(users) == 1 else None


def users_after_casts(node: Node) -> list[tuple[Node, list[Node]]]:
    """Every user of a node's value, with the casts (and the node itself) on the way to it."""
    found = []
    for user in node.users:
        if is_cast(user):
            found += [(last, [node, *path]) for last, path in users_after_casts(user)]
        else:
            found.append((user, [node]))
    return found


def other(node: Node, operand: Node) -> object:
    """The other operand of ``a + b`` or ``a * b``; None if it is not of this form."""
    for a, b in operands(node):
        if a is operand and b is not operand:
            return b
    return None


def scale_of(node: object) -> tuple[Node, list[Node]] | None:
    """``(scale, views)`` of ``1 + scale``, seen through casts and views of the sum; None if it is
    something else.
    """
    views = []
    while is_cast(node) or is_view(node):
        views.append(node)
        node = node.args[0]  # pyright: ignore
    if is_add(node):
        for a, b in operands(node):  # pyright: ignore
            scale = value(b)
            if isinstance(a, int | float) and a == 1 and scale is not None:
                return (b, views) if scale.dtype in DTYPES else None
    return None


def find_norm(node: Node) -> Norm | Miss | None:
    """The norm whose last call, before a separate weight, is this node."""
    norm = _layer_norm(node) or _rms_norm(node) or _rms_by_hand(node)
    if not isinstance(norm, Norm):
        return norm
    if not is_tokens(value(norm.x)) or not is_tokens(value(norm.node)):
        found = value(norm.x)
        shape = "unknown" if found is None else f"{[*found.shape]} {found.dtype}"
        return Miss(node, f"the norm's input is {shape}, expected [B, T, D]")
    for vector in (norm.weight, norm.bias):
        if vector is not None and not _is_weight(vector, value(norm.x)):  # pyright: ignore
            return Miss(node, "the norm's weight is not [D]")
    return norm


def _is_weight(node: object, x: Tensor) -> bool:
    vector = value(node)
    fits = vector is not None and vector.dim() == 1 and vector.dtype in DTYPES
    return fits and same(vector.shape[0], x.shape[-1])  # pyright: ignore


def _last_dimension(shape: object, x: Tensor | None) -> bool:
    """Whether ``normalized_shape`` is x's last dimension."""
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    return x is not None and len(sizes) == 1 and same(sizes[0], x.shape[-1])


def _layer_norm(node: Node) -> Norm | Miss | None:
    if not is_call(node, (F.layer_norm, torch.layer_norm), ()):
        return None
    given = arguments(node, "input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    return _norm_call(node, given, "layer", given.get("eps", 1e-5))


def _rms_norm(node: Node) -> Norm | Miss | None:
    if not is_call(node, (F.rms_norm, torch.rms_norm), ()):
        return None
    given = arguments(node, "input", "normalized_shape", "weight", "eps")
    eps = given.get("eps")
    if eps is None and value(node) is not None:
        # PyTorch's default is that of the dtype it computes in
        fp64 = value(node).dtype == torch.float64  # pyright: ignore
        eps = torch.finfo(torch.float64 if fp64 else torch.float32).eps
    return _norm_call(node, given, "rms", eps)


def _norm_call(node: Node, given: dict, kind: str, eps: object) -> Norm | Miss:
    x = given.get("input")
    eps = number(eps)
    if not isinstance(x, Node) or eps is None or not 0 <= eps < math.inf:
        return Miss(node, "the norm's arguments are not the usual ones")
    if not _last_dimension(given.get("normalized_shape"), value(x)):
        return Miss(node, "it normalizes more than the last dimension")
    weight = given.get("weight")
    bias = given.get("bias")
    return Norm(node, uncast(x), kind, eps, weight, bias, [node])


def _rms_by_hand(node: Node) -> Norm | Miss | None:
    """``x * rsqrt(mean(x^2) + eps)``, as many codebases write RMSNorm."""
    if not is_mul(node):
        return None
    for x, rstd in operands(node):
        if not is_call(rstd, (torch.rsqrt,), ("rsqrt",)) or not isinstance(x, Node):
            continue
        total = rstd.args[0]
        if not is_add(total):
            continue
        for mean, added in operands(total):
            eps = number(added)
            is_mean = is_call(mean, (torch.mean,), ("mean",))
            if is_mean and eps is not None and 0 <= eps < math.inf:
                return _mean_square(node, x, rstd, total, mean, eps)
    return None


def _mean_square(
    node: Node, x: Node, rstd: Node, total: Node, mean: Node, eps: float
) -> Norm | Miss | None:
    """The RMS norm of x if ``mean`` is the mean of its squares over the last dimension."""
    given = arguments(mean, "input", "dim", "keepdim")
    square = given.get("input")
    base = _squared(square)
    if base is None or uncast(base) is not uncast(x):
        return None
    dimensions = given.get("dim")
    sizes = dimensions if isinstance(dimensions, tuple | list) else (dimensions,)
    source = value(square)
    if source is None or not given.get("keepdim") or len(sizes) != 1:
        return Miss(node, "the mean square is not over the last dimension alone")
    if sizes[0] not in (-1, source.dim() - 1):
        return Miss(node, "the mean square is not over the last dimension")
    return Norm(node, uncast(x), "rms", eps, inside=[square, mean, total, rstd, node])


def _squared(node: object) -> Node | None:
    """x of ``x^2``, however it is written."""
    if is_call(node, (torch.pow, operator.pow), ("pow", "__pow__")):
        base, exponent = (*node.args, None)[:2]  # pyright: ignore
        return base if isinstance(base, Node) and exponent == 2 else None  # pyright: ignore
    if is_call(node, (torch.square,), ("square",)):
        return node.args[0]  # pyright: ignore
    if is_mul(node) and len(node.args) == 2 and node.args[0] is node.args[1]:  # pyright: ignore
        return node.args[0]  # pyright: ignore
    return None


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
    if not _is_weight(weight, value(norm.x)) or scale_of(weight) is not None:  # pyright: ignore
        return None
    inside = [*norm.inside, *path[1:], product]
    return Norm(product, norm.x, norm.kind, norm.eps, weight, None, inside)  # pyright: ignore


def _follow_user(norm: Norm, user: Node, path: list[Node]) -> Modulated | Residual | Miss | None:
    """The pattern that a user of the norm belongs to."""
    x: Tensor = value(norm.x)  # pyright: ignore
    inside = [*norm.inside, *path[1:]]
    if splits_frames(user):
        return _follow_frames(norm, user, [*inside, user])
    if not is_mul(user):
        return _sandwich(norm, user, path[-1], None, inside)
    factor = other(user, path[-1])
    one_plus = scale_of(factor)
    kind = vector_kind(factor, x)
    # any two activations could be multiplied: a gate is a part of a larger tensor
    if kind == "token" and one_plus is None and not is_part(factor):  # pyright: ignore
        kind = None
    if kind is None or not is_tokens(value(user)):
        if value(factor) is None or one_plus is None:
            return None
        return Miss(user, f"the scale is {[*value(factor).shape]}, of x {[*x.shape]}")  # pyright: ignore
    inside.append(user)
    if one_plus is None:
        # norm(y) gate, then + x
        result = only_user(user)
        last = next(iter(user.users)) if result is not None and result not in user.users else user
        steps = [last] if last is not user else []
        found = None
        if result is not None:
            found = _sandwich(norm, result, last, factor, [*inside, *steps])  # pyright: ignore
        return found or Miss(user, "the scale is not added to 1")
    return _with_shift(norm, user, factor, kind, inside)  # pyright: ignore


def _follow_frames(norm: Norm, split: Node, inside: list[Node]) -> Modulated | None:
    """``norm(x)`` as frames, modulated with a vector for each, and as tokens again."""
    x: Tensor = value(norm.x)  # pyright: ignore
    frames = value(split).shape[1]  # pyright: ignore
    steps = [split, *_only_users(split)]
    products = [node for node in steps if is_mul(node)]
    end = next((i for i, node in enumerate(steps) if merges_frames(node)), None)
    if end is None or not products:
        return None
    factor = other(products[0], steps[steps.index(products[0]) - 1])
    if scale_of(factor) is None or not is_frame_vector(factor, x, frames):
        return None
    shift = None
    for before, node in zip(steps[:end], steps[1:end], strict=False):
        if node is products[0] or is_cast(node):
            continue
        shift = other(node, before) if is_add(node) and shift is None else None
        if shift is None or not is_frame_vector(shift, x, frames):
            return None
    return _rounded(Modulated(steps[end], norm, factor, shift, [*inside, *steps[1 : end + 1]]))  # pyright: ignore


def _only_users(node: Node) -> list[Node]:
    """The nodes after a node, as long as each is the only user of the one before."""
    found = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        found.append(node)
        if len(found) > 8:
            break
    return found


def _with_shift(
    norm: Norm, product: Node, factor: Node, kind: str, inside: list[Node]
) -> Modulated | Residual:
    """``norm(x) (1 + scale)``, with the shift if one is added to it and nothing else uses it."""
    x: Tensor = value(norm.x)  # pyright: ignore
    plain = Modulated(product, norm, factor, None, inside)
    users = users_after_casts(product)
    if len(users) != 1 or not is_add(users[0][0]):
        return _rounded(plain)
    total, path = users[0]
    shift = other(total, path[-1])
    steps = [*inside, *path[1:]]
    if vector_kind(shift, x) == kind and is_tokens(value(total)):
        return _rounded(Modulated(total, norm, factor, shift, [*steps, total]))  # pyright: ignore
    # x + norm(y) (1 + gate)
    return _sandwich(norm, total, path[-1], factor, steps) or _rounded(plain)


def _rounded(found: Modulated) -> Modulated:
    """With the cast to a narrower dtype, if that is all that reads the result."""
    users = list(found.root.users)
    if len(users) == 1 and is_cast(users[0]) and _is_narrower(users[0], found.root):
        return Modulated(users[0], found.norm, found.scale, found.shift, [*found.inside, users[0]])
    return found


def _is_narrower(cast: Node, source: Node) -> bool:
    narrow = value(cast).dtype  # pyright: ignore
    return narrow.itemsize < value(source).dtype.itemsize  # pyright: ignore


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
    if not is_tokens(value(x)) or not same_shape(value(x), value(norm.x)):  # pyright: ignore
        return None
    residual = Residual(total, x, norm.x, gate, norm, [*inside, total])  # pyright: ignore
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
    if not is_mul(product) or len(product.users) != 1 or not is_tokens(tokens):  # pyright: ignore
        return None
    if not same_shape(tokens, value(total)):  # pyright: ignore
        return None
    for gate, frames in operands(product):  # pyright: ignore
        if not splits_frames(frames) or not same_shape(value(frames.args[0]), tokens):  # pyright: ignore
            continue
        if is_frame_vector(gate, tokens, value(frames).shape[1]):  # pyright: ignore
            inside = [product, merge, *inside]  # pyright: ignore
            return _in_dtype_of_x(Residual(total, x, frames.args[0], gate, None, inside))  # pyright: ignore
    return None


def _gated(total: Node, x: object, factors: object, inside: list[Node]) -> Residual | Miss | None:
    """The gated residual of x and the two factors, either of which may be the gate."""
    tokens = value(x)
    if not is_tokens(tokens) or not is_tokens(value(total)):
        return None
    if not same_shape(tokens, value(total)):  # pyright: ignore
        return None
    first, second = factors  # pyright: ignore
    for gate, y in ((first, second), (second, first)):
        full = value(y)
        if not is_tokens(full) or not same_shape(full, tokens):  # pyright: ignore
            continue
        kind = vector_kind(gate, tokens)  # pyright: ignore
        # of two arrays of tokens the gate is the one that is a part of a larger tensor
        if kind == "image" or (kind == "token" and is_part(gate) and not is_part(y)):  # pyright: ignore
            return _in_dtype_of_x(Residual(total, x, y, gate, None, inside))  # pyright: ignore
        vector = value(gate)
        if vector is not None and vector.dim() in (2, 3) and not same_shape(vector, full):  # pyright: ignore
            return Miss(total, f"the gate is {[*vector.shape]}, of x {[*tokens.shape]}")  # pyright: ignore
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
        if not is_tokens(value(operand)) or not same_shape(value(operand), result):  # pyright: ignore
            return None
    # x is the operand in the dtype of the sum
    if value(x).dtype != result.dtype:  # pyright: ignore
        x, y = y, x
    return _in_dtype_of_x(Residual(total, x, y, None, None, [total]))  # pyright: ignore


def _in_dtype_of_x(found: Residual) -> Residual:
    """The sum is rounded once, to the dtype in which x is stored, if the model rounds it there."""
    total = found.root
    dtype = value(total).dtype  # pyright: ignore
    users = list(total.users)
    if len(users) == 1 and is_cast(users[0]) and _is_narrower(users[0], total):
        stored = uncast(found.x, value(users[0]).dtype)  # pyright: ignore
        if value(stored).dtype == value(users[0]).dtype:  # pyright: ignore
            found.inside.append(users[0])
            return Residual(users[0], stored, found.y, found.gate, found.norm, found.inside)
    return Residual(total, uncast(found.x, dtype), found.y, found.gate, found.norm, found.inside)


def _reads(found: Modulated | Residual) -> list[Node]:
    """The nodes that an operator in the place of the pattern would read."""
    if isinstance(found, Modulated):
        scale = None if found.scale is None else scale_of(found.scale)[0]  # pyright: ignore
        norm = found.norm
        read = [norm.x, scale, found.shift, norm.weight, norm.bias]
    else:
        weight = None if found.norm is None else found.norm.weight
        read = [found.x, found.y, found.gate, weight]
    return [node for node in read if node is not None]


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


def refusal(found: Modulated | Residual, facts: Facts) -> str | None:
    """Why a pattern may not be replaced, or None if it may."""
    read = _reads(found)
    inside = [*found.inside, *_passed_over(found, read)]
    if any(facts.is_changed(node) for node in [*inside, *read]):
        return "a tensor that it reads is changed in place"
    if not facts.one_grad_mode(inside):
        return "autograd is switched on or off inside of it"
    dtypes = {value(node).dtype for node in [*read, found.root]}  # pyright: ignore
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "fp64 and other dtypes are mixed"
    devices = {value(node).device for node in [*read, found.root]}  # pyright: ignore
    if len(devices) > 1:
        return "its tensors are on several devices"
    if _depends_on_strides(found.root):
        return "a view of its result depends on how it lies in memory"
    return None


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
    if is_dense(value(node)):  # pyright: ignore
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
