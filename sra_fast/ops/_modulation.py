"""The vectors of adaLN, one per image, frame, group or token: which shapes they may have, and what
they mean.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, check_tensors, fits_kernel, takes_kernel, upcast
from sra_fast.ops._register import wants_grad

# a gate, shift or scale: vectors, or (vectors, table [D]), whose sum it is
Vector = Tensor | tuple[Tensor, Tensor]


def check_inputs(
    operator: str,
    x: Tensor,
    arrays: dict[str, Tensor],
    modulation: Mapping[str, Any],
    group: Tensor | None,
    *,
    channels: Mapping[str, Tensor | None] | None = None,
    optional: tuple[str, ...] = (),
    within_image: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """Check the inputs of a row operator, and give all vectors of the modulation one shape.

    Args:
        operator: its name, for the messages.
        x: ``[B, T, D]``.
        arrays: tensors that must have the shape of x, by name.
        modulation: vectors by name: ``[B, D]``, ``[B, 1, D]``, ``[1, D]`` or ``[D]``; with
            ``within_image`` also ``[B, F, D]`` with F a divisor of T, one per T / F tokens in a
            row, up to one per token, and any of them as a pair ``(vectors, table [D])``; with a
            group ``[B, G, D]`` instead. Images and tokens that share a vector may be left out of
            one and not of another.
        group: ``[B, T]`` integers or None.
        channels: ``[D]`` or None, by name.
        optional: names in ``modulation`` that may be None.
        within_image: whether vectors may differ between the tokens of an image without a group.
        dtype: of an output, or None.

    Returns:
        The modulation in one shape, None where it was None: ``[B, D]``, ``[B, F, D]`` or ``[B, G,
        D]``. All but a ``[B, F, D]`` beside a ``[B, T, D]`` are views, and gradients come back in
        the shapes that were given. A table is added here, in fp32, but to vectors per token,
        which stay a pair.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an argument is no tensor.
    """
    # by name, so that a message can say which tensor is wrong
    named: dict[str, Any] = {"x": x, **arrays}
    given = []
    # by the vector's place
    tables: dict[int, Tensor] = {}
    for name, t in modulation.items():
        if within_image and isinstance(t, (tuple, list)):
            t, table = _pair(operator, name, t)
            named[f"{name}'s table"] = table
            tables[len(given)] = table
        if t is not None or name not in optional:
            named[name] = t
        given.append(t)
    vectors_of_channels = []
    for name, t in (channels or {}).items():
        if t is not None:
            named[name] = t
            vectors_of_channels.append(t)
    everything = named if group is None else {**named, "group": group}
    check_tensors(operator, everything)
    fits = x.dim() == 3 and all(t.shape == x.shape for t in arrays.values())
    fits = fits and all(t.shape == x.shape[2:] for t in vectors_of_channels)
    fits = fits and all(_is_table(t, x) for t in tables.values())
    # vectors per image; -1 if one of them does not fit
    count = -1
    # by far the most frequent
    per_image = fits and group is None and _are_per_image(given, x)
    if per_image:
        count = 1
    elif fits and group is None:
        count = _vectors_per_image(given, x, within_image)
    elif fits and group is not None and _are_grouped(given, x, group):
        count = 1
    if count < 0:
        expected = _describe(arrays, modulation, channels or {}, within_image)
        raise ValueError(
            f"{operator}: expected {expected}; "
            "got " + ", ".join(f"{name} {[*t.shape]}" for name, t in everything.items())
        )
    _check_dtypes(operator, named, group, dtype)
    # Triton would read another device's address without an error
    if len({t.device for t in everything.values()}) > 1:
        told = ", ".join(f"{name} {t.device}" for name, t in everything.items())
        raise ValueError(f"{operator}: expected every tensor on one device, got {told}")
    if not tables and (per_image or group is not None):
        return given
    return [_in_one_shape(t, tables.get(i), x, count, group) for i, t in enumerate(given)]


def _check_dtypes(
    operator: str, named: dict[str, Tensor], group: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Raise ValueError unless the kernels and the reference can read all of these tensors."""
    if not all(t.dtype in FLOAT_DTYPES for t in named.values()):
        dtypes = ", ".join(f"{name} {t.dtype}" for name, t in named.items())
        raise ValueError(f"{operator}: expected floating-point tensors, got {dtypes}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{operator}: expected a floating-point dtype of the output, got {dtype}")
    if group is not None and not _is_integer(group):
        raise ValueError(f"{operator}: expected an integer group, got {group.dtype}")


def _pair(operator: str, name: str, given: Any) -> tuple[Any, Any]:
    """Vectors and table; ValueError unless there are two of them."""
    if len(given) != 2 or any(t is None for t in given):
        kinds = [type(t).__name__ for t in given]
        raise ValueError(
            f"{operator}: expected {name} as a tensor or as (vectors, table), got {kinds}"
        )
    return given[0], given[1]


