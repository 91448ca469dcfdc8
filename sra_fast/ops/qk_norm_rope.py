"""Norm of queries and keys (arXiv 2302.05442, Sec. 2) and rotary position embedding (RoFormer,
arXiv 2104.09864, Eq. 34), in one pass before attention.
"""

import functools

import torch
from torch import Tensor

from sra_fast.kernels import qk_norm_rope as kernels
from sra_fast.ops._backend import FLOAT_DTYPES, check_tensors, fits_kernel, takes_kernel, upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad
from sra_fast.ops.adaln import NORMS, check_norm

STYLES = ("half", "interleaved")
LAYOUTS = {
    "bthd": ("[B, T, H, d]", "[B, S, H_kv, d]"),
    "bhtd": ("[B, H, T, d]", "[B, H_kv, S, d]"),
}


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: str | None = "rms",
    style: str = "half",
    offset: int | None = None,
    layout: str = "bthd",
) -> tuple[Tensor, Tensor]:
    """The definition, in fp32, rounded once. Tests, benchmarks and backend="torch" all use it."""
    tables = None if cos is None or sin is None else (cos, sin)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        # tokens before heads
        rows = upcast(x if layout == "bthd" else x.transpose(1, 2))
        if norm is not None:
            rows = NORMS[norm](rows, rows.shape[-1:], eps=eps)
        if weight is not None:
            rows = rows * upcast(weight)
        if tables is not None:
            rows = _rotate(rows, *tables, style, offset or 0)
        rows = rows if layout == "bthd" else rows.transpose(1, 2)
        return rows.to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str, offset: int) -> Tensor:
    """``x [B, T, H, d]`` with tokens offset to offset + R rotated, R the rows of the tables."""
    if cos.shape[-1] != x.shape[-1]:
        # one column per pair
        double = lambda t: (
            torch.cat([t, t], -1) if style == "half" else t.repeat_interleave(2, dim=-1)
        )
        cos = double(cos)
        sin = double(sin)
    # one row per token, the same for all heads
    cos, sin = (upcast(t).unsqueeze(-2) for t in (cos, sin))
    end = offset + cos.shape[-3]
    rows = x[:, offset:end]
    if style == "half":
        first, second = rows.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        first, second = rows.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    rotated = rows * cos + turned * sin
    return torch.cat([x[:, :offset], rotated, x[:, end:]], dim=1)


def _fake_fwd(q, k, *options):
    heads_first = options[-1]
    return kernels.dense_like(q, heads_first), kernels.dense_like(k, heads_first)


