"""Attention: against its definition, groups and masks, keys of other tokens and of fewer heads, and
how the fastest backend is chosen.
"""

import contextlib
import re
import threading
import types

import pytest
import torch
from conftest import DEVICE
from torch._subclasses import FakeTensorMode

from sra_fast.ops import attention as public
from sra_fast.ops.attention import attention, attention_ref

# the function of the same name hides the module behind `sra_fast.ops.attention`
module = __import__("sys").modules["sra_fast.ops.attention"]


def make(B=2, T=9, H=3, d=72, dtype=torch.float32):
    """Views of a fused qkv projection, and a gradient."""
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, 3, H, d, device=DEVICE, dtype=dtype).unbind(2)
    return (q, k, v), torch.randn(B, T, H, d, device=DEVICE, dtype=dtype)


def definition(q, k, v, groups=None, mask=None):
    """With einsum; r of the H queries' heads share one of the g heads of keys. A query without keys
    gets zeros.
    """
    B, T, H, d = q.shape
    q = q.reshape(B, T, k.shape[2], -1, d)
    scores = torch.einsum("bigrd,bjgd->bgrij", q, k).flatten(1, 2) / d**0.5
    if groups is not None:
        mask = groups[:, None, :, None] == groups[:, None, None, :]
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        bias = (
            mask if mask.is_floating_point() else torch.zeros_like(scores).where(mask, -torch.inf)
        )
        scores = scores + bias
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights = weights.unflatten(1, (k.shape[2], -1))
    return torch.einsum("bgrij,bjgd->bigrd", weights, v).reshape(B, T, H, d)


def run(fn, inputs, dout):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("backend", [None, "auto", "torch", "math"])
@pytest.mark.parametrize("d", [64, 72])
def test_forward_and_gradients(d, backend):
    inputs, dout = make(d=d)
    truth = run(definition, [t.double() for t in inputs], dout.double())
    found = run(lambda *qkv: attention(*qkv, backend=backend), inputs, dout)
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("d", [64, 72])
def test_backends_in_bf16(d, backend):
    """Every backend that a training may choose is as exact as a few roundings allow."""
    inputs, dout = make(T=256, d=d, dtype=torch.bfloat16)
    truth = run(definition, [t.double() for t in inputs], dout.double())
    try:
        ours = run(lambda *a: attention(*a, backend=backend), inputs, dout)
    except RuntimeError as error:
        assert str(error).startswith(f"attention: backend '{backend}' cannot run")
        pytest.skip(str(error).partition("\n")[0])
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=2**-6 * c.abs().max().item(), rtol=0)


def test_groups_do_not_see_each_other():
    inputs, dout = make(T=8)
    groups = torch.tensor([[0, 1, 0, 0, 2, 1, 0, 0], [5, 5, 5, 5, 5, 5, 5, 7]], device=DEVICE)
    truth = run(lambda *a: definition(*a, groups), [t.double() for t in inputs], dout.double())
    found = run(lambda *qkv: attention(*qkv, groups=groups), inputs, dout)
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    # a group on its own gives the same rows
    alone = [t[:1, groups[0] == 0] for t in inputs]
    torch.testing.assert_close(
        attention(*inputs, groups=groups)[:1, groups[0] == 0], attention_ref(*alone)
    )


