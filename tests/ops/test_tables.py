"""Tables that are added to gate, shift and scale: every row operator, forward and gradients, against
plain PyTorch in fp64.
"""

import pytest
import test_two_modulations as two
import torch
from conftest import DEVICE
from rows import (
    DTYPES,
    OpLog,
    as_tuple,
    bitwise_equal,
    check_against_fp64,
    count_bytes,
    launchers,
    run,
)
from test_optional_vectors import ARRAYS, GROUPS, VECTORS, name_of
from test_optional_vectors import call as call_of_sums
from test_optional_vectors import make as make_vectors
from test_optional_vectors import plain as plain_of_sums
from test_rows import PER_TOKEN, chosen_splits, counted
from torch.utils._pytree import tree_map

from sra_fast import ops
from sra_fast.kernels import per_token as kernels
from sra_fast.ops import _per_token
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.fp8 import adaln_fp8, gated_residual_adaln_fp8

B, T, D = 2, 3, 72
# half precision: the interpreter truncates to bf16 where the device rounds
HALF = DTYPES[-1]
# tables that the operator takes, and those that its backward reads
READ = {
    "adaln": (2, 1),
    "gated_residual": (1, 1),
    "gated_residual_adaln": (3, 2),
    "gated_residual_norm": (1, 1),
}
# operator, kind of each vector that is there, with a + if it has a table, norm
EVERYTHING = {
    **{"gate": "token+", "shift": "token+", "scale": "token+"},
    **{"norm_weight": "", "norm_bias": "", "bias": ""},
}
# in every operator the kernel adds all the tables
IN_THE_KERNEL = [
    ("adaln", {"shift": "token+", "scale": "token+"}, "layer"),
    ("gated_residual", {"gate": "token+", "bias": ""}, ""),
    # six partial sums
    ("gated_residual_adaln", EVERYTHING, "layer"),
    ("gated_residual_norm", {"gate": "token+", "norm_weight": ""}, "rms"),
]
CASES = [
    *IN_THE_KERNEL,
    ("adaln", {"shift": "token+"}, "rms"),
    ("adaln", {"scale": "token+", "norm_weight": "", "norm_bias": ""}, "rms"),
    ("adaln", {"shift": "image+", "scale": "token+", "norm_weight": ""}, "layer"),
    ("adaln", {"shift": "token", "scale": "channel+"}, "layer"),
    ("adaln", {"shift": "channel+", "scale": "image 1+"}, "rms"),
    ("adaln", {"shift": "frame+", "scale": "image"}, "layer"),
    ("adaln", {"shift": "token, one image+", "scale": "frame, one image+"}, "layer"),
    ("gated_residual", {"gate": "token, one image+"}, ""),
    ("gated_residual", {"gate": "frame+"}, ""),
    ("gated_residual_adaln", {"gate": "token+", "shift": "token", "scale": "token"}, "rms"),
    ("gated_residual_adaln", {"gate": "token", "shift": "frame+", "scale": "token+"}, "layer"),
    ("gated_residual_adaln", {"gate": "token", "shift": "token+", "bias": ""}, "layer"),
    (
        "gated_residual_adaln",
        {"gate": "image+", "shift": "image+", "scale": "channel+", "bias": ""},
        "rms",
    ),
    ("gated_residual_norm", {"gate": "token+"}, "layer"),
    ("gated_residual_norm", {"gate": "image+", "norm_weight": ""}, "rms"),
]


