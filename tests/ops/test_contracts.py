"""Promises of every operator: missing derivatives raise, launches follow the tensors' device, and
layouts, NaN, autocast and reused addresses change no result.
"""

import contextlib
import shutil

import pytest
import torch
from rows import OpLog, as_tuple
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sra_fast import ops

torch.manual_seed(0)
X = torch.randn(2, 3, 64)
Y = torch.randn(2, 3, 64)
VECTORS = torch.randn(3, 2, 64)
TABLES = torch.randn(2, 3, 8)
# of all the tensors that may want a gradient, then of the one through which every gradient passes
# a kernel
FULL = {
    "adaln": lambda x, y, g, s, c: ops.adaln(x, s, c, backend="triton"),
    "gated_residual": lambda x, y, g, s, c: ops.gated_residual(x, y, g, backend="triton"),
    "gated_residual_adaln": lambda x, y, g, s, c: ops.gated_residual_adaln(
        x, y, g, s, c, backend="triton"
    ),
    "gated_residual_norm": lambda x, y, g, s, c: ops.gated_residual_norm(x, y, g, backend="triton"),
    "two modulations": lambda x, y, g, s, c: ops.gated_residual_adaln(
        x, y, g, s, c, second=(c, s), backend="triton"
    ),
    "per token": lambda x, y, g, s, c: ops.gated_residual_adaln(
        x, y, y.sin(), s[:, None] * y, c, norm_weight=g[0], backend="triton"
    ),
    "align_distance": lambda x, y, g, s, c: ops.align_distance(x, y, "smooth_l1", backend="triton"),
    # four heads; the last result is that of x
    "qk_norm_rope": lambda x, y, g, s, c: ops.qk_norm_rope(
        y.unflatten(2, (4, 16)),
        x.unflatten(2, (4, 16)),
        *TABLES,
        q_weight=g[0, :16],
        k_weight=s[0, :16],
        backend="triton",
    ),
}
W1, W2 = torch.randn(96, 64) / 8, torch.randn(64, 96) / 8
# with products, whose dtypes are autocast's to choose
LAYERS = {
    "adaln_linear": lambda x, y, g, s, c: ops.adaln_linear(
        x, s, c, W1, residual=(y, g), recompute=True, backend="triton"
    ),
    "adaln_mlp": lambda x, y, g, s, c: ops.adaln_mlp(
        x, s, c, W1, None, W2, residual=(y, g), recompute=True, backend="triton"
    ),
}
CALLS = {name: lambda x, fn=fn: as_tuple(fn(x, Y, *VECTORS))[-1] for name, fn in FULL.items()} | {
    "gated_residual": lambda y: ops.gated_residual(X, y, VECTORS[0] * y.mean(1), backend="triton"),
    "gated_residual_norm": lambda y: ops.gated_residual_norm(X, y, VECTORS[0], backend="triton"),
}
WITHOUT_BACKWARD = {
    "noise_pair": lambda t: ops.noise_pair(t[:, None], t[:, None], t, t, backend="triton"),
    "ema_update_": lambda x: ops.ema_update_([x], [x.clone()], 0.9, backend="triton"),
    "adamw_ema_": lambda x: ops.adamw_ema_(
        x, x.clone(), x.clone(), x.clone(), 1, lr=0.1, backend="triton"
    ),
}
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the tensors here lie on the host"
)


@needs_interpreter
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("constant", [True, False], ids=["sum", "square"])
def test_second_derivative_raises(name, constant):
    x = X.clone().requires_grad_()
    out = CALLS[name](x)
    loss = out.sum() if constant else out.square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss + first.square().sum(), x)


@needs_interpreter
def test_first_derivative_under_create_graph_is_right():
    x = X.clone().requires_grad_()
    loss = CALLS["adaln"](x).square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x, create_graph=True)[0], plain)


@needs_interpreter
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, v: ops.adaln(x, v, v, backend="triton"),
        lambda x, v: ops.gated_residual(x, x, v, backend="triton"),
        # also as both modulations
        lambda x, v: sum(ops.gated_residual_adaln(x, x, v, v, v, second=(v, v), backend="triton")),
    ],
    ids=["adaln", "gated_residual", "gated_residual_adaln"],
)
def test_one_tensor_as_several_inputs_compiles(fn):
    x = X.clone().requires_grad_()
    v = VECTORS[0].clone().requires_grad_()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, v).square().sum(), [x, v]) for f in (fn, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-5)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_raises(name):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        CALLS[name](forward_ad.make_dual(X, X))


