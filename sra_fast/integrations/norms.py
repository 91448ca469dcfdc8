"""The norms of a graph: LayerNorm and RMSNorm, as functions or written out."""

import math
import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.graph import (
    DTYPES,
    arguments,
    is_add,
    is_call,
    is_mul,
    number,
    operands,
    same,
    uncast,
    value,
)
from sra_fast.integrations.tokens import is_tokens


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

    @property
    def reads(self) -> list[Node]:
        """Its arguments."""
        return [node for node in (self.x, self.weight, self.bias) if node is not None]


@dataclass(frozen=True)
class Miss:
    """A node that begins like a pattern and does not end like one."""

    node: Node
    reason: str


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
        if vector is not None and not is_weight(vector, value(norm.x)):
            return Miss(node, "the norm's weight is not [D]")
    return norm


def is_weight(node: object, x: Tensor) -> bool:
    vector = value(node)
    fits = vector is not None and vector.dim() == 1 and vector.dtype in DTYPES
    return fits and same(vector.shape[0], x.shape[-1])


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
        fp64 = value(node).dtype == torch.float64
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
        base, exponent = (*node.args, None)[:2]
        return base if isinstance(base, Node) and exponent == 2 else None
    if is_call(node, (torch.square,), ("square",)):
        return node.args[0]
    if is_mul(node) and len(node.args) == 2 and node.args[0] is node.args[1]:
        return node.args[0]
    return None
