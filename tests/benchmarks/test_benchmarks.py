"""The benchmarks: what they measure is what the operators do, and a wrong operator has no speed."""

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

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import measure  # noqa: E402
import record  # noqa: E402
import registry  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
from registry import ENTRIES, TINY, Shape  # noqa: E402

from sra_fast import ops  # noqa: E402

SHAPE = Shape(TINY, 64, 4)
XL = Shape("SiT-XL/2", 256, 32)
QUICK = ["--device", "cpu", "--budget", "0.002"]


def test_every_operator_with_a_kernel_is_measured():
    assert set(ENTRIES) == {*ops.__all__, "quantize_rows"}
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    # those of an MLP and of qkv are the norm's, and two of their backward passes
    products = {"attention", "linear_gelu", "adaln_linear", "adaln_mlp"}
    assert kernels - {"gelu", "concat_columns"} == {name.rstrip("_") for name in ENTRIES} - products


def test_most_valuable_first():
    found = registry.cases(None, None, None, None)
    assert found[0] == ("gated_residual_adaln", XL) and found[1] == (
        "adamw_ema_",
        Shape("SiT-XL/2"),
    )
    shapes = {shape for name, shape in found if name == "adaln"}
    assert shapes == {
        Shape(m, r, b) for m in registry.MODELS for r in (256, 512) for b in (32, 64, 256)
    }
    assert len(found) == len(set(found)) == 18 * 10 + 3 * 2
    assert registry.cases(["adaln"], [TINY], [64], [3]) == [("adaln", Shape(TINY, 64, 3))]
    assert XL.sizes == (256, 1152, 16) and Shape("SiT-B/2", 512, 1).sizes == (1024, 768, 12)
    # SiT-XL/2 with its projection head
    assert registry.num_parameters(XL) == pytest.approx(674.8e6 + 5.3e6, rel=1e-3)


def size(*tensors) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, torch.Tensor))


def traffic(name: str) -> tuple[int, int]:
    """Bytes of all inputs and outputs of the operators below autograd, each read or written once, at XL."""
    B, T, D = 32, 256, 1152
    meta = lambda *size: torch.empty(*size, dtype=torch.bfloat16, device="meta")
    op, rows, vector = torch.ops.sra_fast, [meta(B, T, D) for _ in range(4)], meta(B, D)
    mean, rstd = (meta(B, T).float() for _ in range(2))
    x, y = rows[:2]
    calls = {
        "adaln": ((x, vector, vector, None, 1e-6, False), (y, x, vector, None, mean, rstd, None)),
        "gated_residual": ((x, y, None, vector, None), (x, y, None, vector, None)),
        "gated_residual_adaln": (
            (x, y, None, *[vector] * 3, None, 1e-6, False),
            (*rows, None, vector, vector, None, mean, rstd, None),
        ),  # fmt: skip
        "align_distance": ((x, y, "smooth_l1", 0.05, True), (mean, x, True)),
    }
    fwd, bwd = calls[name]
    total = lambda call, args: sum(map(size, args)) + size(*tree_leaves(call(*args)))
    return total(getattr(op, name + "_fwd"), fwd), total(getattr(op, name + "_bwd"), bwd)


def test_bytes_of_row_operators():
    for name in ("adaln", "gated_residual", "gated_residual_adaln", "align_distance"):
        assert ENTRIES[name].bytes(XL, 2) == traffic(name), name


@pytest.mark.parametrize(
    "name", [name for name in ENTRIES if ENTRIES[name].bytes and name != "quantize_rows"]
)
def test_bytes_agree_with_the_kernels_docstrings(name):
    """The leading term; s = 2 bytes per element."""
    text = (ROOT / "kernels" / f"{name.rstrip('_')}.py").read_text().split('"""')[1]
    patterns = {
        "align_distance": (r"elements of \[B,T,D\]: forward (\d) ", r"backward (\d); "),
        "noise_pair": (r"\((\d+) and 28 bytes per element in fp32\)",),
        "ema_update_": (r"(\d+) bf16 with copy",),
        "adamw_ema_": (r"copy: (\d+) in all",),
    }.get(name, (r"forward +(\d) s B T D", r"backward +(\d) s B T D"))
    factor = 1 if name in ("noise_pair", "ema_update_", "adamw_ema_") else 2
    stated = [factor * int(re.search(pattern, text)[1]) for pattern in patterns]
    assert [int(count) for _, count in table.bytes_per_element(name)] == stated


