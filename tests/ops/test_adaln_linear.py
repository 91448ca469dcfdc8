"""The two operators that begin a half-block: modulated norm with a linear layer, and with an MLP."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import DTYPES, OpLog, bitwise_equal, check_against_fp64, run

from sra_fast import ops

OPS = {"linear": ops.adaln_linear, "mlp": ops.adaln_mlp}
# parameters of the layers after the norm
LAYERS = {"linear": 2, "mlp": 4}


def make(op, B=2, T=5, D=72, K=96, dtype=torch.float32, groups=0, seed=0):
    """The tensors of a half-block: x, y, y_bias, gate, shift, scale (column slices), weights and
    biases. Also the group, and gradients of x' and of the output.
    """
    torch.manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    shape = (B, groups, 6 * D) if groups else (B, 6 * D)
    gate, shift, scale = randn(*shape).chunk(6, dim=-1)[2:5]
    layers = [randn(K, D) / D**0.5, randn(K), randn(D, K) / K**0.5, randn(D)][: LAYERS[op]]
    group = torch.randint(0, groups, (B, T), device=DEVICE) if groups else None
    return (
        [randn(B, T, D), randn(B, T, D), randn(D), gate, shift, scale, *layers],
        group,
        (randn(B, T, D), randn(B, T, len(layers[-1]))),
    )


def call(op, backend="triton", residual=True, **options):
    """The operator as a function of the tensors of ``make``."""

    def fn(x, y, y_bias, gate, shift, scale, *layers):
        pending = (y, gate, y_bias) if residual else None
        return OPS[op](x, shift, scale, *layers, residual=pending, backend=backend, **options)

    return fn


def naive(op, norm="layer", group=None):
    """What a DiT codebase writes, in the dtype it is given."""
    pick = lambda m: (
        m[:, None]
        if group is None
        else torch.stack([rows[g] for rows, g in zip(m, group, strict=True)])
    )

    def fn(x, y, y_bias, gate, shift, scale, w1, b1, w2=None, b2=None):
        x = x + pick(gate) * (y + y_bias)
        xhat = (
            F.layer_norm(x, x.shape[-1:], eps=1e-6)
            if norm == "layer"
            else F.rms_norm(x, x.shape[-1:], eps=1e-6)
        )
        out = F.linear(xhat * (1 + pick(scale)) + pick(shift), w1, b1)
        return x, out if w2 is None else F.linear(F.gelu(out, approximate="tanh"), w2, b2)

    return fn


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, D, K", [(2, 5, 64, 128), (1, 17, 72, 100), (3, 4, 1152, 48)])
@pytest.mark.parametrize("op", OPS)
def test_forward_and_gradients(op, B, T, D, K, dtype, recompute):
    inputs, _, douts = make(op, B, T, D, K, dtype)
    check_against_fp64(
        call(op, recompute=recompute), naive(op), call(op, "torch"), inputs, douts, floor=2e-5
    )


@pytest.mark.parametrize("recompute, residual", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts(parts, recompute, residual, dtype):
    """Queries, keys and values equal one output that is cut; one of the three is not used."""
    inputs, _, _ = make("linear", 2, 5, 72, 96, dtype)
    inputs[1:4] = inputs[1:4] if residual else [None] * 3
    douts = [
        torch.randn(2, 5, 96 // parts, 2, device=DEVICE, dtype=dtype)[..., 0],
        torch.randn(2, 5, 96 // parts, device=DEVICE, dtype=dtype),
    ]

    def cut(backend, **options):
        return lambda *t: call("linear", backend, residual, **options)(*t)[1][:2]

    whole = lambda *t: call("linear", "torch", residual)(*t)[1].chunk(parts, dim=2)[:2]
    check_against_fp64(
        cut("triton", recompute=recompute, parts=parts), whole, whole, inputs, douts, floor=2e-5
    )
    for a, b in zip(
        run(cut("torch", parts=parts), inputs, douts), run(whole, inputs, douts), strict=True
    ):
        assert torch.equal(a, b)


def test_parts_that_cannot_be():
    inputs, _, _ = make("linear", K=98)
    for parts in (0, 3, 4, 2.0, True):
        with pytest.raises(
            ValueError, match=f"parts 1, 2 or 3 that divide the 98 outputs of weight, got {parts}"
        ):
            call("linear", parts=parts)(*inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm, groups", [("rms", 0), ("layer", 2), ("rms", 3)])
@pytest.mark.parametrize("op", OPS)
def test_variants(op, norm, groups, recompute):
    inputs, group, douts = make(op, groups=groups)
    options = {"norm": norm, "group": group}
    check_against_fp64(
        call(op, recompute=recompute, **options),
        naive(op, norm, group),
        call(op, "torch", **options),
        inputs,
        douts,
        2e-5,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("op", OPS)
def test_without_residual(op, groups, recompute):
    """x' is x itself; another use of x adds its gradient."""
    inputs, group, douts = make(op, groups=groups)
    inputs[1:4] = None, None, None
    other_use = lambda t: t[0][..., : len(t[-1])].sum(2, True)
    fn = lambda backend, **options: (
        lambda *t: call(op, backend, residual=False, group=group, **options)(*t)[1] + other_use(t)
    )
    ours = run(fn("triton", recompute=recompute), inputs, douts[1:])
    theirs = run(fn("torch"), inputs, douts[1:], torch.float64)
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a.double(), c, atol=2e-5 * max(1.0, c.abs().max().item()), rtol=1e-5
        )
    assert call(op, residual=False, group=group)(*inputs)[0] is inputs[0]


