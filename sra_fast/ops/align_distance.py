"""Distances between the student's projected features and the teacher's (SRA, arXiv 2505.02831, Sec. 3.3 and Eq. 5)."""
import torch.nn.functional as F
from torch import Tensor

from sra_fast.ops._backend import upcast

KINDS = ("smooth_l1", "l1", "l2", "cosine_patch", "cosine_token")


def align_distance(
    pred: Tensor, target: Tensor, kind: str, *, beta: float = 0.05, weight: Tensor | None = None
) -> Tensor:
    """Alignment distance of every image.

    ``smooth_l1`` (the paper's choice), ``l1`` and ``l2`` are means over tokens and channels; ``cosine_patch`` is
    ``1 - cos`` over the channels of each token (Eq. 5); ``cosine_token`` is ``1 - cos`` over the tokens of each channel, what
    the published code computes.

    Args:
        pred: ``[B, T, D]`` projected student features.
        target: ``[B, T, D]`` teacher features; no gradient flows into them.
        kind: one of ``smooth_l1, l1, l2, cosine_patch, cosine_token``.
        beta: where smooth-L1 turns from quadratic to linear; feature units.
        weight: ``[B, T]`` weight of each token, or None; the mean over tokens becomes ``sum(w d) / T``.  Not defined
            for ``cosine_token``, which mixes the tokens.

    Returns:
        ``[B]`` fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that differ, an unknown ``kind``, or a ``weight`` where none is defined.
    """
    if pred.dim() != 3 or pred.shape != target.shape:
        raise ValueError(f"expected pred and target of one shape [B, T, D], got {[*pred.shape]} and {[*target.shape]}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if weight is not None and (kind == "cosine_token" or weight.shape != pred.shape[:2]):
        raise ValueError(f"expected weight [B, T] and a kind other than cosine_token, got {[*weight.shape]} and {kind}")
    pred, target = upcast(pred), upcast(target.detach())
    if kind == "cosine_token":
        return (1 - F.cosine_similarity(pred, target, dim=1)).mean(1)
    if kind == "cosine_patch":
        per_token = 1 - F.cosine_similarity(pred, target, dim=2)
    elif kind == "smooth_l1":
        per_token = F.smooth_l1_loss(pred, target, beta=beta, reduction="none").mean(2)
    else:
        per_token = (F.l1_loss if kind == "l1" else F.mse_loss)(pred, target, reduction="none").mean(2)
    return (per_token if weight is None else per_token * weight).mean(1)