def masks(B, H, T, S):
    """One of every kind, True for about half of the keys."""
    full = torch.rand(B, H, T, S, device=DEVICE) > 0.5
    # no query is without keys
    full[..., 0] = True
    padding = torch.arange(S, device=DEVICE) < torch.tensor([[S], [2]], device=DEVICE)
    bias = torch.randn(1, H, T, S, device=DEVICE)
    return {
        "none": None,
        "padding": padding,
        "heads": full,
        "broadcast": full[:1, :1],
        "bias": bias,
        "bias and -inf": bias.where(full, -torch.inf),
        "float padding": torch.zeros(B, S, device=DEVICE).where(padding, -torch.inf),
    }


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("kind", masks(2, 1, 1, 3))
@pytest.mark.parametrize("H_kv, S", [(4, 5), (2, 9), (2, 5), (1, 6)])
def test_other_keys_fewer_heads_and_masks(H_kv, S, kind, layout):
    """Against fp64, with the gradient of a mask of floats."""
    q, dout = torch.randn(2, 2, 9, 4, 16, device=DEVICE)
    k, v = torch.randn(2, S, 2, H_kv, 16, device=DEVICE).unbind(2)
    mask = masks(2, 4, 9, S)[kind]
    has_gradient = mask is not None and mask.is_floating_point()
    inputs = [q, k, v] + [mask] * has_gradient
    turn = (lambda x: x) if layout == "bthd" else (lambda x: x.transpose(1, 2))

    def ours(q, k, v, bias=mask):
        return turn(attention(turn(q), turn(k), turn(v), layout=layout, mask=bias))

    def exact(q, k, v, bias=mask):
        return definition(q, k, v, mask=bias)

    found = run(ours, inputs, dout)
    truth = run(exact, [t.double() for t in inputs], dout.double())
    for a, c in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=1e-5, rtol=1e-5)
    ref = attention_ref(turn(q), turn(k), turn(v), layout=layout, mask=mask)
    torch.testing.assert_close(turn(ref), found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("floats", [False, True], ids=["bool", "floats"])
def test_a_query_without_keys_gets_zeros(floats, backend):
    """And gives no gradient, neither to itself nor to the keys."""
    inputs, dout = make()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=DEVICE)
    mask[1, 0, 4] = False
    mask = torch.zeros(mask.shape, device=DEVICE).where(mask, -torch.inf) if floats else mask
    fn = lambda *a: attention(*a, mask=mask, backend=backend)
    found = run(fn, inputs, dout)
    assert not found[0][1, 4].any() and not found[1][1, 4].any()
    truth = run(lambda *a: definition(*a, mask=mask), [t.double() for t in inputs], dout.double())
    for a, c in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=1e-5, rtol=1e-5)


