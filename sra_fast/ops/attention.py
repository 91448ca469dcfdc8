"""Scaled dot-product attention for ``[B, T, H, d]`` or ``[B, H, T, d]``: no kernel of its own, the
fastest of those installed.

Inside this file queries are ``[B, T, H, d]``, keys and values ``[B, S, H_kv, d]``; the other layout
is a view of it. A mask is ``[B, H, T, S]``, any of B, H and T replaced by 1, as PyTorch takes it.
``runs`` are the segments of ``_attention_segments.py``.
"""

import importlib
import logging
import math
import os
import threading
from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sra_fast.ops._attention_arguments import LAYOUTS, check_attention, check_segments
from sra_fast.ops._attention_segments import Runs, by_slices, token_runs
from sra_fast.ops._backend import HALF, autocast, check_tensors, has_transform
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
# without a mask and in half precision only; "varlen" is PyTorch's kernel for segments
_HALF_ONLY = ("varlen", *_PACKAGES)
BACKENDS = ("auto", "torch", *_SDPA, *_HALF_ONLY)
# those that compute on a CUDA device only
_CUDA_ONLY = ("cudnn", "efficient", *_HALF_ONLY)
# what a backend raises that cannot run its inputs
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)

# (device, dtype, bits of B, T, H, d, S, H_kv, order in memory, kind of mask, training) -> backend;
# with segments (..., B, runs)
_chosen: dict[tuple[object, ...], str] = {}
# numbers of tokens for which a kind of call is measured. A program with many lengths would
# otherwise wait at each new one
_MEASURED_LENGTHS = 4
# kind of call (device, dtype, H, d, H_kv, order in memory, kind of mask, training, whether there
# are segments) -> the calls that were measured, and their backends
_measured: dict[tuple[object, ...], "dict[_Call, str]"] = {}


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bthd",
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The definition: PyTorch's scaled_dot_product_attention, with a mask if there are groups or
    segments.
    """
    runs = None
    if segments is not None:
        runs = check_segments(q, k, layout, segments, [])
    q, k, v = _tokens_first(layout, q, k, v)
    if runs is not None:
        groups = token_runs(runs, q.shape[0], q.device)
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


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, runs: Runs | None = None
) -> Tensor:
    if backend == "varlen" or backend in _PACKAGES and runs is not None:
        # not above: it imports the compiler
        from sra_fast.ops._attention_varlen import in_one_call

        return in_one_call(_PACKAGES.get(backend), q, k, v, runs)
    if runs is not None:
        return by_slices(lambda q, k, v: _run(backend, q, k, v, None), q, k, v, runs)
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


def _function(runs: Runs | None) -> str:
    """What a FlashAttention package is called by."""
    return "flash_attn_func" if runs is None else "flash_attn_varlen_func"


def _installed(package: str, function: str) -> bool:
    """Whether the package imports and has ``function``; an import that fails is logged."""
    try:
        return hasattr(importlib.import_module(package), function)
    except Exception as error:
        # a wheel for another torch fails in many ways; attention must run without it
        if not isinstance(error, ModuleNotFoundError):
            log.warning("attention: %s is installed but does not import: %s", package, error)
        return False


def _candidates(q: Tensor, mask: Tensor | None, runs: Runs | None = None) -> list[str]:
    """The backends worth timing for these inputs."""
    candidates = ["sdpa", "cudnn", "flash", "efficient"]
    if mask is None and q.dtype in HALF:
        function = _function(runs)
        candidates += [name for name in _PACKAGES if _installed(_PACKAGES[name], function)]
        if runs is not None:
            candidates.append("varlen")
    return candidates


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
    name: str,
    inputs: list[Tensor],
    mask: Tensor | None,
    dout: Tensor,
    training: bool,
    runs: Runs | None = None,
) -> list[Tensor]:
    """Forward, or forward and backward, with results as rows of tokens ``[B T, H d]``.

    The layers around attention read its output and its gradients as such rows. A backend that
    returns them in another order pays for the copy here, as it does in a model. The gradient of an
    input with heads before tokens in memory is read in that order, ``[B H, T d]``. The gradient of
    a mask, if it wants one, comes last.
    """
    rows = lambda x: x.flatten(2).flatten(0, 1)
    q, k, v = inputs
    out = rows(_run(name, q, k, v, mask, runs))
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
    # while torch.compile traces, a comparison of strides is symbolic, and torch 2.14 cannot look up
    # a key with it; the branch makes it a constant
    if x.stride(1) < x.stride(2):  # noqa: SIM103
        return True
    return False


def _told(q: Tensor, k: Tensor, runs: Runs | None = None) -> str:
    """Shapes and dtype for a message; keys are named where they are not shaped as queries."""
    shapes = f"{[*q.shape]}"
    if k.shape != q.shape:
        shapes = f"{shapes} x {[*k.shape]}"
    if runs is None:
        return f"{shapes} {q.dtype}"
    cut = f"segments {runs[0]}" if len(runs) == 1 else "segments of their own"
    return f"{shapes} {q.dtype} in {cut}"


def _random_inputs(q: Tensor, k: Tensor, v: Tensor, training: bool) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values laid out as the given ones, and a gradient of the output's rows."""
    # a separate generator: the training run's random numbers must not depend on what was measured
    generator = torch.Generator(q.device).manual_seed(0)
    inputs = [_random_like(x, generator).requires_grad_(training) for x in (q, k, v)]
    B, T, H, d = q.shape
    dout = torch.randn(B * T, H * d, dtype=q.dtype, device=q.device, generator=generator)
    return inputs, dout


