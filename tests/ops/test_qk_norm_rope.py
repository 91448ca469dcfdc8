"""Norm and rotation of queries and keys: forward and gradients against fp64; styles, tables, text
tokens; views of a fused projection in place.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_kernel_close
from rows import DTYPES, OpLog, as_tuple, bitwise_equal, check_against_fp64, count_bytes, run
from torch.utils.checkpoint import checkpoint

from sra_fast.kernels import qk_norm_rope as kernels
from sra_fast.ops.qk_norm_rope import _bwd, _fwd, qk_norm_rope, qk_norm_rope_ref

# shapes of the tables: tokens R, width d, images B
TABLES = {
    "pair": lambda B, R, d: (R, d // 2),
    "element": lambda B, R, d: (R, d),
    "pair per image": lambda B, R, d: (B, R, d // 2),
    "element per image": lambda B, R, d: (B, R, d),
    "one image": lambda B, R, d: (1, R, d // 2),
}


def make(B=2, T=5, H=3, H_kv=2, d=16, dtype=torch.float32, tables="pair", layout="bthd"):
    """q and k, views of a fused projection, and both weights; cos and sin; gradients.

    The tables hold any numbers, not only cosines and sines: every one of them plays its part.
    """
    torch.manual_seed(0)
    heads = torch.randn(B, T, H + 2 * H_kv, d, device=DEVICE, dtype=dtype)
    q = heads[:, :, :H]
    k = heads[:, :, H : H + H_kv]
    if layout == "bhtd":
        q, k = (x.transpose(1, 2) for x in (q, k))
    weights = torch.randn(2, d, device=DEVICE, dtype=dtype)
    angles = None
    if tables is not None:
        angles = torch.randn(2, *TABLES[tables](B, T, d), device=DEVICE)
    douts = [torch.randn(x.shape, device=DEVICE, dtype=dtype) for x in (q, k)]
    return (q, k, *weights), angles, douts


def kernel(tables, backend="triton", **options):
    """The operator of (q, k, q_weight, k_weight), or of q and k."""
    cos, sin = (None, None) if tables is None else tables

    def fn(q, k, q_weight=None, k_weight=None):
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return qk_norm_rope(q, k, cos, sin, **weights, backend=backend, **options)

    return fn


def reference(tables, **options):
    return kernel(tables, backend="torch", **options)


def naive(tables, norm="rms", style="half", layout="bthd", offset=None):
    """What a codebase writes, in the dtype it is given but for the rotation: the error budget."""

    def one(x, weight):
        if norm is not None:
            normalize = {"rms": F.rms_norm, "layer": F.layer_norm}[norm]
            x = normalize(x, x.shape[-1:], eps=1e-6)
        x = x if weight is None else x * weight
        if tables is None:
            return x
        cos, sin = tables
        if cos.shape[-1] != x.shape[-1]:
            both = (lambda t: torch.cat([t, t], -1)) if style == "half" else None
            both = both or (lambda t: t.repeat_interleave(2, -1))
            cos, sin = both(cos), both(sin)
        cos, sin = (t.unsqueeze(-2 if layout == "bthd" else -3) for t in (cos, sin))
        if style == "half":
            turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    return lambda q, k, q_weight=None, k_weight=None: (one(q, q_weight), one(k, k_weight))


def compare(inputs, tables, douts, **options):
    check_against_fp64(
        kernel(tables, **options),
        naive(tables, **options),
        reference(tables, **options),
        inputs,
        douts,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("d", [16, 72, 80, 100, 256])
def test_forward_and_gradients(d, style, dtype):
    compare(*make(d=d, dtype=dtype), style=style)


@pytest.mark.parametrize("tables", [*TABLES, None])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("norm, layout", [("rms", "bhtd"), ("layer", "bthd"), (None, "bthd")])
def test_variants(norm, layout, style, tables):
    inputs, angles, douts = make(1 if tables == "one image" else 2, tables=tables, layout=layout)
    # a rotation without norm has no weights
    inputs = inputs if norm else inputs[:2]
    compare(inputs, angles, douts, norm=norm, style=style, layout=layout)


@pytest.mark.parametrize(
    "B, T, H, H_kv", [(1, 70, 1, 1), (3, 1, 5, 7), (2, 9, 8, 1), (1, 33, 2, 4)]
)
def test_sizes(B, T, H, H_kv):
    """Several tiles of tokens, odd numbers of heads, more keys' heads than queries'."""
    inputs, tables, douts = make(B, T, H, H_kv, d=72)
    compare(inputs, tables, douts, style="interleaved")


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_the_rotation_is_a_product_of_complex_numbers(style):
    """Of the pair x1 + i x2 with cos + i sin, which is RoFormer's definition."""
    (q, k, _, _), _, _ = make(d=8)
    angle = torch.randn(5, 4, device=DEVICE)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    for backend in ("torch", "triton"):
        options = {"norm": None, "style": style, "backend": backend}
        for x, y in zip(
            (q, k), qk_norm_rope(q, k, angle.cos(), angle.sin(), **options), strict=True
        ):
            pairs = x.unflatten(-1, (2, 4)).mT if style == "half" else x.unflatten(-1, (4, 2))
            expected = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
            expected = (expected.mT if style == "half" else expected).flatten(-2)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_rotation_changes_no_length():
    """So a norm without weight may come before or after it, and one with a weight may not."""
    (q, k, w, _), _, _ = make()
    angle = torch.randn(5, 8, device=DEVICE)
    both = lambda x, weight: kernel((angle.cos(), angle.sin()))(x, k, weight)[0]
    rotated = kernel((angle.cos(), angle.sin()), norm=None)(q, k)[0]
    torch.testing.assert_close(both(q, None), kernel(None)(rotated, k)[0])
    assert not torch.allclose(both(q, w), kernel(None)(rotated, k, w)[0], atol=0.1)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("offset, rotated", [(0, 3), (2, 3), (1, 2), (5, 0)])