def test_bytes_of_the_updates_and_the_noise():
    N = registry.num_parameters(SHAPE)
    ema, params, copies, _ = registry.ENTRIES["ema_update_"].make(
        SHAPE, torch.bfloat16, registry.random(0, "cpu")
    )
    assert size(*ema) == 4 * N
    assert ENTRIES["ema_update_"].bytes(SHAPE, 2)[0] == 2 * size(*ema) + size(*params) + size(
        *copies
    )
    flat, *_ = ENTRIES["adamw_ema_"].make(SHAPE, torch.bfloat16, registry.random(0, "cpu"))
    param, grad, exp_avg, exp_avg_sq, weights, ema, copy = flat
    both_ways = size(param, exp_avg, exp_avg_sq, ema)
    assert ENTRIES["adamw_ema_"].bytes(SHAPE, 2)[0] == 2 * both_ways + size(grad, weights, copy)
    inputs = ENTRIES["noise_pair"].make(SHAPE, torch.float32, registry.random(0, "cpu"))
    assert ENTRIES["noise_pair"].bytes(SHAPE, 4)[0] == size(inputs) + size(ops.noise_pair(*inputs))
    rows = ENTRIES["quantize_rows"]
    inputs = rows.make(SHAPE, torch.bfloat16, registry.random(0, "cpu"))
    assert rows.bytes(SHAPE, 2)[0] == size(inputs) + size(rows.ours(*inputs))


def plain_variants():
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=rivals.EPS)
    for name, entry in ENTRIES.items():
        yield from ((name, f) for f in (entry.eager, entry.reference, entry.to_compile) if f)
        if entry.with_norm:
            yield name, lambda *inputs, entry=entry: entry.eager(*inputs, norm=norm)


@pytest.mark.parametrize("name, rival", list(plain_variants()))
def test_a_rival_computes_what_the_operator_computes(name, rival, device):
    entry = ENTRIES[name]
    inputs = lambda: entry.make(SHAPE, torch.float32, registry.random(0, device))
    ours, theirs = (
        measure.results(entry, f, inputs(), torch.float32, device) for f in (entry.ours, rival)
    )
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.float().abs().max() > 0
        # copies in bf16 may be rounded to either side, e4m3 from a sum of another order too
        rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3}.get(a.dtype, 0.13)
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=1e-5)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_run_writes_rows(tmp_path, capsys):
    path, picture = tmp_path / "rows.json", tmp_path / "ops.png"
    plots = find_spec("matplotlib") is not None
    assert (
        run.main([*QUICK, "--json", str(path), *(["--plot", str(picture)] if plots else [])]) == 0
    )
    assert not plots or picture.read_bytes().startswith(b"\x89PNG")
    rows = rows_of(path)
    wanted = {
        f"{n}.{which}" if e.grads else n for n, e in ENTRIES.items() for which in measure.PASSES
    }
    assert {row["name"] for row in rows if row["variant"] == "ours"} == wanted
    assert {row["name"] for row in rows if row["variant"] == "eager"} == wanted
    required = {"kind", "name", "variant", "device", "ms", "versions", "commit", "command"}
    for row in rows:
        assert required <= set(row) <= set(record.FIELDS)
        assert list(row) == [name for name in record.FIELDS if name in row]
        assert row["kind"] == "op" and row["device"] == "cpu" and row["ms"] > 0
        assert row["versions"]["torch"] == torch.__version__ and row["command"].startswith(
            "python benchmarks/run.py"
        )
        assert (
            row["name"].startswith(("matmul", "attention", "linear_gelu", "adaln_"))
            or row["gbps"] > 0
        )
        assert row["name"] in ("copy", "matmul") or (
            row["model"] == TINY and row["percent_of_ceiling"] > 0
        )
        assert ("batch" in row) == (
            row["name"] not in ("copy", "matmul", "adamw_ema_", "ema_update_")
        )
    row = next(row for row in rows if row["name"] == "adaln.both" and row["variant"] == "ours")
    copy = next(row for row in rows if row["name"] == "copy")
    assert (row["resolution"], row["batch"], row["dtype"]) == (64, 4, "float32")
    assert row["gbps"] == pytest.approx(sum(ENTRIES["adaln"].bytes(SHAPE, 4)) / row["ms"] / 1e6)
    assert row["percent_of_ceiling"] == pytest.approx(100 * row["gbps"] / copy["gbps"])
    assert re.search(r"adaln.forward .* ours .*eager \d+\.\d\dx", capsys.readouterr().out)


right_residual, right_adamw, right_ema = ops.gated_residual, ops.adamw_ema_, ops.ema_update_


def wrong_gradient(x, y, gate):
    return right_residual(x, y, gate.detach() + 0.5 * gate - 0.5 * gate.detach())