def _fake_bwd(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, *options):
    heads_first = options[-1]
    dq_weight = q.new_empty(0) if q_weight is None else torch.empty_like(q_weight)
    dk_weight = k.new_empty(0) if k_weight is None else torch.empty_like(k_weight)
    dq = kernels.dense_like(q, heads_first)
    return dq, kernels.dense_like(k, heads_first), dq_weight, dk_weight


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, float eps,"
    " bool norm, bool center, bool interleaved, int offset, bool heads_first"
)
_fwd = register(
    f"qk_norm_rope_fwd({_ARGUMENTS}) -> (Tensor, Tensor)", kernels.qk_norm_rope_fwd, _fake_fwd
)
_bwd = register(
    f"qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.qk_norm_rope_bwd,
    _fake_bwd,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, *options):
        # neither statistics nor outputs: the backward recomputes the former
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.options = options
        outputs = _fwd(q, k, cos, sin, q_weight, k_weight, *options)
        needs_q, needs_k, _, _, needs_q_weight, needs_k_weight = ctx.needs_input_grad[:6]
        wanted = (needs_q or needs_q_weight, needs_k or needs_k_weight)
        fixed = [out for out, needs in zip(outputs, wanted, strict=True) if not needs]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        *saved, q_weight, k_weight = ctx.saved_tensors
        dq, dk, dq_weight, dk_weight = guard_double_backward(
            "qk_norm_rope",
            _bwd,
            with_dense_columns(dq_out),
            with_dense_columns(dk_out),
            *saved,
            q_weight,
            k_weight,
            *ctx.options,
        )
        dq_weight = None if q_weight is None else dq_weight
        dk_weight = None if k_weight is None else dk_weight
        return dq, dk, None, None, dq_weight, dk_weight, *[None] * len(ctx.options)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: str | None = "rms",
    style: str = "half",
    offset: int | None = None,
    layout: str = "bthd",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm every head of queries and keys, then rotate its pairs: one read and one write of each.

    A pair (x1, x2) of a head becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``. Everything is in fp32
    and rounded once. The norm is over the d elements of a head. Norm over all heads together (Wan)
    is ``adaln`` on rows of H d elements, before this operator with ``norm=None``: the weight's
    gradient then has H d sums, more than this kernel's registers hold beside its heads.

    Args:
        q: ``[B, T, H, d]`` or, with ``layout="bhtd"``, ``[B, H, T, d]``, bf16/fp16/fp32; a view of
            a fused qkv projection is used in place, copied only unless its last stride is 1. The
            kernel takes d <= 256. fp64 and wider heads run the reference; the latter is logged
            once.
        k: ``[B, S, H_kv, d]`` or ``[B, H_kv, S, d]`` of q's dtype; S = T if there is a rotation.
        cos: ``[R, d]`` or ``[R, d / 2]``, the same for all images, or ``[B, R, d]``, ``[B, R, d /
            2]`` with B or 1 images; any float dtype, no gradient. R = T unless there is an
            ``offset``. None, as ``sin``: no rotation. With d columns each element has its own.
        sin: shaped as ``cos``.
        q_weight: ``[d]`` or None, multiplied before the rotation.
        k_weight: ``[d]`` or None.
        eps: added to the variance, or to the mean square of RMS.
        norm: ``"rms"``, ``"layer"`` (LayerNorm without bias) or None, which takes no weights.
        style: which elements are a pair. ``"half"``: i and i + d / 2 (GPT-NeoX, LLaMA; diffusers'
            ``use_real_unbind_dim=-2``). ``"interleaved"``: 2 i and 2 i + 1 (RoFormer, GPT-J, Flux,
            Wan, LightningDiT; diffusers' ``use_real_unbind_dim=-1``, and the real and imaginary
            parts of complex tables).
        offset: None: every token is rotated. A number: the tables belong to tokens offset to offset
            + R, and the others, text before or after an image, are only normed.
        layout: ``"bthd"`` or ``"bhtd"``, of inputs and outputs.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(q', k')`` with the shapes and dtypes of q and k, contiguous where the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``cos`` or ``sin`` is alone or wants a
            gradient, ``eps`` is negative, or ``norm``, ``style``, ``layout`` or ``backend`` is
            unknown.
    """
    operator = "qk_norm_rope"
    _check_words(norm, eps, style, layout)
    _check_inputs(q, k, q_weight, k_weight, norm, layout)
    _check_tables(q, k, cos, sin, offset, layout)
    if not _runs_kernel(operator, backend, q, k, q_weight, k_weight):
        return qk_norm_rope_ref(
            q,
            k,
            cos,
            sin,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            norm=norm,
            style=style,
            offset=offset,
            layout=layout,
        )
    # tokens before heads, and tables with images, or one for all: views
    heads_first = layout == "bhtd"
    q, k = (with_dense_columns(x.transpose(1, 2) if heads_first else x) for x in (q, k))
    if cos is not None and sin is not None:
        cos, sin = (with_dense_columns(x if x.dim() == 3 else x[None]) for x in (cos, sin))
    q_weight, k_weight = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    options = (
        eps,
        norm is not None,
        norm == "layer",
        style == "interleaved",
        offset or 0,
        heads_first,
    )
    inputs = (q, k, cos, sin, q_weight, k_weight)
    tracked = wants_grad(q, k, q_weight, k_weight)
    run = functools.partial(apply, _QKNormRope) if tracked else _fwd
    q_out, k_out = run(*inputs, *options)
    return (q_out.transpose(1, 2), k_out.transpose(1, 2)) if heads_first else (q_out, k_out)


def _runs_kernel(
    operator: str,
    backend: str | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> bool:
    """Whether the kernel runs: not on fp64, empty tensors and heads wider than it takes."""
    if not takes_kernel(operator, backend, q, k, q_weight, k_weight) or k.numel() == 0:
        return False
    return fits_kernel(operator, "heads of", q.shape[3], kernels.MAX_WIDTH)


def _check_words(norm: str | None, eps: float, style: str, layout: str) -> None:
    """Raise ValueError unless the words are known and ``eps`` is a number >= 0."""
    # None is a norm too, and then eps plays no role
    check_norm("qk_norm_rope", "rms" if norm is None else norm, eps)
    for name, word, known in (("style", style, STYLES), ("layout", layout, tuple(LAYOUTS))):
        if word not in known:
            raise ValueError(f"qk_norm_rope: {name} must be one of {known}, got {word!r}")


def _check_inputs(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str | None,
    layout: str,
) -> None:
    """Raise ValueError unless queries, keys and weights fit."""
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    weights = {name: w for name, w in weights.items() if w is not None}
    named = {"q": q, "k": k} | weights
    check_tensors("qk_norm_rope", named)
    fits = (
        q.dim() == 4
        and k.dim() == 4
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and all(w.shape == q.shape[3:] for w in weights.values())
    )
    if not fits:
        q_shape, k_shape = LAYOUTS[layout]
        got = ", ".join(f"{name} {[*t.shape]}" for name, t in named.items())
        raise ValueError(
            f"qk_norm_rope: expected q {q_shape}, k {k_shape}, q_weight and k_weight [d], got {got}"
        )
    if weights and norm is None:
        raise ValueError(f"qk_norm_rope: expected a norm with {' and '.join(weights)}, got None")
    if not all(t.dtype in FLOAT_DTYPES for t in named.values()) or q.dtype != k.dtype:
        got = ", ".join(f"{name} {t.dtype}" for name, t in named.items())
        raise ValueError(
            f"qk_norm_rope: expected floating-point tensors, q and k of one dtype, got {got}"
        )
    _check_device(q, named)


def _check_device(q: Tensor, named: dict[str, Tensor]) -> None:
    """Raise ValueError unless every tensor is where q is: Triton would read another device's
    address without an error.
    """
    if any(t.device != q.device for t in named.values()):
        devices = sorted({str(t.device) for t in (q, *named.values())})
        raise ValueError(f"qk_norm_rope: expected every tensor on one device, got {devices}")


def _check_tables(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    offset: int | None,
    layout: str,
) -> None:
    """Raise ValueError unless cosines and sines fit the tokens, or there are none."""
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"qk_norm_rope: expected cos and sin, got {given} without {missing}")
    if cos is None or sin is None:
        if offset is not None:
            raise ValueError(
                f"qk_norm_rope: expected offset with cos and sin, got {offset!r} alone"
            )
        return
    named = {"cos": cos, "sin": sin}
    check_tensors("qk_norm_rope", named)
    if offset is not None and (type(offset) is not int or offset < 0):
        raise ValueError(f"qk_norm_rope: expected an integer offset >= 0, got {offset!r}")
    axis = 1 if layout == "bthd" else 2
    T = q.shape[axis]
    if k.shape[axis] != T:
        raise ValueError(
            "qk_norm_rope: expected as many keys as queries to rotate, "
            f"got T = {T}, S = {k.shape[axis]}"
        )
    d = q.shape[3]
    rows = cos.shape[-2] if cos.dim() in (2, 3) else -1
    # sizes are compared one by one: a compiler cannot look for a symbol in a tuple
    fits = (
        rows >= 0
        and sin.shape == cos.shape
        and (cos.dim() == 2 or cos.shape[0] == 1 or cos.shape[0] == q.shape[0])
        and d % 2 == 0
        and (cos.shape[-1] == d or cos.shape[-1] == d // 2)
        and (rows == T if offset is None else rows + offset <= T)
        and all(t.dtype in FLOAT_DTYPES for t in named.values())
    )
    if not fits:
        got = ", ".join(f"{name} {[*t.shape]} {t.dtype}" for name, t in named.items())
        tokens = f"T = {T} rows" if offset is None else f"at most {T} - {offset} rows"
        raise ValueError(
            f"qk_norm_rope: expected cos and sin of {tokens}, [T, d] or [T, d / 2] for d = {d}, "
            f"with or without images before, floating-point, got {got}"
        )
    _check_device(q, named)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("qk_norm_rope: expected cos and sin without gradient, got requires_grad")