def test_the_recomputed_norm_has_the_same_bits():
    """Every gradient then has the same bits too."""
    inputs, _, douts = make("linear", 2, 5, 1152)
    kept = run(call("linear", recompute=False), inputs, douts)
    assert bitwise_equal(kept, run(call("linear", recompute=True), inputs, douts))


@pytest.mark.parametrize(
    "op, recompute, arrays",
    [("linear", False, 3), ("linear", True, 2), ("mlp", False, 3 + 2 * 4), ("mlp", True, 2 + 4)],
)
def test_keeps_only_what_the_backward_needs(op, recompute, arrays):
    """In arrays [B, T, D]: x', y and h; GELU's input and output are four times as wide."""
    (x, *others), _, _ = make(op, 2, 6, 72, 4 * 72)
    leaves = [t.detach().requires_grad_() for t in (x, *others)]
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        call(op, recompute=recompute)(*leaves)
    given = {t.untyped_storage().data_ptr() for t in others}
    kept = sum(t.numel() for at, t in sizes.items() if at not in given or t.shape == x.shape)
    assert arrays * x.numel() <= kept <= arrays * x.numel() + 2 * 6 * 2


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_outputs_can_be_changed_in_place(op, backend):
    """As the output of a linear layer can."""
    inputs, _, (_, dout) = make(op)
    in_place = lambda *t: F.relu(call(op, backend)(*t)[1], inplace=True)
    for a, b in zip(
        run(in_place, inputs, [dout]),
        run(lambda *t: F.relu(call(op, backend)(*t)[1]), inputs, [dout]),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, arrays", [("linear", 2), ("mlp", 2 + 4)])
def test_frozen_weights_keep_no_inputs(op, arrays):
    (x, *others), _, _ = make(op, 2, 6, 72, 4 * 72)
    leaves = [t.detach().requires_grad_(i < 6) for i, t in enumerate((x, *others))]
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        call(op)(*leaves)
    given = {t.untyped_storage().data_ptr() for t in others}
    kept = sum(t.numel() for at, t in sizes.items() if at not in given or t.shape == x.shape)
    assert arrays * x.numel() <= kept <= arrays * x.numel() + 2 * 6 * 2


@pytest.mark.parametrize("op", OPS)
def test_frozen_weights_recompute_nothing(op):
    inputs, _, (dx, dout) = make(op)
    leaves = [t.detach().requires_grad_(i < 6) for i, t in enumerate(inputs)]
    with OpLog() as log:
        grads = torch.autograd.grad(call(op, recompute=True)(*leaves), leaves[:6], (dx, dout))
    expected = run(call(op), inputs, (dx, dout))[2:8]
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert sum(name in ("aten::mm", "aten::addmm") for name in log.names) == LAYERS[op], (
        "one forward and one backward per layer"
    )


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_one_output_unused(op, used):
    inputs, _, douts = make(op)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = call(op, backend, recompute=True)(*leaves)[used]
        results.append(
            torch.autograd.grad(
                out, leaves, douts[used].to(dtype), materialize_grads=True, allow_unused=True
            )
        )
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(
            a.double(), c, atol=2e-5 * max(1.0, c.abs().max().item()), rtol=1e-5
        )


@pytest.mark.parametrize("op", OPS)
def test_layouts(op):
    """Permuted, sliced and expanded inputs and output gradients."""
    inputs, _, douts = make(op)
    odd = lambda t: torch.stack([t, t], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]
    inputs[3] = inputs[3][:1].expand(2, 72)
    inputs[2] = inputs[2][:1].expand(72)
    strange = (
        [odd(inputs[0]), odd(inputs[1]), *inputs[2:]],
        (odd(douts[0]), douts[1][:, :1].expand_as(douts[1])),
    )
    dense = [t.contiguous() for t in strange[0]], [t.contiguous() for t in strange[1]]
    assert not any(t.is_contiguous() for t in (*strange[0][:4], *strange[1]))
    for a, b in zip(run(call(op), *strange), run(call(op), *dense), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_where_the_unfused_operators_run(op):
    """Without a gradient, with backend torch, in fp64, and under autocast, which then chooses the
    products' dtypes.
    """
    inputs, _, _ = make(op)
    grads = [t.detach().requires_grad_() for t in inputs]
    device = "cuda" if DEVICE == "cuda" else "cpu"
    with OpLog() as log, torch.no_grad():
        call(op)(*grads)
    assert "sra_fast::gated_residual_adaln_fwd" in log.names
    with OpLog() as log:
        call(op, "torch")(*grads)
    assert not any(name.startswith("sra_fast") for name in log.names)
    results = []
    for backend in ("triton", "torch"):
        with torch.autocast(device, torch.bfloat16):
            x_new, out = call(op, backend, recompute=True)(*grads)
        assert x_new.dtype == torch.float32 and out.dtype == torch.bfloat16
        results.append(torch.autograd.grad(out.float().square().sum(), grads[:1])[0])
    torch.testing.assert_close(*results, atol=0.05 * results[1].abs().max().item(), rtol=0)
    small, _, _ = make(op, 1, 2, 8, 6, torch.float64)
    assert torch.autograd.gradcheck(
        call(op, recompute=True), [t.detach().requires_grad_() for t in small]
    )


def test_recompute_without_the_kernels_is_logged(caplog):
    inputs, _, _ = make("mlp")
    for _ in range(2):
        call("mlp", "torch", recompute=True)(*[t.detach().requires_grad_() for t in inputs])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "recompute" in said and "kept" in said


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op, shape):
    inputs, _, douts = make(op, *shape)
    assert all(not grad.any() for grad in run(call(op, recompute=True), inputs, douts)[2:])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op, recompute):
    inputs, _, douts = make(op)
    compiled = torch.compile(call(op, recompute=recompute), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(call(op), inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_second_derivative_raises(op):
    inputs, _, _ = make(op)
    leaves = [t.detach().requires_grad_() for t in inputs]
    first = torch.autograd.grad(call(op)(*leaves)[1].square().sum(), leaves, create_graph=True)
    for i in (0, 6):  # of x and of the first weight
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(first[i].square().sum(), leaves[0], retain_graph=True)


@pytest.mark.parametrize("dynamic", [True, False])
def test_parts_compile_with_weights_as_arguments(dynamic):
    inputs, _, _ = make("linear")
    fn = lambda *t: call("linear", parts=3)(*t)[1][:2]
    douts = [torch.randn(2, 5, 32, device=DEVICE) for _ in range(2)]
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
