"""Attention inside runs of tokens: against its definition with a mask, the products that it takes,
slices and variable-length kernels, and how the fastest is chosen.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import OpLog
from test_attention import definition, fake_clock, make, run  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.ops import _attention_varlen as varlen
from sra_fast.ops.attention import attention, attention_ref

# the function of the same name hides the module behind `sra_fast.ops.attention`
module = sys.modules["sra_fast.ops.attention"]

# of nine tokens and three images
SEGMENTS = {
    "two": (2, 7),
    "a list": [4, 3, 2],
    "of one length": (3, 3, 3),
    "single tokens": (1,) * 9,
    "the same for each": [(2, 7)] * 3,
    "of each": [(2, 7), (3, 3, 3), (2, 7)],
    "one run here, many there": [[9], [1] * 9, [5, 4]],
    "the longest later": [(4, 5), (2, 7), (3, 6)],
}
needs_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="the kernel itself runs on a GPU")


def same_run(segments, B):
    """``[B, 1, T, T]``: whether two tokens are in one run."""
    each = segments if isinstance(segments[0], list | tuple) else [segments] * B
    numbers = [torch.arange(len(run)).repeat_interleave(torch.tensor(run)) for run in each]
    numbers = torch.stack(numbers).to(DEVICE)
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def exact(segments, inputs, dout):
    """Output and gradients in fp64."""
    mask = same_run(segments, len(dout))
    doubles = [t.double() for t in inputs]
    return run(lambda *qkv: definition(*qkv, mask=mask), doubles, dout.double())


def assert_exact(found, truth, atol=1e-5):
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("H_kv", [3, 1])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_forward_and_gradients(kind, H_kv, layout):
    """Of views of one projection, in both layouts, also with grouped queries."""
    inputs, dout = make(B=3, d=16)
    inputs = (inputs[0], inputs[1][:, :, :H_kv], inputs[2][:, :, :H_kv])
    turn = (lambda x: x) if layout == "bthd" else (lambda x: x.transpose(1, 2))
    options = {"layout": layout, "segments": SEGMENTS[kind]}
    truth = exact(SEGMENTS[kind], inputs, dout)
    for fn in (attention, attention_ref):
        found = run(lambda *qkv, fn=fn: turn(fn(*map(turn, qkv), **options)), inputs, dout)
        assert_exact(found, truth)


def test_one_run_is_attention_of_all_tokens():
    inputs, dout = make()
    expected = run(attention, inputs, dout)
    for segments in ((9,), [[9], [9]]):
        found = run(lambda *qkv, s=segments: attention(*qkv, segments=s), inputs, dout)
        assert all(map(torch.equal, found, expected))


def test_fp64_gradcheck():
    inputs, _ = make(2, 3, 1, 4, torch.float64)
    leaves = [t.detach().requires_grad_() for t in inputs]
    for segments in ((1, 2), [(1, 2), (2, 1)]):
        fn = lambda *qkv, s=segments: attention(*qkv, segments=s)
        assert torch.autograd.gradcheck(fn, leaves)


def test_no_images():
    for segments in ((2, 7), [], ()):
        leaves = [torch.zeros(0, 9, 3, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        out = attention(*leaves, segments=segments)
        out.sum().backward()
        assert out.shape == (0, 9, 3, 8) and all(x.grad.shape == out.shape for x in leaves)


def products(segments, device, backend):
    """FLOPs of forward, and of forward and backward."""
    q, k, v = torch.zeros(4, 256, 3, 2, 8, device=device, requires_grad=True).unbind(2)
    with FlopCounterMode(display=False) as counter:
        out = attention(q, k, v, segments=segments, backend=backend)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("device, backend", [("meta", None), (DEVICE, "math")])
def test_products_are_those_of_the_runs(device, backend):
    """A quarter and three quarters of the tokens: 62.5 % of full attention's."""
    full = products(None, device, backend)
    # four images, two heads, a query times a key of eight numbers, and the same with values
    assert full[0] == 2 * 2 * 4 * 2 * 256**2 * 8
    shares = {
        (64, 192): 0.625,
        (64,) * 4: 0.25,
        (256,): 1.0,
        ((64, 192), (128, 128)) * 2: (0.625 + 0.5) / 2,
    }
    for segments, share in shares.items():
        found = products(segments, device, backend)
        assert found == (share * full[0], share * full[1])


