"""In-place exponential moving average of many tensors: the teacher's update (SRA, arXiv
2505.02831, Sec. 3.2).
"""

import logging
import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sra_fast.kernels import _plans
from sra_fast.kernels import ema_update as kernels
from sra_fast.ops._backend import (
    FLOAT_DTYPES,
    HALF,
    asked_backend,
    check_tensors,
    log_once,
    use_triton,
)
from sra_fast.ops._dtensors import check_whole, is_dtensor, local_shards
from sra_fast.ops._memory import first_overlap, is_dense
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

_PLAIN = {Tensor, torch.nn.Parameter}


@dataclass
class _Plan:
    """What is known of lists of tensors that have been checked; it holds none of them.

    Attributes:
        flat: indices of the tensors that the kernels take.
        others: indices of those that the reference takes.
        launches: of the Triton kernel, made when it runs first.
        calls: arguments of the CUDA extension, made when it runs first.
    """

    flat: list[int]
    others: list[int]
    launches: list[kernels.Launch] | None = None
    calls: list[tuple[Any, ...]] | None = None


# lists that have been checked
_known = _plans.Plans()


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


def _extension_calls(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor]
) -> list[tuple[Any, ...]]:
    """What the CUDA extension takes in front of the decay, for each mix of dtypes."""
    assert _ema_cuda is not None
    # the extension takes addresses and dtypes, no tensors
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    mixes: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {}
    for operands in _zip(ema, params, copies):
        copy_name = names[operands[2].dtype] if copies else "none"
        mixes.setdefault((names[operands[1].dtype], copy_name), []).append(operands)
    return [
        (
            [operands[0].data_ptr() for operands in tensors],
            [operands[1].data_ptr() for operands in tensors],
            [operands[2].data_ptr() for operands in tensors] if copies else [],
            [operands[0].numel() for operands in tensors],
            getattr(_ema_cuda.DType, param_name),
            getattr(_ema_cuda.DType, copy_name),
        )
        for (param_name, copy_name), tensors in mixes.items()
    ]


def _run_extension(calls: list[tuple[Any, ...]], decay: float, on_gpu: bool) -> None:
    """Run the CUDA extension.

    Tests give it host tensors too, which run the extension's CPU reference; the operator does not.
    """
    assert _ema_cuda is not None
    for call in calls:
        if on_gpu:
            _ema_cuda.ema_update(*call, decay, torch.cuda.current_stream().cuda_stream)
        else:
            _ema_cuda.ema_update_cpu(*call, decay)


def _run(
    ema: list[Tensor],
    params: list[Tensor],
    copies: list[Tensor],
    decay: float,
    extension: bool,
    decay_on_device: Tensor | None,
    plan: _Plan | None = None,
) -> None:
    """Launch the kernels for flat tensors: those that ``plan``, if there is one, names."""
    kept = decay if decay_on_device is None else decay_on_device
    if plan is None and extension:
        _run_extension(_extension_calls(ema, params, copies), decay, ema[0].is_cuda)
    elif plan is None:
        kernels.ema_update_(ema, params, copies, kept)
    elif extension:
        if plan.calls is None:
            plan.calls = _extension_calls(ema, params, copies)
        _run_extension(plan.calls, decay, ema[0].is_cuda)
    else:
        if plan.launches is None:
            plan.launches = kernels.plan(ema, params, copies)
        kernels.launch(plan.launches, bool(copies), kept)
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
    check_whole("ema_update_", {"decay": decay})
    device = ema[0].device if ema else decay.device
    if decay.numel() != 1 or decay.dtype != torch.float64 or decay.device != device:
        raise ValueError(
            f"ema_update_: expected a decay on the device as one number, fp64, on {device}, "
            f"got {[*decay.shape]} {decay.dtype} {decay.device}"
        )