def make(case, dtypes=(torch.float32,) * 3, shape=None):
    """Arrays, vectors, vectors [D] and a table or None for each of the vectors that vary, in this
    order; and gradients. ``dtypes`` are of the arrays and vectors [D], of what varies, of tables.
    """
    operator, kinds, _ = case
    # three frames of two tokens
    has_frames = any("frame" in kind for kind in kinds.values())
    shape = shape or ((1, 6, D) if has_frames else (B, T, D))
    without = {name: kind.rstrip("+") for name, kind in kinds.items()}
    inputs, douts = make_vectors(operator, without, shape=shape)
    has_table = [kinds.get(name, "").endswith("+") for name in VECTORS[operator][0]]
    tables = [torch.randn(shape[2], device=DEVICE) if has else None for has in has_table]
    arrays, vectors, channels, _ = split(operator, [*inputs, *tables])
    ours, varying, wide = dtypes
    in_dtype = lambda tensors, dtype: [None if t is None else t.to(dtype) for t in tensors]
    parts = ((arrays, ours), (vectors, varying), (channels, ours), (tables, wide))
    return [t for part in parts for t in in_dtype(*part)], in_dtype(douts, ours)


def split(operator, tensors):
    """Arrays, vectors that vary, vectors [D], and tables."""
    arrays = ARRAYS.get(operator, 2)
    varying = len(VECTORS[operator][0])
    tensors = list(tensors)
    return (
        tensors[:arrays],
        tensors[arrays : arrays + varying],
        tensors[arrays + varying : -varying],
        tensors[-varying:],
    )


def with_sums(operator, fn, add):
    """``fn`` of vectors that ``add`` has made of each vector and its table."""

    def added(*tensors):
        arrays, vectors, channels, tables = split(operator, tensors)
        pairs = zip(vectors, tables, strict=True)
        return fn(*arrays, *(v if t is None else add(v, t) for v, t in pairs), *channels)

    return added


def call(case, group=None, backend="triton"):
    """The public operator as a function of the tensors of ``make``."""
    operator, _, norm = case
    fn = call_of_sums(operator, norm, group, backend)
    return with_sums(operator, fn, lambda vector, table: (vector, table))


def plain(case, group=None):
    """The operator as a codebase writes it, the sums in the dtype of x."""
    operator, _, norm = case
    fn = plain_of_sums(operator, norm, group)

    def in_dtype_of_x(x, *others):
        rounded = (None if t is None else t.to(x.dtype) for t in others)
        return tree_map(lambda out: out.to(x.dtype), fn(x, *rounded))

    return with_sums(operator, in_dtype_of_x, torch.add)


