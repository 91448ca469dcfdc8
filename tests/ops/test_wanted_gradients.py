"""Gradients that are not wanted are not computed, and their outputs require none; batched ones."""

import pytest
import torch
from conftest import DEVICE
from rows import OpLog

from sra_fast import ops

B, T, D, K = 2, 4, 16, 32


def half_block(op, backend="triton", **options):
    """The operator as a function of x, y, y_bias, gate, shift, scale and its layers' tensors."""

    def fn(x, y, y_bias, gate, shift, scale, *layers):
        residual = (y, gate, y_bias)
        return op(x, shift, scale, *layers, residual=residual, backend=backend, **options)

    return fn


def make(op):
    torch.manual_seed(0)
    shapes = [(B, T, D), (B, T, D), (D,), (B, D), (B, D), (B, D), (K, D), (K,), (D, K), (D,)]
    shapes = shapes[:8] if op is ops.adaln_linear else shapes
    return [torch.randn(*shape, device=DEVICE) for shape in shapes]


def leaves_of(inputs, wanted):
    return [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]


MM = ("aten::mm", "aten::addmm")
LAYERS = [
    # who wants a gradient, and the products of the backward pass
    (ops.adaln_linear, (6,), 1),
    (ops.adaln_linear, (7,), 0),
    (ops.adaln_linear, (4, 6), 2),
    (ops.adaln_mlp, (6,), 2),
    (ops.adaln_mlp, (7,), 1),
    (ops.adaln_mlp, (8,), 1),
    (ops.adaln_mlp, (9,), 0),
    (ops.adaln_mlp, (6, 8), 3),
    (ops.adaln_mlp, (3, 8), 3),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op, wanted, products", LAYERS)
def test_no_product_for_a_gradient_that_nobody_wants(op, wanted, products, recompute, compiled):
    inputs = make(op)
    results = []
    for backend in ("triton", "torch"):
        fn = half_block(op, backend, recompute=recompute)
        if compiled and backend == "triton":
            torch.compiler.reset()
            fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
        leaves = leaves_of(inputs, wanted)
        x_new, out = fn(*leaves)
        assert x_new.requires_grad == any(i < 4 for i in wanted)
        loss = out.square().sum()
        if x_new.requires_grad:
            loss = loss + x_new.square().sum()
        with OpLog() as log:
            loss.backward()
        results.append([t.grad for t in leaves])
        if backend == "triton" and not compiled:
            # an activation that was not kept comes out of the pass after one product
            again = recompute and op is ops.adaln_mlp and wanted == (8,)
            assert sum(name in MM for name in log.names) == products + again
            if max(wanted) > 5 and min(wanted) > 5 and not recompute:
                assert not any("adaln" in name for name in log.names)
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_stream_is_differentiable_only_if_something_in_it_is():
    stream, other = (torch.randn(B, T, D, device=DEVICE) for _ in range(2))
    image = torch.randn(B, D, device=DEVICE)
    token = torch.randn(B, T, D, device=DEVICE)

    def promised(vectors, **options):
        """Whether x' requires a gradient if x, y, the gate, the shift or the scale does."""
        found = []
        for i in range(5):
            inputs = leaves_of([stream, other, vectors, vectors, vectors], (i,))
            found.append(
                ops.gated_residual_adaln(*inputs, backend="triton", **options)[0].requires_grad
            )
        return found

    assert promised(image) == promised(token) == [True] * 3 + [False] * 2
    assert promised(image, second=(image, image)) == [True] * 3 + [False] * 2


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)])
def test_queries_and_keys_are_by_themselves(wanted):
    q, k = (torch.randn(B, T, 2, 8, device=DEVICE) for _ in range(2))
    weights = [torch.randn(8, device=DEVICE) for _ in range(2)]
    results = []
    for backend in ("triton", "torch"):
        leaves = leaves_of([q, k, *weights], wanted)
        q_weight, k_weight = leaves[2:]
        outs = ops.qk_norm_rope(
            *leaves[:2], q_weight=q_weight, k_weight=k_weight, norm="rms", backend=backend
        )
        expected = [any(i in wanted for i in own) for own in ((0, 2), (1, 3))]
        assert [out.requires_grad for out in outs] == expected
        sum(out.square().sum() for out in outs if out.requires_grad).backward()
        results.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", [ops.adaln_linear, ops.adaln_mlp])
def test_several_gradients_at_once(op, recompute):
    """``is_grads_batched`` runs the backward under vmap."""
    inputs = make(op)
    leaves = leaves_of(inputs, range(len(inputs)))
    out = half_block(op, recompute=recompute)(*leaves)[1]
    grads = torch.randn(3, *out.shape, device=DEVICE)
    found = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for mine, theirs in zip(found, one, strict=True):
            torch.testing.assert_close(mine[i], theirs, atol=1e-4, rtol=1e-4)
