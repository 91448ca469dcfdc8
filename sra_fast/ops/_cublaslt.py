"""Matrix products of cuBLASLt with epilogues that PyTorch does not offer.

The library is the one that PyTorch has loaded, and it is called through its C interface: nothing is
compiled, so every installation on CUDA has it. ``SRA_FAST_CUBLASLT=0`` switches it off.
Constants and structures are those of cublasLt.h, the same in CUDA 12 and 13.
"""

import ctypes
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial

import torch
from torch import Tensor

from sra_fast.ops._backend import log_once
from sra_fast.ops._timing import milliseconds

log = logging.getLogger("sra_fast")


class Epilogue(IntEnum):
    """What happens to the fp32 sums of a product before they are rounded (cublasLtEpilogue_t)."""

    # add a bias, keep that as a second output, and take tanh-GELU
    GELU_AUX_BIAS = 32 | 128 | 4
    # multiply by the derivative of tanh-GELU at a second input
    DGELU = 64 | 128


DTYPES = {torch.float16: 2, torch.bfloat16: 14}
# sums, alpha and beta are fp32: CUBLAS_COMPUTE_32F and CUDA_R_32F
_COMPUTE_32F = 68
_FLOAT32 = 0
_ONE = ctypes.c_float(1.0)
_ZERO = ctypes.c_float(0.0)
# a status: the library has no algorithm for this product
_NOT_SUPPORTED = 15
# attributes of a product (cublasLtMatmulDescAttributes_t)
_TRANSPOSE_A = 3
_EPILOGUE = 7
_BIAS_POINTER = 8
_AUX_POINTER = 11
_AUX_LD = 12
_BIAS_TYPE = 26
# attributes of a search (cublasLtMatmulPreferenceAttributes_t); alignments of A, B, C and D follow
_MAX_WORKSPACE = 1
_REDUCTIONS = 3
_ALIGNMENT_A = 5
# what NVIDIA recommends for Hopper
_WORKSPACE_BYTES = 32 << 20
# where the summed dimension is split, partial sums stay fp32
_REDUCE_IN_COMPUTE_TYPE = 2
# algorithms that the library proposes for a product, the one it expects to be fastest first
_PROPOSALS = 8
# how much faster than the first another must be: noise may not decide which one runs
_MARGIN = 0.97
# numbers of rows for which a layer's products are measured. A program with many lengths would
# otherwise wait half a second at each new one
_MEASURED_LENGTHS = 4
# cuBLASLt does not look beyond
_BEST_ALIGNMENT = 256
# every epilogue reads its vectors and matrices 16 bytes at a time
_LEAST_ALIGNMENT = 16


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def _load() -> ctypes.CDLL | None:
    """The cuBLASLt that PyTorch has loaded, or None if there is none."""
    if torch.version.cuda is None:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"
    try:
        # another copy of the library than PyTorch's would bring its own context and memory
        return ctypes.CDLL(name, mode=ctypes.DEFAULT_MODE | os.RTLD_NOLOAD)
    except OSError as error:
        log.warning("GELU stays a pass of its own: PyTorch has not loaded %s (%s)", name, error)
        return None


# found when this file is imported: a compiler that traces ``available`` cannot load a library
_library = _load()
_found = _library is not None


def available(x: Tensor) -> bool:
    """Whether the products of such tensors can have these epilogues; also asked of tensors without
    data, while a compiler traces.

    Raises:
        ValueError: the variable SRA_FAST_CUBLASLT is neither 0 nor 1.
    """
    wanted = os.environ.get("SRA_FAST_CUBLASLT", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"adaln_mlp: SRA_FAST_CUBLASLT must be 0 or 1, got {wanted!r}")
    return wanted == "1" and _found and x.is_cuda and x.dtype in DTYPES


def _call(name: str, *args) -> None:
    """Call a function of the library.

    Raises:
        RuntimeError: it failed.
    """
    status = getattr(_library, name)(*args)
    if status:
        raise RuntimeError(f"{name} of cuBLASLt failed with status {status}")


@cache
def _handle(device: int) -> ctypes.c_void_p:
    """The library's context on the current device, which is ``device``."""
    handle = ctypes.c_void_p()
    _call("cublasLtCreate", ctypes.byref(handle))
    return handle


def _set(function: str, target: ctypes.c_void_p, attribute: int, value) -> None:
    """Set an attribute to a ctypes value."""
    _call(function, target, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def _layout(dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
    """A dense matrix with adjacent rows, as BLAS stores matrices."""
    layout = ctypes.c_void_p()
    sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
    _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), dtype, *sizes)
    return layout


