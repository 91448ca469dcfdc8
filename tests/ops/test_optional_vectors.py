"""Vectors that are left out, weights of the norm, and vectors per frame and per token: every row
operator, forward and gradients, against plain PyTorch in fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import DTYPES, OpLog, bitwise_equal, check_against_fp64, noncontiguous, run
from torch.utils._pytree import tree_map

from sra_fast import ops
from sra_fast.kernels import adaln as adaln_kernels
from sra_fast.kernels import gated_residual as gated_kernels
from sra_fast.kernels import gated_residual_adaln as fused_kernels
from sra_fast.kernels import per_token as per_token_kernels
from sra_fast.ops import _per_token
from sra_fast.ops.adaln import adaln_bwd, adaln_fwd

B, T, D, FRAMES, GROUPS = 2, 6, 72, 3, 2
NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}
SHAPES = {
    "channel": (D,),
    "image": (B, D),
    "image 1": (B, 1, D),
    "frame": (B, FRAMES, D),
    "frame, one image": (1, FRAMES, D),
    "token": (B, T, D),
    "token, one image": (1, T, D),
    "group": (B, GROUPS, D),
}
# operator: vectors that vary, in the order of its arguments; vectors [D]
VECTORS = {
    "adaln": (("shift", "scale"), ("norm_weight", "norm_bias")),
    "gated_residual": (("gate",), ("bias",)),
    "gated_residual_adaln": (("gate", "shift", "scale"), ("norm_weight", "norm_bias", "bias")),
    "gated_residual_norm": (("gate",), ("norm_weight",)),
}
ARRAYS = {"adaln": 1}
OUTPUTS = {"gated_residual_adaln": 2}


def spread(vector, x, group):
    """The vector of each token of x, in plain PyTorch."""
    if group is not None:
        return torch.stack([v[g] for v, g in zip(vector, group, strict=True)])
    if vector.dim() == 1:
        return vector
    if vector.dim() == 2:
        return vector[:, None]
    rows = vector.shape[1]
    tokens = x.shape[1]
    return vector if rows in (1, tokens) else vector.repeat_interleave(tokens // rows, 1)


def plain(operator, norm, group=None):
    """The operator as a codebase writes it, in the dtype of its inputs."""

    def normed(x):
        return NORMS[norm](x, x.shape[-1:], eps=1e-6)

    def modulated(x, shift, scale, weight, bias):
        x = normed(x)
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
        x = x if scale is None else x * (1 + spread(scale, x, group))
        return x if shift is None else x + spread(shift, x, group)

    def added(x, y, gate, bias):
        y = y if bias is None else y + bias
        return x + (y if gate is None else y * spread(gate, x, group))

    def fused(x, y, gate, shift, scale, weight, norm_bias, bias):
        x = added(x, y, gate, bias)
        return x, modulated(x, shift, scale, weight, norm_bias)

    return {
        "adaln": modulated,
        "gated_residual": added,
        "gated_residual_adaln": fused,
        "gated_residual_norm": lambda x, y, gate, weight: added(
            x, normed(y) if weight is None else normed(y) * weight, gate, None
        ),
    }[operator]


def call(operator, norm, group=None, backend="triton"):
    """The public operator as a function of the same tensors as ``plain``."""
    options = {} if operator == "gated_residual" else {"norm": norm}

    def fn(*tensors):
        # arrays and vectors by position, vectors [D] by name
        names = VECTORS[operator][1]
        channels = dict(zip(names, tensors[-len(names) :], strict=True))
        positional = tensors[: -len(names)]
        return getattr(ops, operator)(
            *positional, **channels, group=group, backend=backend, **options
        )

    return fn


def make(operator, kinds, dtype=torch.float32, shape=None):
    """Inputs in the order of ``plain`` and gradients; a vector that ``kinds`` lacks is None."""
    shape = shape or (B, T, D)
    random = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    arrays = [random(*shape) for _ in range(ARRAYS.get(operator, 2))]
    varying, channels = VECTORS[operator]
    sizes = {B: shape[0], T: shape[1], D: shape[2]}
    vectors = []
    for name in varying:
        if name in kinds:
            vectors.append(random(*(sizes.get(n, n) for n in SHAPES[kinds[name]])))
        else:
            vectors.append(None)
    vectors += [random(shape[2]) if name in kinds else None for name in channels]
    return arrays + vectors, [random(*shape) for _ in range(OUTPUTS.get(operator, 1))]


# operator, kind of each vector that is there, norm
CASES = [
    ("adaln", {}, "layer"),
    ("adaln", {}, "rms"),
    ("adaln", {"scale": "image"}, "rms"),
    ("adaln", {"shift": "image"}, "layer"),
    ("adaln", {"norm_weight": ""}, "rms"),
    ("adaln", {"norm_weight": "", "norm_bias": ""}, "layer"),
    ("adaln", {"norm_bias": ""}, "rms"),
    ("adaln", {"scale": "image", "norm_weight": ""}, "rms"),
    (
        "adaln",
        {"shift": "channel", "scale": "image 1", "norm_weight": "", "norm_bias": ""},
        "layer",
    ),
    ("adaln", {"shift": "frame", "scale": "frame"}, "layer"),
    ("adaln", {"shift": "frame, one image", "scale": "image", "norm_weight": ""}, "layer"),
    ("adaln", {"scale": "frame"}, "rms"),
    ("adaln", {"shift": "token", "scale": "token"}, "layer"),
    ("adaln", {"shift": "token, one image", "scale": "channel"}, "rms"),
    ("adaln", {"shift": "frame", "scale": "token", "norm_weight": "", "norm_bias": ""}, "layer"),
    ("adaln", {"scale": "token"}, "rms"),
    ("adaln", {"shift": "token"}, "layer"),
    ("gated_residual", {}, ""),
    ("gated_residual", {"bias": ""}, ""),
    ("gated_residual", {"gate": "frame", "bias": ""}, ""),
    ("gated_residual", {"gate": "frame, one image"}, ""),
    ("gated_residual", {"gate": "token", "bias": ""}, ""),
    ("gated_residual", {"gate": "token, one image"}, ""),
    ("gated_residual_adaln", {}, "layer"),
    ("gated_residual_adaln", {"bias": "", "norm_weight": "", "norm_bias": ""}, "layer"),
    ("gated_residual_adaln", {"gate": "image"}, "rms"),
    ("gated_residual_adaln", {"shift": "image", "scale": "image"}, "layer"),
    ("gated_residual_adaln", {"gate": "image", "scale": "image", "norm_weight": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "image", "scale": "image", "bias": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "channel", "shift": "frame", "scale": "frame"}, "layer"),
    ("gated_residual_adaln", {"gate": "frame", "norm_weight": "", "bias": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "token", "shift": "token", "scale": "token"}, "layer"),
    ("gated_residual_adaln", {"gate": "channel", "shift": "token", "bias": ""}, "rms"),
    (
        "gated_residual_adaln",
        {"gate": "token", "scale": "image", "norm_weight": "", "norm_bias": "", "bias": ""},
        "layer",
    ),
    ("gated_residual_norm", {}, "rms"),
    ("gated_residual_norm", {"norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "image"}, "layer"),
    ("gated_residual_norm", {"gate": "image", "norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "channel", "norm_weight": ""}, "layer"),
    ("gated_residual_norm", {"gate": "frame", "norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "token", "norm_weight": ""}, "rms"),
]


def name_of(case):
    operator, kinds, norm = case
    return "-".join([operator, norm, *(f"{k}:{v}" if v else k for k, v in kinds.items())])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_and_gradients(case, backend):
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    written = plain(operator, norm)
    check_against_fp64(call(operator, norm, backend=backend), written, written, inputs, douts)
    # without a gradient, as in the teacher
    with torch.no_grad():
        found = call(operator, norm, backend=backend)(*inputs)
        expected = written(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        ("adaln", {"scale": "group", "norm_weight": ""}, "rms"),
        ("adaln", {"norm_weight": ""}, "rms"),
        ("adaln", {"shift": "group"}, "layer"),
        ("gated_residual", {}, ""),
        ("gated_residual_adaln", {"gate": "group", "norm_weight": "", "norm_bias": ""}, "layer"),
        ("gated_residual_adaln", {"scale": "group", "bias": ""}, "rms"),
        ("gated_residual_adaln", {"norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"gate": "group", "norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"norm_weight": ""}, "rms"),
    ],
    ids=name_of,
)
def test_with_a_group(case, backend):
    """A group beside vectors that are left out, or beside none at all."""
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    group = torch.randint(0, GROUPS, (B, T), device=DEVICE)
    written = plain(operator, norm, group)
    check_against_fp64(call(operator, norm, group, backend), written, written, inputs, douts)


EVERYTHING = {"gate": "token", "shift": "token", "scale": "token", "norm_weight": "", "bias": ""}
WITH_KERNELS = [
    ("gated_residual_norm", {"gate": "image", "norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "token", "norm_weight": ""}, "layer"),
    ("gated_residual", {"gate": "token", "bias": ""}, ""),
    ("gated_residual_adaln", {"gate": "token", "shift": "token", "scale": "token"}, "rms"),
    ("gated_residual_adaln", EVERYTHING | {"norm_bias": ""}, "layer"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 7, 1152), (3, 1, 88)], ids=str)
@pytest.mark.parametrize("case", WITH_KERNELS, ids=name_of)
def test_widths(case, shape, dtype):
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds, dtype, shape)
    written = plain(operator, norm)
    check_against_fp64(call(operator, norm), written, written, inputs, douts)


@pytest.mark.parametrize("case", WITH_KERNELS, ids=name_of)
def test_mixed_dtypes(case):
    """An fp32 stream and fp16 vectors: results in their inputs' dtypes."""
    operator, kinds, norm = case
    (x, *others), douts = make(operator, kinds)
    inputs = (x, *(None if t is None else t.half() for t in others))
    ours = run(call(operator, norm), inputs, douts)
    truth = run(plain(operator, norm), inputs, douts, torch.float64)
    wanted = [torch.float32] * (OUTPUTS.get(operator, 1) + 1)
    assert [t.dtype for t in ours] == wanted + [torch.float16] * (len(ours) - len(wanted))
    for a, c in zip(ours, truth, strict=True):
        rounding = 2e-3 if a.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(a.double(), c, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("case", WITH_KERNELS, ids=name_of)
def test_layouts(case):
    """Permuted and sliced rows, strided and expanded vectors."""
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    strided = [None if t is None else _strided(t) for t in inputs]
    assert not any(t.is_contiguous() for t in strided if t is not None)
    expected = run(call(operator, norm), inputs, douts)
    found = run(call(operator, norm), strided, [noncontiguous(t) for t in douts])
    assert bitwise_equal(found, expected)


def _strided(t):
    if t.dim() == 3:
        return noncontiguous(t)
    return torch.stack([t, t], dim=-1)[..., 0]


def test_small_weights_keep_their_digits():
    """As w (1 + scale) - 1 + 1 they would lose three of seven."""
    inputs, douts = make("adaln", {"scale": "image", "norm_weight": "", "norm_bias": ""})
    inputs = [*inputs[:-2], 1e-4 * inputs[-2], 1e-4 * inputs[-1]]
    written = plain("adaln", "layer")
    check_against_fp64(call("adaln", "layer"), written, written, inputs, douts, floor=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        ("adaln", {"norm_weight": "", "norm_bias": ""}, "layer"),
        ("adaln", {"scale": "image", "norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"gate": "image", "norm_weight": ""}, "rms"),
    ],
    ids=name_of,
)
def test_gradients_of_weights_are_rounded_once(case):
    """Two images whose gradients nearly cancel: rounded image by image, two digits would be left."""
    operator, kinds, norm = case
    inputs, (dout,) = make(operator, kinds, torch.float16)
    inputs = [t if t is None or t.dim() == 1 else t[:1].expand(t.shape) for t in inputs]
    dout = torch.stack([dout[0], -dout[0] * (63 / 64)])
    ours = run(call(operator, norm), inputs, [dout])
    truth = run(plain(operator, norm), inputs, [dout], torch.float64)
    channels = [t is not None and t.dim() == 1 for t in inputs if t is not None]
    for a, c, is_channel in zip(ours[1:], truth[1:], channels, strict=True):
        if is_channel:
            torch.testing.assert_close(a.double(), c, atol=2e-4, rtol=1e-3)


def slices(*shape):
    """Column slices of one projection, as a network hands them out."""
    return torch.randn(*shape, 6 * D, device=DEVICE).chunk(6, dim=-1)


@pytest.mark.parametrize("rows", [FRAMES, T])
def test_slices_of_a_projection_are_used_in_place(rows):
    """Per frame and per token: besides our own operator only views."""
    x = torch.randn(B, T, D, device=DEVICE)
    gate, shift, scale = slices(B, rows)[:3]
    with OpLog() as log:
        ops.gated_residual_adaln(x, x, gate, shift, scale, backend="triton")
        ops.gated_residual(x, x, gate, backend="triton")
        ops.gated_residual_norm(x, x, gate, backend="triton")
    views = ("empty", "view", "expand", "alias")
    ran = [name for name in log.names if not any(word in name for word in views)]
    assert len(ran) == 3 and all(name.startswith("sra_fast::") for name in ran), ran


def test_a_plain_affine_norm_is_one_launch():
    """Weights of the norm alone are read as they are: nothing is multiplied first."""
    x = torch.randn(B, T, D, device=DEVICE)
    weight, bias = torch.randn(2, D, device=DEVICE)
    with OpLog() as log:
        ops.adaln(x, norm_weight=weight, norm_bias=bias, backend="triton")
        ops.gated_residual_norm(x, x, norm_weight=weight, backend="triton")
    ran = [name for name in log.names if "empty" not in name and "expand" not in name]
    assert ran == ["sra_fast::adaln_fwd"] * 2


@pytest.mark.parametrize("case", WITH_KERNELS, ids=name_of)
def test_splits_change_only_the_order_of_sums(case, monkeypatch):
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    first = run(call(operator, norm), inputs, douts)
    assert bitwise_equal(first, run(call(operator, norm), inputs, douts))
    for module in (adaln_kernels, per_token_kernels):
        monkeypatch.setattr(module, "split_rows", lambda x, groups, num_loads: (1, 6))
    for a, b in zip(first, run(call(operator, norm), inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", WITH_KERNELS, ids=name_of)
def test_one_row_at_a_time(case, monkeypatch):
    """What rows wider than TWO_ROWS_WIDTH take."""
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    written = plain(operator, norm)
    monkeypatch.setattr(adaln_kernels, "TWO_ROWS_WIDTH", 0)
    monkeypatch.setattr(gated_kernels, "TWO_ROWS_WIDTH", 0)
    check_against_fp64(call(operator, norm), written, written, inputs, douts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_too_wide_for_one_pass_take_two(dtype, monkeypatch):
    """The residual update and the norm then have a kernel each, in both directions."""
    monkeypatch.setattr(fused_kernels, "MAX_WIDTH", 64)
    monkeypatch.setattr(per_token_kernels, "FUSED_WIDTH_WITH_SUMS", 64)
    monkeypatch.setattr(per_token_kernels, "AFFINE_WIDTH", 64)
    image = {"gate": "image", "shift": "image", "scale": "image"}
    for kinds, ran in (
        (image | {"bias": ""}, ["gated_residual_fwd", "adaln_fwd"]),
        (EVERYTHING | {"norm_bias": ""}, ["per_token_fwd", "per_token_fwd"]),
    ):
        inputs, douts = make("gated_residual_adaln", kinds, dtype)
        fn = call("gated_residual_adaln", "layer")
        with OpLog() as log:
            fn(*inputs)
        assert [name for name in log.names if "sra_fast" in name] == [f"sra_fast::{n}" for n in ran]
        written = plain("gated_residual_adaln", "layer")
        check_against_fp64(fn, written, written, inputs, douts)


@pytest.mark.parametrize("recompute", [False, True])
def test_half_blocks_of_wide_rows_run_the_kernels(recompute, monkeypatch):
    monkeypatch.setattr(fused_kernels, "MAX_WIDTH", 64)
    x, y, dx, dh = torch.randn(4, B, T, D, device=DEVICE)
    gate, shift, scale = slices(B)[:3]
    weight = torch.randn(D, D, device=DEVICE) / D**0.5
    bias = torch.randn(D, device=DEVICE)

    def layer(backend):
        return lambda x, y, gate, shift, scale, weight, bias: ops.adaln_linear(
            *(x, shift, scale, weight),
            residual=(y, gate, bias),
            recompute=recompute,
            backend=backend,
        )

    inputs = (x, y, gate, shift, scale, weight, bias)
    with OpLog() as log:
        run(layer("triton"), inputs, [dx, dh])
    ran = {name for name in log.names if "sra_fast" in name}
    passes = ("gated_residual_fwd", "adaln_fwd", "adaln_bwd", "gated_residual_bwd")
    assert ran == {f"sra_fast::{name}" for name in passes}
    check_against_fp64(layer("triton"), layer("torch"), layer("torch"), inputs, [dx, dh], 2e-5)
    # a recomputed norm that no kernel holds: every activation is kept
    monkeypatch.setattr(adaln_kernels, "RECOMPUTE_WIDTH", 64)
    check_against_fp64(layer("triton"), layer("torch"), layer("torch"), inputs, [dx, dh], 2e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    inputs, douts = make("gated_residual_adaln", EVERYTHING)
    pick = lambda fn: lambda *tensors: fn(*tensors)[used]
    needed = [t for t in inputs if t is not None]
    leaves = [t.detach().requires_grad_() for t in needed]
    wide = [t.detach().double().requires_grad_() for t in needed]

    def gradients(fn, leaves, dout):
        given = iter(leaves)
        out = pick(fn)(*(None if t is None else next(given) for t in inputs))
        return torch.autograd.grad(
            out, leaves, dout.to(out.dtype), allow_unused=True, materialize_grads=True
        )

    ours = gradients(call("gated_residual_adaln", "layer"), leaves, douts[used])
    truth = gradients(plain("gated_residual_adaln", "layer"), wide, douts[used])
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), c, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_the_gradient_of_a_wide_shift_keeps_its_digits(fused, with_scale):
    """An fp32 shift beside a scale, or rows, in half precision."""
    half = torch.float16
    x, y = torch.randn(2, B, T, D, device=DEVICE, dtype=half)
    shift = torch.randn(B, D, device=DEVICE, requires_grad=True)
    scale = torch.randn(B, D, device=DEVICE, dtype=half) if with_scale else None
    dh = torch.randn(B, T, D, device=DEVICE, dtype=half)
    if fused:
        _, h = ops.gated_residual_adaln(x, y, None, shift, scale, backend="triton")
    else:
        h = ops.adaln(x, shift, scale, backend="triton")
    h.backward(dh)
    torch.testing.assert_close(shift.grad, dh.float().sum(1), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vectors", ["image", "token"])
def test_what_nobody_used_has_no_gradient(vectors, backend):
    """As in PyTorch: an optimizer tells None from zeros."""
    x, y = torch.randn(2, B, T, D, device=DEVICE)
    given = [torch.randn(SHAPES[vectors], device=DEVICE, requires_grad=True) for _ in range(3)]
    weight = torch.ones(D, device=DEVICE, requires_grad=True)
    x_new, _ = ops.gated_residual_adaln(x, y, *given, norm_weight=weight, backend=backend)
    x_new.square().sum().backward()
    assert given[0].grad.abs().sum() > 0
    assert all(t.grad is None for t in (*given[1:], weight))


@pytest.mark.parametrize("operator", VECTORS)
def test_results_are_contiguous(operator):
    """With either backend, however x lies in memory: a compiler is told that they are."""
    x, y = torch.randn(2, B, D, T, device=DEVICE).transpose(2, 3)
    arrays = [x, y][: ARRAYS.get(operator, 2)]
    vectors = [torch.randn(B, D, device=DEVICE) for _ in VECTORS[operator][0]]
    for backend in ("torch", "triton"):
        out = getattr(ops, operator)(*arrays, *vectors, backend=backend)
        assert all(o.is_contiguous() for o in (out if isinstance(out, tuple) else (out,)))


def test_operator_registration():
    x, y, dx, dh = torch.randn(4, B, T, D, device=DEVICE)
    gate, shift, scale = slices(B, T)[:3]
    weight, norm_bias, bias = torch.randn(3, D, device=DEVICE)
    full = (x, y, bias, gate, weight, norm_bias, shift, scale, None, 1e-6, False, True)
    torch.library.opcheck(_per_token._fwd, full)
    x_new, _, mean, rstd = _per_token._fwd(*full)
    vectors = (bias, gate, weight, norm_bias, scale)
    torch.library.opcheck(_per_token._bwd, (dx, dh, x_new, y, *vectors, mean, rstd))
    # the residual update alone
    none = [None] * 3
    alone = (x, y, None, gate, *none, None, None, 0.0, False, False)
    torch.library.opcheck(_per_token._fwd, alone)
    empty = rstd[:0]
    torch.library.opcheck(_per_token._bwd, (dx, None, None, y, None, gate, *none, empty, empty))
    # the normed branch, per image; a plain norm
    factor = gate[:, 0]
    torch.library.opcheck(adaln_fwd, (y, None, factor, None, 1e-6, False, None, True, x))
    _, mean, rstd = adaln_fwd(y, None, factor, None, 1e-6, False, None, True, x)
    torch.library.opcheck(adaln_bwd, (dh, y, factor, None, mean, rstd, None, False, True))
    torch.library.opcheck(adaln_fwd, (y, None, None, None, 1e-6, False))
    torch.library.opcheck(adaln_bwd, (dh, y, None, None, mean, rstd, None, False))


@pytest.mark.parametrize(
    "case",
    [
        WITH_KERNELS[0],
        WITH_KERNELS[4],
        ("adaln", {"scale": "image"}, "rms"),
        ("gated_residual_adaln", {"gate": "channel", "scale": "frame", "norm_weight": ""}, "rms"),
    ],
    ids=name_of,
)
def test_compiles_without_graph_breaks(case):
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    fn = lambda *tensors: tree_map(torch.sin, call(operator, norm)(*tensors))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("operator", VECTORS)
def test_empty_batch(operator):
    kinds = {name: "token" for name in VECTORS[operator][0]} | {"norm_weight": "", "bias": ""}
    for shape in ((0, T, D), (B, 0, D)):
        inputs, douts = make(operator, kinds, shape=shape)
        norm = "" if operator == "gated_residual" else "rms"
        found = run(call(operator, norm), inputs, douts)[len(douts) :]
        for grad, like in zip(found, [t for t in inputs if t is not None], strict=True):
            assert grad.shape == like.shape and not grad.any()


def test_what_a_vector_may_not_be():
    x = torch.randn(B, T, D, device=DEVICE)
    vector = lambda *shape: torch.randn(*shape, device=DEVICE)
    got = r"expected x.* \[B, T, D\] or \[B, F, D\] with F a divisor of T.*; got .*"
    cases = [
        (lambda: ops.adaln(x, vector(B, 4, D)), "adaln", r"shift \[2, 4, 72\]"),
        (lambda: ops.adaln(x, vector(B, 2, D), vector(B, 3, D)), "adaln", r"scale \[2, 3, 72\]"),
        (lambda: ops.adaln(x, norm_weight=vector(B, D)), "adaln", r"norm_weight \[2, 72\]"),
        (lambda: ops.gated_residual(x, x, vector(3, T, D)), "gated_residual", r"gate \[3, 6, 72\]"),
        (
            lambda: ops.gated_residual_norm(x, x, norm_weight=vector(D + 1)),
            "gated_residual_norm",
            r"norm_weight \[73\]",
        ),
        (
            lambda: ops.gated_residual_adaln(x, x, norm_bias=vector(1)),
            "gated_residual_adaln",
            r"norm_bias \[1\]",
        ),
    ]
    for fn, operator, what in cases:
        with pytest.raises(ValueError, match=f"^{operator}: {got}{what}"):
            fn()