def _local(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists with this rank's shards in place of DTensors.

    Raises:
        ValueError: an average and what belongs to it are not sharded alike.
    """
    columns = []
    for i, operands in enumerate(_zip(ema, params, copies)):
        if any(map(is_dtensor, operands)):
            names = ("ema", "params", "copies")
            given = {f"{name}[{i}]": x for name, x in zip(names, operands, strict=False)}
            columns.append(local_shards("ema_update_", given))
        else:
            columns.append(operands)
    local = [list(column) for column in zip(*columns, strict=True)]
    return local[0], local[1], local[2] if copies else []


def _check_lengths(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> None:
    """Raise ValueError unless the lists match."""
    if len(params) != len(ema) or len(copies) not in (0, len(ema)):
        raise ValueError(
            "ema_update_: expected as many params and copies as ema, "
            f"got {len(params)}, {len(copies)} and {len(ema)}"
        )


def _check(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> None:
    """Raise ValueError unless every tensor has a dtype of its kind, and memory to be written in."""
    for name, tensors in (("ema", ema), ("params", params), ("copies", copies)):
        check_tensors("ema_update_", {f"{name}[{i}]": t for i, t in enumerate(tensors)})
    for i, operands in enumerate(_zip(ema, params, copies)):
        e, p, *c = operands
        device = ema[0].device
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
    _check_distinct(ema, params, copies)


def _check_distinct(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> None:
    """Raise ValueError if what is written lies in the memory of another tensor, as tied weights do
    in a state dict: their average would move twice, and on a GPU two programs would write it at
    once.
    """
    found = first_overlap([*ema, *copies], params)
    if found is not None:
        named = (("ema", ema), ("copies", copies), ("params", params))
        labels = [f"{name}[{i}]" for name, tensors in named for i in range(len(tensors))]
        first, second = found
        raise ValueError(
            "ema_update_: expected memory of its own for every tensor of ema and copies, each of "
            f"them once, got {labels[second]} in the memory of {labels[first]}"
        )


def _is_flat(operands: tuple[Tensor, ...]) -> bool:
    """Whether the kernels can treat the tensors as vectors: no fp64, one common dense order in
    memory.
    """
    if any(t.dtype == torch.float64 for t in operands):
        return False
    if all(t.is_contiguous() for t in operands):
        return True
    first = operands[0]
    return is_dense(first) and all(t.stride() == first.stride() for t in operands)


def _make_plan(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> _Plan:
    """Check the tensors, and tell plain vectors from the few others."""
    _check(ema, params, copies)
    flat = []
    others = []
    for i, operands in enumerate(_zip(ema, params, copies)):
        (flat if _is_flat(operands) else others).append(i)
    return _Plan(flat, others)


def _are_plain(*lists: list[Tensor]) -> bool:
    """Whether all are tensors, and of no subclass but parameters, that might wrap others."""
    return set(map(type, chain(*lists))) <= _PLAIN


def _key(ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> Hashable | None:
    """What the plan of these tensors is found by; None where addresses do not tell them apart, and
    they are checked in every call.
    """
    # a compiler's tensors have no address
    if torch.compiler.is_compiling():
        return None
    if not _are_plain(ema, params, copies):
        return None
    try:
        # the sign of some views is not in their memory
        if any(map(Tensor.is_neg, chain(ema, params, copies))):
            return None
        return _plans.key_of(ema, params, copies)
    except RuntimeError:
        # sparse, nested, or inside a transform of torch.func
        return None


def _launch(
    ema: list[Tensor],
    params: list[Tensor],
    copies: list[Tensor],
    decay: float | Tensor,
    extension: bool,
    plan: _Plan,
    direct: bool,
) -> None:
    """Give the tensors that are plain vectors to the kernel, the few others to the reference.

    ``direct``: the plan belongs to these addresses, and no mode of torch's dispatcher is to see the
    operator. By way of the dispatcher, which is given no plan, a call with 580 tensors took 0.77 ms
    of a CPU core, and takes 0.37 ms without.
    """
    if plan.others:
        log_once(
            "ema_update_: %d of %d tensors run unfused in PyTorch: fp64 or not dense in one order",
            len(plan.others),
            len(ema),
        )
        pick = lambda tensors, indices: [tensors[i] for i in indices] if tensors else []
        others = [pick(tensors, plan.others) for tensors in (ema, params, copies)]
        ema_update_ref_(others[0], others[1], decay, others[2])
        ema = pick(ema, plan.flat)
        params = pick(params, plan.flat)
        copies = pick(copies, plan.flat)
    if not plan.flat:
        return
    on_device = decay if isinstance(decay, Tensor) else None
    on_host = 0.0 if isinstance(decay, Tensor) else decay
    if direct:
        with torch.cuda.device_of(ema[0]):
            _run(ema, params, copies, on_host, extension, on_device, plan)
    else:
        _op(ema, params, copies, on_host, extension, on_device)


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

    Lists of tensors are checked in the first call and remembered by their addresses, shapes,
    strides, dtypes and devices; the last 8 are remembered.

    A CUDA graph can capture the call after the same call has run outside of one, with at most 7
    other lists in between. Its tables, 32 bytes per 4096 elements, are then kept until the process
    ends.

    Of DTensors, as FSDP2 makes them, each rank updates its own shards. An average, its parameter
    and its copy must have one mesh and the same placements; none may be partial.

    Args:
        ema: fp32 tensors of any shapes, each in memory of its own: no tensor twice, and none that
            shares memory with a parameter or a copy. The reference takes a tensor that is
            fp64, or not dense in one order with its parameter; this is logged once.
        params: tensors of the same shapes, bf16/fp16/fp32.
        decay: fraction of the old average that is kept, in [0, 1]; the paper uses 0.9999. Or one
            number on the device, fp64, which the host does not read (nor check): with 1 the average
            and its copies stay as they are, bit for bit, whatever the parameters.
        copies: bf16 or fp16 tensors, each in memory of its own, that receive the new average,
            rounded, in the same pass; or None.
        backend: ``"cuda"`` (the compiled extension, for CUDA tensors), ``"triton"``, ``"torch"`` or ``"auto"``. On a
            GPU auto is the extension if it is built, else Triton; the choice is logged once (as a
            warning if ``SRA_FAST_BUILD_EXT=1`` asked for the extension). The extension takes no decay
            on the device. Default:
            ``$SRA_FAST_BACKEND``, else auto.

    Raises:
        ValueError: the numbers of tensors, their shapes, dtypes or devices do not fit, ``ema`` or
            ``copies`` holds an expanded tensor or one in the memory of another, DTensors are not
            sharded alike, ``decay`` is outside [0, 1], or ``backend`` is unknown or cannot run on
            their device.
        RuntimeError: ``backend="cuda"`` and the extension is not built; or a CUDA graph captures a
            call with lists that are not remembered.
    """
    ema = _as_list("ema", ema)
    params = _as_list("params", params)
    copies = [] if copies is None else _as_list("copies", copies)
    _check_lengths(ema, params, copies)
    # a DTensor counts its changes apart from its shard's
    dtensors = []
    if not _are_plain(ema, params, copies):
        dtensors = [x for x in (*ema, *copies) if is_dtensor(x)]
        ema, params, copies = _local(ema, params, copies)

    # what was checked in an earlier call is not checked again
    key = _key(ema, params, copies)
    make = lambda: _make_plan(ema, params, copies)
    plan = make() if key is None else _known.get(key, make)
    _check_decay(decay, ema)
    if not ema:
        return
    choice = _choose(ema[0], backend, on_device=isinstance(decay, Tensor))
    if choice == "torch":
        ema_update_ref_(ema, params, decay, copies)
    else:
        direct = key is not None and _get_current_dispatch_mode() is None
        _launch(ema, params, copies, decay, choice == "cuda", plan, direct)
    if dtensors:
        torch.autograd.graph.increment_version(dtensors)