def _is_table(table: Tensor, x: Tensor) -> bool:
    """Whether a table is ``[D]``, ``[1, D]`` or ``[1, 1, D]``."""
    shape = table.shape
    return 1 <= len(shape) <= 3 and shape[-1] == x.shape[2] and all(n == 1 for n in shape[:-1])


def name_second(
    operator: str, second: tuple[Vector, Vector] | None, *first: Vector | None
) -> dict[str, Vector]:
    """Shift and scale of a second modulation by name; nothing without one.

    Raises:
        ValueError: ``second`` is not a pair, or the call has no first shift or no first scale.
    """
    if second is None:
        return {}
    # a single tensor is a likely mistake
    if not isinstance(second, tuple | list) or len(second) != 2:
        kinds = type(second).__name__
        if isinstance(second, tuple | list):
            kinds = [type(t).__name__ for t in second]
        raise ValueError(f"{operator}: expected second (shift, scale), got {kinds}")
    if any(t is None for t in first):
        raise ValueError(f"{operator}: expected shift and scale beside second, got None")
    return {"second shift": second[0], "second scale": second[1]}


def _describe(
    arrays: dict[str, Tensor],
    modulation: Mapping[str, Tensor | None],
    channels: Mapping[str, Tensor | None],
    within_image: bool,
) -> str:
    """The shapes that an operator takes, for an error message."""
    vectors = f"{', '.join(modulation)} [B, D] or [B, 1, D], [1, D], [D]"
    if within_image:
        vectors += ", [B, T, D] or [B, F, D] with F a divisor of T, or a pair (vectors, table [D])"
    vectors += ", with a group [B, T] instead [B, G, D]"
    if channels:
        vectors += f", and {', '.join(channels)} [D]"
    return f"{', '.join(['x', *arrays])} [B, T, D] and {vectors}"


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _are_grouped(vectors: list[Tensor | None], x: Tensor, group: Tensor) -> bool:
    """Whether all vectors are ``[B, G, D]`` with one G > 0, and the group fits x."""
    B, T, D = x.shape
    shapes = [t.shape for t in vectors if t is not None]
    return group.shape == (B, T) and all(
        shape == shapes[0] and len(shape) == 3 and shape[0] == B and shape[1] > 0 and shape[2] == D
        for shape in shapes
    )


def _vectors_per_image(vectors: list[Tensor | None], x: Tensor, within_image: bool) -> int:
    """The largest number of vectors that an image has; -1 if one of them does not fit."""
    T = x.shape[1]
    # a list: while a compiler traces with dynamic shapes, sizes have no hash
    counts = [_count_per_image(t, x) for t in vectors if t is not None]
    # the largest, and with empty images T = 0 itself
    most = T if T in counts else max([1, *counts])
    for F in counts:
        varies = F != 1
        # F vectors for T tokens, and for the largest number of vectors
        divides = most == F or (F > 0 and T % F == 0 and most % F == 0)
        if F < 0 or (varies and not (within_image and divides and (F == T or T % F == 0))):
            return -1
    return most


def _are_per_image(vectors: list[Tensor | None], x: Tensor) -> bool:
    """Whether all vectors are ``[B, D]``."""
    # dim() first, because comparing symbolic sizes adds guards
    shape = (x.shape[0], x.shape[2])
    return all(t is None or t.dim() == 2 and t.shape == shape for t in vectors)


def _count_per_image(vector: Tensor, x: Tensor) -> int:
    """How many vectors an image has; -1 if the shape does not fit."""
    B, _, D = x.shape
    shape = vector.shape
    # the number of dimensions and the width first: a comparison of symbolic sizes is a guard
    if not 1 <= len(shape) <= 3 or shape[-1] != D:
        return -1
    if len(shape) > 1 and shape[0] != 1 and shape[0] != B:
        return -1
    return shape[1] if len(shape) == 3 else 1


def _in_one_shape(
    vector: Tensor | None, table: Tensor | None, x: Tensor, F: int, group: Tensor | None
) -> Vector | None:
    """A vector as ``[B, D]``, ``[B, F, D]`` or, with a group, as it is, its table added; vectors
    per token with a table stay a pair.
    """
    if vector is None:
        return None
    if table is not None:
        table = table.reshape(x.shape[2])
        if group is None and F != 1 and vector.dim() == 3 and vector.shape[1] == x.shape[1]:
            return _spread(vector, x, F), table
        # as few as images, frames or groups: a small operation
        vector = upcast(vector) + upcast(table)
    return vector if group is not None else _spread(vector, x, F)


def summed(vector: Any) -> Any:
    """Vectors and their table in one, in fp32 or fp64; what has no table as it is."""
    if isinstance(vector, tuple):
        vectors, table = vector
        # a table may be [1, D] where a reference is called by itself
        return upcast(vectors) + upcast(table).flatten()
    return vector


