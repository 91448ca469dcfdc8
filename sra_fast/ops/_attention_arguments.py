"""What ``attention`` takes, and one line for what it does not take."""

import torch
from torch import Tensor

from sra_fast.ops._attention_segments import Runs, checked_runs

LAYOUTS = {"bthd": "[B, T, H, d]", "bhtd": "[B, H, T, d]"}
KEY_LAYOUTS = {"bthd": "[B, S, H_kv, d]", "bhtd": "[B, H_kv, S, d]"}


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: str, groups: Tensor | None, mask: Tensor | None
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit."""
    if not _shapes_fit(q, k, v, layout):
        raise ValueError(
            f"attention: expected q {LAYOUTS[layout]} and k, v of one shape {KEY_LAYOUTS[layout]}, "
            f"H_kv a divisor of H, got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            "attention: expected q, k, v of one floating-point dtype, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    devices = {"k": k, "v": v, "groups": groups, "mask": mask}
    devices = {name: x.device for name, x in devices.items() if x is not None}
    if any(device != q.device for device in devices.values()):
        raise ValueError(
            f"attention: expected every tensor on {q.device}, got {', '.join(devices)} on "
            f"{[*map(str, devices.values())]}"
        )
    if groups is not None and mask is not None:
        raise ValueError("attention: expected groups or mask, got both")
    if groups is not None:
        _check_groups(q, k, layout, groups)
    if mask is not None:
        _check_mask(q, k, layout, mask)


def _shapes_fit(q: Tensor, k: Tensor, v: Tensor, layout: str) -> bool:
    """Whether images and width are the same, and H_kv divides H."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        return False
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False
    heads = 2 if layout == "bthd" else 1
    num_heads = q.shape[heads]
    num_key_heads = k.shape[heads]
    return num_heads == num_key_heads or num_key_heads > 0 and num_heads % num_key_heads == 0


def check_segments(
    q: Tensor, k: Tensor, layout: str, segments: object, others: list[str]
) -> Runs | None:
    """The runs that ``segments`` stand for; None if they cut nothing.

    Raises:
        ValueError: they do not fit, or one of the arguments ``others`` is given, too.
    """
    if others:
        raise ValueError(f"attention: expected segments or {others[0]}, got both")
    num_tokens = _num_tokens("segments", q, k, layout)
    runs = checked_runs(segments, q.shape[0], num_tokens)
    return None if q.numel() == 0 or runs == ((num_tokens,),) else runs


def _num_tokens(argument: str, q: Tensor, k: Tensor, layout: str) -> int:
    """T. Raise ValueError unless there are as many keys, which ``argument`` needs."""
    axis = 1 if layout == "bthd" else 2
    if k.shape[axis] != q.shape[axis]:
        raise ValueError(
            f"attention: expected {argument} with as many keys as queries, "
            f"got T = {q.shape[axis]}, S = {k.shape[axis]}"
        )
    return q.shape[axis]


def _check_groups(q: Tensor, k: Tensor, layout: str, groups: Tensor) -> None:
    """Raise ValueError unless the groups are integers, one per token, of queries and of keys."""
    tokens = (q.shape[0], _num_tokens("groups", q, k, layout))
    if groups.shape != tokens or groups.is_floating_point() or groups.is_complex():
        raise ValueError(
            f"attention: expected groups [B, T] = {[*tokens]} integers, "
            f"got {[*groups.shape]} {groups.dtype}"
        )


def _check_mask(q: Tensor, k: Tensor, layout: str, mask: Tensor) -> None:
    """Raise ValueError unless the mask is bool or floating and broadcasts to its full shape."""
    heads, tokens = (2, 1) if layout == "bthd" else (1, 2)
    B, H, T, S = q.shape[0], q.shape[heads], q.shape[tokens], k.shape[tokens]
    # which of its sizes may be 1 instead; the keys are always written out
    wanted = {2: (B, S), 4: (B, H, T, S)}.get(mask.dim(), ())
    fits = bool(wanted) and mask.shape[-1] == S
    fits = fits and all(size in (1, full) for size, full in zip(mask.shape, wanted, strict=True))
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention: expected mask [B, S] = {[B, S]} or [B, H, T, S] = {[B, H, T, S]} "
            "(B, H or T may be 1), bool or floating-point, "
            f"got {[*mask.shape]} {mask.dtype}"
        )