def test_tokens_without_rotation(offset, rotated, style):
    """Text before or after an image: as with cosines of 1 and sines of 0."""
    inputs, (cos, sin), douts = make()
    tables = (cos[:rotated], sin[:rotated])
    written_out = (torch.ones_like(cos), torch.zeros_like(sin))
    for whole, part in zip(written_out, tables, strict=True):
        whole[offset : offset + rotated] = part
    ours = run(kernel(tables, offset=offset, style=style), inputs, douts)
    assert bitwise_equal(ours, run(kernel(written_out, style=style), inputs, douts))
    truth = run(reference(tables, offset=offset, style=style), inputs, douts)
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("S", [1, 40])
def test_keys_of_other_tokens(S, norm):
    """Cross attention has a norm and no rotation."""
    (q, _, *weights), _, (dq, _) = make(d=72)
    k, dk = torch.randn(2, 2, S, 4, 72, device=DEVICE)
    compare((q, k, *weights), None, (dq, dk), norm=norm)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_weights_are_optional(given):
    inputs, tables, douts = make()
    weights = [w if wanted else None for w, wanted in zip(inputs[2:], given, strict=True)]
    compare((*inputs[:2], *weights), tables, douts)


def test_heads_of_odd_width_without_rotation():
    inputs, _, douts = make(d=7, tables=None)
    compare(inputs, None, douts)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_eps_is_added_to_the_variance(norm):
    """Heads as small as the root of eps, where eps is half of what is under the square root."""
    inputs, tables, douts = make(d=72)
    inputs = (inputs[0] / 10, inputs[1] / 10, *inputs[2:])
    fn = lambda backend: kernel(tables, backend=backend, eps=1e-2, norm=norm)
    for a, c in zip(run(fn("triton"), inputs, douts), run(fn("torch"), inputs, douts), strict=True):
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-5)


def test_without_eps_the_rows_past_the_end_are_no_nan():
    """They are zeros, whose norm is not a number, and must not enter the weights' gradients."""
    inputs, tables, douts = make(1, 3)
    ours = run(kernel(tables, eps=0.0), inputs, douts)
    truth = run(reference(tables, eps=0.0), inputs, douts)
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


