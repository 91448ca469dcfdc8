"""The vectors of adaLN, one per image, group or token: which shapes they may have, and what they
mean.
"""

from types import ModuleType

import torch
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, log_once, upcast, use_triton


def check_inputs(
    x: Tensor,
    arrays: dict[str, Tensor],
    modulation: dict[str, Tensor],
    group: Tensor | None,
    *,
    bias: Tensor | None = None,
    per_token: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Check the inputs of a row operator.

    Args:
        x: ``[B, T, D]``.
        arrays: tensors that must have the shape of x, by name.
        modulation: vectors that must share one shape, by name: ``[B, D]``, or ``[B, G, D]`` with a
            group, or ``[B, T, D]`` if ``per_token``.
        group: ``[B, T]`` integers or None.
        bias: ``[D]`` or None.
        per_token: whether the operator takes one vector per token.
        dtype: of an output, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    # by name, so that a message can say which tensor is wrong
    named = {"x": x, **arrays, **modulation}
    if bias is not None:
        named["bias"] = bias
    if not _shapes_fit(x, list(arrays.values()), list(modulation.values()), group, bias, per_token):
        per_image = f"{', '.join(modulation)} [B, D]" + (" or [B, T, D]" if per_token else "")
        got = named if group is None else {**named, "group": group}
        raise ValueError(
            f"expected {', '.join(['x', *arrays])} [B, T, D] and {per_image}, with a group [B, T]"
            " instead [B, G, D], and bias [D]; got "
            + ", ".join(f"{name} {[*t.shape]}" for name, t in got.items())
        )
    if not all(t.dtype in FLOAT_DTYPES for t in named.values()):
        dtypes = {name: t.dtype for name, t in named.items()}
        raise ValueError(f"expected floating-point tensors, got {dtypes}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"expected a floating-point dtype of the output, got {dtype}")
    if group is not None and not _is_integer(group):
        raise ValueError(f"expected an integer group, got {group.dtype}")
    # Triton would read another device's address without an error
    devices = {t.device for t in named.values()}
    if group is not None:
        devices.add(group.device)
    if len(devices) > 1:
        raise ValueError(f"expected every tensor on one device, got {sorted(map(str, devices))}")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _shapes_fit(
    x: Tensor,
    arrays: list[Tensor],
    modulation: list[Tensor],
    group: Tensor | None,
    bias: Tensor | None,
    per_token: bool,
) -> bool:
    if x.dim() != 3 or any(t.shape != x.shape for t in arrays):
        return False
    B, T, D = x.shape
    first = modulation[0].shape
    if group is None:
        fits = first == (B, D) or (per_token and first == x.shape)
    else:
        # [B, G, D] with at least one group
        is_grouped = len(first) == 3 and first[0] == B and first[2] == D and first[1] > 0
        fits = is_grouped and group.shape == (B, T)
    same = all(t.shape == first for t in modulation)
    return fits and same and (bias is None or bias.shape == (D,))


def runs_kernel(
    kernels: ModuleType,
    backend: str | None,
    x: Tensor,
    *others: Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether the kernel takes ``x [B, T, D]``.

    The reference takes fp64 (of any input or of the output), empty tensors, and rows wider than the
    kernel's MAX_WIDTH; the last is logged once.
    """
    # None in the set stands for the default dtype of the output
    dtypes = {dtype, *(t.dtype for t in (x, *others))}
    if not use_triton(x, backend) or x.numel() == 0 or torch.float64 in dtypes:
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
    D]``.
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
