"""The operators' benchmark measures what the operators do, and a wrong operator has no speed."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from benchmarks.operators import inputs, run, stacked_products
from benchmarks.operators.correctness import all_results
from benchmarks.operators.entry import EPS
from benchmarks.operators.registry import OPERATORS, cases
from benchmarks.operators.shapes import TINY, Shape, num_parameters
from benchmarks.record import FIELDS, ROOT
from benchmarks.report.table import bytes_per_element
from benchmarks.report.verdict import operator_lines
from benchmarks.timing import make_randn
from sra_fast import ops

SHAPE = Shape(TINY, 64, 4)
XL = Shape("SiT-XL/2", 256, 32)
QUICK = ["--device", "cpu", "--budget", "0.002"]


def run_quickly(path: Path, *words: str) -> int:
    """Run the benchmark on a CPU, with its rows in ``path``."""
    return run.main([*QUICK, *words, "--json", str(path)])


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


# the registry


def test_every_operator_with_a_kernel_is_measured():
    # operators inside a half-block or the teacher, which nobody calls from outside
    inner = {"quantize_rows", "gelu", "swiglu", "concat_columns"}
    variants = {"adaln_per_token", "gated_residual_adaln_per_token", "gated_residual_adaln_table"}
    variants |= {"gated_residual_adaln_two", "gated_residual_adaln_groups", "attention_segments"}
    assert set(OPERATORS) == {*ops.__all__, *inner, *variants}
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    # operators without a kernel file of their name
    products = {"attention", "linear_gelu", "linear_swiglu", "adaln_linear", "adaln_mlp"}
    products |= {"gated_residual_norm"}
    measured = {name.rstrip("_") for name in OPERATORS} - products - variants
    assert kernels == measured | {"per_token"}


def test_known_sizes():
    assert XL.sizes == (256, 1152, 16)
    assert Shape("SiT-B/2", 512, 1).sizes == (1024, 768, 12)
    # 675 M parameters (SiT's paper) and the projection head
    assert num_parameters(XL) == pytest.approx(674.8e6 + 5.3e6, rel=1e-3)


def test_a_run_that_stops_early_has_the_most_valuable_cases():
    found = cases()
    assert found[0] == ("gated_residual_adaln", XL)
    # an operator on parameters has one case per model, whatever the resolution and the batch
    assert [shape for name, shape in found if name == "adamw_ema_"] == [
        Shape("SiT-XL/2"),
        Shape("SiT-B/2"),
        Shape("SiT-L/2"),
    ]
    # what is asked for is measured, in no table of sizes or not
    assert cases(["adaln"], [TINY], [64], [3]) == [("adaln", Shape(TINY, 64, 3))]


# bytes


def size(*values) -> int:
    """Bytes of all tensors in nested values."""
    return sum(x.nbytes for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def bytes_of_row_operator(name: str) -> tuple[int, int]:
    """Bytes of all inputs and outputs of the operators below autograd, each read or written once, at XL."""
    B, T, D = 32, 256, 1152
    rows = (torch.empty(B, T, D, dtype=torch.bfloat16, device="meta") for _ in range(5))
    x, y, dx, dh, dh2 = rows
    vector = torch.empty(B, D, dtype=torch.bfloat16, device="meta")
    # of a token, as wide as x
    gate, shift, scale = (torch.empty_like(x) for _ in range(3))
    none = (None,) * 4
    mean, rstd = (torch.empty(B, T, device="meta") for _ in range(2))
    forward = {
        "adaln": (x, vector, vector, None, 1e-6, False),
        "gated_residual": (x, y, None, vector, None),
        "gated_residual_adaln": (x, y, None, vector, vector, vector, None, 1e-6, False),
        "gated_residual_adaln_two": (x, y, None, *(vector,) * 5, 1e-6, False),
        "align_distance": (x, y, "smooth_l1", 0.05, True),
        # the kernel of adaln adds the stream
        "gated_residual_norm": (y, None, vector, None, 1e-6, True, None, True, x),
        "adaln_per_token": (x, *none, None, shift, scale, None, 1e-6, False, True),
        "gated_residual_adaln_per_token": (
            *(x, y, None, gate, None, None, shift, scale, None, 1e-6, False, True),
        ),
    }[name]
    backward = {
        "adaln": (dx, x, vector, None, mean, rstd, None),
        "gated_residual": (x, y, None, vector, None),
        "gated_residual_adaln": (x, y, dx, dh, None, vector, vector, None, mean, rstd, None),
        "gated_residual_adaln_two": (x, y, dx, dh, dh2, None, *(vector,) * 3, mean, rstd),
        "align_distance": (mean, x, True),
        "gated_residual_norm": (dx, y, vector, None, mean[:0], rstd, None, False, True),
        "adaln_per_token": (None, dh, x, *none, None, scale, mean, rstd),
        "gated_residual_adaln_per_token": (
            *(dx, dh, x, y, None, gate, None, None, scale, mean, rstd),
        ),
    }[name]
    operator = {"gated_residual_norm": "adaln"}.get(name, name)
    operator = "per_token" if name.endswith("per_token") else operator

    def total(call, args: tuple) -> int:
        return size(args) + size(call(*args))

    op = torch.ops.sra_fast
    return tuple(
        total(getattr(op, f"{operator}_{which}"), args)
        for which, args in (("fwd", forward), ("bwd", backward))
    )


@pytest.mark.parametrize(
    "name",
    [
        *("adaln", "gated_residual", "gated_residual_adaln", "align_distance"),
        *("gated_residual_norm", "adaln_per_token", "gated_residual_adaln_per_token"),
        "gated_residual_adaln_two",
    ],
)
def test_bytes_of_row_operators(name):
    assert OPERATORS[name].bytes(XL, 2) == bytes_of_row_operator(name)


# in a kernel's docstring: what states its bytes per element
ROW_PATTERNS = (r"forward +(\d) s B T D", r"backward +(\d) s B T D")
PATTERNS = {
    "gated_residual_norm": (
        r"gated_residual_norm, RMS: forward +(\d) s B T D",
        r"gated_residual_norm, RMS: forward .{1,70} backward +(\d) s B T D",
    ),
    "adaln_per_token": (
        r" adaln +forward +(\d+) s B T D",
        r" adaln +forward .{1,60} backward +(\d+) s B T D",
    ),
    "gated_residual_adaln_table": (
        r"gated_residual_adaln forward +(\d+) s B T D",
        r"gated_residual_adaln forward .{1,70} backward +(\d+) s B T D",
    ),
    "gated_residual_adaln_per_token": (
        r"gated_residual_adaln forward +(\d+) s B T D",
        r"gated_residual_adaln forward .{1,70} backward +(\d+) s B T D",
    ),
    "gated_residual_adaln_two": (
        r"With two modulations, .{1,70} forward +(\d) s B T D",
        r"With two modulations, .{1,160} backward +(\d) s B T D",
    ),
    "gelu": (r"(\d) s M N \(dy, x; dx\)",),
    "swiglu": (r"forward +(\d) s M N ", r"backward +(\d) s M N "),
    "concat_columns": (r"(\d) s M K D",),
    "qk_norm_rope": (r"forward +(\d) s N ", r"backward +(\d) s N "),
    "align_distance": (r"elements of \[B, T, D\]: forward (\d) ", r"backward (\d); "),
    "noise_pair": (r"\((\d+) and 28 bytes per element in fp32\)",),
    "ema_update_": (r"(\d+) bf16 with copy",),
    "adamw_ema_": (r"copy: (\d+) in all",),
}
# the files of operators without a kernel of their own
FILES = {
    "gated_residual_norm": "adaln",
    "adaln_per_token": "per_token",
    "gated_residual_adaln_per_token": "per_token",
    "gated_residual_adaln_table": "per_token",
    "gated_residual_adaln_two": "gated_residual_adaln",
    "gated_residual_adaln_groups": "gated_residual_adaln",
}
IN_BYTES = ("noise_pair", "ema_update_", "adamw_ema_")


@pytest.mark.parametrize(
    "name", [name for name in OPERATORS if OPERATORS[name].bytes and name != "quantize_rows"]
)
def test_bytes_agree_with_the_kernels_docstrings(name):
    """Only the leading term; the others state it in elements of s = 2 bytes."""
    file = FILES.get(name, name.rstrip("_"))
    text = (ROOT / "kernels" / f"{file}.py").read_text().split('"""')[1]
    # a sentence may continue in the next line
    text = " ".join(text.split())
    unit = 1 if name in IN_BYTES else 2
    patterns = PATTERNS.get(name, ROW_PATTERNS)
    stated = [unit * int(re.search(pattern, text)[1]) for pattern in patterns]
    assert [int(count) for _, count in bytes_per_element(name)] == stated


