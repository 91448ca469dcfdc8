"""How cuBLASLt is called, on a CPU: a library of the same functions that multiplies with numpy."""

import ctypes
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sra_fast.ops import _backend, _cublaslt
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
BFLOAT = 14
NOT_SUPPORTED = 15


class Library:
    """The functions of cuBLASLt that are used, for fp16 in host memory.

    Handles are numbers. It proposes as many algorithms as ``proposals`` says, and records which run,
    and what was searched for.
    """

    def __init__(self, proposals):
        self.proposals = proposals
        self.numbers = itertools.count(1)
        self.objects = {}
        self.ran = []
        self.searched = []
        # by proposal: not 0 means that it does not run here
        self.states = {}
        self.statuses = {}
        self.search_status = 0
        self.dtype = HALF

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
        assert dtype == self.dtype
        return self.create(layout, (rows.value, columns.value, ld.value))

    def cublasLtMatmulPreferenceCreate(self, preference):
        return self.create(preference, {})

    def cublasLtMatmulPreferenceSetAttribute(self, preference, attribute, value, size):
        assert size.value == ctypes.sizeof(value._obj) == (8 if attribute == 1 else 4)
        self.objects[preference.value][attribute] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference):
        self.objects.pop(preference.value)
        return 0

    def cublasLtMatmulAlgoGetHeuristic(
        self, handle, description, a, b, c, d, preference, most, found, count
    ):
        assert most >= self.proposals
        asked = self.objects[preference.value]
        wanted = self.objects[description.value]
        assert asked[1] == 32 << 20 and asked[3] == 2
        # of A, B, C, D, and of the addresses that it was shown
        shown = (wanted["aux"], wanted.get("bias"))
        self.searched.append(([asked[i] for i in (5, 6, 7, 8)], shown))
        assert wanted["bias_type"] == self.dtype
        for i in range(self.proposals):
            found[i].algorithm.data[0] = i
            found[i].workspace_size = 16 * i
            found[i].state = self.states.get(i, 0)
        count._obj.value = self.proposals
        return self.search_status

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
        if self.dtype == BFLOAT or self.statuses.get(self.ran[-1]):
            return self.statuses.get(self.ran[-1], 0)
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
    fake.times = [2.0, 1.0, 1.5]
    fake.capturing = False
    monkeypatch.setattr(_cublaslt, "_library", fake)
    monkeypatch.setattr(_cublaslt, "_plans", {})
    monkeypatch.setattr(_cublaslt, "_lengths", Counter())
    monkeypatch.setattr(_cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
    monkeypatch.setattr(_backend, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0})
    )

    def milliseconds(launch, calls):
        launch()
        return fake.times[fake.ran[-1]]

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
    hidden, a = aligned(M, N), aligned(M, N)
    epilogue = Epilogue.GELU_AUX_BIAS
    assert multiply(epilogue, weight, x, hidden, aux=a, transpose=True, bias=bias)
    exact = F.linear(*(t.double() for t in (x, weight, bias)))
    torch.testing.assert_close(a, exact.half())
    torch.testing.assert_close(hidden, F.gelu(exact, approximate="tanh").half())

    # the next layer's input gradient, from a gradient [M, K] of its output
    weight = aligned(K, N)
    da = aligned(M, N)
    assert multiply(Epilogue.DGELU, weight, x, da, aux=a)
    wide = a.double().requires_grad_()
    F.gelu(wide, approximate="tanh").backward(x.double() @ weight.double())
    torch.testing.assert_close(da, wide.grad.half())


def product(M=8, K=16, N=24, aux=None, dtype=torch.float16):
    """fc2's input gradient; which algorithms ran."""
    weight, x, out = (t.to(dtype) for t in (aligned(K, N), aligned(M, K), aligned(M, N)))
    aux = aligned(M, N).to(dtype) if aux is None else aux
    ran = _cublaslt._library.ran
    before = len(ran)
    launched = multiply(Epilogue.DGELU, weight, x, out, aux=aux)
    return ran[before:] if launched else None


def test_the_fastest_algorithm_is_measured_once_per_shape(library):
    assert product() == [0, 1, 2, 1]
    assert product() == [1]
    # other rows are another shape; a little faster is not enough
    library.times = [1.0, 0.98, 0.99]
    assert product(16) == [0, 1, 2, 0]


def test_only_the_first_lengths_of_a_layer_are_measured(library):
    assert [len(product(8 * i)) for i in range(1, 7)] == [4, 4, 4, 4, 1, 1]
    # another layer is measured
    assert len(product(8, K=32)) == 4


