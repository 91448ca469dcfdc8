"""The per-image, per-group and per-token vectors of adaLN: what shapes they may have, and what they mean."""

from types import ModuleType

import torch
from torch import Tensor

from sra_fast.ops._backend import FLOAT_DTYPES, log_once, upcast, use_triton


def check(
    x: Tensor,
    arrays: dict[str, Tensor],
    modulation: dict[str, Tensor],
    group: Tensor | None,
    *,
    bias: Tensor | None = None,
    per_token: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless ``arrays`` are shaped as ``x [B, T, D]`` and ``modulation`` as the docstrings say; ``dtype`` is that of
    an output."""
    named = {"x": x, **arrays, **modulation} | ({} if bias is None else {"bias": bias})
    if not _shapes_fit(x, list(arrays.values()), list(modulation.values()), group, bias, per_token):
        per_image = f"{', '.join(modulation)} [B, D]" + (" or [B, T, D]" if per_token else "")
        got = named if group is None else {**named, "group": group}
        raise ValueError(
            f"expected {', '.join(['x', *arrays])} [B, T, D] and {per_image}, with a group [B, T] instead [B, G, D],"
            f" and bias [D]; got {', '.join(f'{name} {[*t.shape]}' for name, t in got.items())}"
        )
    if not all(t.dtype in FLOAT_DTYPES for t in named.values()):
        raise ValueError(
            f"expected floating-point tensors, got { {name: t.dtype for name, t in named.items()} }"
        )
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"expected a floating-point dtype of the output, got {dtype}")
    if group is not None and (
        group.is_floating_point() or group.is_complex() or group.dtype == torch.bool
    ):
        raise ValueError(f"expected an integer group, got {group.dtype}")
    devices = {t.device for t in named.values()} | ({group.device} if group is not None else set())
    if len(devices) > 1:
        raise ValueError(f"expected every tensor on one device, got {sorted(map(str, devices))}")


def _shapes_fit(
    x: Tensor,
    arrays: list,
    modulation: list,
    group: Tensor | None,
    bias: Tensor | None,
    per_token: bool,
):
    if x.dim() != 3 or any(t.shape != x.shape for t in arrays):
        return False
    B, T, D = x.shape
    first = modulation[0].shape
    if group is not None:
        fits = (
            len(first) == 3
            and first[0] == B
            and first[2] == D
            and group.shape == (B, T)
            and first[1] > 0
        )
    else:
        fits = first == (B, D) or (per_token and first == x.shape)
    return (
        fits and all(t.shape == first for t in modulation) and (bias is None or bias.shape == (D,))
    )


def runs_kernel(
    kernels: ModuleType,
    backend: str | None,
    x: Tensor,
    *others: Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    """True if the kernel takes ``x [B, T, D]``: fp64 (of the output too), empty and very wide tensors go to the reference."""
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


def spread(modulation: Tensor, group: Tensor | None) -> Tensor:
    """``[B, D]``, ``[B, T, D]``, or ``[B, G, D]`` with its group as what broadcasts against ``[B, T, D]``, upcast."""
    modulation = upcast(modulation)
    if group is not None:
        return modulation.gather(1, group.long()[:, :, None].expand(-1, -1, modulation.shape[2]))
    return modulation[:, None] if modulation.dim() == 2 else modulation


def in_place(modulation: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, as slices of a projection are; else a copy."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()