def backend_times(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    training: bool,
    runs: Runs | None = None,
) -> dict[str, float]:
    """Milliseconds of every candidate that runs, on random data laid out as the inputs.

    ``mask`` is the one of the call, because a backend may be faster where nothing is masked.
    """
    inputs, dout = _random_inputs(q, k, v, training)
    # a candidate that cannot run these inputs raises and is left out
    times = {}
    for name in _candidates(q, mask, runs):
        try:
            times[name] = milliseconds(
                lambda name=name: _timed_step(name, inputs, mask, dout, training, runs)
            )
        except _REFUSALS as error:
            reason = str(error).partition("\n")[0]
            log.info("attention: %s cannot run %s: %s", name, _told(q, k, runs), reason)
    return times


def _measure(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, training: bool, runs: Runs | None
) -> str:
    """The candidate with the least time for forward, or forward and backward."""
    times = backend_times(q, k, v, mask, training, runs)
    best = min(times, key=lambda name: times[name], default="sdpa")
    listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    listed = listed or "nothing could be measured"
    what = "forward and backward" if training else "forward"
    log.info("attention: %s for %s of %s (%s)", best, what, _told(q, k, runs), listed)
    return best


def _kind(mask: Tensor | None) -> tuple[object, ...] | None:
    """What about a mask decides which backends take it, and how fast."""
    if mask is None:
        return None
    return (mask.dtype, mask.requires_grad, tuple(size == 1 for size in mask.shape))


class _Call(NamedTuple):
    """The sizes of a call that was measured."""

    B: int
    T: int
    S: int
    runs: Runs | None

    def length(self) -> tuple[object, ...]:
        """What counts as a length; segments have the exact batch, as their offsets do."""
        return self[1:] if self.runs is None else self

    def work(self) -> float:
        """Products of a query with a key, for each image and head."""
        if self.runs is None:
            return self.T * self.S
        return sum(n * n for run in self.runs for n in run) / len(self.runs)

    def distance(self, other: "_Call") -> float:
        """By how many factors of e the sizes differ, those of the images least of all."""
        sizes = (self.T, self.S, self.work())
        others = (other.T, other.S, other.work())
        apart = sum(abs(math.log(a / b)) for a, b in zip(sizes, others, strict=True))
        return apart + 1e-3 * abs(math.log(self.B / other.B))