def inputs_of(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return OPERATORS[name].make(SHAPE, dtype, make_randn(0, "cpu"))


def test_bytes_of_the_updates():
    ema, params, copies, _ = inputs_of("ema_update_")
    assert size(ema) == 4 * num_parameters(SHAPE)
    expected = 2 * size(ema) + size(params) + size(copies)
    assert OPERATORS["ema_update_"].bytes(SHAPE, 2)[0] == expected

    flat, *_ = inputs_of("adamw_ema_")
    param, grad, exp_avg, exp_avg_sq, weights, ema, copy = flat
    read_and_written = size(param, exp_avg, exp_avg_sq, ema)
    expected = 2 * read_and_written + size(grad, weights, copy)
    assert OPERATORS["adamw_ema_"].bytes(SHAPE, 2)[0] == expected


def test_bytes_of_the_noise_and_of_quantization():
    latents = inputs_of("noise_pair", torch.float32)
    expected = size(latents) + size(ops.noise_pair(*latents))
    assert OPERATORS["noise_pair"].bytes(SHAPE, 4)[0] == expected

    hidden = inputs_of("quantize_rows")
    expected = size(hidden) + size(OPERATORS["quantize_rows"].ours(*hidden))
    assert OPERATORS["quantize_rows"].bytes(SHAPE, 2)[0] == expected


# rivals


def rivals():
    """(operator, function) of everything that ours is compared with."""
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=EPS)
    for name, operator in OPERATORS.items():
        yield name, operator.eager
        yield name, operator.reference
        if operator.to_compile:
            yield name, operator.to_compile
        if operator.with_norm:
            yield name, lambda *inputs, eager=operator.eager: eager(*inputs, norm=norm)