@dataclass(frozen=True)
class _Shape:
    """What a plan depends on: D ``[m, n]`` = op(A) B, with adjacent rows, k summed.

    ``alignments`` are those of A, B, D, the second matrix and the bias in bytes, 0 without a bias.
    """

    device: int
    dtype: torch.dtype
    epilogue: Epilogue
    m: int
    n: int
    k: int
    transpose_a: bool
    alignments: tuple[int, ...]


class _Plan:
    """A product of one shape, with the algorithms that the library proposes for it.

    Attributes:
        proposals: the library's, the one first that it expects to be fastest.
        chosen: index of the one that runs; None if there is none.
        measured: whether it was chosen by time.
    """

    def __init__(self, shape: _Shape):
        self.lock = threading.Lock()
        self.shape = shape
        dtype = DTYPES[shape.dtype]
        self.description = ctypes.c_void_p()
        _call("cublasLtMatmulDescCreate", ctypes.byref(self.description), _COMPUTE_32F, _FLOAT32)
        self._describe(_TRANSPOSE_A, ctypes.c_int32(shape.transpose_a))
        self._describe(_EPILOGUE, ctypes.c_int32(shape.epilogue))
        self._describe(_BIAS_TYPE, ctypes.c_int32(dtype))
        self._describe(_AUX_LD, ctypes.c_int64(shape.m))

        a = (shape.k, shape.m) if shape.transpose_a else (shape.m, shape.k)
        self.a = _layout(dtype, *a)
        self.b = _layout(dtype, shape.k, shape.n)
        self.d = _layout(dtype, shape.m, shape.n)
        self.proposals = self._search()
        self.chosen = 0 if self.proposals else None
        self.measured = len(self.proposals) < 2

    def _describe(self, attribute: int, value) -> None:
        _set("cublasLtMatmulDescSetAttribute", self.description, attribute, value)

    def _point(self, bias: int, aux: int) -> None:
        """Set the addresses of bias and second matrix; a bias of 0 is none."""
        if bias:
            self._describe(_BIAS_POINTER, ctypes.c_void_p(bias))
        self._describe(_AUX_POINTER, ctypes.c_void_p(aux))

    def _search(self) -> list[_Heuristic]:
        """What the library proposes; nothing, if it has no algorithm or the search fails."""
        assert _library is not None
        *matrices, aux, bias = self.shape.alignments
        # nothing is read there: the search takes the alignment of both from their addresses
        self._point(bias, aux)
        preference = ctypes.c_void_p()
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        prefer = partial(_set, "cublasLtMatmulPreferenceSetAttribute", preference)
        prefer(_MAX_WORKSPACE, ctypes.c_size_t(_WORKSPACE_BYTES))
        prefer(_REDUCTIONS, ctypes.c_uint32(_REDUCE_IN_COMPUTE_TYPE))
        # C is D
        for i, alignment in enumerate((*matrices, matrices[-1])):
            prefer(_ALIGNMENT_A + i, ctypes.c_uint32(alignment))
        found = (_Heuristic * _PROPOSALS)()
        count = ctypes.c_int(0)
        status = _library.cublasLtMatmulAlgoGetHeuristic(
            _handle(self.shape.device),
            self.description,
            *(self.a, self.b, self.d, self.d),
            preference,
            _PROPOSALS,
            found,
            ctypes.byref(count),
        )
        _call("cublasLtMatmulPreferenceDestroy", preference)
        if status not in (0, _NOT_SUPPORTED):
            # two operators give the same result: no reason to end a training
            log.warning("cuBLASLt: the search for %s failed with status %d", self.shape, status)
        proposed = found[: count.value] if status == 0 else []
        return [each for each in proposed if each.state == 0]

    def choose(self, launch: Callable[[int], None]) -> None:
        """Keep the fastest proposal that runs.

        Args:
            launch: runs the product with the proposal of an index.
        """
        times = []
        for i in range(len(self.proposals)):
            try:
                times.append(milliseconds(partial(launch, i), calls=5))
            # the library may propose what this device or its free memory cannot do
            except RuntimeError as error:
                log.info("cuBLASLt: proposal %d is left out: %s", i, error)
                times.append(math.inf)
        best = times.index(min(times))
        if times[best] < _MARGIN * times[0]:
            self.chosen = best
        if times[best] == math.inf:
            self.chosen = None
        self.measured = True
        listed = ", ".join(f"{1e3 * ms:.0f}" for ms in times)
        shape = (self.shape.n, self.shape.m, self.shape.k)
        name = self.shape.epilogue.name
        log.info("cuBLASLt: %s %s: %s of %s us", name, shape, self.chosen, listed)

    def run(self, index: int, a: Tensor, b: Tensor, d: Tensor, bias: int, aux: int) -> None:
        """Launch a proposal in the current stream."""
        proposal = self.proposals[index]
        workspace = d.new_empty(max(proposal.workspace_size, 1), dtype=torch.uint8)
        device = self.shape.device
        stream = torch.cuda.current_stream(device).cuda_stream
        result = (ctypes.c_void_p(d.data_ptr()), self.d)
        # the description is shared by all threads, among them autograd's
        with self.lock:
            self._point(bias, aux)
            _call(
                "cublasLtMatmul",
                _handle(device),
                self.description,
                ctypes.byref(_ONE),
                *(ctypes.c_void_p(a.data_ptr()), self.a),
                *(ctypes.c_void_p(b.data_ptr()), self.b),
                ctypes.byref(_ZERO),
                *result,
                *result,
                ctypes.byref(proposal.algorithm),
                ctypes.c_void_p(workspace.data_ptr()),
                ctypes.c_size_t(proposal.workspace_size),
                ctypes.c_void_p(stream),
            )