def split_tables(vectors: Sequence[Any]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The vectors by themselves, and their tables; None where there is none."""
    pairs = [vector if isinstance(vector, tuple) else (vector, None) for vector in vectors]
    return [vector for vector, _ in pairs], [table for _, table in pairs]


def _spread(vector: Tensor, x: Tensor, F: int) -> Tensor:
    """``[B, D]`` for F = 1, else ``[B, F, D]``; a view where one can be."""
    B, _, D = x.shape
    if F == 1:
        # also with one token per image, where [B, 1, D] is one vector per token
        if vector.dim() == 3:
            vector = vector.squeeze(1)
        return vector if vector.shape == (B, D) else vector.expand(B, D)
    if vector.dim() == 2:
        vector = vector[:, None]
    if vector.dim() == 3 and vector.shape[1] not in (1, F):
        vector = vector.repeat_interleave(F // vector.shape[1], dim=1)
    return vector if vector.shape == (B, F, D) else vector.expand(B, F, D)


def is_per_token(vectors: Sequence[Vector | None], x: Tensor, group: Tensor | None) -> bool:
    """Whether vectors of one shape (``check_inputs``) are one per token, as are all pairs."""
    return group is None and any(
        isinstance(t, tuple) or t is not None and t.dim() == 3 and t.shape == x.shape
        for t in vectors
    )


def frames_as_images(
    arrays: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """``[B, T, D]`` arrays as ``[B F, T / F, D]`` and their ``[B, F, D]`` vectors as ``[B F, D]``.

    Vectors that are column slices of one projection remain views. Anything else than one vector
    per frame comes back as it is.
    """
    F = next((t.shape[1] for t in vectors if t is not None and t.dim() == 3), 1)
    if F == 1:
        return arrays, vectors
    B, T, D = arrays[0].shape
    images = [t.reshape(B * F, T // F, D) for t in arrays]
    return images, [None if t is None else t.reshape(B * F, D) for t in vectors]


def summed_in_fp32(vector: Tensor) -> Tensor:
    """A vector that all images share, in fp32 if it wants a gradient: the sum over images is then
    rounded once.
    """
    return vector.float() if wants_grad(vector) else vector


def fold_affine(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Shift and scale with which a plain norm gives ``(xhat w + b) (1 + scale) + shift``.

    No row of x is read: what is multiplied is as small as the modulation, and fp32. The vectors
    have the shape of the modulation or, without one, that of the gate or ``[B, D]``.

    Returns:
        shift, scale, and whether the scale is the factor itself. As w (1 + scale) - 1 it would
        lose the digits of a small weight. There is a scale if there is a shift.
    """
    if weight is None and bias is None and (shift is None or scale is not None):
        return shift, scale, False
    given = [t for t in (shift, scale, gate) if t is not None]
    shape = given[0].shape if given else (x.shape[0], x.shape[2])
    factor = None if scale is None else 1 + scale.float()
    if bias is not None:
        offset = summed_in_fp32(bias) if factor is None else bias.float() * factor
        shift = offset.expand(shape) if shift is None else offset.float() + shift.float()
    if weight is not None:
        product = summed_in_fp32(weight) if factor is None else weight.float() * factor
        scale = product.expand(shape)
    elif shift is not None and scale is None:
        scale = x.new_zeros(x.shape[2]).expand(shape)
    return shift, scale, weight is not None


def runs_kernel(
    operator: str,
    kernels: ModuleType,
    backend: str | None,
    x: Tensor,
    *others: Vector | None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``operator`` runs the kernel, and the kernel takes ``x [B, T, D]``.

    The reference takes fp64 (of any input or of the output), empty tensors, and rows wider than the
    kernel's MAX_WIDTH; the last is logged once.
    """
    vectors, tables = split_tables(others)
    if not takes_kernel(operator, backend, x, *vectors, *tables, dtype=dtype):
        return False
    name = kernels.__name__.rpartition(".")[2]
    return fits_kernel(name, "rows of", x.shape[2], kernels.MAX_WIDTH)


def in_one_dtype(shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Shift and scale in the wider of their dtypes: the kernels make both gradients in that of the
    scale. There is a scale if there is a shift (``fold_affine``).
    """
    if shift is None or scale is None or shift.dtype == scale.dtype:
        return shift, scale
    dtype = torch.promote_types(shift.dtype, scale.dtype)
    return shift.to(dtype), scale.to(dtype)


def broadcast_to_tokens(modulation: Vector, x: Tensor, group: Tensor | None) -> Tensor:
    """Upcast ``[B, D]``, ``[B, F, D]``, or ``[B, G, D]`` with its group; broadcasts to the ``[B,
    T, D]`` of x, as ``[B, 1, D]``, ``[1, D]`` and ``[D]`` do.
    """
    modulation = upcast(summed(modulation))
    if group is not None:
        # each token's vector by its group index; an index out of range raises
        index = group.long()[:, :, None].expand(-1, -1, modulation.shape[2])
        return modulation.gather(1, index)
    if modulation.dim() < 3:
        return modulation[:, None] if modulation.dim() == 2 else modulation
    T = x.shape[1]
    F = modulation.shape[1]
    return modulation if F in (1, T) else modulation.repeat_interleave(T // F, dim=1)
