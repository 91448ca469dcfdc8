"""Distances between the student's projected features and the teacher's.

SRA, arXiv 2505.02831, Sec. 3.3 and Eq. 5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import align_distance as kernels
from sra_fast.ops._backend import FLOAT_DTYPES, check_tensors, fits_kernel, takes_kernel, upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._register import guard_double_backward, register, wants_grad

KINDS = ("smooth_l1", "l1", "l2", "cosine_patch", "cosine_token")


def align_distance_ref(
    pred: Tensor, target: Tensor, kind: str, *, beta: float = 0.05, weight: Tensor | None = None
) -> Tensor:
    """The definition, in fp32 (fp64 for fp64).

    Tests, benchmarks and backend="torch" all use this one function.
    """
    pred = upcast(pred)
    target = upcast(target.detach())
    # over the tokens of each channel; the others give one distance per token first
    if kind == "cosine_token":
        return (1 - F.cosine_similarity(pred, target, dim=1)).mean(1)
    if kind == "cosine_patch":
        per_token = 1 - F.cosine_similarity(pred, target, dim=2)
    elif kind == "smooth_l1":
        per_token = F.smooth_l1_loss(pred, target, beta=beta, reduction="none").mean(2)
    else:
        loss = F.l1_loss if kind == "l1" else F.mse_loss
        per_token = loss(pred, target, reduction="none").mean(2)
    return (per_token if weight is None else per_token * weight).mean(1)


def _fake_fwd(
    pred: Tensor, target: Tensor, kind: str, beta: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    B, T, D = pred.shape
    dist = pred.new_empty((B, D if kind == "cosine_token" else T), dtype=torch.float32)
    grad = pred.new_empty((B, T, D) if need_grad else (0,), dtype=kernels.grad_dtype(pred))
    return dist, grad


_fwd = register(
    "align_distance_fwd(Tensor pred, Tensor target, str kind, float beta, bool need_grad)"
    " -> (Tensor, Tensor)",
    kernels.align_distance_fwd,
    _fake_fwd,
)
_bwd = register(
    "align_distance_bwd(Tensor ddist, Tensor grad, bool per_token) -> Tensor",
    kernels.align_distance_bwd,
    lambda ddist, grad, per_token: grad.new_empty(grad.shape),
)


class _AlignDistance(torch.autograd.Function):
    """The distance of every token, ``[B, T]``, or of every channel, ``[B, D]``; differentiable
    only in ``pred``.
    """

    @staticmethod
    def forward(ctx, pred, target, kind, beta):
        # one read of the features makes both distance and gradient
        dist, grad = _fwd(pred, target, kind, beta, True)
        ctx.save_for_backward(grad, dist)
        ctx.per_token = kind != "cosine_token"
        return dist

    @staticmethod
    def backward(ctx, ddist):
        grad, dist = ctx.saved_tensors
        # the stored gradient does not depend on pred for autograd; dist does
        dpred = guard_double_backward("align_distance", _bwd, ddist, grad, ctx.per_token, tie=dist)
        return dpred, None, None, None


def _check(
    pred: Tensor, target: Tensor, kind: str, beta: float, weight: Tensor | None, reduction: str
) -> None:
    """Raise ValueError unless the arguments fit."""
    named = {"pred": pred, "target": target} | ({} if weight is None else {"weight": weight})
    check_tensors("align_distance", named)
    if pred.dim() != 3 or pred.shape != target.shape:
        raise ValueError(
            "align_distance: expected pred and target of one shape [B, T, D], "
            f"got {[*pred.shape]} and {[*target.shape]}"
        )
    if kind not in KINDS:
        raise ValueError(f"align_distance: kind must be one of {KINDS}, got {kind!r}")
    if reduction not in ("none", "mean"):
        raise ValueError(f"align_distance: reduction must be 'none' or 'mean', got {reduction!r}")
    # a NaN compares with nothing
    if not isinstance(beta, int | float) or not 0 <= beta < math.inf:
        raise ValueError(f"align_distance: expected a finite beta >= 0, got {beta!r}")
    if weight is not None and (kind == "cosine_token" or weight.shape != pred.shape[:2]):
        raise ValueError(
            "align_distance: expected weight [B, T] and a kind other than cosine_token, "
            f"got {[*weight.shape]} and {kind}"
        )
    if any(x.dtype not in FLOAT_DTYPES or x.device != pred.device for x in named.values()):
        got = ", ".join(f"{name} {x.dtype} {x.device}" for name, x in named.items())
        raise ValueError(
            f"align_distance: expected floating-point tensors on one device, got {got}"
        )


def _runs_kernel(pred: Tensor, target: Tensor, kind: str, backend: str | None) -> bool:
    """Whether the kernel takes the features; a size beyond its limit is logged once."""
    if not takes_kernel("align_distance", backend, pred, target):
        return False
    # what one program holds in registers: all tokens of some channels, or all channels of a token
    _, T, D = pred.shape
    length, longest = (T, kernels.MAX_TOKENS) if kind == "cosine_token" else (D, kernels.MAX_WIDTH)
    return fits_kernel(kind, "over", length, longest)


def align_distance(
    pred: Tensor,
    target: Tensor,
    kind: str,
    *,
    beta: float = 0.05,
    weight: Tensor | None = None,
    reduction: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Alignment distance of every image.

    ``smooth_l1`` (the paper's choice), ``l1`` and ``l2`` are means over tokens and channels.
    ``cosine_patch`` is ``1 - cos`` over the channels of each token (Eq. 5). ``cosine_token`` is
    ``1 - cos`` over the tokens of each channel, which the published code computes. The kernel
    reads both inputs once, computes the gradient in the same pass and never materializes fp32
    ``[B, T, D]``.

    Args:
        pred: ``[B, T, D]`` projected student features, bf16/fp16/fp32; any strides. The kernel
            takes D <= 16384, and T <= 1024 for ``cosine_token``. fp64 and larger tensors run the
            reference; larger ones are logged once.
        target: ``[B, T, D]`` teacher features, any floating dtype and strides; no gradient flows
            into them.
        kind: one of ``smooth_l1, l1, l2, cosine_patch, cosine_token``.
        beta: where smooth-L1 turns from quadratic to linear, in the units of the features.
        weight: ``[B, T]`` weight of each token, or None; the mean over tokens becomes ``sum(w d) /
            T``. Not defined for ``cosine_token``, which mixes the tokens. Gradients flow into it.
        reduction: ``"none"`` for one distance per image, ``"mean"`` for their mean.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B]``, or a scalar for ``reduction="mean"``; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that differ, an unknown ``kind`` or ``reduction``, a negative ``beta``,
            integer tensors, tensors on different devices, or a ``weight`` where none is defined.
    """
    _check(pred, target, kind, beta, weight, reduction)
    if _runs_kernel(pred, target, kind, backend):
        # smooth-L1 divides by beta; without a quadratic part it is L1
        kind = "l1" if kind == "smooth_l1" and beta == 0 else kind
        pred = with_dense_columns(pred)
        target = with_dense_columns(target.detach())
        if wants_grad(pred):
            dist = _AlignDistance.apply(pred, target, kind, beta)
        else:
            dist, _ = _fwd(pred, target, kind, beta, False)
        # the means over tokens or channels are small: PyTorch takes them
        loss = (dist if weight is None else dist * weight).mean(1)
    else:
        loss = align_distance_ref(pred, target, kind, beta=beta, weight=weight)
    return loss.mean() if reduction == "mean" else loss
