"""The step benchmark: its programs take the engine's steps, and its rows say what was measured, on any machine."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.record import FIELDS
from benchmarks.step import train_step
from benchmarks.step.kernel_families import FAMILIES
from benchmarks.step.phases import Phases
from benchmarks.step.steps import OneBatch, make_step
from benchmarks.step.variants import OTHER_TARGETS, Variant
from benchmarks.step.worker import Failure, Worker
from sra_fast.zero.process_group import init_distributed

MODULE = "benchmarks.step.train_step"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SMALL = "--device cpu --model SiT-S/8 --resolution 64 --steps 2".split()
ON_CPU = ["--device", "cpu"]


def one_process_environment() -> dict[str, str]:
    """Without what an earlier test or a launcher says of other processes."""
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


# programs against the engine

# four blocks that move: a large learning rate and a fast average, so that a wrong layer, draw or update
# shows in the loss
TINY = (
    "+model.depth=4+model.hidden_size=32+model.num_heads=2"
    "+align.student_layer=2+align.teacher_layer=3+align.weight=1.0"
    "+optim.lr=0.01+optim.eps=1e-5+optim.clip=0.5+optim.weight_decay=0.1+train.ema_decay=0.5"
)
COMPILED = "strong+backend=aot_eager"
PROGRAMS = [
    "fp32_teacher",
    "swap_ema",
    "bf16_teacher",
    "truncated",
    "fused_ops",
    COMPILED,
    "strong+compile=whole+backend=aot_eager",
    "swap_ema+compile=blocks+backend=aot_eager",
]
# what the comparison must be able to see
WRONG = ["+align.teacher_layer=4", "+train.ema_decay=0.6", "+optim.clip=0"]

# a worker that measures sums of losses instead of times: {"sums": [after step 0, ...]}
PROGRAM = """
from benchmarks.step.measure_case import environment_of, release
from benchmarks.step.steps import make_step
from benchmarks.step.variants import Variant
from benchmarks.step.worker import serve
from sra_fast.zero.process_group import init_distributed

def handle(request):
    name, steps = request
    variant = Variant.parse(name)
    with environment_of(variant):
        run = make_step(variant, variant.configuration("SiT-S/8", 64, 3, "cpu"), init_distributed())
        sums = []
        for i in range(steps):
            run.step(i)
            sums.append(float(run.loss_sum))
    if hasattr(run, "close"):
        run.close()
    return {"sums": sums}

