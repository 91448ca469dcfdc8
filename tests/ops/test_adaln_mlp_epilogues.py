"""``adaln_mlp`` in half precision with GELU in the products' epilogues, against the same without.

On a CPU the operators with the epilogues run as their definitions: what is tested there is when
they are called, and with what.
"""

import os

import pytest
import torch
from conftest import DEVICE
from rows import OpLog, run
from test_adaln_linear import call, make

from sra_fast.ops import _cublaslt

HALF = torch.float16
FORWARD = "sra_fast::linear_gelu_keep"
BACKWARD = "sra_fast::linear_dgelu"


@pytest.fixture(autouse=True)
def epilogues(monkeypatch):
    """As on a CUDA device."""
    if DEVICE == "cpu":
        monkeypatch.setattr(
            _cublaslt,
            "available",
            lambda x: x.dtype in _cublaslt.DTYPES and os.environ.get("SRA_FAST_CUBLASLT") != "0",
        )


@pytest.fixture
def alike(monkeypatch):
    """Asserts that ``fn()`` gives the same with the epilogues, which then run, and without."""

    def check(fn, expected):
        with OpLog() as log:
            ours = fn()
        assert [name for name in (FORWARD, BACKWARD) if name in log.names] == expected
        with monkeypatch.context() as patch, OpLog() as log:
            patch.setenv("SRA_FAST_CUBLASLT", "0")
            theirs = fn()
        assert FORWARD not in log.names and BACKWARD not in log.names
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            # one rounding less, and the order of the bias's sum
            largest = b.float().abs().max().item()
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4e-3 * max(largest, 1e-3))

    return check


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_recomputed_needs_the_pass_over_gelu(recompute, alike):
    inputs, _, douts = make("mlp", dtype=HALF)
    expected = [FORWARD] if recompute else [FORWARD, BACKWARD]
    alike(lambda: run(call("mlp", recompute=recompute), inputs, douts), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mask", range(16))
def test_frozen_layers(mask, recompute, alike):
    """Every combination of the four parameters that want a gradient."""
    inputs, _, douts = make("mlp", dtype=HALF)

    def gradients():
        wanted = [i < 6 or bool(mask >> (i - 6) & 1) for i in range(len(inputs))]
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        out = call("mlp", recompute=recompute)(*leaves)
        return torch.autograd.grad(out, [t for t in leaves if t.requires_grad], douts)

    # GELU's output is read by the gradient of the second weight alone
    keeps = not recompute or not mask & 4
    alike(gradients, [FORWARD, BACKWARD] if keeps else [FORWARD])


def test_without_the_first_bias(alike):
    inputs, _, douts = make("mlp", dtype=HALF)
    inputs[7] = None
    alike(lambda: run(call("mlp"), inputs, douts), [BACKWARD])


def test_below_an_fp32_stream(alike):
    """The layers have their own dtype."""
    inputs, _, douts = make("mlp")
    mixed = [t.to(HALF) if i >= 6 else t for i, t in enumerate(inputs)]
    alike(lambda: run(call("mlp"), mixed, douts), [FORWARD, BACKWARD])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used, alike):
    inputs, _, douts = make("mlp", dtype=HALF)

    def gradients():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call("mlp")(*leaves)[used]
        return torch.autograd.grad(
            out, leaves, douts[used], materialize_grads=True, allow_unused=True
        )

    alike(gradients, [FORWARD, BACKWARD])


def test_layouts(alike):
    """Transposed weights, an expanded bias, and an expanded gradient of the output."""
    inputs, _, (dx, dout) = make("mlp", dtype=HALF)
    transposed = lambda t: t.t().contiguous().t()
    w1, b1, w2, b2 = inputs[6:]
    strange = [*inputs[:6], transposed(w1), b1[:1].expand(len(b1)), transposed(w2), b2]
    douts = (dx, dout[:, :1].expand_as(dout))
    alike(lambda: run(call("mlp"), strange, douts), [FORWARD, BACKWARD])
    dense = [t.contiguous() for t in strange], [t.contiguous() for t in douts]
    for a, b in zip(run(call("mlp"), strange, douts), run(call("mlp"), *dense), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3 * b.abs().max().item(), rtol=0)


def test_keeps_the_same_tensors(monkeypatch):
    """The second output of the first product is GELU's input, which the backward keeps anyway."""
    inputs, _, _ = make("mlp", 2, 6, 72, 4 * 72, dtype=HALF)

    def kept():
        leaves = [t.detach().requires_grad_() for t in inputs]
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            call("mlp")(*leaves)
        return sorted(t.untyped_storage().nbytes() for t in sizes.values())

    ours = kept()
    monkeypatch.setenv("SRA_FAST_CUBLASLT", "0")
    assert ours == kept()


def test_a_graph_that_runs_backward_twice():
    inputs, _, douts = make("mlp", dtype=HALF)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call("mlp")(*leaves)
    first = torch.autograd.grad(out, leaves, douts, retain_graph=True)
    copies = [t.clone() for t in first]
    for t in first:
        t.fill_(7)
    for a, b in zip(torch.autograd.grad(out, leaves, douts), copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_without_graph_breaks(recompute):
    inputs, _, douts = make("mlp", dtype=HALF)
    eager = call("mlp", recompute=recompute)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(eager, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_second_derivative_raises():
    inputs, _, _ = make("mlp", dtype=HALF)
    leaves = [t.detach().requires_grad_() for t in inputs]
    first = torch.autograd.grad(call("mlp")(*leaves)[1].square().sum(), leaves, create_graph=True)
    for i in (0, 6, 7, 8, 9):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(first[i].square().sum(), leaves[0], retain_graph=True)
