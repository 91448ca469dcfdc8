"""Scaled dot-product attention for ``[B, T, H, d]`` or ``[B, H, T, d]``: no kernel of its own, the
fastest of those installed.

Inside this file queries are ``[B, T, H, d]``, keys and values ``[B, S, H_kv, d]``; the other layout
is a view of it. A mask is ``[B, H, T, S]``, any of B, H and T replaced by 1, as PyTorch takes it.
"""

import importlib
import logging
import os
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sra_fast.ops._backend import autocast, check_tensors
from sra_fast.ops._timing import milliseconds

log = logging.getLogger("sra_fast")

# PyTorch's backends; "sdpa" lets PyTorch pick
_SDPA = {
    "sdpa": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# packages that may be installed: all take [B, T, H, d] in bf16 or fp16, none takes a mask
_PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
BACKENDS = ("auto", "torch", *_SDPA, *_PACKAGES)
# those that compute on a CUDA device only
_CUDA_ONLY = ("cudnn", "efficient", *_PACKAGES)
HALF = (torch.float16, torch.bfloat16)
LAYOUTS = {"bthd": "[B, T, H, d]", "bhtd": "[B, H, T, d]"}
KEY_LAYOUTS = {"bthd": "[B, S, H_kv, d]", "bhtd": "[B, H_kv, S, d]"}

# (device, dtype, bits of B, T, H, d, S, H_kv, order in memory, kind of mask, training) -> backend
_chosen: dict[tuple[object, ...], str] = {}


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bthd",
    groups: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition: PyTorch's scaled_dot_product_attention, with a mask if there are groups."""
    q, k, v = _tokens_first(layout, q, k, v)
    return _in_layout(layout, _run("sdpa", q, k, v, _full_mask(q, groups, mask)))


def _full_mask(q: Tensor, groups: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What PyTorch gets as ``attn_mask``: four dimensions, bool or the dtype of ``q``."""
    if groups is not None:
        # tokens see each other if their groups are the same
        return (groups[:, :, None] == groups[:, None, :])[:, None]
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask[:, None, None]
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)


def _tokens_first(layout: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[B, T, H, d]``."""
    if layout == "bthd":
        return q, k, v
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _in_layout(layout: str, out: Tensor) -> Tensor:
    """A view of ``out [B, T, H, d]`` in ``layout``."""
    return out if layout == "bthd" else out.transpose(1, 2)


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if backend in _PACKAGES:
        out = importlib.import_module(_PACKAGES[backend]).flash_attn_func(q, k, v)
        # some versions return the log-sum-exp too
        return out[0] if isinstance(out, tuple) else out
    # PyTorch wants heads before tokens
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"attn_mask": mask}
    # a branch: of dynamic shapes the comparison is no bool, which PyTorch wants
    if k.shape[1] != q.shape[1]:
        if backend == "efficient":
            # the one backend of PyTorch that takes as many keys as queries only
            k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
        else:
            options["enable_gqa"] = True
    if _SDPA[backend] is None:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    with sdpa_kernel(_SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """``x [B, H_kv, S, d]`` with ``num_heads`` heads: a head of x serves neighbouring queries."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _installed(package: str) -> bool:
    """Whether the package imports; if it is installed and does not, that is logged."""
    try:
        return hasattr(importlib.import_module(package), "flash_attn_func")
    except Exception as error:
        # a wheel for another torch fails in many ways; attention must run without it
        if not isinstance(error, ModuleNotFoundError):
            log.warning("attention: %s is installed but does not import: %s", package, error)
        return False


def _candidates(q: Tensor, mask: Tensor | None) -> list[str]:
    """The backends worth timing for these inputs."""
    packages = []
    if mask is None and q.dtype in HALF:
        packages = [name for name, package in _PACKAGES.items() if _installed(package)]
    return ["sdpa", "cudnn", "flash", "efficient", *packages]


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers with the shape, dtype and strides of ``x``, as of a view of a fused
    projection.

    An expanded tensor becomes dense, because its elements share memory.
    """
    if 0 in x.stride():
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    alike = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return alike.normal_(generator=generator)


def _timed_step(
    name: str, inputs: list[Tensor], mask: Tensor | None, dout: Tensor, training: bool
) -> list[Tensor]:
    """Forward, or forward and backward, with results as rows of tokens ``[B T, H d]``.

    The layers around attention read its output and its gradients as such rows. A backend that
    returns them in another order pays for the copy here, as it does in a model. The gradient of an
    input with heads before tokens in memory is read in that order, ``[B H, T d]``. The gradient of
    a mask, if it wants one, comes last.
    """
    rows = lambda x: x.flatten(2).flatten(0, 1)
    q, k, v = inputs
    out = rows(_run(name, q, k, v, mask))
    if not training:
        return [out]
    leaves = inputs if mask is None or not mask.requires_grad else [*inputs, mask]
    *grads, last = torch.autograd.grad(out, leaves, dout)
    if leaves is inputs:
        grads.append(last)
    laid_out = [
        rows(grad.transpose(1, 2) if _heads_first_in_memory(x) else grad)
        for x, grad in zip(inputs, grads, strict=True)
    ]
    return laid_out if leaves is inputs else [*laid_out, last]


def _heads_first_in_memory(x: Tensor) -> bool:
    """Whether the tokens of one head of ``x [B, T, H, d]`` lie together."""
    return x.stride(1) < x.stride(2)


def _told(q: Tensor, k: Tensor) -> str:
    """Shapes and dtype for a message; keys are named where they are not shaped as queries."""
    shapes = f"{[*q.shape]}"
    if k.shape != q.shape:
        shapes = f"{shapes} x {[*k.shape]}"
    return f"{shapes} {q.dtype}"


def backend_times(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, training: bool
) -> dict[str, float]:
    """Milliseconds of every candidate that runs, on random data laid out as the inputs.

    ``mask`` is the one of the call, because a backend may be faster where nothing is masked.
    """
    # a separate generator: the training run's random numbers must not depend on what was measured
    generator = torch.Generator(q.device).manual_seed(0)
    inputs = [_random_like(x, generator).requires_grad_(training) for x in (q, k, v)]
    B, T, H, d = q.shape
    dout = torch.randn(B * T, H * d, dtype=q.dtype, device=q.device, generator=generator)
    # a candidate that cannot run these inputs raises and is left out
    times = {}
    for name in _candidates(q, mask):
        try:
            times[name] = milliseconds(
                lambda name=name: _timed_step(name, inputs, mask, dout, training)
            )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            log.info("attention: %s cannot run %s: %s", name, _told(q, k), reason)
    return times


def _measure(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, training: bool) -> str:
    """The candidate with the least time for forward, or forward and backward."""
    times = backend_times(q, k, v, mask, training)
    best = min(times, key=lambda name: times[name], default="sdpa")
    listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    listed = listed or "nothing could be measured"
    what = "forward and backward" if training else "forward"
    log.info("attention: %s for %s of %s (%s)", best, what, _told(q, k), listed)
    return best


def _kind(mask: Tensor | None) -> tuple[object, ...] | None:
    """What about a mask decides which backends take it, and how fast."""
    if mask is None:
        return None
    return (mask.dtype, mask.requires_grad, tuple(size == 1 for size in mask.shape))


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, training: bool) -> str:
    """The measured backend for this shape; measured now if it is new and measuring is possible."""
    # how a backend reads its inputs depends on their order in memory, not on the layout's name
    order = tuple(_heads_first_in_memory(x) for x in (q, k, v))
    shape = (q.shape[0].bit_length(), *q.shape[1:], *k.shape[1:3])
    key = (q.device, q.dtype, *shape, order, _kind(mask), training)
    compiling = torch.compiler.is_compiling()
    if key in _chosen:
        # under fullgraph compilation a package's import would break the graph
        return "sdpa" if compiling and _chosen[key] in _PACKAGES else _chosen[key]
    if compiling or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    # inside a backward pass the measurement's own backward would wait for this thread forever
    if torch._C._current_graph_task_id() != -1:
        return "sdpa"

    def work():
        torch.cuda.set_device(q.device)
        alone = mask
        if mask is not None:
            alone = mask.detach().requires_grad_(training and mask.requires_grad)
        _chosen[key] = _measure(q.detach(), k.detach(), v.detach(), alone, training)

    # a new thread has none of the caller's saved-tensor hooks, autocast or no_grad: activation
    # checkpointing counts the saved tensors and must not see those of the measurement
    # the caller waits: the choice is needed now
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return _chosen.setdefault(key, "sdpa")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bthd",
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of ``[B, T, H, d]``, tokens before heads; of ``[B, H, T, d]`` with layout="bhtd".

    That is ``softmax(q k^T / sqrt(d)) v`` for every head. PyTorch's
    ``scaled_dot_product_attention`` has heads before tokens, and neither layout can be told from
    the other by its shape.

    Keys and values may be those of other tokens (cross attention: S of them) and have fewer heads
    (grouped-query attention, arXiv 2305.13245: H_kv of them). Head h of the queries then takes head
    ``h // (H / H_kv)`` of the keys. Text and image tokens that attend to each other are one
    sequence: concatenate them before.

    On a CUDA device the first call of a shape measures the installed backends and keeps the
    fastest. The choice can differ between runs: name a backend if runs must agree bit for bit.
    Nothing can be measured while torch.compile traces, a CUDA graph is captured or a backward pass
    runs (a reentrant checkpoint). Run the shape once eagerly before, or PyTorch picks. PyTorch
    also picks in compiled code if a package was the fastest.

    Args:
        q: ``[B, T, H, d]`` or, with ``layout="bhtd"``, ``[B, H, T, d]``, any float dtype; views of
            a fused qkv projection are used in place.
        k: ``[B, S, H_kv, d]`` or ``[B, H_kv, S, d]``, H_kv a divisor of H. PyTorch's backends take
            fewer heads as they are, "efficient" gets a copy with H heads.
        v: shaped as ``k``.
        layout: ``"bthd"`` or ``"bhtd"``, of inputs and output; nothing is copied for either.
        groups: ``[B, T]`` integers or None; a token attends to the tokens of its own group, groups
            of any size. Only where queries and keys are the same tokens, T = S; not with ``mask``.
        mask: ``[B, S]``, which keys exist, or ``[B, H, T, S]``, which keys each query attends to; B
            may be 1, H and T too. True: attends. Or floats, rounded to q's dtype and added to the
            scaled scores; they may want a gradient. A query that attends to no key (every value
            False or -inf) gets zeros, and gives no gradient, as in PyTorch.
        backend: ``"auto"`` (measured), ``"sdpa"`` or ``"torch"`` (PyTorch picks), ``"cudnn"``,
            ``"flash"``, ``"efficient"``, ``"math"`` (PyTorch's), ``"fa2"``, ``"fa3"``, ``"fa4"``
            (FlashAttention, if installed); default: ``$SRA_FAST_ATTENTION``, else ``"torch"``
            where ``$SRA_FAST_BACKEND`` says so, else auto.

    Returns:
        The shape of ``q``, in its layout and dtype (under autocast in autocast's).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; ``groups`` and ``mask`` are both given;
            ``layout`` or ``backend`` is unknown; ``backend`` is not installed, cannot run on the
            device or in the dtype, or takes no groups or mask.
        RuntimeError: the named ``backend`` cannot run these inputs, for example their head width.
    """
    # a tuple: a list as a key of the dict would be a TypeError
    if layout not in tuple(LAYOUTS):
        raise ValueError(f"attention: layout must be one of {tuple(LAYOUTS)}, got {layout!r}")
    optional = {"groups": groups, "mask": mask}
    given = {name: value for name, value in optional.items() if value is not None}
    check_tensors("attention", {"q": q, "k": k, "v": v} | given)
    if autocast(q):
        # what autocast does to scaled_dot_product_attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, layout, groups, mask)
    backend = _check_backend(backend, q, [*given])
    q, k, v = _tokens_first(layout, q, k, v)
    full_mask = _full_mask(q, groups, mask)
    if backend == "auto" and q.is_cuda and q.numel() and k.numel():
        wanted = [x.requires_grad for x in (q, k, v, full_mask) if x is not None]
        training = torch.is_grad_enabled() and any(wanted)
        backend = _choose(q, k, v, full_mask, training)
    if backend in ("auto", "torch", "sdpa"):
        out = _run("sdpa", q, k, v, full_mask)
    else:
        out = _run_named(backend, q, k, v, layout, full_mask)
    return _in_layout(layout, out)


def _run_named(
    backend: str, q: Tensor, k: Tensor, v: Tensor, layout: str, mask: Tensor | None
) -> Tensor:
    """``_run`` with the backend that the caller named; if it fails, the message has that name and
    the shape in the caller's layout.
    """
    try:
        return _run(backend, q, k, v, mask)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        told = _told(_in_layout(layout, q), _in_layout(layout, k))
        raise RuntimeError(
            f"attention: backend {backend!r} cannot run {LAYOUTS[layout]} = {told}: {reason}"
        ) from error


def _check_backend(backend: str | None, q: Tensor, masks: list[str]) -> str:
    """The backend that was asked for.

    Raises:
        ValueError: it is unknown, not installed, or cannot run on the device or in the dtype of
            ``q``, or takes none of the arguments ``masks``.
    """
    if backend is None:
        torch_only = os.environ.get("SRA_FAST_BACKEND") == "torch"
        backend = os.environ.get("SRA_FAST_ATTENTION") or ("torch" if torch_only else "auto")
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend must be one of {BACKENDS}, got {backend!r}")
    if backend in _CUDA_ONLY and not q.is_cuda:
        raise ValueError(f"attention: backend {backend!r} needs CUDA tensors, got {q.device}")
    if backend in _PACKAGES:
        if masks:
            raise ValueError(f"attention: backend {backend!r} takes no {masks[0]}")
        if q.dtype not in HALF:
            raise ValueError(
                f"attention: backend {backend!r} needs bf16 or fp16 tensors, got {q.dtype}"
            )
        if not _installed(_PACKAGES[backend]):
            raise ValueError(
                f"attention: backend {backend!r} needs the package {_PACKAGES[backend]}"
            )
    return backend


def _check(
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


def _check_groups(q: Tensor, k: Tensor, layout: str, groups: Tensor) -> None:
    """Raise ValueError unless the groups are integers, one per token, of queries and of keys."""
    axis = 1 if layout == "bthd" else 2
    tokens = (q.shape[0], q.shape[axis])
    if k.shape[axis] != q.shape[axis]:
        raise ValueError(
            "attention: expected groups with as many keys as queries, "
            f"got T = {q.shape[axis]}, S = {k.shape[axis]}"
        )
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