@needs_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_without_gradients_the_operator_is_called_directly(name, monkeypatch):
    """The same numbers without an autograd.Function."""
    x = X.clone().requires_grad_()
    expected = CALLS[name](x)
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        assert torch.equal(CALLS[name](x), expected)
    assert torch.equal(CALLS[name](X), expected)


@needs_interpreter
@pytest.mark.parametrize("name", [*CALLS, *WITHOUT_BACKWARD])
def test_every_launch_is_on_the_tensors_device(name, monkeypatch):
    """The device is set once per launch; the launchers do not know about devices."""
    entered = []
    original = torch.cuda.device_of.__init__

    def spy(self, tensor):
        entered.append(tensor)
        original(self, tensor)

    monkeypatch.setattr(torch.cuda.device_of, "__init__", spy)
    if name in CALLS:
        CALLS[name](X.clone().requires_grad_()).sum().backward()
    else:
        WITHOUT_BACKWARD[name](torch.ones(7))
    assert len(entered) == (2 if name in CALLS else 1)


def test_attention_follows_autocast():
    """Under CUDA's autocast normalized queries and keys stay fp32 while values are in half
    precision.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 2, 5, 2, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert ops.attention(q, k, v.bfloat16()).dtype == torch.bfloat16


def gradients(fn, dtype=torch.float32, context=contextlib.nullcontext):
    """Outputs and gradients of a call on X, Y and VECTORS in a dtype."""
    leaves = [t.to(dtype).requires_grad_() for t in (X.clone(), Y.clone(), *VECTORS.clone())]
    with context():
        out = as_tuple(fn(*leaves))
    torch.autograd.backward(out, [o.detach().cos() for o in out])
    return [*out, *(t.grad for t in leaves)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@needs_interpreter
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", FULL | LAYERS)
def test_checkpointing(name, reentrant):
    fn = (FULL | LAYERS)[name]
    checkpointed = lambda *a: checkpoint(fn, *a, use_reentrant=reentrant)
    assert_same(gradients(checkpointed), gradients(fn))


@needs_interpreter
@pytest.mark.parametrize("name", LAYERS)
def test_every_launch_of_a_layer_is_on_the_tensors_device(name, monkeypatch):
    entered = []
    original = torch.cuda.device_of.__init__
    monkeypatch.setattr(
        torch.cuda.device_of,
        "__init__",
        lambda self, tensor: entered.append(tensor) or original(self, tensor),
    )
    LAYERS[name](X.clone().requires_grad_(), Y, *VECTORS)[1].sum().backward()
    assert len(entered) == {"adaln_linear": 2, "adaln_mlp": 3}[name]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_autocast_changes_nothing(name, dtype):
    """The dtypes of outputs and gradients follow the inputs, whatever autocast would choose."""
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    assert_same(gradients(FULL[name], dtype, autocast), gradients(FULL[name], dtype))


@needs_interpreter
@pytest.mark.parametrize("name", WITHOUT_BACKWARD)
def test_autocast_changes_nothing_in_place(name):
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        x = torch.linspace(0, 1, 7)
        with context:
            out = WITHOUT_BACKWARD[name](x)
        results.append([x, *(out or ())])
    assert_same(*results)


@needs_interpreter
@pytest.mark.parametrize(
    "name, saved",
    [
        ("adaln", [0, 4]),
        ("gated_residual", [1, 2]),
        ("gated_residual_adaln", [1, 2, 4, "output"]),
        ("gated_residual_norm", [1, 2]),
        ("two modulations", [1, 2, 3, 4, "output"]),
        ("per token", [1, 4, "output"]),
    ],
)
def test_a_saved_tensor_that_changes_before_the_backward_raises(name, saved):
    for which in saved:
        leaves = [t.clone().requires_grad_() for t in (X, Y, *VECTORS)]
        inputs = [t * 1 for t in leaves]
        out = as_tuple(FULL[name](*inputs))
        with torch.no_grad():
            (out[0] if which == "output" else inputs[which]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out[-1].sum().backward()


@needs_interpreter
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore:dynamo_pgo", "ignore:.torch.jit")
def test_inductor_keeps_the_strides_of_inputs():
    """Transposed intermediates: without the tag inductor drops the copy and hands the launcher
    permuted rows.
    """
    a = torch.randn(2, 64, 16)
    v = torch.randn(2, 64)
    fn = lambda a: ops.gated_residual(
        (a * 2).transpose(1, 2), a.sin().transpose(1, 2), v, backend="triton"
    )
    # a cached graph knows nothing of the operators' tags
    with torch._inductor.config.patch(
        force_disable_caches=True, cpp_cache_precompile_headers=False, **{"cpp.simdlen": 1}
    ):
        torch.testing.assert_close(
            torch.compile(fn, fullgraph=True)(a), fn(a), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_statistics_are_kept_in_fp32(norm, device):
    """Also for half-precision rows, and of the rounded residual."""
    x, y, (gate, shift, scale) = (t.to(device, torch.float16) for t in (X, Y, VECTORS))
    args = shift, scale, None, 1e-6, norm == "rms"
    x_new, _, *fused = torch.ops.sra_fast.gated_residual_adaln_fwd(x, y, None, gate, *args)
    for rows, (mean, rstd) in ((x_new, fused), (x, torch.ops.sra_fast.adaln_fwd(x, *args)[1:])):
        exact = rows.double()
        if norm == "layer":
            torch.testing.assert_close(mean.double(), exact.mean(2), atol=1e-6, rtol=1e-6)
            exact = exact - exact.mean(2, keepdim=True)
        torch.testing.assert_close(
            rstd.double(), exact.square().mean(2).rsqrt(), atol=1e-6, rtol=1e-5
        )


@needs_interpreter
def test_a_nan_stays_one_in_the_distance_and_its_gradient():
    x = X.clone()
    x[0, 0, 0] = float("nan")
    x.requires_grad_()
    loss = ops.align_distance(x, Y, "smooth_l1", backend="triton").sum()
    loss.backward()
    assert loss.isnan() and x.grad[0, 0, 0].isnan() and x.grad.isnan().sum() == 1


@needs_interpreter
def test_ema_plans_tell_params_from_copies():
    """Three averages without copies, then two with: the same addresses in the same order."""
    a, b, c = (torch.zeros(64) for _ in range(3))
    d, e, f = (torch.ones(64) for _ in range(3))
    ops.ema_update_([a, b, c], [d, e, f], 0.5, backend="triton")
    half = [torch.zeros(64, dtype=torch.bfloat16) for _ in range(2)]
    ops.ema_update_([a, b], [d, e], 0.5, copies=half, backend="triton")
    assert a.eq(0.75).all() and c.eq(0.5).all() and half[0].eq(0.75).all()


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_bias_of_any_layout(device, layout):
    x, y, bias = (torch.randn(*shape, device=device) for shape in ((2, 3, 64), (2, 3, 64), (128,)))
    bias = bias[::2] if layout == "strided" else bias[:1].expand(64)
    gate, shift, scale = torch.randn(2, 192, device=device).chunk(3, dim=1)
    out = ops.gated_residual_adaln(x, y, gate, shift, scale, bias=bias, backend="triton")
    for a, b in zip(
        out,
        ops.gated_residual_adaln(x, y, gate, shift, scale, bias=bias, backend="torch"),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    out, expected = (
        ops.gated_residual(x, y, gate, bias=bias, backend=b) for b in ("triton", "torch")
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


# the most elements that each kernel's registers hold, and a call over so many
LARGEST = {
    "adaln": (
        8192,
        lambda D: ops.adaln(torch.ones(1, 2, D), *torch.ones(2, 1, D), backend="triton"),
    ),
    "gated_residual": (
        8192,
        lambda D: ops.gated_residual(*torch.ones(2, 1, 2, D), torch.ones(1, D), backend="triton"),
    ),
    "l1": (16384, lambda D: ops.align_distance(*torch.ones(2, 1, 2, D), "l1", backend="triton")),
    "cosine_token": (
        1024,
        lambda T: ops.align_distance(*torch.ones(2, 1, T, 2), "cosine_token", backend="triton"),
    ),
}


@needs_interpreter
@pytest.mark.parametrize("name", LARGEST)
def test_the_reference_takes_what_no_kernel_holds_and_says_so_once(name, caplog):
    limit, call = LARGEST[name]
    for size, kernel in ((limit, True), (limit + 8, False), (limit + 8, False)):
        with OpLog() as log:
            call(size)
        assert any(op.startswith("sra_fast") for op in log.names) == kernel
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{name} runs unfused") and str(limit) in said and str(limit + 8) in said