def test_slices_are_views_and_nothing_is_gathered(monkeypatch):
    """PyTorch gets the memory of the projection; only the results are put together."""
    (q, k, v), _ = make(B=3)
    original = F.scaled_dot_product_attention
    seen = []

    def spy(*inputs, **options):
        seen.append(inputs)
        return original(*inputs, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    for segments, begins in {(2, 7): (0, 2), (3, 3, 3): (0,)}.items():
        seen.clear()
        with OpLog() as log:
            attention(q, k, v, segments=segments, backend="torch")
        for parts, begin in zip(seen, begins, strict=True):
            for x, part in zip((q, k, v), parts, strict=True):
                assert part.data_ptr() == x[:, begin].data_ptr()
        together = log.names.count("aten::cat")
        assert together == (len(begins) > 1)
        assert not any("index" in name or "copy" in name for name in log.names)


def test_images_with_the_same_runs_are_one_batch(monkeypatch):
    (q, k, v), _ = make(B=3)
    original = F.scaled_dot_product_attention
    shapes = []

    def spy(q, *rest, **options):
        shapes.append(tuple(q.shape))
        return original(q, *rest, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    with OpLog() as log:
        attention(q, k, v, segments=SEGMENTS["of each"], backend="torch")
    assert shapes == [(2, 3, 2, 72), (2, 3, 7, 72), (3, 3, 3, 72)]
    assert not any("index" in name for name in log.names)


# the variable-length kernels


def by_runs(q, k, v, q_ends, k_ends):
    """Attention of rows ``[total, H, d]``, a run after the other, and the weights of each."""
    outs = []
    weights = []
    heads = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(
        *(zip(ends[:-1], ends[1:], strict=True) for ends in (q_ends.tolist(), k_ends.tolist())),
        strict=True,
    ):
        keys, values = (x[c:d].float().repeat_interleave(heads, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b].float(), keys) / q.shape[2] ** 0.5
        weights.append(scores.softmax(-1))
        outs.append(torch.einsum("hij,jhd->ihd", weights[-1], values))
    return torch.cat(outs).to(q.dtype), weights


def grads_by_runs(dout, q, k, v, ends):
    """Gradients of ``by_runs`` as flash attention writes them; as many heads of keys as queries."""
    grads = []
    scale = q.shape[2] ** -0.5
    _, weights = by_runs(q, k, v, ends, ends)
    ends = ends.tolist()
    for p, a, b in zip(weights, ends[:-1], ends[1:], strict=True):
        do, qs, ks, vs = (x[a:b].float() for x in (dout, q, k, v))
        dp = torch.einsum("ihd,jhd->hij", do, vs)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hij,jhd->ihd", ds, ks)
        dk = torch.einsum("hij,ihd->jhd", ds, qs)
        grads.append((dq, dk, torch.einsum("hij,ihd->jhd", p, do)))
    return tuple(torch.cat(parts).to(q.dtype) for parts in zip(*grads, strict=True))


@pytest.fixture
def kernel(monkeypatch):
    """PyTorch's ``varlen_attn`` on any device, and a log of what its kernel gets.

    Without a GPU the two operators that it calls get an implementation for the CPU. The function,
    its derivative and what a compiler knows of it are PyTorch's.
    """
    calls = []

    def forward(q, k, v, q_ends, k_ends, q_longest, k_longest, dropout, causal, *_, **options):
        assert q_ends.dtype == k_ends.dtype == torch.int32
        assert q_longest == q_ends.diff().max() and k_longest == k_ends.diff().max()
        assert dropout == 0 and not causal and options.get("scale") is None
        calls.append((q, k, v, q_ends))
        out, _ = by_runs(q, k, v, q_ends, k_ends)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)

    def backward(dout, q, k, v, out, lse, q_ends, *rest, **options):
        return grads_by_runs(dout, q, k, v, q_ends)

    varlen._cached_offsets.cache_clear()
    monkeypatch.setattr(module, "_CUDA_ONLY", ())
    if DEVICE == "cuda":
        yield calls
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls
    varlen._cached_offsets.cache_clear()


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_pytorchs_kernel(kernel, kind, layout):
    """As exact as a few roundings allow, forward and gradients."""
    inputs, dout = make(B=3, dtype=torch.bfloat16)
    turn = (lambda x: x) if layout == "bthd" else (lambda x: x.transpose(1, 2))
    options = {"layout": layout, "segments": SEGMENTS[kind], "backend": "varlen"}
    found = run(lambda *qkv: turn(attention(*map(turn, qkv), **options)), inputs, dout)
    for ours, expected in zip(found, exact(SEGMENTS[kind], inputs, dout), strict=True):
        tolerance = 2**-6 * expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=0)
    if DEVICE == "cpu":
        assert len(kernel) == 1, "one call for all images and runs"


