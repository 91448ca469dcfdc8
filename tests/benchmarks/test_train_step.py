"""The step benchmark: its programs take the engine's steps, its rows say what was measured, on any machine."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import phases  # noqa: E402
import record  # noqa: E402
import train_step  # noqa: E402
from variants import LADDER, NAMES, Variant, expand, teacher_share  # noqa: E402
from worker import Worker  # noqa: E402

SMALL = [
    "--device",
    "cpu",
    "--model",
    "SiT-S/8",
    "--resolution",
    "64",
    "--warmup",
    "0",
    "--steps",
    "2",
]
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
} | {"OMP_NUM_THREADS": "1"}


def run(*args):
    command = [sys.executable, "benchmarks/train_step.py", *SMALL, *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


# four blocks that move: a large step, a fast average, so that a wrong layer, draw or update shows in the loss
TINY = (
    "+model.depth=4+model.hidden_size=32+model.num_heads=2+align.student_layer=2+align.teacher_layer=3+align.weight=1.0"
    "+optim.lr=0.01+optim.eps=1e-5+optim.clip=0.5+optim.weight_decay=0.1+train.ema_decay=0.5"
)
# runs each variant for six steps and prints its sums of losses
PROGRAM = """
import sys, json, torch
sys.path[:0] = ["{root}", "{root}/benchmarks"]
from step_case import make_step
from variants import Variant
from sra_fast.zero.process_group import init_distributed
found, device = {{}}, init_distributed()
for name in sys.argv[1:]:
    variant = Variant.parse(name)
    torch._dynamo.reset()
    run, sums = make_step(variant, variant.configuration("SiT-S/8", 64, 3, "cpu"), device, None), []
    for i in range(6):
        run.step(i)
        sums.append(float(run.loss_sum))
    found[name] = sums
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sums():
    programs = ["fp32_teacher", "swap_ema", "bf16_teacher", "truncated", "fused_ops", "strong+backend=aot_eager",
                "strong+compile=whole+backend=aot_eager", "swap_ema+compile=blocks+backend=aot_eager"]  # fmt: skip
    # what the comparison must be able to see
    wrong = [
        "truncated+align.teacher_layer=4",
        "truncated+train.ema_decay=0.6",
        "truncated+optim.clip=0",
    ]
    names = [
        "sra" + TINY,
        *(name + TINY for name in programs),
        *("truncated" + TINY + name[9:] for name in wrong),
    ]
    command = [sys.executable, "-c", PROGRAM.format(root=ROOT), *names]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout.splitlines()[-1]).values())


def test_programs_take_the_engines_steps(sums):
    engine, *programs = sums[:9]
    for program in programs:
        assert program == pytest.approx(engine, rel=1e-5)
    for wrong in sums[9:]:
        assert wrong != pytest.approx(engine, rel=1e-3)


def test_rows_of_every_kind(tmp_path):
    done = run(
        "--batch",
        2,
        "--variants",
        "plain,sra,truncated",
        "--profile",
        1,
        "--warmup",
        1,
        "--json",
        tmp_path / "rows.json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    copy, matmul = rows[:2]
    assert (
        (copy["name"], matmul["name"]) == ("copy", "matmul")
        and copy["gbps"] > 0
        and matmul["ms"] > 0
    )
    for variant in ("plain", "sra", "truncated"):
        mine = [row for row in rows if row["variant"] == variant]
        (step,) = (row for row in mine if row["kind"] == "train_step")
        assert (step["name"], step["model"], step["resolution"], step["batch"]) == (
            "step",
            "SiT-S/8",
            64,
            2,
        )
        assert (
            step["images_per_s"] * step["ms"] == pytest.approx(2000)
            and step["percent_of_ceiling"] > 0
        )
        # neither is known of a CPU
        assert not {"mfu", "peak_bytes"} & set(step)
        teacher = {"teacher"} if variant != "plain" else set()
        parts = {row["name"]: row["ms"] for row in mine if row["kind"] == "phase"}
        assert (
            set(parts) == {"forward", "backward", "optimizer", "communication"} | teacher
            and min(parts.values()) >= 0
        )
        (start,) = (
            row for row in mine if row["kind"] == "host"
        )  # a CPU's host has no device to run ahead of
        assert start["name"] == "start-up" and start["ms"] > step["ms"]
        shares = {row["name"]: row["ms"] for row in mine if row["kind"] == "kernel_share"}
        assert {"matmul", "attention"} <= set(shares) <= {*phases.FAMILIES, "other"}
    for row in rows:
        assert (
            list(row) == [name for name in record.FIELDS if name in row] and row["device"] == "cpu"
        )
        assert row["versions"]["torch"] == torch.__version__ and row["command"].startswith(
            "python benchmarks/train_step.py"
        )


def test_host_time_does_not_wait_for_the_device(monkeypatch):
    """A step that returns after 5 ms, on a device that is busy for 50 more."""
    now, calls = [0.0], []

    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: spend("wait", 0.05))
    assert phases.time_host(lambda i: spend("step", 0.005), range(3)) == pytest.approx([5.0] * 3)
    assert calls == ["wait", "step"] * 3


