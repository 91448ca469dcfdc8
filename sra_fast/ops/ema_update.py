"""In-place exponential moving average of many tensors: the teacher's update (SRA, arXiv
2505.02831, Sec. 3.2).
"""

import logging
import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from sra_fast.kernels import ema_update as kernels
from sra_fast.ops._backend import (
    FLOAT_DTYPES,
    asked_backend,
    check_tensors,
    log_once,
    use_triton,
)
from sra_fast.ops._register import register

try:
    # compiled on demand, see setup.py
    import sra_fast._ema_cuda as _ema_cuda  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    _ema_cuda = None
except ImportError as error:
    # built, but for another machine: say why it is not used
    log_once("the CUDA extension does not load: %s", error)
    _ema_cuda = None

HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def ema_update_ref_(
    ema: list[Tensor],
    params: list[Tensor],
    decay: float | Tensor,
    copies: list[Tensor] | None = None,
) -> None:
    """The definition, in the dtype of ``ema``.

    Tests, benchmarks and backend="torch" all use this one function.
    """
    if isinstance(decay, Tensor):
        _move_on_device(ema, params, decay, copies or [])
        return
    for e, p in zip(ema, params, strict=True):
        e.lerp_(p.to(e.dtype), 1 - decay)
    if copies:
        for c, e in zip(copies, ema, strict=True):
            c.copy_(e)


def _move_on_device(
    ema: list[Tensor], params: list[Tensor], decay: Tensor, copies: list[Tensor]
) -> None:
    """The definition with the decay on the device, which is not read: with 1 nothing changes,
    whatever the parameters are.
    """
    moves = decay.reshape(()) != 1
    weight = 1 - decay.reshape(())
    for e, p in zip(ema, params, strict=True):
        e.copy_(torch.where(moves, torch.lerp(e, p.to(e.dtype), weight.to(e.dtype)), e))
    for c, e in zip(copies, ema, strict=False):
        c.copy_(torch.where(moves, e.to(c.dtype), c))