@needs_cpu
def test_a_kernel_gets_views_and_one_list_of_offsets(kernel):
    """Tokens of all images in a row, in the memory of the projection."""
    inputs, dout = make(B=3)
    segments = SEGMENTS["of each"]
    found = run(lambda *qkv: module._run("varlen", *qkv, None, tuple(segments)), inputs, dout)
    assert_exact(found, exact(segments, inputs, dout))
    (*rows, ends) = kernel.pop()
    assert ends.tolist() == [0, 2, 9, 12, 15, 18, 20, 27]
    for given, received in zip(inputs, rows, strict=True):
        assert received.shape == (27, 3, 72) and received.data_ptr() == given.data_ptr()
        assert received.stride() == given.stride()[1:]
    # the same lengths: the same offsets, of every batch its own
    for images in (3, 2, 3):
        batch = [x[:images] for x in inputs]
        module._run("varlen", *batch, None, ((4, 5),))
        assert kernel[-1][3].tolist() == [9 * i + j for i in range(images) for j in (0, 4)] + [
            9 * images
        ]
    assert kernel[-1][3].data_ptr() == kernel[-3][3].data_ptr()


@needs_cpu
def test_a_kernel_without_segments(kernel):
    """All keys of an image, also those of other tokens and of fewer heads."""
    (q, k, v), _ = make()
    for keys in (9, 5):
        given = (q, k[:, :keys, :1], v[:, :keys, :1])
        out = module._run("varlen", *given, None)
        torch.testing.assert_close(out, definition(*given), atol=1e-5, rtol=1e-5)


@needs_cpu
def test_offsets_of_inference_mode_serve_a_training(kernel):
    inputs, dout = make()
    fn = lambda *qkv: module._run("varlen", *qkv, None, ((2, 7),))
    with torch.inference_mode():
        fn(*inputs)
    assert_exact(run(fn, inputs, dout), exact((2, 7), inputs, dout))
    assert varlen._cached_offsets.cache_info().misses == 1


def test_a_capture_gets_no_new_offsets(monkeypatch):
    """They would be copied from the host."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must run once before a CUDA graph is captured"):
        varlen._offsets(((2, 7),), 2, torch.device("cuda:0"))


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4"])
@pytest.mark.parametrize("kind", ["two", "of each"])
def test_packages(monkeypatch, backend, kind):
    """FlashAttention is called once, by the names that all its versions share."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        calls.append((q, k, v))
        assert cu_seqlens_q.dtype == torch.int32 and not options
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        out, _ = by_runs(q, k, v, cu_seqlens_q, cu_seqlens_k)
        # the log-sum-exp of some versions
        return out if backend == "fa2" else (out, None)

    package = module._PACKAGES[backend]
    fake = types.ModuleType(package)
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, package, fake)
    monkeypatch.setattr(module, "_CUDA_ONLY", ())
    inputs, dout = make(B=3, dtype=torch.bfloat16)
    fn = lambda *qkv: attention(*qkv, segments=SEGMENTS[kind], backend=backend)
    found = run(fn, inputs, dout)
    for ours, expected in zip(found, exact(SEGMENTS[kind], inputs, dout), strict=True):
        tolerance = 2**-6 * expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=0)
    assert len(calls) == 1
    for given, received in zip(inputs, calls[0], strict=True):
        assert received.shape == (27, 3, 72) and received.stride() == given.stride()[1:]
    # one without the function takes no part, and one without any other takes part here only
    q = inputs[0]
    assert backend in module._candidates(q, None, ((2, 7),))
    assert backend not in module._candidates(q, None)
    del fake.flash_attn_varlen_func
    assert backend not in module._candidates(q, None, ((2, 7),))
    with pytest.raises(ValueError, match=f"^attention: backend '{backend}' needs the package .*"):
        fn(*inputs)