serve(handle, lambda: release(cuda=False))
"""
STEPS = 6


@pytest.fixture
def start_worker():
    """A function that starts a process and returns ``sums(name)``, which runs a variant in it."""
    made = []

    def start():
        worker = Worker([sys.executable, "-c", PROGRAM], one_process_environment())
        made.append(worker)

        def sums(base: str, setting: str = "") -> list[float]:
            # a setting replaces an earlier one of the same name
            return worker.ask([base + TINY + setting, STEPS], 300)["sums"]

        return sums

    yield start
    for worker in made:
        worker.stop()


def test_programs_take_the_engines_steps_and_leave_nothing_behind(start_worker):
    sums = start_worker()
    engine = sums("sra")
    found = {name: sums(name) for name in PROGRAMS}
    for name, theirs in found.items():
        assert theirs == pytest.approx(engine, rel=1e-5), name
    for setting in WRONG:
        assert sums("truncated", setting) != pytest.approx(engine, rel=1e-3), setting

    # to the bit: nothing of an earlier case, its backend, compiled code or seeds, reaches a later one
    assert sums("sra") == engine
    assert sums("plain") != pytest.approx(engine, rel=1e-3)
    fresh = start_worker()
    assert fresh(COMPILED) == found[COMPILED] == sums(COMPILED)
    assert fresh("sra") == engine


# the engine with every target

# four tokens, so that they can be cut into groups
# without a graph, whose phases cannot be told apart
SMALL_ENGINE = "+model.hidden_size=32+model.num_heads=2+optim.lr=0.01+train.graph=false"
TARGET_VARIANTS = [
    *OTHER_TARGETS,
    "dual_time+align.full_share=0.5",
    "self_flow+align.teacher_dtype=fp8+train.precision=bf16",
    "cached_features+align.head=conv+align.target_norm=spatial",
    "self_flow+align2.target=cached_features",
]


def small_target(name: str) -> tuple:
    """``(variant, configuration)`` of a tiny SiT."""
    variant = Variant.parse(name + SMALL_ENGINE)
    return variant, variant.configuration("SiT-S/4", 64, 4, "cpu")


@pytest.fixture
def one_process(monkeypatch):
    """The device of a group of one process; the variables that say so are taken back."""
    for name in (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return init_distributed()


@pytest.mark.parametrize("name", TARGET_VARIANTS)
def test_the_engine_aligns_to_every_target(name, one_process):
    variant, cfg = small_target(name)
    run = make_step(variant, cfg, one_process)
    phases = Phases(cuda=False)
    for owner, attribute, phase in run.phases:
        phases.around(owner, attribute, phase)
    has_teacher = name.startswith(("self_flow", "dual_time"))
    times = phases.measure(run.step, range(3))
    assert set(times) == {"forward", "backward", "optimizer"} | (
        {"teacher"} if has_teacher else set()
    )
    # every step adds its alignment losses: none has been left out
    for section in cfg.alignments:
        total = run.logger.values.total("align" if section == "align" else "align2")
        assert torch.isfinite(total) and total != 0
    run.close()


def test_one_batch_has_what_a_target_needs(one_process):
    _, cfg = small_target("cached_features+align.feature_width=24")
    data = OneBatch(cfg, one_process)
    moments, labels, features = data.batch
    assert (data.features.tokens, data.features.width) == (4, 24)
    assert features.shape == (4, 4, 24) and features.dtype == torch.float32
    assert features.std() == pytest.approx(1, abs=0.2)
    # equal configurations have equal batches, and features change nothing else
    _, plain = small_target("plain")
    same = OneBatch(plain, one_process)
    assert same.features is None and len(same.batch) == 2
    assert torch.equal(same.batch[0], moments) and torch.equal(same.batch[1], labels)

    # mean + deviation * noise, both uniform in [0, 1): mean 1/2, variance 1/12 + 1/3
    mean, std = data.channel_statistics()
    assert mean == pytest.approx([0.5 * 0.18215] * 4, abs=0.03)
    assert std == pytest.approx([(5 / 12) ** 0.5 * 0.18215] * 4, rel=0.2)


# a run


def assert_fields(row: dict) -> None:
    """What every row has."""
    assert list(row) == [name for name in FIELDS if name in row]
    assert row["device"] == "cpu"
    assert row["versions"]["torch"] == torch.__version__
    assert row["command"].startswith(f"python -m {MODULE} ")


def assert_all_kinds(variant: str, rows: list[dict]) -> None:
    """The step, its phases, its kernels and the host's time of a variant."""
    rows = [row for row in rows if row["variant"] == variant]

    def parts(kind: str) -> dict[str, float]:
        return {row["name"]: row["ms"] for row in rows if row["kind"] == kind}

    (step,) = (row for row in rows if row["kind"] == "train_step")
    assert step["name"] == "step"
    assert (step["model"], step["resolution"], step["batch"]) == ("SiT-S/8", 64, 2)
    # two images
    assert step["images_per_s"] * step["ms"] == pytest.approx(2000)
    assert step["percent_of_ceiling"] > 0
    # neither is known of a CPU
    assert not {"mfu", "peak_bytes"} & set(step)

    teacher = set() if variant == "plain" else {"teacher"}
    phases = parts("phase")
    assert set(phases) == {"forward", "backward", "optimizer", "communication"} | teacher
    assert min(phases.values()) >= 0
    # a CPU's host has no device to run ahead of, so there is no "step"
    assert set(parts("host")) == {"start-up"}
    assert parts("host")["start-up"] > step["ms"]
    assert {"matmul", "attention"} <= set(parts("kernel_share")) <= {*FAMILIES, "other"}