def test_deterministic_programs_take_the_first(library, monkeypatch):
    assert product() == [0, 1, 2, 1]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert product() == [0] and product(16) == [0]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert product() == [1] and product(16) == [0, 1, 2, 1]


def test_a_capture_takes_the_first_until_it_can_be_measured(library):
    library.capturing = True
    assert product() == [0]
    library.capturing = False
    assert product() == [0, 1, 2, 1]
    library.capturing = True
    assert product() == [1]


def test_proposals_that_fail_are_left_out(library):
    library.statuses = {1: NOT_SUPPORTED}
    assert product() == [0, 1, 2, 2]
    library.statuses = dict.fromkeys(range(3), 13)
    assert product(16) is None and product(16) is None


def test_proposals_for_other_devices_are_left_out(library):
    library.states = {0: 8}
    assert product() == [1, 2, 1]


def test_without_an_algorithm_nothing_runs(library, caplog):
    library.search_status = NOT_SUPPORTED
    assert product() is None and product() is None and library.ran == []
    library.search_status = 0
    library.proposals = 0
    assert product(16) is None
    assert caplog.text.count("cuBLASLt has no algorithm for some products") == 1


def test_a_failed_search_is_logged(library, caplog):
    library.search_status = 7
    assert product() is None and "failed with status 7" in caplog.text


def test_what_it_cannot_take(library, caplog):
    # 20 columns, 20 rows of the weight, and a matrix that begins at a multiple of 2 bytes
    assert product(N=20) is None
    assert product(K=20) is None
    assert product(aux=aligned(8 * 24 + 1)[1:].view(8, 24)) is None
    assert library.searched == []
    assert caplog.text.count("GELU is a pass of its own") == 1


def test_searches_promise_the_least_alignment_of_their_plan(library):
    """What is found for addresses that are multiples of 128 may not run for others."""
    room = aligned(8 * 24 + 128)
    for offset in (64, 8, 128, 0):
        assert product(aux=room[offset:][: 8 * 24].view(8, 24))
    assert library.searched == [([256] * 4, (16, None)), ([256] * 4, (256, None))]

    x, weight, hidden, a = aligned(8, 16), aligned(24, 16), aligned(8, 24), aligned(8, 24)
    for offset in (32, 8, 0):
        bias = aligned(24 + 64)[offset:][:24]
        epilogue = Epilogue.GELU_AUX_BIAS
        assert multiply(epilogue, weight, x, hidden, aux=a, transpose=True, bias=bias)
    assert library.searched[2:] == [([256] * 4, (256, 16)), ([256] * 4, (256, 256))]


def test_matrices_of_other_alignments_are_searched_for_with_theirs(library):
    room = aligned(16 * 24 + 64)
    weights = [room[offset:][: 16 * 24].view(16, 24) for offset in (8, 0)]
    x, out, aux = aligned(8, 16), aligned(8, 24), aligned(8, 24)
    for weight in weights:
        assert multiply(Epilogue.DGELU, weight, x, out, aux=aux)
    assert [asked for asked, _ in library.searched] == [[16, 256, 256, 256], [256] * 4]


def test_bf16_is_another_shape_with_its_own_number(library):
    assert product() == [0, 1, 2, 1]
    library.dtype = BFLOAT
    room = torch.empty(8 * 24 + 128, dtype=torch.bfloat16)
    begin = -room.data_ptr() % 256 // 2
    aux = room[begin : begin + 8 * 24].view(8, 24)
    # casts may lie anywhere: what counts is that it is searched for again
    assert product(aux=aux, dtype=torch.bfloat16) == [0, 1, 2, 1]


def test_wrong_shapes_and_dtypes_never_reach_the_library(library):
    out = aligned(8, 24)
    for weight, x in (
        (aligned(24, 16), aligned(8, 16)),
        (aligned(16, 24), aligned(8, 8)),
        (aligned(16, 24).float(), aligned(8, 16)),
    ):
        with pytest.raises(AssertionError):
            multiply(Epilogue.DGELU, weight, x, out, aux=out)
    assert library.searched == []


def test_a_failure_names_the_function(library):
    assert product() == [0, 1, 2, 1]
    library.statuses = {1: 13}
    with pytest.raises(RuntimeError, match="cublasLtMatmul of cuBLASLt failed with status 13"):
        product()


def test_a_missing_library_is_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _cublaslt._load() is None and not caplog.text
    monkeypatch.setattr(torch.version, "cuda", "999.0")
    assert _cublaslt._load() is None and "libcublasLt.so.999" in caplog.text