# the choice


def test_the_fastest_is_chosen_once_per_lengths_and_batch(fake_clock, caplog):  # noqa: F811
    """Slices with each of PyTorch's backends, and in half precision the variable-length kernels."""
    (q, _, _), _ = make(dtype=torch.bfloat16)
    fake_clock.times["varlen"] = 0.5
    choose = lambda q, runs=None: module._choose(q, q, q, None, True, runs)
    with caplog.at_level("INFO", logger="sra_fast"):
        assert choose(q, ((2, 7),)) == "varlen"
        assert choose(q) == "flash"
    assert (
        "varlen for forward and backward of [2, 9, 3, 72] torch.bfloat16 in segments (2, 7) ("
        in (caplog.text)
    )
    fake_clock.times["varlen"] = 9.0
    count = len(fake_clock.measured)
    assert choose(q, ((2, 7),)) == "varlen" and choose(q) == "flash"
    assert len(fake_clock.measured) == count
    # others are measured, also a batch that has the same power of two: its offsets are its own
    assert choose(q, ((3, 6),)) == "flash"
    assert choose(q, ((2, 7), (3, 6))) == "flash"
    assert choose(q[[0, 1, 0]], ((2, 7),)) == "flash"
    # without half precision there is no such kernel
    fake_clock.times["varlen"] = 0.5
    assert choose(q.float(), ((2, 7),)) == "flash"


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_choice_is_read_while_compiling(fake_clock, dynamic):  # noqa: F811
    """A kernel of PyTorch may be in a graph, one of a package may not."""
    torch._dynamo.reset()
    (q, _, _), _ = make(dtype=torch.bfloat16)
    runs = ((2, 7),)
    fn = lambda q: (q.sin(), module._choose(q, q, q, None, False, runs))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert compiled(q)[1] == "sdpa" and not fake_clock.measured
    for chosen, expected in {"varlen": "varlen", "fa3": "sdpa"}.items():
        fake_clock.times["varlen"] = 0.5
        assert module._choose(q, q, q, None, False, runs) in ("varlen", "fa3")
        module._chosen.update(dict.fromkeys(module._chosen, chosen))
        torch._dynamo.reset()
        assert compiled(q)[1] == expected


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("segments", [(64, 192), [(64, 192), (128, 128)]], ids=["alike", "each"])
@pytest.mark.parametrize(
    "backend", ["auto", "sdpa", "cudnn", "flash", "efficient", "math", "varlen"]
)
def test_backends_in_bf16(backend, segments):
    inputs, dout = make(T=256, dtype=torch.bfloat16)
    fn = lambda *qkv: attention(*qkv, segments=segments, backend=backend)
    try:
        found = run(fn, inputs, dout)
    except RuntimeError as error:
        assert str(error).startswith(f"attention: backend '{backend}' cannot run")
        pytest.skip(str(error).partition("\n")[0])
    for ours, expected in zip(found, exact(segments, inputs, dout), strict=True):
        tolerance = 2**-6 * expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("segments", [(64, 192), [(64, 192), (128, 128)]], ids=["alike", "each"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "varlen"])
def test_in_a_cuda_graph(backend, segments):
    """After one eager call nothing in a capture comes from the host."""
    inputs, _ = make(T=256, dtype=torch.bfloat16)
    fn = lambda: attention(*inputs, segments=segments, backend=backend)
    expected = fn().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


