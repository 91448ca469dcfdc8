"""How values stand to tokens ``[B, T, D]``: vectors, frames, and what is done with a result.

Questions about shapes are answered for every input of the graph, or with "no".
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from sra_fast.integrations.graph import DTYPES, is_add, is_cast, is_view, operands, same, value


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
    return is_view(node) and _is_split(value(node), value(node.args[0]))


def merges_frames(node: object) -> bool:
    """Whether a node is ``[B, F, T / F, D]`` seen as tokens ``[B, T, D]``."""
    return is_view(node) and _is_split(value(node.args[0]), value(node))


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


def only_users(node: Node) -> list[Node]:
    """The nodes after a node, as long as each is the only user of the one before."""
    found = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        found.append(node)
        if len(found) > 8:
            break
    return found


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
        node = node.args[0]
    if is_add(node):
        for a, b in operands(node):
            scale = value(b)
            if isinstance(a, int | float) and a == 1 and scale is not None:
                return (b, views) if scale.dtype in DTYPES else None
    return None