def passes(log):
    """The operators that ran and that read or write memory."""
    views = ("empty", "view", "expand", "alias", "detach", "slice", "split", "select", "as_strided")
    return [name for name in log.names if not any(word in name for word in views)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_and_gradients(case, backend):
    inputs, douts = make(case)
    check_against_fp64(call(case, backend=backend), plain(case), plain(case), inputs, douts)


@pytest.mark.parametrize("case", IN_THE_KERNEL, ids=name_of)
def test_the_bits_of_sums_written_before_the_call(case):
    """Of every result but the gradients of the tables, whose sums have another order."""
    operator, _, norm = case
    inputs, douts = make(case, shape=(1, T, D))
    ours = run(call(case), inputs, douts)
    before = with_sums(operator, call_of_sums(operator, norm), torch.add)
    theirs = run(before, inputs, douts)
    count = READ[operator][0]
    assert bitwise_equal(ours[:-count], theirs[:-count])
    for a, b in zip(ours[-count:], theirs[-count:], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    # without a gradient, as in the teacher
    with torch.no_grad():
        assert bitwise_equal(as_tuple(call(case)(*inputs)), ours[: len(douts)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        ("adaln", {"shift": "group+", "scale": "group"}, "layer"),
        ("gated_residual", {"gate": "group+", "bias": ""}, ""),
        ("gated_residual_adaln", {"gate": "group+", "scale": "group+", "norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"gate": "group+", "norm_weight": ""}, "rms"),
    ],
    ids=name_of,
)
def test_with_a_group(case, backend):
    inputs, douts = make(case)
    group = torch.randint(0, GROUPS, (B, T), device=DEVICE)
    written = plain(case, group)
    check_against_fp64(call(case, group, backend), written, written, inputs, douts)


@pytest.mark.parametrize(
    "case, shape, dtypes",
    [
        (IN_THE_KERNEL[0], (1, 2, 1152), (HALF, torch.float32, HALF)),
        (IN_THE_KERNEL[1], (1, 2, 1152), (HALF, HALF, torch.float32)),
        (IN_THE_KERNEL[2], (1, 3, 64), (HALF, HALF, torch.float32)),
        (IN_THE_KERNEL[2], (1, 2, 88), (torch.float32, HALF, torch.float32)),
        # one vector per token and image at once
        (IN_THE_KERNEL[2], (3, 1, 72), (HALF, HALF, HALF)),
        (IN_THE_KERNEL[3], (1, 3, 88), (torch.float32, HALF, HALF)),
    ],
)
def test_widths_and_dtypes(case, shape, dtypes):
    """``dtypes`` are of arrays and vectors [D], of what varies, and of tables."""
    inputs, douts = make(case, dtypes, shape)
    check_against_fp64(call(case), plain(case), plain(case), inputs, douts)


def of_two(fn, add):
    """``fn`` of test_two_modulations as a function of x, y, five vectors, a bias and five tables."""

    def added(x, y, *others):
        vectors, bias, tables = others[:5], others[5], others[6:]
        given = (add(vector, table) for vector, table in zip(vectors, tables, strict=True))
        return fn(x, y, *given, None, None, bias)

    return added


def as_pair(vector, table):
    return vector, table


@pytest.mark.parametrize("shape", [(1, D), (1, T, D)], ids=["image", "token"])
def test_two_modulations(shape):
    """In `second`, too: one pass, or composed of two."""
    (x, y, *_, bias), douts = two.make(1, T, bias=True)
    vectors = torch.randn(5, *shape, device=DEVICE)
    tables = torch.randn(5, D, device=DEVICE)
    written = of_two(two.naive(), torch.add)
    inputs = (x, y, *vectors, bias, *tables)
    check_against_fp64(of_two(two.kernel(), as_pair), written, written, inputs, douts)
    # and before the first block
    scale = vectors[0]
    pair = (vectors[1], tables[1])
    found = ops.adaln(x, pair, scale, second=(scale, pair), backend="triton")
    one = lambda *given: ops.adaln(x, *given, backend="triton")
    assert bitwise_equal(found, (one(pair, scale), one(scale, pair)))


@pytest.mark.parametrize("case", IN_THE_KERNEL, ids=name_of)
def test_the_kernel_adds_the_tables(case):
    """One operator each way, no pass over the vectors, and none is kept for the backward."""
    operator = case[0]
    inputs, douts = make(case, shape=(1, T, D))
    # as models have them: slices of a projection, rows of a parameter
    arrays, _, channels, tables = split(operator, inputs)
    count = len(tables)
    vectors = torch.randn(1, T, 6 * D, device=DEVICE).chunk(6, dim=2)[2 : 2 + count]
    tables = torch.randn(6, D, device=DEVICE)[2 : 2 + count]
    inputs = [t.detach() for t in (*arrays, *vectors, *channels, *tables) if t is not None]
    inputs = [t.requires_grad_() for t in inputs]
    given = iter(inputs)
    fill = [None if t is None else next(given) for t in (*arrays, *vectors, *channels)]
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with OpLog() as log, keep:
        out = as_tuple(call(case)(*fill, *given))
    assert passes(log) == ["sra_fast::per_token_fwd"]
    # arrays, gate, scale and x'
    pointers = {t.data_ptr() for t in (*arrays, *vectors, *out)}
    assert all(t.data_ptr() in pointers for t in saved if t.numel() == T * D)
    with OpLog() as log:
        torch.autograd.grad(out, inputs, douts)
    assert passes(log) == ["sra_fast::per_token_bwd"]


@counted
@pytest.mark.parametrize("op", PER_TOKEN)
def test_bytes(op, monkeypatch):
    """What the docstring of the kernels states: D elements of a table per row, and partial sums."""
    arrays, statistics = PER_TOKEN[op]
    operator, _, direction = op.rpartition("_")
    count, in_backward = READ[operator]
    make = lambda *shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE)
    options = {"variant": "token", "tables": torch.float32, "make": make}
    launch = launchers(B, T, D, torch.float32, **options)[op]
    with count_bytes(monkeypatch) as total, chosen_splits() as splits:
        launch()
    read, summed = (count, 0) if direction == "fwd" else (in_backward, count)
    # each program writes its sums, which are read and added
    sums = summed * ((4 + 4) * splits[0] * B + 4) * D
    assert sum(total.values()) == B * T * ((arrays + read) * 4 * D + statistics) + sums


def test_gradients_of_tables_are_summed_unrounded():
    """From the rounded gradients of vectors in bf16, two digits of the sum would be left."""
    shape = (1, 12, D)
    kinds = {"gate": "token+", "shift": "token+", "scale": "token+"}
    case = ("gated_residual_adaln", kinds, "layer")
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    (x, y, gate, *others, gate_table, shift_table, scale_table), douts = make(case, dtypes, shape)
    # integers, so that x' is exact in bf16
    small = lambda t: t.clamp(-4, 4).round()
    inputs = (*map(small, (x, y, gate)), *others, small(gate_table), shift_table, scale_table)
    ours = run(call(case), inputs, douts)
    # x', h, dx, dy, and gradients of three vectors and three tables
    dvectors, dtables = ours[4:7], ours[7:]
    truth = run(plain(case), inputs, douts, torch.float64)[7:]
    for dvector, dtable, expected in zip(dvectors, dtables, truth, strict=True):
        assert dvector.dtype == torch.bfloat16 and dtable.dtype == torch.float32
        torch.testing.assert_close(dtable.double(), expected, atol=2e-5, rtol=1e-5)
    # the check above can fail; the gradients of a shift are those of h, which nothing rounds
    for i in (0, 2):
        of_rounded = dvectors[i].double().sum((0, 1))
        assert (of_rounded - truth[i]).abs().max() > 1e-2


def test_gradients_of_tables_are_repeatable(monkeypatch):
    """Programs add in a fixed order; how many there are changes nothing but that order."""
    case = IN_THE_KERNEL[2]
    inputs, douts = make(case, shape=(1, T, D))
    results = []
    for splits in ((1, 4), (3, 1), (3, 1)):
        monkeypatch.setattr(kernels, "split_rows", lambda x, groups, num_loads, s=splits: s)
        results.append(run(call(case), inputs, douts))
    one, three, again = results
    assert bitwise_equal(three, again)
    # x', h, and gradients of x, y and three vectors per token
    assert bitwise_equal(one[:7], three[:7])
    for a, b in zip(one[7:], three[7:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_table_of_three_vectors():
    case = ("gated_residual_adaln", {name: "token+" for name in ("gate", "shift", "scale")}, "rms")
    inputs, douts = make(case, shape=(1, 2, D))
    shared = lambda fn: lambda *tensors: fn(*tensors, tensors[-1], tensors[-1])
    written = shared(plain(case))
    check_against_fp64(shared(call(case)), written, written, inputs[:-2], douts)


# a parameter that holds the table, and the view of it that is given
LAYOUTS = {
    "row": (lambda table: torch.stack([table + 1, table]), lambda t: t[1]),
    "column": (lambda table: torch.stack([table, table + 1], dim=1), lambda t: t[:, 0]),
    "leading one": (lambda table: table[None], lambda t: t),
    "leading ones": (lambda table: table[None, None], lambda t: t),
    "expanded": (lambda table: table[:1].clone(), lambda t: t.expand(D)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_in_any_layout(layout):
    """Gradients reach the parameter of which a table is a part."""
    store, view = LAYOUTS[layout]
    case = IN_THE_KERNEL[1]
    (*others, table), douts = make(case, shape=(1, 2, D))
    parameter = store(table)
    fn = lambda *tensors: call(case)(*tensors[:-1], view(tensors[-1]))
    written = lambda *tensors: plain(case)(*tensors[:-1], view(tensors[-1]))
    *found, dparameter = check_against_fp64(fn, written, written, (*others, parameter), douts)
    assert dparameter.shape == parameter.shape
    dense = view(parameter).reshape(D).contiguous()
    assert bitwise_equal(found, run(call(case), [*others, dense], douts)[:-1])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    """What enters into h alone has no gradient without it, the tables included."""
    case = IN_THE_KERNEL[2]
    inputs, douts = make(case, shape=(1, T, D))

    def gradients(fn, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        dout = douts[used].to(dtype)
        return torch.autograd.grad(fn(*leaves)[used], leaves, dout, allow_unused=True)

    ours = gradients(call(case), torch.float32)
    truth = gradients(plain(case), torch.float64)
    for a, c in zip(ours, truth, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            torch.testing.assert_close(a.double(), c, atol=2e-5, rtol=1e-5)
    # shift, scale, weight and bias of the norm, both tables
    assert sum(a is None for a in ours) == (6 if used == 0 else 0)


def test_frozen_tables_and_frozen_vectors():
    case = IN_THE_KERNEL[2]
    inputs, douts = make(case, shape=(1, 2, D))
    everything = run(call(case), inputs, douts)[len(douts) :]
    first = len(inputs) - READ[case[0]][0]
    for learns in (range(first), range(first, len(inputs))):
        leaves = [t.detach().requires_grad_(i in learns) for i, t in enumerate(inputs)]
        found = torch.autograd.grad(call(case)(*leaves), [leaves[i] for i in learns], douts)
        assert bitwise_equal(found, [everything[i] for i in learns])


@pytest.mark.parametrize("vectors", ["image", "token"])
def test_sums_outside_the_kernel_are_fp32(vectors, monkeypatch):
    """A table of small numbers beside vectors in half precision keeps its digits."""
    monkeypatch.setattr(kernels, "TABLE_WIDTH", D - 8)
    case = ("adaln", {"shift": f"{vectors}+", "scale": f"{vectors}+"}, "layer")
    inputs, _ = make(case, (torch.float32, torch.float16, torch.float32), (1, 2, D))
    with_floats = lambda vector, table: vector.float() + table
    before = with_sums("adaln", call_of_sums("adaln", "layer"), with_floats)
    assert torch.equal(call(case)(*inputs), before(*inputs))


def test_an_fp64_table_runs_the_reference():
    (x, shift, scale, *_, shift_table, scale_table), _ = make(IN_THE_KERNEL[0])
    pair = (shift, shift_table.double())
    with OpLog() as log:
        h = ops.adaln(x, pair, (scale, scale_table), backend="triton")
    assert not any("sra_fast" in name for name in log.names)
    assert torch.equal(h, adaln_ref(x, pair, (scale, scale_table[None])))


# what is narrowed, and what then runs forward
WIDE = [
    ("adaln", {"shift": "token+", "scale": "token+"}, {"TABLE_WIDTH"}, ["add", "add", ""]),
    ("adaln", {"shift": "token+", "norm_weight": ""}, {"TABLE_WIDTH_AFFINE"}, ["add", ""]),
    ("adaln", {"scale": "token+"}, {"TABLE_WIDTH_AFFINE"}, [""]),
    ("gated_residual", {"gate": "token+", "bias": ""}, {"TABLE_WIDTH"}, ["add", ""]),
    ("gated_residual_norm", {"gate": "token+", "norm_weight": ""}, {"TABLE_WIDTH"}, ["add", ""]),
    ("gated_residual_adaln", EVERYTHING, {"FUSED_WIDTH_WITH_SUMS"}, ["", ""]),
    # a table alone makes sums, and none of them is in the update
    (
        "gated_residual_adaln",
        {"gate": "token", "scale": "token+"},
        {"FUSED_WIDTH_WITH_SUMS", "TABLE_WIDTH"},
        ["", "add", ""],
    ),
]


@pytest.mark.parametrize("operator, kinds, narrow, ran", WIDE)
def test_wide_rows(operator, kinds, narrow, ran, monkeypatch):
    """Rows too wide for the sums: tables in a pass of their own, or update and norm in two."""
    for name in narrow:
        monkeypatch.setattr(kernels, name, D - 8)
    case = (operator, kinds, "" if operator == "gated_residual" else "layer")
    inputs, douts = make(case, shape=(1, 2, D))
    with OpLog() as log:
        call(case)(*inputs)
    names = {"add": "aten::add.Tensor", "": "sra_fast::per_token_fwd"}
    assert passes(log) == [names[name] for name in ran]
    check_against_fp64(call(case), plain(case), plain(case), inputs, douts)


@pytest.mark.parametrize(
    "widest, case, above",
    [
        (kernels.TABLE_WIDTH, IN_THE_KERNEL[1], ["aten::add.Tensor", "sra_fast::per_token_fwd"]),
        (
            kernels.TABLE_WIDTH_AFFINE,
            ("adaln", {"scale": "token+", "norm_weight": ""}, "rms"),
            ["aten::add.Tensor", "sra_fast::per_token_fwd"],
        ),
        (kernels.FUSED_WIDTH_WITH_SUMS, IN_THE_KERNEL[2], ["sra_fast::per_token_fwd"] * 2),
    ],
)
def test_the_widest_rows_of_one_pass(widest, case, above):
    for width, ran in ((widest, ["sra_fast::per_token_fwd"]), (widest + 8, above)):
        inputs, _ = make(case, shape=(1, 2, width))
        with OpLog() as log:
            call(case)(*inputs)
        # fp32 vectors and tables: nothing is converted before the sum
        assert passes(log) == ran


@pytest.mark.parametrize("shape", [(0, T, D), (B, 0, D)], ids=str)
@pytest.mark.parametrize("case", IN_THE_KERNEL, ids=name_of)
def test_empty_batch(case, shape):
    inputs, douts = make(case, shape=shape)
    found = run(call(case), inputs, douts)[len(douts) :]
    given = [t for t in inputs if t is not None]
    for grad, like in zip(found, given, strict=True):
        assert grad.shape == like.shape and not grad.any()


def test_operator_registration():
    inputs, (dx, dh) = make(IN_THE_KERNEL[2], shape=(1, 2, D))
    (x, y), (gate, shift, scale), (weight, norm_bias, bias), tables = split(
        "gated_residual_adaln", inputs
    )
    full = (x, y, bias, gate, weight, norm_bias, shift, scale, None, 1e-6, False, True)
    options = (None, False, *tables)
    torch.library.opcheck(_per_token._fwd, (*full, *options))
    x_new, _, mean, rstd = _per_token._fwd(*full, *options)
    vectors = (bias, gate, weight, norm_bias, scale)
    gate_table, shift_table, scale_table = tables
    tables = (gate_table, shift_table.dtype, scale_table)
    backward = (dx, dh, x_new, y, *vectors, mean, rstd, False, *tables)
    torch.library.opcheck(_per_token._bwd, backward)


@pytest.mark.parametrize("case", IN_THE_KERNEL, ids=name_of)
def test_compiles_without_graph_breaks(case):
    """With one tensor as every table, too."""
    inputs, douts = make(case, shape=(1, 2, D))
    tables = READ[case[0]][0]
    inputs = inputs[: len(inputs) - tables + 1]
    fn = lambda *tensors: tree_map(torch.sin, call(case)(*tensors, *[tensors[-1]] * (tables - 1)))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, douts), run(fn, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_shift_and_its_table_may_change_before_the_backward():
    """No gradient depends on what is only added."""
    torch.manual_seed(0)
    x, vectors = torch.randn(2, B, T, D, device=DEVICE, requires_grad=True)
    table = torch.randn(D, device=DEVICE, requires_grad=True)
    out = ops.adaln(x, (vectors, table), backend="triton")
    with torch.no_grad():
        table.add_(1)
    (grad,) = torch.autograd.grad(out.sum(), [table])
    assert torch.equal(grad, torch.full_like(table, B * T))


# a vector with what is no table, and the end of the message
BAD = [
    (lambda v, t: (v, t, t), r"expected {0} as .* \(vectors, table\), got \['Tensor', .*\]$"),
    (lambda v, t: (v,), r"expected {0} as .* \(vectors, table\), got \['Tensor'\]$"),
    (lambda v, t: (v, None), r"expected {0} as .*, got \['Tensor', 'NoneType'\]$"),
    (lambda v, t: (None, t), r"expected {0} as .*, got \['NoneType', 'Tensor'\]$"),
    (lambda v, t: (v, 0.5), r"expected {0}'s table as a tensor, got float$"),
    (lambda v, t: (v, t[1:]), r"expected x.* \(vectors, table \[D\]\).*; got .*{0}'s table \[71\]"),
    (lambda v, t: (v, t.expand(B, D)), r"expected x.*; got .*{0}'s table \[2, 72\]"),
    (lambda v, t: (v, t[0]), r"expected x.*; got .*{0}'s table \[\]"),
    (lambda v, t: (v[:, 1:], t), r"expected x.*; got .*{0} \[2, 2, 72\]"),
    (lambda v, t: (v, t.long()), r"expected floating-point tensors, got .*{0}'s table torch.int64"),
    (lambda v, t: (v, t.to_sparse()), r"expected {0}'s table as a dense tensor, got .*sparse_coo$"),
    (lambda v, t: (v, t.to("meta")), r"expected every tensor on one device, got .*table meta"),
]


@pytest.mark.parametrize("operator", VECTORS)
def test_what_a_pair_may_not_be(operator):
    x, v = torch.randn(2, B, T, D, device=DEVICE)
    t = torch.randn(D, device=DEVICE)
    arrays = [x] * ARRAYS.get(operator, 2)
    name = VECTORS[operator][0][0]
    for wrong, message in BAD:
        with pytest.raises(ValueError, match=f"^{operator}: {message.format(name)}") as error:
            getattr(ops, operator)(*arrays, **{name: wrong(v, t)}, backend="triton")
        assert "\n" not in str(error.value)


def test_operators_that_take_no_tables():
    x = torch.randn(B, T, D, device=DEVICE)
    v = torch.randn(B, D, device=DEVICE)
    pair = (v, torch.randn(D, device=DEVICE))
    weight = torch.randn(D, D, device=DEVICE)
    layer = {"residual": (x, pair)}
    half_block = r"residual \(y, gate\) or \(y, gate, y_bias\), got \['Tensor', 'tuple'\]"
    cases = [
        (ops.adaln_linear, (x, pair, v, weight), {}, "shift as a tensor, got tuple"),
        (ops.adaln_linear, (x, v, v, weight), layer, half_block),
        (ops.adaln_mlp, (x, v, pair, weight, None, weight), {}, "scale as a tensor, got tuple"),
        (adaln_fp8, (x, v, pair), {}, "scale as a tensor, got tuple"),
        (gated_residual_adaln_fp8, (x, x, pair, v, v), {}, "gate as a tensor, got tuple"),
    ]
    for operator, args, options, message in cases:
        with pytest.raises(ValueError, match=f"^{operator.__name__}: expected {message}$"):
            operator(*args, **options)
