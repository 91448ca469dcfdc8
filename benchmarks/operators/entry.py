"""What the registry holds of an operator, and formulas for the bytes and FLOPs that it needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.operators.shapes import Shape

# epsilon of every norm
EPS = 1e-6
# bytes or FLOPs of the forward and of the backward pass
Passes = tuple[float, float]


@dataclass(frozen=True)
class Operator:
    """One operator: its inputs, the functions that compute it, and the least that it has to move.

    All functions take the inputs.

    Attributes:
        make: ``make(shape, dtype, randn)`` returns the inputs (``inputs.py``).
        ours: the call under test.
        reference: the definition; on fp32 inputs its results are the truth.
        eager: plain PyTorch in the dtype of the inputs.
        bytes: ``bytes(shape, element_size)`` returns the fewest bytes of both passes; None if arithmetic is
            the limit.
        flops: ``flops(shape)`` returns the FLOPs of both passes, where ``bytes`` is None.
        elements: what the table's bytes per element refer to.
        grads: indices of the inputs that get a gradient. Without any there is no backward pass.
        written: indices of the inputs that the call changes. Without any it returns its results.
        to_compile: what ``torch.compile`` gets, if that is not ``eager``.
        with_norm: ``eager`` also takes ``norm``, an installed package's LayerNorm.
        compiles: False if the compiled rival runs only when asked for, because it compiles for minutes.
        dtype: the only dtype that there is, if the working dtype plays no role.
    """

    make: Callable
    ours: Callable
    reference: Callable
    eager: Callable
    bytes: Callable[[Shape, int], Passes] | None = None
    flops: Callable[[Shape], Passes] | None = None
    elements: Callable[[Shape], int] = lambda shape: shape.elements
    grads: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    to_compile: Callable | None = None
    with_norm: bool = False
    compiles: bool = True
    dtype: torch.dtype | None = None

    @property
    def per_model(self) -> bool:
        """Whether it works on a model's parameters, so that resolution and batch mean nothing."""
        return bool(self.written)


def row_bytes(
    forward: tuple[int, int], backward: tuple[int, int], per_token: int = 0
) -> Callable[[Shape, int], Passes]:
    """Bytes of an operator on rows of tokens.

    Args:
        forward: how many arrays [B, T, D] and how many vectors [B, D] the forward pass reads or writes.
        backward: the same of the backward pass.
        per_token: bytes of fp32 statistics per token that each pass reads or writes.
    """

    def count(shape: Shape, element_size: int) -> Passes:
        T, D, _ = shape.sizes
        B = shape.batch

        def bytes_of(arrays: int, vectors: int) -> int:
            return element_size * B * D * (T * arrays + vectors) + per_token * B * T

        return bytes_of(*forward), bytes_of(*backward)

    return count


def attention_flops(shape: Shape) -> Passes:
    """Two products forward, five backward: flash attention recomputes one."""
    T = shape.sizes[0]
    forward = 4 * shape.elements * T
    return forward, 2.5 * forward


def product_flops(forward: int, backward: int) -> Callable[[Shape], Passes]:
    """FLOPs of products of all tokens with so many D x D matrices in each pass."""

    def count(shape: Shape) -> Passes:
        D = shape.sizes[1]
        # 2 FLOP per multiply-add
        one = 2 * shape.elements * D
        return forward * one, backward * one

    return count