_plans: dict[_Shape, _Plan] = {}
# lengths that were measured, by layer: (epilogue, m, k, dtype)
_lengths: Counter = Counter()


def _plan_for(shape: _Shape) -> _Plan:
    """The plan of a shape, made when it is first needed."""
    plan = _plans.get(shape)
    if plan is None:
        # two threads may make the same plan: both are right, and the first to be kept stays
        plan = _plans.setdefault(shape, _Plan(shape))
        if plan.chosen is None:
            log_once("cuBLASLt has no algorithm for some products: their GELU is a pass of its own")
    return plan


def _index(plan: _Plan, launch: Callable[[int], None]) -> int | None:
    """Which proposal runs now; measured, if this is the time for it."""
    if plan.chosen is None:
        return None
    if torch.are_deterministic_algorithms_enabled():
        return 0
    shape = plan.shape
    if not plan.measured and not torch.cuda.is_current_stream_capturing():
        layer = (shape.epilogue, shape.m, shape.k, shape.dtype)
        if _lengths[layer] < _MEASURED_LENGTHS:
            _lengths[layer] += 1
            plan.choose(launch)
        # a length too many keeps the first
        plan.measured = True
    return plan.chosen


def _alignment(t: Tensor) -> int:
    """How the address is aligned, in bytes: 256, 16, or 1 for less.

    Not finer, because every combination of alignments is measured by itself.
    """
    for alignment in (_BEST_ALIGNMENT, _LEAST_ALIGNMENT):
        if t.data_ptr() % alignment == 0:
            return alignment
    return 1


def multiply(
    epilogue: Epilogue,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    aux: Tensor,
    transpose: bool = False,
    bias: Tensor | None = None,
) -> bool:
    """``out = b @ a``, or ``b @ a^T`` with ``transpose``, with an epilogue.

    All are contiguous matrices of one dtype of ``DTYPES`` on the current device.

    The first call of a shape measures the algorithms that the library proposes, so the choice can
    differ between runs. Under ``torch.use_deterministic_algorithms`` it is always the first. During
    the capture of a CUDA graph nothing can be measured: a new shape then gets the first, until a
    call outside of a capture measures it. Of a layer only the first few numbers of rows are
    measured.

    Args:
        epilogue: what happens to the sums.
        a: ``[K, N]``, or ``[N, K]`` with ``transpose``.
        b: ``[M, K]``.
        out: ``[M, N]``, written.
        aux: ``[M, N]``; written by GELU_AUX_BIAS, read by DGELU.
        transpose: use the transpose of a.
        bias: ``[N]``, read by GELU_AUX_BIAS.

    Returns:
        Whether it was launched. If not, the library has no algorithm for these tensors.

    Raises:
        RuntimeError: the library failed.
    """
    M, N = out.shape
    K = b.shape[1]
    # the library would read and write beyond smaller tensors
    assert a.shape == ((N, K) if transpose else (K, N)) and b.shape == (M, K)
    assert aux.shape == out.shape and (bias is None or bias.shape == (N,))
    assert all(t.dtype == out.dtype and t.is_contiguous() for t in (a, b, aux))
    alignments = (
        *map(_alignment, (a, b, out, aux)),
        0 if bias is None else _alignment(bias),
    )
    if 1 in alignments or N % 8 or K % 8:
        log_once(
            "widths or addresses that cuBLASLt's epilogues do not take: GELU is a pass of its own"
        )
        return False
    # the library's matrices have adjacent rows: it sees the transpose of each, and swaps factors
    shape = _Shape(out.get_device(), out.dtype, epilogue, N, M, K, transpose, alignments)
    addresses = (0 if bias is None else bias.data_ptr(), aux.data_ptr())
    plan = _plan_for(shape)
    launch = lambda index: plan.run(index, a, b, out, *addresses)
    index = _index(plan, launch)
    if index is None:
        return False
    launch(index)
    return True