def _zip(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """(ema, param), or (ema, param, copy) with copies, of every tensor."""
    lists = (ema, params, copies) if copies else (ema, params)
    return list(zip(*lists, strict=True))


def _run_extension(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float
) -> None:
    """One call of the CUDA extension per mix of dtypes.

    Tests give it host tensors too, which run the extension's CPU reference; the operator does not.
    """
    assert _ema_cuda is not None
    # the extension takes addresses and dtypes, no tensors
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    mixes: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {}
    for operands in _zip(ema, params, copies):
        copy_name = names[operands[2].dtype] if copies else "none"
        mixes.setdefault((names[operands[1].dtype], copy_name), []).append(operands)
    for (param_name, copy_name), tensors in mixes.items():
        args = (
            [operands[0].data_ptr() for operands in tensors],
            [operands[1].data_ptr() for operands in tensors],
            [operands[2].data_ptr() for operands in tensors] if copies else [],
            [operands[0].numel() for operands in tensors],
            getattr(_ema_cuda.DType, param_name),
            getattr(_ema_cuda.DType, copy_name),
            decay,
        )
        if ema[0].is_cuda:
            _ema_cuda.ema_update(*args, torch.cuda.current_stream().cuda_stream)
        else:
            _ema_cuda.ema_update_cpu(*args)


def _run(
    ema: list[Tensor],
    params: list[Tensor],
    copies: list[Tensor],
    decay: float,
    extension: bool,
    decay_on_device: Tensor | None,
) -> None:
    if extension:
        _run_extension(ema, params, copies, decay)
    else:
        kernels.ema_update_(
            ema, params, copies, decay if decay_on_device is None else decay_on_device
        )
    # autograd must see the change: a graph that saved the old value would otherwise be wrong
    # silently
    torch.autograd.graph.increment_version([*ema, *copies])


_op = register(
    "ema_update_(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] copies, float decay, bool extension,"
    " Tensor? decay_on_device) -> ()",
    _run,
    lambda *args: None,
)


def _choose(x: Tensor, backend: str | None, on_device: bool = False) -> str:
    """Which implementation runs: "cuda" (the extension), "triton" or "torch".

    ``on_device``: the decay is a tensor, which the extension does not take.
    """
    backend = asked_backend("ema_update_", backend)
    if backend == "cuda":
        if on_device:
            raise ValueError(
                "ema_update_: expected decay as a number with backend='cuda', got a tensor, which "
                "'triton' and 'torch' take"
            )
        # the extension's CPU reference is there to be compared with, and is slow
        if not x.is_cuda:
            raise ValueError(f"ema_update_: backend='cuda' needs CUDA tensors, got {x.device}")
        if _ema_cuda is None:
            raise RuntimeError(
                "ema_update_: backend='cuda' needs sra_fast._ema_cuda: install with "
                "SRA_FAST_BUILD_EXT=1 and nvcc"
            )
        return backend
    if not use_triton("ema_update_", x, backend):
        return "torch"
    if backend == "triton" or on_device:
        return "triton"
    # "auto" on a GPU: the extension if it is built
    if _ema_cuda is not None:
        log_once("ema_update_ runs the CUDA extension", level=logging.INFO)
        return "cuda"
    if os.environ.get("SRA_FAST_BUILD_EXT") == "1":
        log_once(
            "SRA_FAST_BUILD_EXT=1, but the CUDA extension is not there: ema_update_ runs in Triton"
        )
    else:
        log_once("ema_update_ runs in Triton: the CUDA extension is not built", level=logging.INFO)
    return "triton"


def _as_list(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of an argument; one tensor is a likely mistake, and its rows are not meant.

    Raises:
        ValueError: the argument is one tensor, or nothing that could be iterated.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise ValueError(
            f"ema_update_: expected {name} as tensors in a list, got {type(tensors).__name__}"
        )
    return list(tensors)


def _shares_elements(x: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor; such a tensor has no values of
    its own to be written.
    """
    return any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))


def _check_decay(decay: float | Tensor, ema: list[Tensor]) -> None:
    """Raise ValueError unless the decay is a number in [0, 1], or one of fp64 beside the average."""
    if not isinstance(decay, Tensor):
        if not isinstance(decay, int | float) or not 0 <= decay <= 1:
            raise ValueError(f"ema_update_: expected decay in [0, 1], got {decay!r}")
        return
    device = ema[0].device if ema else decay.device
    if decay.numel() != 1 or decay.dtype != torch.float64 or decay.device != device:
        raise ValueError(
            f"ema_update_: expected a decay on the device as one number, fp64, on {device}, "
            f"got {[*decay.shape]} {decay.dtype} {decay.device}"
        )


def _check(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor], decay: float | Tensor
) -> None:
    """Raise ValueError unless the lists match and every tensor has a dtype of its kind."""
    if len(params) != len(ema) or len(copies) not in (0, len(ema)):
        raise ValueError(
            "ema_update_: expected as many params and copies as ema, "
            f"got {len(params)}, {len(copies)} and {len(ema)}"
        )
    for name, tensors in (("ema", ema), ("params", params), ("copies", copies)):
        check_tensors("ema_update_", {f"{name}[{i}]": t for i, t in enumerate(tensors)})
    _check_decay(decay, ema)
    if not ema:
        return
    device = ema[0].device
    for i, operands in enumerate(_zip(ema, params, copies)):
        e, p, *c = operands
        # every tensor matches its average
        if any(t.shape != e.shape or t.device != device for t in operands):
            got = [(list(t.shape), str(t.device)) for t in operands]
            raise ValueError(
                f"ema_update_: expected tensors of one shape on {device} at index {i}, got {got}"
            )
        if _shares_elements(e) or any(_shares_elements(t) for t in c):
            raise ValueError(
                "ema_update_: expected ema and copies with memory for every element, got an "
                f"expanded tensor at index {i}"
            )
        fits = e.dtype in (torch.float32, torch.float64) and p.dtype in FLOAT_DTYPES
        if not fits or (c and c[0].dtype not in HALF):
            got = [str(t.dtype) for t in operands]
            raise ValueError(
                "ema_update_: expected ema fp32 (a bf16 EMA does not move), params bf16, fp16 or fp32, "
                f"copies bf16 or fp16, got {got} at index {i}"
            )
    _check_distinct(ema)


def _check_distinct(ema: list[Tensor]) -> None:
    """Raise ValueError if a tensor is there twice, as tied weights are in a state dict: its average
    would move twice, and on a GPU two programs would write it at once.
    """
    # a compiler's tensors have no address
    if torch.compiler.is_compiling():
        return
    seen: dict[int, int] = {}
    for i, tensor in enumerate(ema):
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        first = seen.setdefault(tensor.data_ptr(), i)
        if first != i:
            raise ValueError(
                f"ema_update_: expected every tensor once in ema, the one at index {i} is that at "
                f"index {first}"
            )


def _is_flat(operands: tuple[Tensor, ...]) -> bool:
    """Whether the kernels can treat the tensors as vectors: no fp64, one common dense order in
    memory.
    """
    if any(t.dtype == torch.float64 for t in operands):
        return False
    if all(t.is_contiguous() for t in operands):
        return True
    # dense in another order: from the innermost dimension out, each stride is the product of the
    # sizes
    first = operands[0]
    dims = sorted((s, n) for n, s in zip(first.shape, first.stride(), strict=True) if n != 1)
    gapless = all(s == math.prod(n for _, n in dims[:i]) for i, (s, _) in enumerate(dims))
    return gapless and all(t.stride() == first.stride() for t in operands)


def _launch(
    ema: list[Tensor],
    params: list[Tensor],
    copies: list[Tensor],
    decay: float | Tensor,
    extension: bool,
) -> None:
    """Give the tensors that are plain vectors to the kernel, the few others to the reference."""
    flat = []
    others = []
    for operands in _zip(ema, params, copies):
        (flat if _is_flat(operands) else others).append(operands)
    for e, p, *c in others:
        ema_update_ref_([e], [p], decay, c)
    if others:
        log_once(
            "ema_update_: %d of %d tensors run unfused in PyTorch: fp64 or not dense in one order",
            len(others),
            len(ema),
        )
    # transpose to one list per kind of operand
    if flat:
        columns = [list(column) for column in zip(*flat, strict=True)]
        on_device = decay if isinstance(decay, Tensor) else None
        on_host = 0.0 if isinstance(decay, Tensor) else decay
        last = columns[2] if copies else []
        _op(columns[0], columns[1], last, on_host, extension, on_device)


@torch.no_grad()
def ema_update_(
    ema: Iterable[Tensor],
    params: Iterable[Tensor],
    decay: float | Tensor,
    copies: Iterable[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> None:
    """``ema = decay * ema + (1 - decay) * params`` for every tensor, in place, with one launch per
    mix of dtypes.

    Args:
        ema: fp32 tensors of any shapes; no tensor twice. The reference takes a tensor that is
            fp64, or not dense in one order with its parameter; this is logged once.
        params: tensors of the same shapes, bf16/fp16/fp32.
        decay: fraction of the old average that is kept, in [0, 1]; the paper uses 0.9999. Or one
            number on the device, fp64, which the host does not read (nor check): with 1 the average
            and its copies stay as they are, bit for bit, whatever the parameters.
        copies: bf16 or fp16 tensors that receive the new average, rounded, in the same pass; or
            None.
        backend: ``"cuda"`` (the compiled extension, for CUDA tensors), ``"triton"``, ``"torch"`` or ``"auto"``. On a
            GPU auto is the extension if it is built, else Triton; the choice is logged once (as a
            warning if ``SRA_FAST_BUILD_EXT=1`` asked for the extension). The extension takes no decay
            on the device. Default:
            ``$SRA_FAST_BACKEND``, else auto.

    Raises:
        ValueError: the numbers of tensors, their shapes, dtypes or devices do not fit, ``ema`` or
            ``copies`` holds an expanded tensor, ``ema`` holds a tensor twice, ``decay`` is outside
            [0, 1], or ``backend`` is unknown or cannot run on their device.
        RuntimeError: ``backend="cuda"`` and the extension is not built.
    """
    ema = _as_list("ema", ema)
    params = _as_list("params", params)
    copies = [] if copies is None else _as_list("copies", copies)
    _check(ema, params, copies, decay)
    if not ema:
        return
    choice = _choose(ema[0], backend, on_device=isinstance(decay, Tensor))
    if choice == "torch":
        ema_update_ref_(ema, params, decay, copies)
    else:
        _launch(ema, params, copies, decay, extension=choice == "cuda")