def _measured_or_nearest(
    call: _Call,
    known: dict[_Call, str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    training: bool,
) -> str:
    """The backend for ``call``: measured, or that of the nearest call among ``known`` if enough
    lengths were measured.
    """
    runs = call.runs
    lengths = {other.length() for other in known}
    if len(lengths) < _MEASURED_LENGTHS or call.length() in lengths:
        known[call] = _measure(q, k, v, mask, training, runs)
        return known[call]
    nearest = min(known, key=call.distance)
    name = known[nearest]
    # it may refuse a length that it was not measured with
    inputs, dout = _random_inputs(q, k, v, training)
    try:
        _timed_step(name, inputs, mask, dout, training, runs)
    except _REFUSALS:
        name = "sdpa"
    told = _told(q, k, runs)
    log.info("attention: %s for %s, as measured with T = %d", name, told, nearest.T)
    return name


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    training: bool,
    runs: Runs | None = None,
) -> str:
    """The measured backend for this shape; measured now if it is new and measuring is possible."""
    # PyTorch's own choice is the only one that has rules for every transform
    if has_transform():
        return "sdpa"
    # how a backend reads its inputs depends on their order in memory, not on the layout's name
    order = tuple(_heads_first_in_memory(x) for x in (q, k, v))
    shape = (q.shape[0].bit_length(), *q.shape[1:], *k.shape[1:3])
    kind = _kind(mask)
    key = (q.device, q.dtype, *shape, order, kind, training)
    if runs is not None:
        # the exact batch: a variable-length kernel that was measured has its offsets on the device
        key = (*key, index(q.shape[0]), runs)
    compiling = torch.compiler.is_compiling()
    if key in _chosen:
        # under fullgraph compilation a package's import would break the graph
        return "sdpa" if compiling and _chosen[key] in _PACKAGES else _chosen[key]
    # a fake tensor has a device and no data
    if compiling or isinstance(q, FakeTensor) or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    # inside a backward pass the measurement's own backward would wait for this thread forever
    if torch._C._current_graph_task_id() != -1:
        return "sdpa"

    B, T, H, d = q.shape
    call = _Call(B, T, k.shape[1], runs)
    family = (q.device, q.dtype, H, d, k.shape[2], order, kind, training, runs is None)
    known = _measured.setdefault(family, {})

    def work():
        torch.cuda.set_device(q.device)
        alone = mask
        if mask is not None:
            alone = mask.detach().requires_grad_(training and mask.requires_grad)
        tensors = (q.detach(), k.detach(), v.detach(), alone)
        _chosen[key] = _measured_or_nearest(call, known, *tensors, training)

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
    segments: Sequence[int] | Sequence[Sequence[int]] | None = None,
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
    also picks in compiled code if a package was the fastest. Four lengths are measured for each
    kind of call (heads, their width, dtype, order in memory, kind of mask, training or not); a
    further one takes the backend of the length nearest to it. Under torch.func's transforms and
    for fake tensors PyTorch picks.

    With ``segments`` every run of tokens attends to itself only, and costs no more: two runs of a
    quarter and three quarters of the tokens take 62.5 % of the products (arXiv 2607.02508). On a
    CUDA device in half precision that is one call of a variable-length kernel, or a call for each
    run, whichever was faster. All other tensors take a call for each run, and runs of one length
    share one. Every new tuple of lengths is a new shape: it is traced anew, and measured unless
    four were.

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
            may be 1, H and T too. PyTorch's ``[T, S]`` is ``mask[None, None]``: by itself it is
            refused, or with T = B taken for ``[B, S]``. True: attends. Or floats, rounded to q's
            dtype and added to the scaled scores; they may want a gradient. A query that attends to
            no key (every value False or -inf) gets zeros, and gives no gradient, as in PyTorch.
        segments: lengths of the runs of neighbouring tokens that attend among themselves, in order:
            Python integers that sum to T, the same for every image, or B tuples of them. Only where
            T = S; not with ``groups`` or ``mask``.
        backend: ``"auto"`` (measured), ``"sdpa"`` or ``"torch"`` (PyTorch picks), ``"cudnn"``,
            ``"flash"``, ``"efficient"``, ``"math"`` (PyTorch's, a call for each run), ``"varlen"``
            (PyTorch's, one call for all runs), ``"fa2"``, ``"fa3"``, ``"fa4"`` (FlashAttention, if
            installed, one call for all runs); default: ``$SRA_FAST_ATTENTION``, else ``"torch"``
            where ``$SRA_FAST_BACKEND`` says so, else auto.

    Returns:
        The shape of ``q``, in its layout and dtype (under autocast in autocast's).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; two of ``groups``, ``mask`` and
            ``segments`` are given; ``layout`` or ``backend`` is unknown; ``backend`` is not
            installed, cannot run on the device or in the dtype, or takes no groups or mask.
        RuntimeError: the named ``backend`` cannot run these inputs, for example their head width,
            or segments that a CUDA graph meets before they ran once.
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
    check_attention(q, k, v, layout, groups, mask)
    runs = None
    if segments is not None:
        runs = check_segments(q, k, layout, segments, [*given])
    backend = _check_backend(backend, q, [*given], runs)
    q, k, v = _tokens_first(layout, q, k, v)
    full_mask = _full_mask(q, groups, mask)
    if backend == "auto" and q.is_cuda and q.numel() and k.numel():
        wanted = [x.requires_grad for x in (q, k, v, full_mask) if x is not None]
        training = torch.is_grad_enabled() and any(wanted)
        backend = _choose(q, k, v, full_mask, training, runs)
    if backend in ("auto", "torch", "sdpa"):
        out = _run("sdpa", q, k, v, full_mask, runs)
    else:
        out = _run_named(backend, q, k, v, layout, full_mask, runs)
    return _in_layout(layout, out)


def _run_named(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    mask: Tensor | None,
    runs: Runs | None,
) -> Tensor:
    """``_run`` with the backend that the caller named; if it fails, the message has that name and
    the shape in the caller's layout.
    """
    try:
        return _run(backend, q, k, v, mask, runs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        told = _told(_in_layout(layout, q), _in_layout(layout, k), runs)
        raise RuntimeError(
            f"attention: backend {backend!r} cannot run {LAYOUTS[layout]} = {told}: {reason}"
        ) from error


def _check_backend(backend: str | None, q: Tensor, masks: list[str], runs: Runs | None) -> str:
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
    if backend in _HALF_ONLY:
        if masks:
            raise ValueError(f"attention: backend {backend!r} takes no {masks[0]}")
        if q.dtype not in HALF:
            raise ValueError(
                f"attention: backend {backend!r} needs bf16 or fp16 tensors, got {q.dtype}"
            )
    if backend in _PACKAGES and not _installed(_PACKAGES[backend], _function(runs)):
        raise ValueError(
            f"attention: backend {backend!r} needs the package {_PACKAGES[backend]}, "
            f"with {_function(runs)}"
        )
    return backend