WRONG = {
    "value": (
        "gated_residual",
        lambda x, *rest: right_residual(x, *rest) + 1e-3 * (torch.arange(x.shape[2]) == 7),
    ),
    "gradient": ("gated_residual", wrong_gradient),
    "unwritten": (
        "gated_residual",
        lambda x, y, gate: right_residual(x, y, gate) + 0 * x.new_empty(x.shape),
    ),
    "no weight decay": (
        "adamw_ema_",
        lambda *args, **kw: right_adamw(*args, **{**kw, "weight_decay": 0.0}),
    ),
    "no copy": ("ema_update_", lambda ema, params, decay, copies: right_ema(ema, params, decay)),
}


@pytest.mark.parametrize("name, wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_operator_is_red_and_has_no_speed(name, wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, name, wrong)
    assert (
        run.main([*QUICK, "--ops", f"{name},noise_pair", "--json", str(tmp_path / "rows.json")])
        == 1
    )
    out, rows = capsys.readouterr().out, rows_of(tmp_path / "rows.json")
    lines = [line for line in out.splitlines() if re.match(rf"{name}[. ].* tiny ", line)]
    passes = 3 if ENTRIES[name].grads else 1
    assert sum("RED" in line for line in lines) == passes and f"{name} ours: RED" in out
    assert not any(re.search(r"\d\.\d\dx", line) for line in lines)
    ours = {row["name"]: row for row in rows if row["variant"] == "ours"}
    # the others go on
    assert len(ours) == passes + 1 and "ms" in ours.pop("noise_pair")
    assert not any({"ms", "gbps", "percent_of_ceiling"} & set(row) for row in ours.values())


def test_a_wrong_rival_is_red_and_no_speed_is_claimed_against_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.torch, "compile", lambda *args, **kw: wrong_gradient)
    command = [*QUICK, "--ops", "gated_residual", "--variants", "ours,eager,compile"]
    assert run.main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert "gated_residual compile: RED: result 3" in out and "eager" in out
    assert not re.search(r"compile \d", out)


def test_a_rival_that_cannot_run_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        ENTRIES, "adaln", replace(ENTRIES["adaln"], to_compile=lambda *inputs: 1 / 0)
    )
    monkeypatch.setattr(run.torch, "compile", lambda function, **kw: function)
    command = [
        *QUICK,
        "--ops",
        "adaln",
        "--variants",
        "ours,compile",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert run.main(command) == 0
    assert "adaln compile: cannot run: ZeroDivisionError" in capsys.readouterr().out
    assert {row["variant"] for row in rows_of(tmp_path / "rows.json")} == {"torch", "ours"}


def test_time_limit_leaves_what_there_is(tmp_path, capsys):
    for _ in range(2):
        assert run.main([*QUICK, "--time-limit", "0", "--json", str(tmp_path / "rows.json")]) == 0
        assert (
            f"time limit reached: {len(ENTRIES)} of {len(ENTRIES)} cases not measured"
            in capsys.readouterr().out
        )
    # the second run's replaced the first one's
    assert [row["name"] for row in rows_of(tmp_path / "rows.json")] == ["copy", "matmul"]


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--ops", "adaln,nothing"])
    assert "expected gated_residual_adaln, " in capsys.readouterr().err


class FakeEvent:
    """Time on a device that runs everything at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_device_times_count_only_what_is_timed(monkeypatch):
    log, FakeEvent.now = [], 0.0

    def prepare(x):
        FakeEvent.now += 100.0
        return [x]

    def timed(state):
        # a graph can be walked once
        log.append(state.pop())
        FakeEvent.now += 3.0
        return object()

    for name, fake in {
        "Event": FakeEvent,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert measure.milliseconds([0, 1, 2], prepare, timed, "cuda", 0.0) == 3.0
    # warm-up, then the sets in turn
    assert log[9:] == [0, 1, 2] * ((len(log) - 9) // 3) and len(log) >= 9 + 3 + 3 * 3


def test_commands_name_no_folder_of_a_machine():
    command = f"python benchmarks/run.py --json {ROOT}/benchmarks/results/x.json --reference /home/me/SRA --budget 0.1"
    expected = (
        "python benchmarks/run.py --json benchmarks/results/x.json --reference SRA --budget 0.1"
    )
    assert record.environment("cpu", command)["command"] == expected


def test_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SRA_FAST_COMMIT", "0123abc")
    assert record.commit() == "0123abc"


def test_sets_are_larger_than_l2(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sets = lambda mib: measure.num_sets(
        (torch.empty(mib << 20, dtype=torch.uint8, device="meta"),), "cuda"
    )
    assert (sets(801), sets(800), sets(50), sets(1)) == (1, 3, 4, 48)


def test_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/",
        "--benchmark-only",
        "-q",
        "-k",
        "cpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")
    }  # a worker of xdist may not measure
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
