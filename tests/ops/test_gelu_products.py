"""Products with GELU or its derivative in their epilogue: cuBLASLt on a GPU, two operators elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close

from sra_fast.ops import _cublaslt
from sra_fast.ops.gelu_products import (
    linear_dgelu,
    linear_dgelu_ref,
    linear_gelu_keep,
    linear_gelu_keep_ref,
)

CUDA = DEVICE == "cuda"
DTYPES = [torch.bfloat16, torch.float16]
# rows, inputs and outputs of the layer; the last is SiT-XL/2's fc1 for 4 images, on a CPU, which
# multiplies half precision slowly, for a quarter of one
SHAPES = [(8, 16, 32), (13, 48, 80), (256, 384, 1536), (1024 if CUDA else 64, 1152, 4608)]


def inputs(M, K, N, dtype):
    torch.manual_seed(0)
    tensors = (torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N))
    return [t.to(DEVICE, dtype) for t in tensors]


@pytest.fixture
def launched(monkeypatch):
    """What ``multiply`` has answered: on a GPU every product must be the library's."""
    answers = []
    multiply = _cublaslt.multiply

    def spy(*args, **kw):
        answers.append(multiply(*args, **kw))
        return answers[-1]

    monkeypatch.setattr(_cublaslt, "multiply", spy)
    yield answers
    assert answers == [True] * len(answers) and bool(answers) == CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_forward(M, K, N, dtype, launched):
    given = inputs(M, K, N, dtype)
    exact = linear_gelu_keep_ref(*(t.double() for t in given))
    theirs = linear_gelu_keep_ref(*given)
    for ours, naive, wanted in zip(linear_gelu_keep(*given), theirs, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == (M, N)
        assert_kernel_close(ours, naive, wanted, floor=4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_derivative(M, K, N, dtype, launched):
    """The layer after GELU has K outputs here."""
    dout, weight, _ = inputs(M, K, N, dtype)
    weight = weight.t().contiguous()
    a = (torch.randn(M, N) * 2).to(DEVICE, dtype)
    ours = linear_dgelu(dout, weight, a)
    wide = a.double().requires_grad_()
    F.gelu(wide, approximate="tanh").backward(dout.double() @ weight.double())
    assert ours.dtype == dtype
    assert_kernel_close(ours, linear_dgelu_ref(dout, weight, a), wide.grad, floor=4e-3)


def test_operator_registration():
    x, weight, bias = inputs(16, 32, 48, torch.bfloat16)
    torch.library.opcheck(linear_gelu_keep, (x, weight, bias))
    a = torch.randn(16, 48).to(DEVICE, torch.bfloat16)
    torch.library.opcheck(linear_dgelu, (x, weight.t().contiguous(), a))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("N, offset", [(30, 0), (32, 1)])
def test_what_the_library_cannot_take_is_two_operators(N, offset, monkeypatch):
    """A width that is no multiple of 8, and a bias that begins at no multiple of 16 bytes."""
    answers = []
    multiply = _cublaslt.multiply
    monkeypatch.setattr(
        _cublaslt, "multiply", lambda *args, **kw: answers.append(multiply(*args, **kw))
    )
    x, weight, bias = inputs(8, 16, N, torch.bfloat16)
    bias = torch.cat([bias[:offset], bias])[offset:]
    ours = linear_gelu_keep(x, weight, bias)
    assert answers == [False]
    for a, b in zip(ours, linear_gelu_keep_ref(x, weight, bias), strict=True):
        assert torch.equal(a, b)


def test_where_it_is_available(monkeypatch):
    half, single = (torch.empty(1, dtype=dtype, device=DEVICE) for dtype in (torch.half, None))
    assert _cublaslt.available(half) == CUDA and not _cublaslt.available(single)
    monkeypatch.setenv("SRA_FAST_CUBLASLT", "0")
    assert not _cublaslt.available(half)
    monkeypatch.setenv("SRA_FAST_CUBLASLT", "false")
    with pytest.raises(ValueError, match="SRA_FAST_CUBLASLT must be 0 or 1, got 'false'"):
        _cublaslt.available(half)