def test_a_backend_without_grouped_heads_gets_them_repeated(monkeypatch):
    """Neighbouring heads of queries share a head of keys; PyTorch's own order is the same."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    q, dout = torch.randn(2, 2, 9, 4, 16, device=DEVICE)
    k, v = torch.randn(2, 5, 2, 2, 16, device=DEVICE).unbind(2)
    truth = run(definition, [t.double() for t in (q, k, v)], dout.double())
    for backend in ("efficient", "math"):
        found = run(lambda *a, name=backend: module._run(name, *a, None), (q, k, v), dout)
        for a, c in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), c, atol=1e-5, rtol=1e-5)


def test_a_mask_follows_the_dtype_of_the_queries():
    """A bias kept in fp32 beside queries in half precision, and under autocast."""
    (q, k, v), _ = make(dtype=torch.bfloat16)
    bias = torch.randn(1, 3, 9, 9, device=DEVICE)
    expected = definition(*(t.double() for t in (q, k, v)), mask=bias.bfloat16().double())
    out = attention(q, k, v, mask=bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)
    with torch.autocast(DEVICE, torch.bfloat16):
        again = attention(q.float(), k.float(), v.float(), mask=bias)
    assert torch.equal(again, out)


def test_fp64_gradcheck():
    inputs, _ = make(1, 3, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(attention, [t.detach().requires_grad_() for t in inputs])


def test_compiles_without_graph_breaks():
    inputs, dout = make()
    groups = torch.arange(9, device=DEVICE).expand(2, 9) % 2
    mask = groups[:, None, None] == 0
    options = ({"groups": groups}, {"mask": mask}, {"backend": "math"}, {"layout": "bhtd"})
    for kwargs in ({}, *options, {"dynamic": True}):
        # sizes that are symbols while tracing
        dynamic = kwargs.pop("dynamic", None)
        fn = lambda *a, kwargs=kwargs: attention(*a, **kwargs).sin()
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        # on a GPU the compiled function may take another backend than the one that is measured
        for a, b in zip(run(compiled, inputs, dout), run(fn, inputs, dout), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def choose(q, mask, training, k=None):
    """The chosen backend if queries, keys and values have the same layout."""
    k = q if k is None else k
    return module._choose(q, k, k, mask, training)


@pytest.fixture
def fake_clock(monkeypatch):
    """Measuring without a device: times by name, and a log of what was measured in which thread."""
    times = {"sdpa": 3.0, "cudnn": 2.0, "flash": 1.0, "efficient": 4.0}
    measured = []

    def run_named(name, q, k, v, mask, runs=None):
        measured.append((name, threading.get_ident()))
        if times[name] is None:
            raise RuntimeError("No available kernel")
        return definition(q, k, v, mask=mask)

    def milliseconds(run):
        run()
        return times[measured[-1][0]]

    monkeypatch.setattr(module, "_run", run_named)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_measured", {})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return types.SimpleNamespace(times=times, measured=measured)


def test_the_fastest_is_chosen_once_per_shape(fake_clock):
    (q, _, _), _ = make()
    assert choose(q, None, True) == "flash"
    count = len(fake_clock.measured)
    fake_clock.times["flash"] = 9.0
    assert choose(q, None, True) == "flash" and len(fake_clock.measured) == count
    # a batch size of the same power of two is the same shape; a larger one, inference, a mask,
    # another head dimension, other keys and another dtype are not
    assert choose(q[[0, 1, 0]], None, True) == "flash"
    assert choose(q[[0, 1] * 4], None, True) == "cudnn"
    assert choose(q.double(), None, True) == "cudnn"
    assert choose(q, None, False) == "cudnn"
    assert choose(q[..., :64], None, True) == "cudnn"
    assert choose(q, None, True, k=q[:, :5]) == "cudnn"
    assert choose(q, None, True, k=q[:, :, :1]) == "cudnn"


def test_the_fifth_length_takes_the_choice_of_the_nearest(fake_clock, caplog):
    """A program with many lengths does not measure at each; another kind of call has its own."""
    q = torch.randn(2, 100, 3, 72, device=DEVICE)
    fastest = {8: "flash", 20: "cudnn", 50: "efficient", 90: "sdpa"}
    for T, name in fastest.items():
        fake_clock.times.update(dict.fromkeys(fake_clock.times, 9.0))
        fake_clock.times[name] = 0.5
        assert choose(q[:, :T], None, True) == name
    # of a length that was measured another batch size is, too
    fake_clock.times["flash"] = 0.1
    assert choose(q[:1, :90], None, True) == "flash"
    count = len(fake_clock.measured)
    nearest = {5: "flash", 10: "flash", 18: "cudnn", 40: "efficient", 99: "sdpa"}
    for T, name in nearest.items():
        with caplog.at_level("INFO", logger="sra_fast"):
            assert choose(q[:, :T], None, True) == name
        assert f"attention: {name} for [2, {T}, 3, 72]" in caplog.text
        # it ran once, to see that it can, and is remembered
        assert choose(q[:, :T], None, True) == name
    assert [name for name, _ in fake_clock.measured[count:]] == [*nearest.values()]
    # keys of another number are another length: none is nearer than T = 20
    assert choose(q[:, :20], None, True, k=q[:, :22]) == "cudnn"
    # the nearest choice refuses a length
    fake_clock.times["cudnn"] = None
    assert choose(q[:, :21], None, True) == "sdpa"
    assert choose(q[:, :21], None, False) == "flash", "inference is measured by itself"
    assert choose(q[:, :21, :1], None, True) == "flash", "and so is another number of heads"


def test_without_data_nothing_is_measured(fake_clock):
    """Fake tensors and those inside a transform: PyTorch picks."""
    (q, _, _), _ = make()
    with FakeTensorMode():
        assert choose(torch.empty(q.shape, device=DEVICE), None, True) == "sdpa"
    chosen = []
    torch.vmap(lambda q: (chosen.append(choose(q, None, False)), q)[1])(q[None])
    assert chosen == ["sdpa"] and not fake_clock.measured
    assert choose(q, None, False) == "flash"


def test_the_choice_knows_the_kind_of_mask(fake_clock):
    """Its dtype, what it is broadcast over and whether it wants a gradient; not its values."""
    (q, _, _), _ = make()
    mask = torch.rand(2, 1, 9, 9, device=DEVICE) > 0.5
    kinds = [None, mask, mask[:, :, :1], mask[:1], mask.float(), mask.float().requires_grad_()]
    for kind in kinds:
        count = len(fake_clock.measured)
        assert choose(q, kind, True) == "flash"
        assert len(fake_clock.measured) > count, "a new kind is measured"
    count = len(fake_clock.measured)
    assert choose(q, ~mask, True) == "flash" and len(fake_clock.measured) == count
    assert kinds[-1].grad is None
    # the gradient of the mask is part of what is timed
    inputs = [x.detach().requires_grad_() for x in (q, q, q)]
    dout = torch.randn(18, 216, device=DEVICE)
    timed = module._timed_step("sdpa", inputs, kinds[-1], dout, training=True)
    assert timed[-1].shape == mask.shape and timed[-1].any() and len(timed) == 4
    assert len(module._timed_step("sdpa", inputs, mask, dout, training=True)) == 3


def test_what_cannot_run_is_passed_over(fake_clock, caplog):
    (q, _, _), _ = make()
    fake_clock.times.update(flash=None, cudnn=None)
    with caplog.at_level("INFO", logger="sra_fast"):
        assert choose(q, None, True) == "sdpa"
    assert "flash cannot run [2, 9, 3, 72] torch.float32: No available kernel" in caplog.text
    fake_clock.times.update(dict.fromkeys(fake_clock.times))
    assert choose(q, None, False) == "sdpa"


def test_measuring_leaves_no_trace(fake_clock):
    """Checkpointing and exact resumption depend on the random state and on the saved tensors:
    measuring changes neither.
    """
    (q, _, _), _ = make()
    state = torch.get_rng_state()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        choose(q.requires_grad_(), None, True)
    assert torch.equal(state, torch.get_rng_state()) and not packed
    assert {thread for _, thread in fake_clock.measured}.isdisjoint({threading.get_ident()})


def test_a_backward_pass_is_no_time_to_measure(fake_clock):
    """The measurement's backward would need the thread of the running one: a reentrant checkpoint
    would hang.
    """
    (q, _, _), _ = make()
    chosen = []
    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda grad: chosen.append(choose(q, None, True)))
    x.backward()
    assert chosen == ["sdpa"] and not fake_clock.measured
    assert choose(q, None, True) == "flash", "what was not measured is measured later"


def test_the_choice_is_read_while_compiling(fake_clock):
    """Known shapes keep their backend under torch.compile; PyTorch picks for unknown ones, and
    nothing is measured.
    """
    (q, _, _), _ = make()
    fn = torch.compile(lambda q: (q, choose(q, None, False)), fullgraph=True, backend="aot_eager")
    assert fn(q)[1] == "sdpa" and not fake_clock.measured
    choose(q, None, False)
    torch._dynamo.reset()
    assert fn(q)[1] == "flash"
    # a mask is part of what is known
    mask = torch.rand(2, 1, 9, 9, device=DEVICE) > 0.5
    masked = lambda q, mask: (q, choose(q, mask, False))
    masked = torch.compile(masked, fullgraph=True, backend="aot_eager")
    assert masked(q, mask)[1] == "sdpa"
    choose(q, ~mask, False)
    torch._dynamo.reset()
    assert masked(q, mask)[1] == "flash"
    module._chosen.update(dict.fromkeys(module._chosen, "fa2"))
    torch._dynamo.reset()
    assert fn(q)[1] == "sdpa", "a package is no part of a compiled graph"
    assert choose(q, None, False) == "fa2"


def test_the_device_is_timed_not_the_host(monkeypatch):
    """The device is busy before the first event, and nothing waits for it until the last call of a
    round is queued.
    """
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def query(self):
            # the first round begins too early
            return log.count("busy") == 1

        def elapsed_time(self, later):
            return 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    cycles = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: (cycles.append(n), log.append("busy")))
    assert module.milliseconds(lambda: log.append("call"), calls=3, rounds=2) == 10.0
    a_round = ["wait", "busy", "event", "call", "call", "call", "event", "wait"]
    assert log == ["call"] * 3 + a_round * 3
    assert cycles == [cycles[0], 2 * cycles[0], 2 * cycles[0]]


def test_what_is_timed_is_laid_out_as_in_a_block(monkeypatch):
    """The inputs are views of one projection.

    The results are dense rows of tokens, copied if a backend returns another order.
    """
    qkv = torch.randn(2, 9, 3, 4, 8, device=DEVICE)
    q, k, v = qkv.unbind(2)
    alike = module._random_like(q, torch.Generator(DEVICE).manual_seed(0))
    assert alike.stride() == q.stride() and alike.shape == q.shape and 0.5 < alike.std() < 1.5
    expanded = module._random_like(
        k[:, :, :1].expand(-1, -1, 4, -1), torch.Generator(DEVICE).manual_seed(0)
    )
    assert expanded.is_contiguous() and expanded.std(2).min() > 0
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(18, 32, device=DEVICE)
    expected = torch.autograd.grad(
        module._run("sdpa", *inputs, None).flatten(2).flatten(0, 1), inputs, dout
    )

    def heads_first(
        name, q, k, v, mask, runs=None
    ):  # its output, and the gradients that autograd hands on, have heads before tokens
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    monkeypatch.setattr(module, "_run", heads_first)
    grads = module._timed_step("cudnn", inputs, None, dout, training=True)
    for grad, right in zip(grads, expected, strict=True):
        assert grad.is_contiguous() and grad.shape == (18, 32)
        torch.testing.assert_close(grad, right.flatten(2).flatten(0, 1))
    (out,) = module._timed_step("cudnn", inputs, None, dout, training=False)
    assert out.is_contiguous() and out.shape == (18, 32)


def test_backend_can_be_named(monkeypatch):
    used = []
    monkeypatch.setattr(module, "_run", lambda name, q, *rest: used.append(name) or q)
    inputs, _ = make()
    monkeypatch.delenv("SRA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SRA_FAST_ATTENTION", raising=False)
    public(*inputs, backend="math")
    monkeypatch.setenv("SRA_FAST_BACKEND", "torch")
    public(*inputs)
    monkeypatch.setenv("SRA_FAST_ATTENTION", "math")
    public(*inputs)
    public(*inputs, backend="flash")
    assert used == ["math", "sdpa", "math", "flash"]


def test_installed_packages_take_part(monkeypatch):
    """FlashAttention is found by import, only without a mask and in 16 bits; its tuple is
    unpacked. It takes fewer heads and other keys as they are.
    """
    fake = types.ModuleType("flash_attn_interface")
    fake.flash_attn_func = lambda q, k, v: (definition(q, k, v), None)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn_interface", fake)
    inputs, _ = make()
    torch.testing.assert_close(
        module._run("fa3", *inputs, None), attention_ref(*inputs), atol=1e-5, rtol=1e-5
    )
    q, k, v = inputs
    fewer = (q, k[:, :5, :1], v[:, :5, :1])
    torch.testing.assert_close(
        module._run("fa3", *fewer, None), definition(*fewer), atol=1e-5, rtol=1e-5
    )
    assert "fa3" in module._candidates(q.half(), None)
    assert "fa3" not in module._candidates(q, None)
    assert "fa3" not in module._candidates(q.half(), torch.zeros(2, 1, 9, 9))


def test_rejects_bad_input():
    (q, k, v), _ = make()
    groups = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    mask = torch.ones(2, 3, 9, 9, dtype=torch.bool, device=DEVICE)
    shapes = "expected q \\[B, T, H, d\\] and k, v of one shape \\[B, S, H_kv, d\\], H_kv a divisor"
    cases = [
        ((q, k[:1], v), {}, shapes + " of H, got \\[2, 9, 3, 72\\], \\[1, 9, 3, 72\\]"),
        ((q, k[:1], v[:1]), {}, shapes),
        ((q, k[:, :8], v), {}, shapes),
        ((q, k[:, :, :2], v[:, :, :2]), {}, shapes),
        ((q, k[:, :, :0], v[:, :, :0]), {}, shapes),
        ((q, k[..., :64], v[..., :64]), {}, shapes),
        ((q[0], k[0], v[0]), {}, "one shape"),
        ((q, k, v), {"groups": groups, "mask": mask}, "expected groups or mask, got both"),
        ((q, k[:, :5], v[:, :5]), {"groups": groups}, "as many keys as queries, got T = 9, S = 5"),
        ((q, k, v), {"mask": mask.long()}, "bool or floating-point, got .*int64"),
        (
            (q, k, v),
            {"mask": mask[..., :5]},
            "mask \\[B, S\\] = \\[2, 9\\] or .*got \\[2, 3, 9, 5\\]",
        ),
        ((q, k[:, :5], v[:, :5]), {"mask": mask}, "\\[B, H, T, S\\] = \\[2, 3, 9, 5\\]"),
        ((q, k, v), {"mask": mask[:, :2]}, "expected mask"),
        ((q, k, v), {"mask": mask[0]}, "expected mask"),
        ((q, k, v), {"mask": mask[..., :1]}, "expected mask"),
        ((q, k, v), {"mask": mask.to("meta")}, "every tensor on .*, got k, v, mask on"),
        ((q, k, v), {"mask": mask.tolist()}, "expected mask as a tensor, got list"),
        ((q, k.half(), v), {}, "one floating-point dtype"),
        ((q.long(), k.long(), v.long()), {}, "one floating-point dtype"),
        ((q, k.to("meta"), v), {}, "every tensor on"),
        ((q, k, v), {"groups": groups[:1]}, "expected groups \\[B, T\\] = \\[2, 9\\]"),
        ((q, k, v), {"groups": groups.float()}, "integers, got"),
        ((q, k, v), {"backend": "triton"}, "backend must be one of"),
        ((q, k, v), {"layout": "bhqd"}, "layout must be one of \\('bthd', 'bhtd'\\), got 'bhqd'"),
        ((q, k[:1], v), {"layout": "bhtd"}, "shape \\[B, H_kv, S, d\\], .*got \\[2, 9, 3, 72\\]"),
        # [2, 9] fits the tokens of the one layout and the heads of the other
        ((q, k, v), {"layout": "bhtd", "groups": groups}, "groups \\[B, T\\] = \\[2, 3\\]"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*args, **kwargs)


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    """A request by name is an error where "auto" would pass the backend over."""
    inputs, _ = make()
    half = [x.half() for x in inputs]
    groups = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    if DEVICE == "cpu":
        for name in ("cudnn", "efficient", "fa2"):
            with pytest.raises(
                ValueError, match=f"^attention: backend '{name}' needs CUDA tensors"
            ):
                attention(*half, backend=name)
    monkeypatch.setattr(module, "_CUDA_ONLY", ())
    monkeypatch.setattr(module, "_installed", lambda package, function: False)
    for given, options, message in (
        (half, {"groups": groups}, "takes no groups"),
        (half, {"mask": groups.bool()}, "takes no mask"),
        (inputs, {}, "needs bf16 or fp16 tensors, got torch.float32"),
        (half, {}, "needs the package flash_attn_interface"),
    ):
        with pytest.raises(ValueError, match=f"^attention: backend 'fa3' {message}"):
            attention(*given, backend="fa3", **options)

    def refuse(*args):
        raise RuntimeError("No available kernel.\nMore of it.")

    monkeypatch.setattr(module, "_run", refuse)
    message = r"^attention: backend 'flash' cannot run .*float32: No available kernel.$"
    with pytest.raises(RuntimeError, match=message):
        attention(*inputs, backend="flash")
    # the shape is the caller's
    for layout, names in (("bthd", "B, T, H, d"), ("bhtd", "B, H, T, d")):
        shape = rf"cannot run \[{names}\] = {re.escape(str([*inputs[0].shape]))} "
        with pytest.raises(RuntimeError, match=shape):
            attention(*inputs, backend="flash", layout=layout)


@pytest.mark.parametrize("grouped", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("backend", [None, "math"])
def test_heads_before_tokens(backend, grouped):
    """The layout changes what a dimension means, and no value: output and gradients have it too."""
    inputs, dout = make()
    groups = torch.arange(9, device=DEVICE).expand(2, 9) % 2 if grouped else None
    turn = lambda x: x.transpose(1, 2)
    fn = lambda *qkv: attention(*qkv, layout="bhtd", groups=groups, backend=backend)
    found = run(fn, [turn(x).contiguous() for x in inputs], turn(dout))
    truth = run(lambda *a: definition(*a, groups), [t.double() for t in inputs], dout.double())
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), turn(expected), atol=1e-5, rtol=1e-5)
    # the same shape in the other layout is another computation
    other = attention(*(turn(x).contiguous() for x in inputs), backend=backend)
    assert other.shape == found[0].shape and not torch.allclose(other, found[0], atol=1e-2)
    ref = attention_ref(*(turn(x) for x in inputs), layout="bhtd", groups=groups)
    torch.testing.assert_close(ref, turn(attention_ref(*inputs, groups=groups)))


def test_heads_before_tokens_copies_nothing(monkeypatch):
    """What PyTorch gets is the memory of the inputs, and its output is what comes back."""
    inputs = torch.randn(3, 2, 4, 9, 8, device=DEVICE).unbind(0)
    original = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(q, k, v, **options):
        out = original(q, k, v, **options)
        seen.extend([q, k, v, out])
        return out

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    out = attention(*inputs, layout="bhtd", backend="torch")
    for given, received in zip([*inputs, out], seen, strict=True):
        assert given.data_ptr() == received.data_ptr() and given.stride() == received.stride()


def test_the_choice_knows_the_order_in_memory(fake_clock):
    """Heads before tokens in memory is measured on its own; the layout's name alone is not."""
    (q, _, _), _ = make()
    assert choose(q, None, True) == "flash"
    fake_clock.times["flash"] = 9.0
    same = q.transpose(1, 2)
    assert module._choose(*module._tokens_first("bhtd", same, same, same), None, True) == "flash"
    other = module._tokens_first("bhtd", *[same.contiguous()] * 3)[0]
    assert other.shape == q.shape and choose(other, None, True) == "cudnn"
    # gradients are read in the order of their inputs
    inputs = [other.detach().requires_grad_() for _ in range(3)]
    dout = torch.randn(18, 216, device=DEVICE)
    for grad in module._timed_step("sdpa", inputs, None, dout, training=True):
        assert grad.is_contiguous() and grad.shape == (2 * 3, 9 * 72)
