"""How cuBLASLt is called, on a CPU: a library of the same functions that multiplies with numpy."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sra_fast.ops import _cublaslt
from sra_fast.ops._cublaslt import Epilogue, multiply

# what cublasLt.h calls the attributes, with the bytes that each must have
ATTRIBUTES = {
    3: ("transpose_a", 4),
    7: ("epilogue", 4),
    8: ("bias", 8),
    11: ("aux", 8),
    12: ("aux_ld", 8),
    26: ("bias_type", 4),
}
HALF = 2


class Library:
    """The functions of cuBLASLt that are used, for fp16 in host memory.

    Handles are numbers. It proposes as many algorithms as ``proposals`` says, and records which run.
    """

    def __init__(self, proposals):
        self.proposals = proposals
        self.numbers = itertools.count(1)
        self.objects = {}
        self.ran = []
        self.alignments = None

    def create(self, reference, value):
        reference._obj.value = next(self.numbers)
        self.objects[reference._obj.value] = value
        return 0

    def cublasLtCreate(self, handle):
        return self.create(handle, "handle")

    def cublasLtMatmulDescCreate(self, description, compute, scale):
        assert (compute, scale) == (68, 0)
        return self.create(description, {})

    def cublasLtMatmulDescSetAttribute(self, description, attribute, value, size):
        name, expected = ATTRIBUTES[attribute]
        assert size.value == expected == ctypes.sizeof(value._obj)
        self.objects[description.value][name] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, layout, dtype, rows, columns, ld):
        assert dtype == HALF
        return self.create(layout, (rows.value, columns.value, ld.value))

    def cublasLtMatmulPreferenceCreate(self, preference):
        return self.create(preference, {})

    def cublasLtMatmulPreferenceSetAttribute(self, preference, attribute, value, size):
        assert size.value == ctypes.sizeof(value._obj) == (8 if attribute == 1 else 4)
        self.objects[preference.value][attribute] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference):
        asked = self.objects.pop(preference.value)
        self.alignments = [asked[i] for i in (5, 6, 7, 8)]
        return 0

    def cublasLtMatmulAlgoGetHeuristic(
        self, handle, description, a, b, c, d, preference, most, found, count
    ):
        assert most >= self.proposals
        for i in range(self.proposals):
            found[i].algorithm.data[0] = i
            found[i].workspace_size = 16 * i
        count._obj.value = self.proposals
        return 0

    def matrix(self, address, layout):
        """A matrix in host memory, whose columns begin ``ld`` elements apart."""
        rows, columns, ld = self.objects[layout.value]
        at = address if isinstance(address, int) else address.value
        buffer = (ctypes.c_uint16 * (ld * columns)).from_address(at)
        return np.frombuffer(buffer, np.float16).reshape(columns, ld).T[:rows]

    def cublasLtMatmul(
        self, handle, description, alpha, a, la, b, lb, beta, c, lc, d, ld, algorithm, work, size,
        stream,
    ):  # fmt: skip
        assert (alpha._obj.value, beta._obj.value) == (1.0, 0.0)
        self.ran.append(algorithm._obj.data[0])
        assert size.value == 16 * self.ran[-1]
        wanted = self.objects[description.value]
        left = self.matrix(a, la).astype(np.float64)
        left = left.T if wanted["transpose_a"] else left
        sums = torch.from_numpy(left @ self.matrix(b, lb).astype(np.float64))
        out = self.matrix(d, ld)
        # the second matrix is laid out as the result
        rows, columns, _ = self.objects[ld.value]
        aux_layout = ctypes.c_void_p()
        sizes = (ctypes.c_uint64(n) for n in (rows, columns, wanted["aux_ld"]))
        self.cublasLtMatrixLayoutCreate(ctypes.byref(aux_layout), HALF, *sizes)
        aux = self.matrix(wanted["aux"], aux_layout)
        if wanted["epilogue"] == 164:
            bias = (ctypes.c_uint16 * rows).from_address(wanted["bias"])
            sums += torch.from_numpy(np.frombuffer(bias, np.float16).astype(np.float64))[:, None]
            aux[:] = sums.numpy()
            out[:] = F.gelu(sums, approximate="tanh").numpy()
        else:
            assert wanted["epilogue"] == 192
            x = torch.from_numpy(aux.astype(np.float64)).requires_grad_()
            F.gelu(x, approximate="tanh").backward(sums)
            out[:] = x.grad.numpy()
        return 0


@pytest.fixture
def library(monkeypatch):
    """One that proposes three algorithms, of which the second is the fastest."""
    fake = Library(3)
    monkeypatch.setattr(_cublaslt, "_library", fake)
    monkeypatch.setattr(_cublaslt, "_plans", {})
    monkeypatch.setattr(_cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0})
    )

    def milliseconds(launch, calls):
        launch()
        return fake.times[fake.ran[-1]]

    fake.times = [2.0, 1.0, 1.5]
    monkeypatch.setattr(_cublaslt, "milliseconds", milliseconds)
    return fake


def aligned(*size):
    """Random numbers at a multiple of 256 bytes."""
    count = math.prod(size)
    room = torch.randn(count + 128).half()
    begin = -room.data_ptr() % 256 // 2
    return room[begin : begin + count].view(size)


@pytest.mark.parametrize("M, K, N", [(8, 16, 24), (13, 24, 8), (1, 8, 40)])
def test_both_products(library, M, K, N):
    x, weight, bias = aligned(M, K), aligned(N, K), aligned(N)
    hidden, a = torch.empty(2, M, N).half().unbind()
    epilogue = Epilogue.GELU_AUX_BIAS
    assert multiply(epilogue, weight, x, hidden, aux=a, transpose=True, bias=bias)
    exact = F.linear(*(t.double() for t in (x, weight, bias)))
    torch.testing.assert_close(a, exact.half())
    torch.testing.assert_close(hidden, F.gelu(exact, approximate="tanh").half())

    # the next layer's input gradient, from a gradient [M, K] of its output
    weight = aligned(K, N)
    da = torch.empty(M, N).half()
    assert multiply(Epilogue.DGELU, weight, x, da, aux=a)
    wide = a.double().requires_grad_()
    F.gelu(wide, approximate="tanh").backward(x.double() @ weight.double())
    torch.testing.assert_close(da, wide.grad.half())


def product(M=8, aux=None):
    weight, x = aligned(16, 24), aligned(M, 16)
    out = aligned(M, 24)
    return multiply(Epilogue.DGELU, weight, x, out, aux=aligned(M, 24) if aux is None else aux)


def test_the_fastest_algorithm_is_measured_once_per_shape(library):
    assert product() and library.ran == [0, 1, 2, 1]
    assert product() and library.ran[4:] == [1]
    # other rows are another shape; a little faster is not enough
    library.times = [1.0, 0.98, 0.99]
    assert product(16) and library.ran[5:] == [0, 1, 2, 0]


@pytest.mark.parametrize("why", ["capture", "deterministic"])
def test_without_measuring_it_is_the_first(library, why, monkeypatch):
    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert product() and library.ran == [0]


def test_without_an_algorithm_nothing_runs(library):
    library.proposals = 0
    assert not product() and not product() and library.ran == []


def test_what_it_cannot_take(library):
    out = torch.empty(8, 20).half()
    # 20 columns, and a matrix that begins at a multiple of 2 bytes
    assert not multiply(Epilogue.DGELU, aligned(16, 20), aligned(8, 16), out, aux=out)
    assert not product(aux=aligned(8 * 24 + 1)[1:].view(8, 24))
    assert library.ran == []


def test_alignments_are_part_of_the_shape(library):
    """An algorithm for addresses that are multiples of 256 may not run for others."""
    room = aligned(8 * 24 + 64)
    for offset in (0, 8, 32, 0):
        assert product(aux=room[offset:][: 8 * 24].view(8, 24))
    assert len(_cublaslt._plans) == 2
    assert all(each % 16 == 0 for each in library.alignments)


def test_a_failure_names_the_function(library, monkeypatch):
    monkeypatch.setattr(library, "cublasLtMatmul", lambda *args: 13)
    with pytest.raises(RuntimeError, match="cublasLtMatmul of cuBLASLt failed with status 13"):
        product()


def test_a_missing_library_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "999.0")
    assert _cublaslt._load() is None and "libcublasLt.so.999" in caplog.text
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _cublaslt._load() is None