def test_a_run_in_which_two_of_five_cases_fail(tmp_path, monkeypatch, capsys):
    """A failure is printed, the others have rows of every kind, and the exit code says that something failed."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # relative to a folder that is not the one in which the process starts
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = "--batch 2 --warmup 1 --profile 1 --published empty --json rows.json --variants"
    variants = "plain+model.patch_size=5,reference,plain,sra,truncated"
    assert train_step.main([*SMALL, *words.split(), variants]) == 1

    output = capsys.readouterr().out
    assert "plain+model.patch_size=5 SiT-S/8 64 px, 2 images: failed: " in output
    missing = tmp_path / "empty" / "SiT-SRA/models/sit.py"
    expected = f"expected a checkout that holds SiT-SRA/models/sit.py, found none at {missing}"
    assert expected in output

    rows = rows_of(tmp_path / "rows.json")
    steps = [row["variant"] for row in rows if row["kind"] == "train_step"]
    assert steps == ["torch", "torch", "plain", "sra", "truncated"]
    copy, matmul = rows[:2]
    assert (copy["name"], matmul["name"]) == ("copy", "matmul")
    assert copy["gbps"] > 0
    assert matmul["ms"] > 0
    for row in rows:
        assert_fields(row)
    for variant in ("plain", "sra", "truncated"):
        assert_all_kinds(variant, rows)


# the order of cases and repetitions, with answers that are made up

ANSWER = {
    "ms": 1.0,
    "images_per_s": 1.0,
    "flops_per_s": 1.0,
    "peak_bytes": None,
    "dtype": "float32",
    "loss": 1.0,
}
CEILINGS = {"copy": [1.0, 1.0], "matmul": [1.0, 1.0]}


@pytest.fixture
def asked(monkeypatch):
    """Requests that a run makes; ``asked.answer(name, batch, profile)`` may be replaced."""

    class Asked(list):
        answer = staticmethod(lambda name, batch, profile: ANSWER)

    requests = Asked()

    def ask(self, request, limit):
        name, model, resolution, batch, profile = request
        requests.append((name, model, resolution, batch, profile))
        return CEILINGS if name == "ceilings" else requests.answer(name, batch, profile)

    monkeypatch.setattr(Worker, "ask", ask)
    return requests


def test_repetitions_alternate_and_the_median_counts(asked, tmp_path):
    times = {"plain": [3.0, 1.0, 2.0], "sra": [6.0, 9.0, 5.0]}

    def answer(name, batch, profile):
        phases = {"phases": {"forward": times[name][0]}} if profile else {}
        return {**ANSWER, "ms": times[name].pop(0), **phases}

    asked.answer = answer
    path = tmp_path / "rows.json"
    words = [*ON_CPU, "--batch", "1", "--repeat", "3", "--json", str(path)]
    assert train_step.main(words) == 0
    # only the first repetition is profiled
    assert [(request[0], request[-1]) for request in asked[1:]] == [
        ("plain", True),
        ("sra", True),
        ("plain", False),
        ("sra", False),
        ("plain", False),
        ("sra", False),
    ]
    rows = rows_of(path)
    steps = {row["variant"]: row for row in rows if row["name"] == "step"}
    assert steps["plain"]["ms"] == 2.0
    assert steps["sra"]["ms"] == 6.0
    assert steps["plain"]["spread"] == 1.0
    assert steps["sra"]["spread"] == pytest.approx(4 / 6)
    phases = {row["variant"]: row["ms"] for row in rows if row["kind"] == "phase"}
    assert phases == {"plain": 3.0, "sra": 6.0}


def test_without_ceilings_nothing_is_said_of_them(asked, tmp_path, monkeypatch):
    def ask(self, request, limit):
        if request[0] == "ceilings":
            raise Failure("no ceilings")
        return ANSWER

    monkeypatch.setattr(Worker, "ask", ask)
    path = tmp_path / "rows.json"
    assert train_step.main([*ON_CPU, "--batch", "1", "--json", str(path)]) == 1
    rows = rows_of(path)
    assert [row["variant"] for row in rows] == ["plain", "sra"]
    assert not any("percent_of_ceiling" in row for row in rows)


@pytest.mark.parametrize("order", [(60.0, 70.0), (70.0, 60.0)])
def test_two_repetitions_count_alike(order):
    repetitions = [
        {"ms": ms, "images_per_s": 32e3 / ms, "mfu": 30 / ms, "peak_bytes": 7} for ms in order
    ]
    found, spread = train_step.summary(repetitions)
    assert found["ms"] == 65.0
    assert found["images_per_s"] == pytest.approx(32e3 / 65)
    assert found["mfu"] == pytest.approx(30 / 65)
    assert found["peak_bytes"] == 7
    assert spread == pytest.approx(10 / 65)
    # a single one has no spread
    assert train_step.summary(repetitions[:1]) == (repetitions[0], None)


def test_cases_run_in_the_order_given(asked, tmp_path):
    words = "--case SiT-S/8 64 4 sra,plain,sra --case SiT-S/4 32 2 plain --json".split()
    assert train_step.main([*ON_CPU, *words, str(tmp_path / "rows.json")]) == 0
    assert [request[:4] for request in asked[1:]] == [
        ("sra", "SiT-S/8", 64, 4),
        ("plain", "SiT-S/8", 64, 4),
        ("sra", "SiT-S/8", 64, 4),
        ("plain", "SiT-S/4", 32, 2),
    ]


def fails_with_many_images(name, batch, profile):
    if name == "sra" and batch >= 64:
        raise Failure("torch.OutOfMemoryError: CUDA out of memory")
    return ANSWER


def test_what_does_not_fit_is_not_tried_larger(asked, tmp_path):
    asked.answer = fails_with_many_images
    words = "--batch 128 32 64 --json".split()
    # too little memory is no failure
    assert train_step.main([*ON_CPU, *words, str(tmp_path / "rows.json")]) == 0
    tried = [(request[0], request[3]) for request in asked]
    assert ("sra", 64) in tried
    assert ("sra", 128) not in tried
    assert ("plain", 128) in tried


def test_what_does_not_fit_is_tried_smaller(asked, tmp_path):
    asked.answer = fails_with_many_images
    words = "--batch 128 --shrink --json".split()
    path = tmp_path / "rows.json"
    assert train_step.main([*ON_CPU, *words, str(path)]) == 0
    tried = [request[3] for request in asked if request[0] == "sra"]
    assert tried == [128, 64, 32]
    steps = [(row["variant"], row["batch"]) for row in rows_of(path) if row["name"] == "step"]
    assert steps == [("plain", 128), ("sra", 32)]


@pytest.mark.parametrize(
    "message",
    [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "AcceleratorError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_way_of_saying_that_memory_is_short(message, asked, tmp_path):
    def answer(name, batch, profile):
        if batch > 1:
            raise Failure(message)
        return ANSWER

    asked.answer = answer
    words = "--variants plain --batch 4 --shrink --json".split()
    assert train_step.main([*ON_CPU, *words, str(tmp_path / "rows.json")]) == 0
    assert [request[3] for request in asked if request[0] == "plain"] == [4, 2, 1]


def test_what_no_time_is_left_for_is_said(asked, tmp_path, capsys):
    words = "--batch 1 --budget 0 --json".split()
    assert train_step.main([*ON_CPU, *words, str(tmp_path / "rows.json")]) == 1
    expected = "plain            SiT-XL/2 256 px, 1 images: not run, no time is left"
    assert expected in capsys.readouterr().out
    assert asked == []