@pytest.mark.parametrize("name, rival", list(rivals()))
def test_a_rival_computes_what_the_operator_computes(name, rival, device):
    operator = OPERATORS[name]

    def results(function) -> list[torch.Tensor]:
        given = operator.make(SHAPE, torch.float32, make_randn(0, device))
        return all_results(operator, function, given, torch.float32, device)

    ours = results(operator.ours)
    theirs = results(rival)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.float().abs().max() > 0
        # bf16 copies may be rounded to either side; e4m3 values also after sums in another order
        rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3}.get(a.dtype, 0.13)
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=1e-5)


def test_stacked_products_compute_the_same():
    for name, shape in stacked_products.product_shapes("SiT-S/8", 64, 3).items():
        x, weights, biases = stacked_products.make_inputs(0, name, shape, torch.float32, "cpu")
        one_by_one = stacked_products.separate(x, weights, biases)
        expected = {
            "batched_bias": torch.stack(one_by_one),
            "batched": torch.stack(one_by_one) - biases[:, None],
            "wide": torch.cat(one_by_one, 1),
        }
        for function in stacked_products.functions_of(name, "cpu")[1:]:
            actual = function(x, weights, biases)
            torch.testing.assert_close(actual, expected[function.__name__], rtol=1e-4, atol=1e-4)


def test_shapes_of_stacked_products():
    assert stacked_products.product_shapes("SiT-XL/2", 256, 32) == {
        "qkv": (2, 8192, 1152, 3456),
        "proj": (2, 8192, 1152, 1152),
        "fc1": (2, 8192, 1152, 4608),
        "fc2": (2, 8192, 4608, 1152),
        "adaln": (28, 32, 1152, 6912),
    }


# a run


def test_run_writes_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    picture = tmp_path / "ops.png"
    has_matplotlib = find_spec("matplotlib") is not None
    assert run_quickly(path, *(["--plot", str(picture)] if has_matplotlib else [])) == 0
    if has_matplotlib:
        assert picture.read_bytes().startswith(b"\x89PNG")

    rows = rows_of(path)
    labels = set()
    for name, operator in OPERATORS.items():
        labels |= {f"{name}.{which}" for which in run.PASSES} if operator.grads else {name}
    for variant in ("ours", "eager"):
        assert {row["name"] for row in rows if row["variant"] == variant} == labels
    required = {"kind", "name", "variant", "device", "ms", "versions", "commit", "command"}
    for row in rows:
        assert required <= set(row) <= set(FIELDS)
        assert list(row) == [name for name in FIELDS if name in row]
        assert row["kind"] == "op"
        assert row["device"] == "cpu"
        assert row["ms"] > 0
        assert row["versions"]["torch"] == torch.__version__
        assert row["command"].startswith("python -m benchmarks.operators.run ")
        operator = OPERATORS.get(row["name"].partition(".")[0])
        if operator is not None:
            assert row["model"] == TINY
            assert row["percent_of_ceiling"] > 0
            assert ("gbps" in row) == (operator.bytes is not None)
            assert ("batch" in row) == (not operator.per_model)

    row = next(row for row in rows if row["name"] == "adaln.both" and row["variant"] == "ours")
    copy = next(row for row in rows if row["name"] == "copy")
    assert (row["resolution"], row["batch"], row["dtype"]) == (64, 4, "float32")
    assert row["gbps"] == pytest.approx(sum(OPERATORS["adaln"].bytes(SHAPE, 4)) / row["ms"] / 1e6)
    assert row["percent_of_ceiling"] == pytest.approx(100 * row["gbps"] / copy["gbps"])
    assert re.search(r"adaln.forward .* ours .*eager \d+\.\d\dx", capsys.readouterr().out)


