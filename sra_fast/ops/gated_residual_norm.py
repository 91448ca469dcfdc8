"""The residual update with a normed branch, "sandwich norm" (Lumina-Image 2.0, Z-Image)."""

from torch import Tensor

from sra_fast.ops._backend import upcast, use_triton
from sra_fast.ops._modulation import broadcast_to_tokens, check_inputs
from sra_fast.ops.adaln import NORMS, check_norm


def gated_residual_norm_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> Tensor:
    """The definition, in fp32, rounded once."""
    yhat = NORMS[norm](upcast(y), y.shape[-1:], eps=eps)
    if norm_weight is not None:
        yhat = yhat * upcast(norm_weight)
    if gate is not None:
        yhat = yhat * broadcast_to_tokens(gate, x, group)
    return (upcast(x) + yhat).to(x.dtype)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    group: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * (norm(y) * norm_weight)``, computed in fp32 and rounded once.

    Args:
        x: ``[B, T, D]`` residual stream, bf16/fp16/fp32.
        y: ``[B, T, D]`` output of the attention or the MLP, any of these dtypes.
        gate: ``[B, D]`` or ``[B, 1, D]``; ``[1, D]`` or ``[D]``, shared by all images; ``[B, F,
            D]`` or ``[B, T, D]``, one per frame or token; or ``[B, G, D]`` with ``group``; see
            ``adaln``. A function of it, such as ``tanh(gate)``, costs one small operation on
            ``[B, D]``. None: 1.
        eps: added to the mean square, or to the variance of ``"layer"``.
        norm: ``"rms"`` or ``"layer"``, both without weights of their own.
        norm_weight: ``[D]`` or None: 1.
        group: ``[B, T]`` integers in [0, G) or None; see ``gated_residual``.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps`` is negative, or ``norm`` or
            ``backend`` is unknown.
    """
    operator = "gated_residual_norm"
    (gate,) = check_inputs(
        operator,
        x,
        {"y": y},
        {"gate": gate},
        group,
        channels={"norm_weight": norm_weight},
        optional=("gate",),
        within_image=True,
    )
    check_norm(operator, norm, eps)
    use_triton(operator, x, backend)
    return gated_residual_norm_ref(x, y, gate, eps, norm=norm, norm_weight=norm_weight, group=group)