def test_two_pass_variance():
    """Heads whose mean is a thousand times their deviation."""
    inputs, tables, douts = make(d=128)
    inputs = (inputs[0] + 1000, inputs[1] + 1000, *inputs[2:])
    options = {"norm": "layer"}
    check_against_fp64(
        kernel(tables, **options),
        naive(tables, **options),
        reference(tables, **options),
        inputs,
        douts,
        floor=1e-4,
    )


def test_mixed_dtypes():
    """Half-precision heads, fp32 weights and tables of fp64: results in their inputs' dtypes,
    rounded once.
    """
    (q, k, *weights), tables, douts = make(d=72, dtype=torch.float16)
    inputs = (q, k, weights[0].float(), weights[1])
    ours = run(kernel(tables.double()), inputs, douts)
    truth = run(reference(tables.double()), inputs, douts, torch.float64)
    half, single = torch.float16, torch.float32
    assert [t.dtype for t in ours] == [half, half, half, half, single, half]
    for a, c in zip(ours, truth, strict=True):
        assert_kernel_close(a, c.to(a.dtype), c, factor=1.01, floor=2e-5)


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_layouts(layout):
    """Heads before tokens in memory or after them, strided columns, expanded and shared inputs."""
    inputs, tables, douts = make(d=72, layout=layout)
    odd = (
        inputs[0].transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([inputs[1]] * 2, dim=-1)[..., 0],
        inputs[2][:1].expand(72),
        torch.stack([inputs[3]] * 2, dim=-1)[..., 0],
    )
    odd_douts = (douts[0][:, :1].expand(douts[0].shape), douts[1].flip(3).flip(3)[..., :1].expand(
        douts[1].shape
    ))  # fmt: skip
    odd_tables = [torch.stack([t, t], dim=-1)[..., 0] for t in tables]
    assert not any(t.is_contiguous() for t in (*odd, *odd_douts, *odd_tables))
    dense = [t.contiguous() for t in odd]
    fn = lambda tables: kernel(tables, layout=layout)
    expected = run(fn(tables), dense, [d.contiguous() for d in odd_douts])
    assert bitwise_equal(run(fn(odd_tables), odd, odd_douts), expected)
    assert all(t.is_contiguous() for t in expected[:2])


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_the_projection_is_used_in_place(layout):
    """Views reach the kernel as they are: only our own operator runs, and no copy is kept."""
    inputs, tables, _ = make(layout=layout)
    with OpLog() as log:
        kernel(tables, layout=layout)(*inputs)
    views = ("empty", "transpose", "unsqueeze", "expand", "slice", "select", "unbind", "alias")
    computed = [name for name in log.names if not any(view in name for view in views)]
    assert computed == ["sra_fast::qk_norm_rope_fwd"]
    saved = []
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernel(tables, layout=layout)(*leaves)
    known = {t.data_ptr() for t in (*inputs, *tables)}
    assert {t.data_ptr() for t in saved} == known


