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

from sra_fast.ops._backend import autocast

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
    except (
        Exception
    ) as error:  # a wheel for another torch fails in many ways; none of them is ours to die of
        if not isinstance(error, ModuleNotFoundError):
            log.warning("attention: %s is installed but does not import: %s", package, error)
        return False


def _candidates(q: Tensor, groups: Tensor | None) -> list[str]:
    packages = []
    if groups is None and q.dtype in (torch.float16, torch.bfloat16):
        packages = [name for name, package in _PACKAGES.items() if _installed(package)]
    return ["sdpa", "cudnn", "flash", "efficient", *packages]


# cycles for which the device is kept busy until a round of calls is queued: 20 ms at 2 GHz
_BUSY_CYCLES = 40_000_000


def _milliseconds(run: Callable[[], object], calls: int = 10, rounds: int = 3) -> float:
    """Device time of one call of ``run``: the median of ``rounds``, after three unmeasured calls.

    A call takes the host longer than the device: the device waits until all calls of a round are queued, or it would be the
    host that is timed.
    """
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_BUSY_CYCLES)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in the shape, the dtype and the strides of ``x``: views of one projection stay such views.

    What was expanded becomes dense: its elements share memory.
    """
    if 0 in x.stride():
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_(
        generator=generator
    )


def _timed_step(
    name: str, inputs: list[Tensor], groups: Tensor | None, dout: Tensor, training: bool
) -> list[Tensor]:
    """Forward, or forward and backward, to rows of tokens ``[B T, H d]``.

    The layers around attention read its output and its gradients as such rows: a backend that leaves them in another order
    pays for the copy here, as it does there.
    """
    rows = lambda x: x.flatten(2).flatten(0, 1)
    out = rows(_run(name, *inputs, groups))
    return [rows(grad) for grad in torch.autograd.grad(out, inputs, dout)] if training else [out]


def backend_times(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None, training: bool
) -> dict[str, float]:
    """Milliseconds of every candidate that runs, on random data laid out as the inputs."""
    # a generator of its own: the training run's random numbers must not depend on what was measured
    generator = torch.Generator(q.device).manual_seed(0)
    inputs = [_random_like(x, generator).requires_grad_(training) for x in (q, k, v)]
    dout = torch.randn(
        q.shape[0] * q.shape[1],
        q.shape[2] * q.shape[3],
        dtype=q.dtype,
        device=q.device,
        generator=generator,
    )
    times = {}
    for name in _candidates(q, groups):
        try:
            times[name] = _milliseconds(
                lambda name=name: _timed_step(name, inputs, groups, dout, training)
            )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            log.info(
                "attention: %s cannot run %s %s: %s",
                name,
                [*q.shape],
                q.dtype,
                str(error).partition("\n")[0],
            )
    return times


def _measure(q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None, training: bool) -> str:
    """The candidate with the least time for forward, or forward and backward."""
    times = backend_times(q, k, v, groups, training)
    best = min(times, key=times.get, default="sdpa")
    listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    what = "forward and backward" if training else "forward"
    log.info(
        "attention: %s for %s of %s %s (%s)",
        best,
        what,
        [*q.shape],
        q.dtype,
        listed or "nothing could be measured",
    )
    return best


def _choose(q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None, training: bool) -> str:
    """The measured backend for this shape; measured now if it is new and measuring is possible."""
    key = (q.device, q.dtype, q.shape[0].bit_length(), *q.shape[1:], groups is not None, training)
    if key in _chosen:
        # a compiler that may not break the graph stops at a package's import
        return (
            "sdpa" if torch.compiler.is_compiling() and _chosen[key] in _PACKAGES else _chosen[key]
        )
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    # the thread of a running backward pass is the one that the measurement's own would wait for, for ever
    if torch._C._current_graph_task_id() != -1:
        return "sdpa"

    def work():
        torch.cuda.set_device(q.device)
        _chosen[key] = _measure(q.detach(), k.detach(), v.detach(), groups, training)

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
    if autocast(q):  # what autocast does to scaled_dot_product_attention itself
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, groups)
    if backend is None:
        torch_only = os.environ.get("SRA_FAST_BACKEND") == "torch"
        backend = os.environ.get("SRA_FAST_ATTENTION") or ("torch" if torch_only else "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend in _PACKAGES and (groups is not None or not _installed(_PACKAGES[backend])):
        raise ValueError(
            f"backend {backend!r} needs the package {_PACKAGES[backend]} and takes no groups"
        )
    if backend == "auto" and q.is_cuda and q.numel():
        training = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad
        )
        backend = _choose(q, k, v, groups, training)
    return _run("sdpa" if backend in ("auto", "torch") else backend, q, k, v, groups)


def _check(q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"expected q, k, v of one shape [B, T, H, d], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"expected q, k, v of one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if (
        k.device != q.device
        or v.device != q.device
        or (groups is not None and groups.device != q.device)
    ):
        raise ValueError(
            f"expected every tensor on {q.device}, got k on {k.device}, v on {v.device}"
        )
    if groups is not None and (groups.shape != q.shape[:2] or groups.is_floating_point()):
        raise ValueError(
            f"expected groups [B, T] = {[*q.shape[:2]]} integers, got {[*groups.shape]} {groups.dtype}"
        )