def test_a_case_that_fails_is_said_and_the_others_go_on(tmp_path):
    names = "plain+train.zero_stage=7,plain,reference"
    done = run(
        "--batch",
        1,
        "--variants",
        names,
        "--reference",
        tmp_path,
        "--profile",
        0,
        "--json",
        tmp_path / "rows.json",
    )
    assert (
        done.returncode == 1
        and "plain+train.zero_stage=7 SiT-S/8 64 px, 1 images: failed: " in done.stdout
    )
    assert (
        f"expects a checkout that holds SiT-SRA/models/sit.py, found none at {tmp_path}"
        in done.stdout
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"] for row in rows] == ["torch", "torch", "plain"]


@pytest.mark.parametrize("words, message", [
    ("fastest", "expected a variant of reference, plain"),
    ("reference", "needs --reference PATH"),
    ("strong+speed=9", "variant strong has no switch speed"),
    ("sra+compile=whole", "variant sra has no switch compile"),
    ("sra+train.compile", "expected settings name=value"),
])  # fmt: skip
def test_unknown_variants_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        train_step.parse(["--variants", words])
    assert message in capsys.readouterr().err


STEP = {
    "images_per_s": 1.0,
    "flops_per_s": 1.0,
    "peak_bytes": None,
    "dtype": "float32",
    "loss": 1.0,
}


def test_repetitions_alternate_and_the_median_counts(monkeypatch, tmp_path):
    times, tried = {"plain": [3.0, 1.0, 2.0], "sra": [6.0, 9.0, 5.0]}, []

    def ask(self, request, limit):
        name, *_, profile = request
        tried.append((name, profile))
        if name == "ceilings":
            raise train_step.Failure("no ceilings")
        apart = {"phases": {"forward": times[name][0]}} if profile else {}
        return {"ms": times[name].pop(0), **STEP, **apart}

    monkeypatch.setattr(train_step.Worker, "ask", ask)
    path = tmp_path / "rows.json"
    assert (
        train_step.main(["--device", "cpu", "--batch", "1", "--repeat", "3", "--json", str(path)])
        == 1
    )
    # a step is taken apart once
    assert tried == [
        ("ceilings", True),
        ("plain", True),
        ("sra", True),
        *[("plain", False), ("sra", False)] * 2,
    ]
    rows = json.loads(path.read_text())
    steps = {row["variant"]: row for row in rows if row["kind"] == "train_step"}
    assert {name: row["ms"] for name, row in steps.items()} == {"plain": 2.0, "sra": 6.0}
    assert {name: row["spread"] for name, row in steps.items()} == {
        "plain": 1.0,
        "sra": pytest.approx(4 / 6),
    }
    assert {row["variant"]: row["ms"] for row in rows if row["kind"] == "phase"} == {
        "plain": 3.0,
        "sra": 6.0,
    }
    # nothing can be said about the ceiling
    assert not any("percent_of_ceiling" in row for row in rows)


def test_two_repetitions_count_alike():
    fast, slow = (
        {"ms": ms, "images_per_s": 32e3 / ms, "mfu": 30 / ms, "peak_bytes": 7}
        for ms in (60.0, 70.0)
    )
    for order in ((fast, slow), (slow, fast)):
        found, spread = train_step.summary([*order])
        assert found["ms"] == 65.0 and spread == pytest.approx(10 / 65) and found["peak_bytes"] == 7
        assert found["images_per_s"] == pytest.approx(32e3 / 65) and found["mfu"] == pytest.approx(
            30 / 65
        )
    assert train_step.summary([fast]) == (fast, None)


def test_cases_run_in_the_order_given(monkeypatch, tmp_path):
    tried = []

    def ask(self, request, limit):
        tried.append(tuple(request[:4]))
        return (
            {"copy": [1.0, 1.0], "matmul": [1.0, 1.0]}
            if request[0] == "ceilings"
            else {"ms": 1.0, **STEP}
        )

    monkeypatch.setattr(train_step.Worker, "ask", ask)
    words = [
        "--case",
        "SiT-S/8",
        "64",
        "4",
        "sra,plain,sra",
        "--case",
        "SiT-S/4",
        "32",
        "2",
        "plain",
    ]
    assert train_step.main(["--device", "cpu", *words, "--json", str(tmp_path / "rows.json")]) == 0
    large, small = ("SiT-S/8", 64, 4), ("SiT-S/4", 32, 2)
    assert tried[1:] == [("sra", *large), ("plain", *large), ("sra", *large), ("plain", *small)]


def test_what_does_not_fit_is_not_tried_larger(monkeypatch, tmp_path):
    tried = []

    def ask(self, request, limit):
        name, _, _, batch, _ = request
        tried.append((name, batch))
        if name == "sra" and batch >= 64:
            raise train_step.Failure("torch.OutOfMemoryError: CUDA out of memory")
        if name == "ceilings":
            return {"copy": [1.0, 1.0], "matmul": [1.0, 1.0]}
        return {"ms": 1.0, **STEP}

    monkeypatch.setattr(train_step.Worker, "ask", ask)
    command = [
        "--device",
        "cpu",
        "--batch",
        "128",
        "32",
        "64",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert train_step.main(command) == 0
    assert [name for name, batch in tried if batch == 128] == ["plain"] and ("sra", 64) in tried


def test_what_no_time_is_left_for_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step.Worker, "ask", lambda *args: pytest.fail("nothing may start"))
    command = [
        "--device",
        "cpu",
        "--batch",
        "1",
        "--budget",
        "0",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert train_step.main(command) == 1
    assert (
        "plain            SiT-XL/2 256 px, 1 images: not run, no time is left"
        in capsys.readouterr().out
    )


def test_one_process_gives_what_separate_processes_give():
    """Losses to the bit: nothing of an earlier case, its backend, its compiled code or its seeds, reaches the next."""
    command = [sys.executable, "benchmarks/train_step.py", *SMALL, "--profile", "0", "--serve"]
    losses = []
    for separate in (False, True):
        worker = Worker(command, ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}, separate)
        names = [name + TINY for name in ("plain", "sra", "strong+backend=aot_eager", "sra")]
        losses.append([worker.ask([name, "SiT-S/8", 64, 2, False], 200)["loss"] for name in names])
        worker.stop()
    assert losses[0] == losses[1] and losses[0][1] == losses[0][3]
    assert len(set(losses[0][:2])) == 2, "with and without alignment"


PUBLISHED_MODEL = """
import torch
class SiT(torch.nn.Module):
    def __init__(self, input_size, num_classes, use_cfg, fused_attn, qk_norm, decoder_hidden_size=768):
        super().__init__()
        assert decoder_hidden_size == 384
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    def forward(self, x, t, y, ad):
        tokens = x.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            tokens = tokens + layer(tokens)
            if i + 1 == ad:
                features = tokens
        return tokens.transpose(1, 2).reshape(x.shape), features, y
SiT_models = {"SiT-S/8": SiT}
"""
PUBLISHED_LOSS = """
class SRALoss:
    def __init__(self, block_out_s, block_out_t, t_max, loss_type):
        assert (block_out_s, block_out_t, t_max, loss_type) == (3, 8, 0.2, "sml1")
    def __call__(self, model, images, teacher, labels):
        out, features, _ = model(images, images[:, 0, 0, 0], y=labels, ad=3)
        target = teacher(images, images[:, 0, 0, 0], y=labels, ad=8)[1]
        assert out.dtype == target.dtype and not target.requires_grad and features.requires_grad
        return (out - 1).square().mean((1, 2, 3)) / 1e3, (features - target).square().mean() / 1e3
"""


@pytest.fixture
def checkout(tmp_path):
    """A stand-in of the published code with its layout and its signatures."""
    for name, text in {"models/sit.py": PUBLISHED_MODEL, "loss.py": PUBLISHED_LOSS}.items():
        path = tmp_path / "SiT-SRA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_published_loop_learns_and_moves_its_teacher(checkout):
    from reference import Reference
    from step_case import RandomMoments

    losses = {}
    for precision, dtype in {"fp32": "float32", "bf16": "float16"}.items():
        # with this eps AdamW sees the scale of the gradients
        settings = f"+train.precision={precision}+optim.lr=0.03+optim.eps=1e-5+train.ema_decay=0.5+align.student_layer=3"
        cfg = Variant.parse("reference" + settings).configuration("SiT-S/8", 64, 4, "cpu")
        run = Reference(
            cfg, str(checkout), RandomMoments(cfg, torch.device("cpu")), torch.device("cpu")
        )
        assert run.dtype == dtype and run.scaler.is_enabled() == (precision == "bf16")
        weights, sums = [p.clone() for p in run.model.parameters()], [0.0]
        for i in range(8):
            run.step(i)
            sums.append(float(run.loss_sum))
        losses[precision] = [after - before for before, after in pairwise(sums)]
        for start, p, average in zip(
            weights, run.model.parameters(), run.ema.parameters(), strict=True
        ):
            if p.requires_grad:
                # between the start and the student, closer to the student after eight halvings
                assert 0 < (p - average).norm() < 0.6 * (p - start).norm()
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_ladder_and_depths():
    assert expand(["ladder"], "SiT-XL/2", True)[:2] == ["reference", "fp32_teacher"] and set(
        LADDER
    ) < set(NAMES)
    assert expand(["plain", "ladder", "plain"], "SiT-XL/2", False) == [
        "plain",
        *LADDER[1:],
        "plain",
    ]
    depths = expand(["depths"], "SiT-XL/2", False)
    assert [teacher_share(name, "SiT-XL/2") for name in depths] == [0.25, 0.5, 0.75, 1.0]
    assert teacher_share("sra", "SiT-XL/2") == 20 / 28
    cfg = Variant.parse(depths[0]).configuration("SiT-XL/2", 512, 8, "cuda")
    assert (cfg.align.student_layer, cfg.align.teacher_layer, cfg.model.input_size) == (7, 7, 64)
    # the engine knows every option that the variants set
    assert (
        Variant.parse("fp8").configuration("SiT-XL/2", 256, 8, "cuda").align.teacher_dtype == "fp8"
    )
    assert [
        Variant.parse(name).configuration("SiT-B/2", 256, 8, "cuda").train.compile
        for name in LADDER[6:]
    ] == [False, True, True, True]
    # only programs without our kernels are told so
    backends = {name: Variant.parse(name).environment.get("SRA_FAST_BACKEND") for name in NAMES}
    assert {name for name, backend in backends.items() if backend == "torch"} == {
        "fp32_teacher",
        "bf16_teacher",
        "swap_ema",
        "truncated",
        "strong",
    }
    # the best rival and the engine take the backend of attention that is the fastest
    attention = {
        name
        for name in NAMES
        if Variant.parse(name).environment.get("SRA_FAST_ATTENTION", "auto") == "auto"
    }
    assert attention >= {"strong", "fused_ops", "sra", "plain"} and not attention & {
        "truncated",
        "swap_ema",
        "fp32_teacher",
    }