# compilers


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["two", "of one length", "of each"])
def test_slices_compile_without_graph_breaks(kind, dynamic):
    """Also where sizes and lengths are symbols while tracing."""
    torch._dynamo.reset()
    inputs, dout = make(B=3)
    fn = lambda *qkv: attention(*qkv, segments=SEGMENTS[kind]).sin()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(run(compiled, inputs, dout), run(fn, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@needs_cpu
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["two", "of each"])
def test_a_kernel_compiles_and_its_offsets_are_no_part_of_the_program(kernel, kind, dynamic):
    """They are a tensor that is there before: a compiled call copies nothing to the device."""
    torch._dynamo.reset()
    inputs, dout = make(B=3, dtype=torch.bfloat16)
    segments = SEGMENTS[kind]
    fn = lambda *qkv: attention(*qkv, segments=segments, backend="varlen").sin()
    graphs = []

    def keep_graph(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(fn, fullgraph=True, backend=keep_graph, dynamic=dynamic)
    found = run(compiled, inputs, dout)
    for a, b in zip(found, run(fn, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    assert varlen._cached_offsets.cache_info().misses == 1
    assert kernel[0][3].data_ptr() == kernel[-1][3].data_ptr()
    names = " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert "_varlen_attn" in names and "tensor" not in names, names


# arguments


def test_rejects_bad_input():
    (q, k, v), _ = make()
    groups = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    lengths = r"expected segments as positive integers that sum to T = 9, got "
    cases = [
        ((q, k, v), {"segments": (2, 6)}, lengths + r"\(2, 6\)"),
        ((q, k, v), {"segments": (0, 9)}, lengths + r"\(0, 9\)"),
        ((q, k, v), {"segments": (-1, 10)}, lengths),
        ((q, k, v), {"segments": (2.0, 7.0)}, lengths + r"\(2.0, 7.0\)"),
        ((q, k, v), {"segments": (True, 8)}, lengths),
        ((q, k, v), {"segments": ("2", "7")}, lengths),
        ((q, k, v), {"segments": [(2, 7), (2, 6)]}, lengths + r"\(2, 6\)"),
        ((q, k, v), {"segments": [(2, 7), 9]}, lengths),
        ((q, k, v), {"segments": [[(2, 7)], [(2, 7)]]}, lengths),
        ((q, k, v), {"segments": [(2, 7)]}, "segments of 2 images, got those of 1"),
        ((q, k, v), {"segments": []}, "segments of 2 images, got those of 0"),
        ((q, k, v), {"segments": 9}, "segments as a tuple of integers, or one .*, got int"),
        ((q, k, v), {"segments": torch.tensor([2, 7])}, "or one for each image, got Tensor"),
        ((q, k, v), {"segments": "27"}, "got str"),
        ((q, k, v), {"segments": (2, 7), "groups": groups}, "segments or groups, got both"),
        ((q, k, v), {"segments": (2, 7), "mask": mask}, "segments or mask, got both"),
        (
            (q, k[:, :5], v[:, :5]),
            {"segments": (2, 7)},
            "segments with as many keys as queries, got T = 9, S = 5",
        ),
        # tokens are those of the layout
        ((q, k, v), {"segments": (2, 7), "layout": "bhtd"}, "sum to T = 3, got"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=f"^attention: .*{message}"):
            attention(*args, **kwargs)


def test_a_kernel_that_cannot_run_is_named(monkeypatch):
    (q, k, v), _ = make()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="^attention: backend 'varlen' needs CUDA tensors"):
            attention(q.half(), k.half(), v.half(), segments=(2, 7), backend="varlen")
    monkeypatch.setattr(module, "_CUDA_ONLY", ())
    with pytest.raises(ValueError, match="^attention: backend 'varlen' needs bf16 or fp16"):
        attention(q, k, v, segments=(2, 7), backend="varlen")
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="^attention: backend 'varlen' takes no mask"):
        attention(q.half(), k.half(), v.half(), mask=mask, backend="varlen")
    if DEVICE == "cpu":
        # PyTorch has no such kernel for a CPU
        message = r"cannot run \[B, T, H, d\] = \[2, 9, 3, 72\] .* in segments \(2, 7\): "
        with pytest.raises(RuntimeError, match="^attention: backend 'varlen' " + message):
            attention(q.half(), k.half(), v.half(), segments=(2, 7), backend="varlen")