def test_the_same_rows_on_every_device(monkeypatch):
    """However many programs share tokens and heads: equal rows, and repeatable sums."""
    inputs, tables, douts = make(1, 20, 6, 2, d=72)
    fn = kernel(tables, style="interleaved")
    expected = run(fn, inputs, douts)
    assert bitwise_equal(expected, run(fn, inputs, douts))
    shares = set()
    for sms in (1, 132):
        monkeypatch.setattr(kernels, "num_sms", lambda device, sms=sms: sms)
        shares.add(tuple(kernels._shape_arguments(*inputs[:2], True, 4)[1][4:6]))
        other = run(fn, inputs, douts)
        assert bitwise_equal(other[:4], expected[:4])
        for a, b in zip(other[4:], expected[4:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert len(shares) == 2


@pytest.mark.parametrize("B, T", [(0, 4), (3, 0)])
def test_empty_batch(B, T):
    inputs, tables, douts = make(B, T)
    for t, like in zip(run(kernel(tables), inputs, douts)[2:], inputs, strict=True):
        assert t.shape == like.shape and not t.any()


def test_fp64_and_wide_heads_run_the_reference(caplog):
    inputs, tables, _ = make(1, 2, 1, 1, d=4, dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(kernel(tables), leaves)
    inputs, tables, _ = make(1, 2, 1, 1, d=258)
    with OpLog() as log:
        out = kernel(tables)(*inputs)
    assert not any(name.startswith("sra_fast") for name in log.names)
    assert bitwise_equal(out, reference(tables)(*inputs))
    assert "qk_norm_rope runs unfused in PyTorch: heads of 258" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(reentrant):
    inputs, tables, douts = make()
    fn = kernel(tables)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = checkpoint(fn, *leaves, use_reentrant=reentrant)
    torch.autograd.backward(out, douts)
    assert bitwise_equal([*out, *(t.grad for t in leaves)], run(fn, inputs, douts))


@pytest.mark.parametrize("heads_first", [False, True])
def test_operator_registration(heads_first):
    (q, k, *weights), tables, (dq, dk) = make(1, 3, 2, 1, d=8, layout="bthd")
    cos, sin = (t.expand(1, -1, -1) for t in tables)
    for given in ((cos, sin, *weights), (None, None, None, weights[1])):
        arguments = (q, k, *given, 1e-6, True, False, False, 0, heads_first)
        torch.library.opcheck(_fwd, arguments)
        torch.library.opcheck(_bwd, (dq, dk, *arguments))


def test_compiles_without_graph_breaks():
    inputs, tables, douts = make()
    for dynamic, options in ((None, {"style": "interleaved"}), (True, {"norm": "layer"})):
        fn = lambda *a, options=options: [x.sin() for x in kernel(tables, **options)(*a)]
        ours = lambda *a, fn=fn: tuple(fn(*a))
        # sizes that are symbols while tracing
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for a, b in zip(run(compiled, inputs, douts), run(ours, inputs, douts), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_derivatives_that_there_are_not():
    (q, k, *weights), (cos, sin), _ = make()
    leaf = q.detach().requires_grad_()
    out, _ = kernel((cos, sin))(leaf, k, *weights)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="^qk_norm_rope: can be differentiated once"):
        first.sum().backward()
    for tables in ((cos.requires_grad_(), sin), (cos.detach(), sin.requires_grad_())):
        with pytest.raises(
            ValueError, match="^qk_norm_rope: expected cos and sin without gradient"
        ):
            kernel(tables)(q, k)
        with torch.no_grad():
            kernel(tables)(q, k)


def test_one_gradient_is_wanted():
    """Of the keys' weight only: the graph holds what it needs, and the others get none."""
    (q, k, _, weight), tables, (_, dk) = make()
    weight = weight.detach().requires_grad_()
    _, out = kernel(tables)(q, k, None, weight)
    truth = run(lambda w: reference(tables)(q, k, None, w)[1], [weight], [dk])
    found = torch.autograd.grad(out, weight, dk)
    torch.testing.assert_close(found[0], truth[1], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize("tables, style", [("pair", "interleaved"), ("element", "half")])
def test_bytes(tables, style, monkeypatch):
    """Each array once; a table once for all heads of queries, and once for those of keys."""
    B, T, H, H_kv, d = 1, 40, 4, 2, 72
    monkeypatch.setattr(kernels, "num_sms", lambda device: 1)
    (q, k, *weights), angles, douts = make(B, T, H, H_kv, d, torch.float16, tables)
    cos, sin = (t.expand(B, -1, -1) for t in angles)
    options = (1e-6, True, False, style == "interleaved", 0, False)
    programs, shape_arguments, _ = kernels._shape_arguments(q, k, style == "interleaved", 1)
    for name in ("FWD_PROGRAMS_PER_SM", "BWD_PROGRAMS_PER_SM"):
        monkeypatch.setattr(kernels, name, 1)
    # one program for all heads of a token
    assert shape_arguments[5] == 1
    N = q.numel() + k.numel()
    per_pass = 2 * 2 * B * 4 * angles[0].numel() + 2 * 2 * programs * d
    with count_bytes(monkeypatch) as seen:
        kernels.qk_norm_rope_fwd(q, k, cos, sin, *weights, *options)
    assert sum(seen.values()) == 2 * 2 * N + per_pass
    with count_bytes(monkeypatch) as seen:
        kernels.qk_norm_rope_bwd(*douts, q, k, cos, sin, *weights, *options)
    assert sum(seen.values()) == 3 * 2 * N + per_pass + 16 * programs * d + 2 * 2 * d


def test_rejects_bad_input():
    (q, k, w, _), (cos, sin), _ = make()
    k3 = k[:, :3]
    shapes = r"expected q \[B, T, H, d\], k \[B, S, H_kv, d\], q_weight and k_weight \[d\], got "
    rows = r"expected cos and sin of T = 5 rows, \[T, d\] or \[T, d / 2\] for d = 16"
    cases = [
        ((q[0], k), {}, shapes),
        ((q, k[:1]), {}, shapes),
        ((q, k[..., :8]), {}, shapes),
        ((q, k), {"q_weight": w[:8]}, shapes + ".*q_weight \\[8\\]"),
        ((q, k), {"layout": "bhtd", "q_weight": w[:8]}, r"q \[B, H, T, d\], k \[B, H_kv, S, d\]"),
        ((q, k.half()), {}, "q and k of one dtype, got q torch.float32, k torch.float16"),
        ((q.long(), k.long()), {}, "floating-point tensors"),
        ((q, k.to("meta")), {}, "every tensor on one device"),
        ((q, k, cos, sin.to("meta")), {}, "every tensor on one device"),
        ((q, k, cos), {}, "expected cos and sin, got cos without sin"),
        ((q, k, None, sin), {}, "expected cos and sin, got sin without cos"),
        ((q, k, cos.tolist(), sin), {}, "expected cos as a tensor, got list"),
        ((q, k, cos[:4], sin[:4]), {}, rows),
        ((q, k, cos, sin[:4]), {}, rows),
        ((q, k, cos[:, :4], sin[:, :4]), {}, rows),
        ((q, k, cos[None, None], sin[None, None]), {}, rows),
        ((q, k, cos.expand(3, 5, 8), sin.expand(3, 5, 8)), {}, rows),
        ((q, k, cos.long(), sin.long()), {}, rows),
        ((q[..., :7], k[..., :7], cos[:, :3], sin[:, :3]), {}, "T, d / 2\\] for d = 7"),
        ((q, k3, cos, sin), {}, "as many keys as queries to rotate, got T = 5, S = 3"),
        ((q, k, cos, sin), {"offset": 1}, "of at most 5 - 1 rows"),
        ((q, k, cos, sin), {"offset": -1}, "an integer offset >= 0, got -1"),
        ((q, k, cos, sin), {"offset": 1.0}, "an integer offset >= 0, got 1.0"),
        ((q, k), {"offset": 1}, "expected offset with cos and sin, got 1 alone"),
        ((q, k), {"norm": "batch"}, "norm must be one of"),
        ((q, k), {"norm": None, "k_weight": w}, "expected a norm with k_weight, got None"),
        ((q, k), {"eps": -1.0}, "a finite eps >= 0, got -1.0"),
        ((q, k), {"style": "both"}, r"style must be one of \('half', 'interleaved'\), got 'both'"),
        ((q, k), {"layout": "bhqd"}, r"layout must be one of \('bthd', 'bhtd'\), got 'bhqd'"),
        ((q, k), {"backend": "cuda"}, "backend must be one of"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=f"^qk_norm_rope: .*{message}"):
            qk_norm_rope(*args, **kwargs)


def test_the_reference_is_public_in_both_layouts():
    inputs, tables, _ = make()
    turn = lambda x: x.transpose(1, 2)
    expected = qk_norm_rope_ref(*inputs[:2], *tables)
    found = qk_norm_rope_ref(*map(turn, inputs[:2]), *tables, layout="bhtd")
    assert bitwise_equal(map(turn, found), expected) and len(as_tuple(found)) == 2


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_results_may_be_changed_in_place(layout, backend):
    q, k = torch.randn(2, 2, 4, 4, 8, device=DEVICE, requires_grad=True).unbind()
    q_out, k_out = qk_norm_rope(q, k, layout=layout, backend=backend)
    expected = 2 * q_out.detach()
    q_out.mul_(2.0)
    (q_out.sum() + k_out.sum()).backward()
    assert torch.equal(q_out, expected)
