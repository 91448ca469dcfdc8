"""Scaled dot-product attention over tokens-first heads: no kernel of our own, the fastest of those installed."""
import importlib
import logging
import os
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger("sra_fast")

# PyTorch's own; "sdpa" lets PyTorch pick
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

# (device, dtype, T, H, d, masked, training) -> backend
_chosen: dict[tuple, str] = {}


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """The definition: PyTorch's scaled_dot_product_attention, with a mask where there are groups."""
    return _run("sdpa", q, k, v, groups)


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> Tensor:
    if backend in _PACKAGES:
        out = importlib.import_module(_PACKAGES[backend]).flash_attn_func(q, k, v)
        # some versions give the log-sum-exp too
        return out[0] if isinstance(out, tuple) else out
    mask = None if groups is None else (groups[:, :, None] == groups[:, None, :])[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _SDPA[backend] is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    with sdpa_kernel(_SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _installed(package: str) -> bool:
    try:
        return hasattr(importlib.import_module(package), "flash_attn_func")
    except Exception as error:  # a wheel for another torch fails in many ways; none of them is ours to die of
        if not isinstance(error, ModuleNotFoundError):
            log.warning("attention: %s is installed but does not import: %s", package, error)
        return False


def _candidates(q: Tensor, groups: Tensor | None) -> list[str]:
    packages = []
    if groups is None and q.dtype in (torch.float16, torch.bfloat16):
        packages = [name for name, package in _PACKAGES.items() if _installed(package)]
    return ["sdpa", "cudnn", "flash", "efficient", *packages]


def _milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median device time of ``run`` after three unmeasured calls."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def _measure(q: Tensor, groups: Tensor | None, training: bool) -> str:
    """The candidate with the least time for forward, or forward and backward, on random data shaped as ``q``."""
    # a generator of its own: the training run's random numbers must not depend on what was measured
    generator = torch.Generator(q.device).manual_seed(0)
    random = lambda: torch.randn(q.shape, dtype=q.dtype, device=q.device, generator=generator)
    inputs, dout = [random().requires_grad_(training) for _ in range(3)], random()
    times: dict[str, float] = {}
    for name in _candidates(q, groups):

        def step(name=name):
            out = _run(name, *inputs, groups)
            return torch.autograd.grad(out, inputs, dout) if training else out

        try:
            times[name] = _milliseconds(step)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            log.info("attention: %s cannot run %s %s: %s", name, [*q.shape], q.dtype, str(error).partition("\n")[0])
    best = min(times, key=times.get, default="sdpa")
    listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    log.info("attention: %s for %s %s (%s)", best, [*q.shape], q.dtype, listed or "nothing could be measured")
    return best


def _choose(q: Tensor, groups: Tensor | None, training: bool) -> str:
    """The measured backend for this shape; measured now if it is new and measuring is possible."""
    key = (q.device, q.dtype, q.shape[0].bit_length(), *q.shape[1:], groups is not None, training)
    if key in _chosen:
        # a compiler that may not break the graph stops at a package's import
        return "sdpa" if torch.compiler.is_compiling() and _chosen[key] in _PACKAGES else _chosen[key]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    # the thread of a running backward pass is the one that the measurement's own would wait for, for ever
    if torch._C._current_graph_task_id() != -1:
        return "sdpa"

    def work():
        torch.cuda.set_device(q.device)
        _chosen[key] = _measure(q.detach(), groups, training)

    # a thread has no saved-tensor hooks, autocast or no_grad of the caller's: activation checkpointing, which counts
    # the tensors that are saved, must not see those of the measurement
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return _chosen.setdefault(key, "sdpa")


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, groups: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` for every head.

    On a CUDA device the first call of a shape measures what is installed and keeps the fastest; the choice can differ
    between runs, so name a backend where runs must agree bit for bit.  While torch.compile traces, a CUDA graph is captured or
    a backward pass runs (which repeats a reentrant checkpoint) nothing can be measured: run the shape once eagerly before, or
    PyTorch picks, which it also does in compiled code where a package was the fastest.

    Args:
        q: ``[B, T, H, d]``, any float dtype; views of a fused qkv projection are used in place.
        k: ``[B, T, H, d]``.
        v: ``[B, T, H, d]``.
        groups: ``[B, T]`` integers or None; a token attends to the tokens of its own group, groups of any size.
        backend: ``"auto"`` (measured), ``"sdpa"`` or ``"torch"`` (PyTorch picks), ``"cudnn"``, ``"flash"``,
            ``"efficient"``, ``"math"`` (PyTorch's), ``"fa2"``, ``"fa3"``, ``"fa4"`` (FlashAttention, if installed);
            default: ``$SRA_FAST_ATTENTION``, else ``"torch"`` where ``$SRA_FAST_BACKEND`` says so, else auto.

    Returns:
        ``[B, T, H, d]`` in ``q.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; ``backend`` is unknown, not installed, or takes no groups.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # what autocast does to scaled_dot_product_attention itself
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, groups)
    if backend is None:
        torch_only = os.environ.get("SRA_FAST_BACKEND") == "torch"
        backend = os.environ.get("SRA_FAST_ATTENTION") or ("torch" if torch_only else "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend in _PACKAGES and (groups is not None or not _installed(_PACKAGES[backend])):
        raise ValueError(f"backend {backend!r} needs the package {_PACKAGES[backend]} and takes no groups")
    if backend == "auto" and q.is_cuda and q.numel():
        training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend = _choose(q, groups, training)
    return _run("sdpa" if backend in ("auto", "torch") else backend, q, k, v, groups)


def _check(q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"expected q, k, v of one shape [B, T, H, d], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"expected q, k, v of one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device or (groups is not None and groups.device != q.device):
        raise ValueError(f"expected every tensor on {q.device}, got k on {k.device}, v on {v.device}")
    if groups is not None and (groups.shape != q.shape[:2] or groups.is_floating_point()):
        raise ValueError(f"expected groups [B, T] = {[*q.shape[:2]]} integers, got {[*groups.shape]} {groups.dtype}")