right_residual = ops.gated_residual
right_adamw = ops.adamw_ema_
right_ema = ops.ema_update_


def wrong_value(x, y, gate):
    return right_residual(x, y, gate) + 1e-3 * (torch.arange(x.shape[2]) == 7)


def wrong_gradient(x, y, gate):
    """The right value, half of the gate's gradient."""
    return right_residual(x, y, gate.detach() + 0.5 * gate - 0.5 * gate.detach())


def unwritten(x, y, gate):
    return right_residual(x, y, gate) + 0 * x.new_empty(x.shape)


def no_weight_decay(*args, **kw):
    return right_adamw(*args, **{**kw, "weight_decay": 0.0})


def no_copy(ema, params, decay, copies):
    return right_ema(ema, params, decay)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("gated_residual", wrong_value),
        ("gated_residual", wrong_gradient),
        ("gated_residual", unwritten),
        ("adamw_ema_", no_weight_decay),
        ("ema_update_", no_copy),
    ],
)
def test_a_wrong_operator_is_red_and_has_no_speed(name, wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, name, wrong)
    assert run_quickly(tmp_path / "rows.json", "--ops", f"{name},noise_pair") == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.match(rf"{name}[. ].* tiny ", line)]
    passes = 3 if OPERATORS[name].grads else 1
    assert f"{name} ours: RED" in out
    assert sum("RED" in line for line in lines) == passes
    assert not any(re.search(r"\d\.\d\dx", line) for line in lines)
    ours = {row["name"]: row for row in rows_of(tmp_path / "rows.json") if row["variant"] == "ours"}
    # the other operator is measured as ever
    assert len(ours) == passes + 1
    assert "ms" in ours.pop("noise_pair")
    assert not any({"ms", "gbps", "percent_of_ceiling"} & set(row) for row in ours.values())


def test_a_wrong_rival_is_red_and_no_speed_is_claimed_against_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: wrong_gradient)
    words = ["--ops", "gated_residual", "--variants", "ours,eager,compile"]
    assert run_quickly(tmp_path / "rows.json", *words) == 0
    out = capsys.readouterr().out
    assert "gated_residual compile: RED: result 3" in out
    assert "eager" in out
    assert not re.search(r"compile \d", out)


def test_a_rival_that_cannot_run_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    broken = replace(OPERATORS["adaln"], to_compile=lambda *inputs: 1 / 0)
    monkeypatch.setitem(OPERATORS, "adaln", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **kw: function)
    words = ["--ops", "adaln", "--variants", "ours,compile"]
    assert run_quickly(tmp_path / "rows.json", *words) == 0
    assert "adaln compile: cannot run: ZeroDivisionError" in capsys.readouterr().out
    assert {row["variant"] for row in rows_of(tmp_path / "rows.json")} == {"torch", "ours"}


def fails(*inputs):
    raise RuntimeError("the kernel is broken\nand a second line")


def test_ours_that_fails_has_rows_without_a_speed(tmp_path, capsys, monkeypatch):
    """An older commit's rows would be shown for it otherwise."""
    monkeypatch.setattr(ops, "gated_residual", fails)
    path = tmp_path / "rows.json"
    assert run_quickly(path, "--ops", "gated_residual", "--variants", "ours,eager") == 1
    out = capsys.readouterr().out
    said = "gated_residual ours: cannot run: RuntimeError: the kernel is broken\n"
    assert out.count(said) == 1
    assert len(re.findall(r"^gated_residual\..* ours +RED$", out, re.MULTILINE)) == 3
    ours = [row for row in rows_of(path) if row["variant"] == "ours"]
    assert {row["name"] for row in ours} == {f"gated_residual.{which}" for which in run.PASSES}
    assert not any({"ms", "gbps", "percent_of_ceiling"} & set(row) for row in ours)
    assert operator_lines(ours)[0].startswith("operators: 0 right, 3 wrong: ")
    # eager is measured all the same
    assert sum("ms" in row for row in rows_of(path) if row["variant"] == "eager") == 3


