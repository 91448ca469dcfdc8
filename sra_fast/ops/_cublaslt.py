"""Matrix products of cuBLASLt with epilogues that PyTorch does not offer.

The library is the one that PyTorch has loaded, and it is called through its C interface: nothing is
compiled, so every installation on CUDA has it. ``SRA_FAST_CUBLASLT=0`` switches it off.
Constants and structures are those of cublasLt.h, the same in CUDA 12 and 13.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

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
# attributes of a product (cublasLtMatmulDescAttributes_t)
_TRANSPOSE_A = 3
_EPILOGUE = 7
_BIAS_POINTER = 8
_AUX_POINTER = 11
_AUX_LD = 12
_BIAS_TYPE = 26
# attributes of a search (cublasLtMatmulPreferenceAttributes_t); alignments of A, B, C and D follow
_MAX_WORKSPACE = 1
_ALIGNMENT_A = 5
# what NVIDIA recommends for Hopper
_WORKSPACE_BYTES = 32 << 20
# algorithms that the library proposes for a product, the one it expects to be fastest first
_PROPOSALS = 8
# how much faster than the first another must be: noise may not decide which one runs
_MARGIN = 0.97
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
    """cuBLASLt, or None where PyTorch has none."""
    if torch.version.cuda is None:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        log.warning("GELU stays a pass of its own: %s", error)
        return None


# found when this file is imported: a compiler that traces ``available`` cannot load a library
_library = _load()
_found = _library is not None


def available(x: Tensor) -> bool:
    """Whether the products of such tensors can have these epilogues; also asked of tensors without
    data, while a compiler traces.
    """
    wanted = os.environ.get("SRA_FAST_CUBLASLT", "1") != "0"
    return wanted and _found and x.is_cuda and x.dtype in DTYPES


def _call(name: str, *args) -> None:
    """Call a function of the library.

    Raises:
        RuntimeError: it failed.
    """
    status = getattr(_library, name)(*args)
    if status:
        raise RuntimeError(f"{name} of cuBLASLt failed with status {status}")


@functools.cache
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

    ``alignments`` are those of A, B, C and D in bytes, then those of the second matrix and of the
    bias, which the library reads off their addresses.
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

    ``chosen`` is the index of the one that runs, None if there is none.
    """

    def __init__(self, shape: _Shape, bias: int, aux: int):
        self.lock = threading.Lock()
        self.shape = shape
        dtype = DTYPES[shape.dtype]
        self.description = ctypes.c_void_p()
        _call("cublasLtMatmulDescCreate", ctypes.byref(self.description), _COMPUTE_32F, _FLOAT32)
        self._describe(_TRANSPOSE_A, ctypes.c_int32(shape.transpose_a))
        self._describe(_EPILOGUE, ctypes.c_int32(shape.epilogue))
        self._describe(_BIAS_TYPE, ctypes.c_int32(dtype))
        self._describe(_AUX_LD, ctypes.c_int64(shape.m))
        # the search looks at the alignment of both
        self._point(bias, aux)

        a = (shape.k, shape.m) if shape.transpose_a else (shape.m, shape.k)
        self.a = _layout(dtype, *a)
        self.b = _layout(dtype, shape.k, shape.n)
        self.d = _layout(dtype, shape.m, shape.n)
        self.proposals = self._search()
        self.chosen = 0 if self.proposals else None

    def _describe(self, attribute: int, value) -> None:
        _set("cublasLtMatmulDescSetAttribute", self.description, attribute, value)

    def _point(self, bias: int, aux: int) -> None:
        """Set the addresses of bias and second matrix; 0 for none."""
        self._describe(_BIAS_POINTER, ctypes.c_void_p(bias))
        self._describe(_AUX_POINTER, ctypes.c_void_p(aux))

    def _search(self) -> list[_Heuristic]:
        """What the library proposes."""
        assert _library is not None
        preference = ctypes.c_void_p()
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        set_preference = functools.partial(_set, "cublasLtMatmulPreferenceSetAttribute", preference)
        set_preference(_MAX_WORKSPACE, ctypes.c_size_t(_WORKSPACE_BYTES))
        for i, alignment in enumerate(self.shape.alignments[:4]):
            set_preference(_ALIGNMENT_A + i, ctypes.c_uint32(alignment))
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
        proposed = found[: count.value] if status == 0 else []
        return [each for each in proposed if each.state == 0]

    def choose(self, launch: Callable[[int], None]) -> None:
        """Keep the fastest proposal.

        Args:
            launch: runs the product with the proposal of an index.
        """
        times = [milliseconds(lambda i=i: launch(i), calls=5) for i in range(len(self.proposals))]
        best = times.index(min(times))
        if times[best] < _MARGIN * times[0]:
            self.chosen = best
        listed = ", ".join(f"{1e3 * ms:.0f}" for ms in times)
        shape = (self.shape.n, self.shape.m, self.shape.k)
        log.info(
            "cuBLASLt: %s %s: %s of %s us", self.shape.epilogue.name, shape, self.chosen, listed
        )

    def run(self, index: int, a: Tensor, b: Tensor, d: Tensor, bias: int, aux: int) -> None:
        """Launch a proposal in the current stream."""
        proposal = self.proposals[index]
        workspace = d.new_empty(max(proposal.workspace_size, 1), dtype=torch.uint8)
        one = ctypes.c_float(1.0)
        zero = ctypes.c_float(0.0)
        address = lambda t: ctypes.c_void_p(t.data_ptr())
        device = self.shape.device
        # the description is shared by all threads, among them autograd's
        with self.lock:
            self._point(bias, aux)
            _call(
                "cublasLtMatmul",
                _handle(device),
                self.description,
                ctypes.byref(one),
                *(address(a), self.a),
                *(address(b), self.b),
                ctypes.byref(zero),
                *(address(d), self.d),
                *(address(d), self.d),
                ctypes.byref(proposal.algorithm),
                address(workspace),
                ctypes.c_size_t(proposal.workspace_size),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
            )


_plans: dict[_Shape, _Plan] = {}


def _alignment(t: Tensor) -> int:
    """How the address is aligned, in bytes: 256, 16, or 0 for less.

    Not finer, because every combination of alignments is measured by itself.
    """
    for alignment in (_BEST_ALIGNMENT, _LEAST_ALIGNMENT):
        if t.data_ptr() % alignment == 0:
            return alignment
    return 0


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

    All are contiguous matrices of one dtype of ``DTYPES`` on the current device. The first call of a
    shape measures the algorithms that the library proposes, so the choice can differ between runs.
    Under ``torch.use_deterministic_algorithms``, and where a CUDA graph is captured, it is the first.

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
    given = [a, b, out, out, aux] if bias is None else [a, b, out, out, aux, bias]
    alignments = tuple(map(_alignment, given))
    if min(alignments) == 0 or N % 8 or K % 8:
        return False
    # the library's matrices have adjacent rows: it sees the transpose of each, and swaps factors
    device = out.get_device()
    shape = _Shape(device, out.dtype, epilogue, N, M, K, transpose, alignments)
    addresses = (0 if bias is None else bias.data_ptr(), aux.data_ptr())
    plan = _plans.get(shape)
    if plan is None:
        plan = _Plan(shape, *addresses)
        fixed = torch.are_deterministic_algorithms_enabled()
        if len(plan.proposals) > 1 and not fixed and not torch.cuda.is_current_stream_capturing():
            plan.choose(lambda index: plan.run(index, a, b, out, *addresses))
        # another thread may have made the same plan: both are right
        _plans[shape] = plan
    if plan.chosen is None:
        return False
    plan.run(plan.chosen, a, b, out, *addresses)
    return True
