"""A linear layer with GELU in its epilogue, on CUDA without a gradient; two operators everywhere
else.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_kernel_close
from rows import OpLog
from torch._subclasses import FakeTensorMode

from sra_fast import ops
from sra_fast.ops.linear_gelu import _product, linear_gelu_ref

module = sys.modules["sra_fast.ops.linear_gelu"]  # the function has the module's name


def inputs(*lead, K=48, N=80, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return [
        t.to(device, dtype)
        for t in (torch.randn(*lead, K), torch.randn(N, K) / K**0.5, torch.randn(N))
    ]


@pytest.mark.parametrize("lead", [(7,), (2, 5), (1,), ()], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_forward(dtype, lead, device):
    """Against fp64; on a GPU this is the epilogue, which rounds once where two operators round
    twice.
    """
    given = inputs(*lead, dtype=dtype, device=device)
    out = ops.linear_gelu(*given)
    assert out.dtype == dtype and out.shape == (*lead, 80)
    exact = F.gelu(F.linear(*(t.double() for t in given)), approximate="tanh")
    assert_kernel_close(
        out, linear_gelu_ref(*given), exact, floor=4e-3 if dtype != torch.float64 else 1e-12
    )


def test_gradients(device):
    given = [t.requires_grad_() for t in inputs(2, 5, device=device)]
    upstream = torch.randn(2, 5, 80, device=device)
    ours = torch.autograd.grad(ops.linear_gelu(*given), given, upstream)
    expected = torch.autograd.grad(F.gelu(F.linear(*given), approximate="tanh"), given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_product_adds_the_bias_and_multiplies_by_the_transpose():
    """On a CPU its GELU is the exact one, which differs by 5e-4 at most."""
    given = inputs(6)
    torch.testing.assert_close(_product(*given), linear_gelu_ref(*given), atol=6e-4, rtol=0)


@pytest.mark.parametrize(
    "grad, backend, fused", [(False, "auto", True), (True, "auto", False), (False, "torch", False)]
)
def test_epilogue_where_no_gradient_is_wanted(grad, backend, fused, monkeypatch):
    """Fake tensors stand for those of a GPU."""
    monkeypatch.setattr(module, "linear_gelu_ref", lambda *given: "two operators")
    with FakeTensorMode(), torch.device("cuda:0"), torch.set_grad_enabled(grad):
        given = (
            torch.empty(2, 5, 48),
            torch.nn.Parameter(torch.empty(80, 48)),
            torch.nn.Parameter(torch.empty(80)),
        )
        with OpLog() as log:
            out = ops.linear_gelu(*given, backend=backend)
    assert (
        (out.shape == (2, 5, 80) and "sra_fast::linear_gelu" in log.names)
        if fused
        else out == "two operators"
    )


def test_autocast_chooses_the_dtypes(device):
    x, weight, bias = inputs(3, device=device)
    with (
        torch.autocast(device if isinstance(device, str) else device.type, torch.bfloat16),
        torch.no_grad(),
    ):
        assert ops.linear_gelu(x.bfloat16(), weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[:, :47], w, b),
        lambda x, w, b: (x, w.t(), b),
        lambda x, w, b: (x, w, b[:79]),
        lambda x, w, b: (x.bfloat16(), w, b),
        lambda x, w, b: (x.long(), w.long(), b.long()),
        lambda x, w, b: (x, w.to("meta"), b),
        lambda x, w, b: (x, w[0], b),
    ],
)
def test_bad_input_is_named(change):
    with pytest.raises(
        ValueError, match=r"expected x \[\.\.\., K\], weight \[N, K\] and bias \[N\]"
    ):
        ops.linear_gelu(*change(*inputs(4)))