def test_too_little_memory_for_ours_is_not_wrong(tmp_path, capsys, monkeypatch):
    def too_large(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "gated_residual", too_large)
    path = tmp_path / "rows.json"
    assert run_quickly(path, "--ops", "gated_residual", "--variants", "ours") == 0
    assert "cannot run: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    assert {row["variant"] for row in rows_of(path)} == {"torch"}


@pytest.mark.parametrize("field", ["reference", "eager", "make"])
def test_a_reference_that_fails_does_not_end_the_run(field, tmp_path, capsys, monkeypatch):
    broken = replace(OPERATORS["gated_residual"], **{field: fails})
    monkeypatch.setitem(OPERATORS, "gated_residual", broken)
    path = tmp_path / "rows.json"
    assert run_quickly(path, "--ops", "gated_residual,noise_pair") == 1
    printed = capsys.readouterr()
    said = (
        "gated_residual tiny 64 px, 4 images: cannot be checked: RuntimeError: the kernel is broken"
    )
    assert said in printed.out.splitlines()
    assert printed.err == "wrong or failing: gated_residual\n"
    names = {row["name"] for row in rows_of(path)}
    assert names == {"copy", "matmul", "noise_pair"}


def test_a_device_that_is_lost_ends_the_run_with_its_rows(tmp_path, capsys, monkeypatch):
    """After an illegal memory access every call of CUDA fails."""
    errors = iter([None, "AcceleratorError: an illegal memory access"])
    monkeypatch.setattr(run, "device_error", lambda device: next(errors))
    path = tmp_path / "rows.json"
    words = ["--ops", "gated_residual,noise_pair,adaln", "--variants", "ours,eager"]
    assert run_quickly(path, *words) == 1
    out = capsys.readouterr().out
    first = cases(["gated_residual", "noise_pair", "adaln"], [TINY], [64], [4])[0][0]
    said = f"the device takes no more calls after {first} eager: AcceleratorError: an illegal"
    assert out.count(said) == 1
    assert "2 of 3 cases not measured" in out
    measured = {row["name"].partition(".")[0] for row in rows_of(path)}
    assert measured == {"copy", "matmul", first}


def test_what_a_kernel_did_wrong_is_found_after_its_variant(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors may be late")

    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    assert run.device_error("cpu") is None
    assert calls == []
    assert run.device_error("cuda") is None
    assert calls == ["synchronize", "empty_cache"]
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, call, lost)
            said = run.device_error("cuda")
        assert said == "RuntimeError: CUDA error: an illegal memory access"


def test_an_entry_is_all_that_a_new_operator_needs(tmp_path, monkeypatch):
    """The run, the rows and the table take an operator from the registry, and know its name from nowhere else."""
    doubled = replace(
        OPERATORS["gated_residual"],
        make=lambda shape, dtype, randn: inputs.rows(shape, dtype, randn, 1, 0),
        ours=lambda x: 2 * x,
        reference=lambda x: x + x,
        eager=lambda x: x + x,
        bytes=lambda shape, element_size: (2 * element_size * shape.elements,) * 2,
        grads=(0,),
    )
    monkeypatch.setitem(OPERATORS, "double", doubled)
    assert run_quickly(tmp_path / "rows.json", "--ops", "double") == 0
    rows = [row for row in rows_of(tmp_path / "rows.json") if row["variant"] == "ours"]
    assert [row["name"] for row in rows] == ["double.forward", "double.backward", "double.both"]
    assert bytes_per_element("double") == [("double.forward", "4"), ("double.backward", "4")]


def test_time_limit_leaves_what_there_is(tmp_path, capsys):
    path = tmp_path / "rows.json"
    # the second run replaces the rows of the first one
    for _ in range(2):
        assert run_quickly(path, "--time-limit", "0") == 0
        count = len(OPERATORS)
        said = f"time limit reached: {count} of {count} cases not measured"
        assert said in capsys.readouterr().out
    assert [row["name"] for row in rows_of(path)] == ["copy", "matmul"]


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--ops", "adaln,nothing"])
    assert "expected gated_residual_adaln, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("--batch 0", "--batch: expected 1 or more images, got 0"),
        ("--batch 4,-1", "--batch: expected 1 or more images, got -1"),
        ("--resolution 8", "--resolution: expected multiples of 16 pixels, got 8"),
        ("--resolution 64,0", "--resolution: expected multiples of 16 pixels, got 0"),
        ("--resolution 40", "--resolution: expected multiples of 16 pixels, got 40"),
    ],
)
def test_sizes_that_no_model_has_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        run.parse(words.split())
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    words = "-m pytest benchmarks/ --benchmark-only -q -k cpu -p no:cacheprovider"
    # a worker of xdist may not measure
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, *words.split()]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
