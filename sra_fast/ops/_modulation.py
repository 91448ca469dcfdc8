"""The vectors of adaLN, one per image, group or token: which shapes they may have, and what they
mean.
"""

from types import ModuleType

import torch
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, check_tensors, log_once, upcast, use_triton


def check_inputs(
    operator: str,
    x: Tensor,
    arrays: dict[str, Tensor],
    modulation: dict[str, Tensor],
    group: Tensor | None,
    *,
    bias: dict[str, Tensor | None] | None = None,
    per_token: bool = False,
    takes_group: bool = True,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Check the inputs of a row operator, and give every image its vectors.

    Args:
        operator: its name, for the messages.
        x: ``[B, T, D]``.
        arrays: tensors that must have the shape of x, by name.
        modulation: vectors by name: ``[B, D]``, ``[B, 1, D]``, ``[1, D]`` or ``[D]``, or
            ``[B, G, D]`` with a group, or ``[B, T, D]`` if ``per_token``. Images and tokens that
            share a vector may be left out of one and not of another.
        group: ``[B, T]`` integers or None.
        bias: ``[D]`` or None, by name; None: the operator takes none.
        per_token: whether the operator takes one vector per token.
        takes_group: whether the operator has a ``group``.
        dtype: of an output, or None.

    Returns:
        The modulation in one shape: ``[B, D]``, ``[B, G, D]`` or ``[B, T, D]``. These are views,
        so gradients come back in the shapes that were given.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an argument is no tensor.
    """
    # by name, so that a message can say which tensor is wrong
    named: dict[str, Tensor] = {"x": x, **arrays, **modulation}
    named |= {name: t for name, t in (bias or {}).items() if t is not None}
    check_tensors(operator, named if group is None else {**named, "group": group})
    vectors = list(modulation.values())
    if group is None and x.dim() == 3:
        vectors = [_one_per_image(vector, x) for vector in vectors]
    if not _shapes_fit(x, arrays, vectors, group, bias or {}, per_token):
        got = named if group is None else {**named, "group": group}
        raise ValueError(
            f"{operator}: expected {_describe(arrays, modulation, bias, per_token, takes_group)}; "
            "got " + ", ".join(f"{name} {[*t.shape]}" for name, t in got.items())
        )
    if not all(t.dtype in FLOAT_DTYPES for t in named.values()):
        dtypes = ", ".join(f"{name} {t.dtype}" for name, t in named.items())
        raise ValueError(f"{operator}: expected floating-point tensors, got {dtypes}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{operator}: expected a floating-point dtype of the output, got {dtype}")
    if group is not None and not _is_integer(group):
        raise ValueError(f"{operator}: expected an integer group, got {group.dtype}")
    # Triton would read another device's address without an error
    devices = {t.device for t in named.values()}
    if group is not None:
        devices.add(group.device)
    if len(devices) > 1:
        raise ValueError(
            f"{operator}: expected every tensor on one device, got {sorted(map(str, devices))}"
        )
    return vectors


def _describe(
    arrays: dict[str, Tensor],
    modulation: dict[str, Tensor],
    bias: dict[str, Tensor | None] | None,
    per_token: bool,
    takes_group: bool,
) -> str:
    """The shapes that an operator takes, for an error message."""
    vectors = f"{', '.join(modulation)} [B, D] or [B, 1, D], [1, D], [D]"
    if per_token:
        vectors += " or [B, T, D]"
    if takes_group:
        vectors += ", with a group [B, T] instead [B, G, D]"
    if bias:
        vectors += f", and {', '.join(bias)} [D]"
    return f"{', '.join(['x', *arrays])} [B, T, D] and {vectors}"


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _one_per_image(vector: Tensor, x: Tensor) -> Tensor:
    """A view ``[B, D]`` of ``[B, 1, D]``, ``[1, D]`` or ``[D]``; any other shape as it is."""
    B, _, D = x.shape
    # also with one token per image, where [B, 1, D] is one vector per token
    if vector.dim() == 3 and vector.shape[1] == 1:
        vector = vector.squeeze(1)
    if vector.shape != (B, D) and vector.shape in ((D,), (1, D)):
        vector = vector.expand(B, D)
    return vector


def _shapes_fit(
    x: Tensor,
    arrays: dict[str, Tensor],
    vectors: list[Tensor],
    group: Tensor | None,
    bias: dict[str, Tensor | None],
    per_token: bool,
) -> bool:
    if x.dim() != 3 or any(t.shape != x.shape for t in arrays.values()):
        return False
    B, T, D = x.shape
    first = vectors[0].shape
    if group is None:
        fits = first == (B, D) or (per_token and first == x.shape)
    else:
        # [B, G, D] with at least one group
        is_grouped = len(first) == 3 and first[0] == B and first[2] == D and first[1] > 0
        fits = is_grouped and group.shape == (B, T)
    same = all(t.shape == first for t in vectors)
    return fits and same and all(t is None or t.shape == (D,) for t in bias.values())


def runs_kernel(
    operator: str,
    kernels: ModuleType,
    backend: str | None,
    x: Tensor,
    *others: Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``operator`` runs the kernel, and the kernel takes ``x [B, T, D]``.

    The reference takes fp64 (of any input or of the output), empty tensors, and rows wider than the
    kernel's MAX_WIDTH; the last is logged once.
    """
    # None in the set stands for the default dtype of the output
    dtypes = {dtype, *(t.dtype for t in (x, *others))}
    if not use_triton(operator, x, backend) or x.numel() == 0 or torch.float64 in dtypes:
        return False
    D = x.shape[2]
    if D > kernels.MAX_WIDTH:
        name = kernels.__name__.rpartition(".")[2]
        log_once(
            f"{name} runs unfused in PyTorch: rows of %d elements, the kernel takes %d",
            D,
            kernels.MAX_WIDTH,
        )
    return D <= kernels.MAX_WIDTH


def broadcast_to_tokens(modulation: Tensor, group: Tensor | None) -> Tensor:
    """Upcast ``[B, D]``, ``[B, T, D]``, or ``[B, G, D]`` with its group; broadcasts to ``[B, T,
    D]``, as ``[B, 1, D]``, ``[1, D]`` and ``[D]`` do.
    """
    modulation = upcast(modulation)
    if group is not None:
        # each token's vector by its group index; an index out of range raises
        index = group.long()[:, :, None].expand(-1, -1, modulation.shape[2])
        return modulation.gather(1, index)
    return modulation[:, None] if modulation.dim() == 2 else modulation


def with_dense_rows(modulation: Tensor) -> Tensor:
    """The tensor itself if its last stride is 1, as of a column slice of a projection; else a
    copy.
    """
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()
