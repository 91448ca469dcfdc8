"""Predictions rest on bytes that two processes really send, on DeepSpeed's memory estimate, and on known limits."""

import json
import os
import subprocess
import sys

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from benchmarks.cost_model import one_gpu, scaling
from benchmarks.cost_model.one_gpu import Sizes, Times
from benchmarks.cost_model.scaling import (
    GRADIENT_COPIES,
    GRAPH_COPIES,
    GRAPH_STAGES,
    MAX_LIVE,
    REDUCE_BUCKET,
    Cluster,
    collectives,
    state_bytes,
    step_seconds,
    wire_bytes,
)
from benchmarks.record import ROOT
from benchmarks.step.variants import Variant

XL = Sizes(680_000_000, 475_000_000)
# 83 ms
TIMES = Times(forward=0.020, teacher=0.010, backward=0.040, optimizer=0.012, other=0.001)
UNLIMITED = Cluster(intra=1e15, inter=1e15)
H100S = Cluster(intra=450e9, inter=50e9)
# seconds of copies around the gradients of XL, by stage
COPIES = [bytes_each * XL.student / 3e12 for bytes_each in GRADIENT_COPIES]


# ZeRO stage, with a graph or without
WAYS = [(stage, False) for stage in range(4)] + [(stage, True) for stage in GRAPH_STAGES]


def count_traffic() -> list[dict]:
    """What two processes count in a step of every way, in bf16."""
    names = [
        f"sra+train.precision=bf16+train.zero_stage={stage}+train.graph={str(graph).lower()}"
        for stage, graph in WAYS
    ]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2"
    module = ["-m", "benchmarks.cost_model.network_traffic"]
    command = [sys.executable, *launcher.split(), *module, *names]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-4000:]
    return list(json.loads(lines[-1]).values())


def test_two_processes_send_and_copy_what_is_predicted():
    """In every ZeRO stage. One test, so that the processes start once."""
    for (stage, graph), found in zip(WAYS, count_traffic(), strict=True):
        predicted = collectives(stage, Sizes(found["parameters"], found["teacher"]), graph=graph)
        sizes = {}
        sent = 0.0
        for kind, size in predicted.values():
            sizes[kind] = sizes.get(kind, 0) + size
            # gloo implements reduce-scatter by all-reduce
            on_wire = "all_reduce" if kind == "reduce_scatter" else kind
            sent += wire_bytes(on_wire, size, 2)
        # the norm and a few other numbers are not predicted
        large = {kind: size for kind, size in found["collectives"].items() if size > 1000}
        assert large == pytest.approx(sizes, rel=1e-6), f"stage {stage}"
        assert found["sent"] == pytest.approx(sent, rel=1e-3), f"stage {stage}"

        # copies around the gradients; the rest is of activations, a small model on few images
        per_parameter = found["copies"] / found["parameters"]
        expected = GRAPH_COPIES if graph else GRADIENT_COPIES[stage]
        assert per_parameter == pytest.approx(expected, abs=0.3), f"stage {stage}"


@pytest.mark.parametrize("nodes", [1, 4])
def test_memory_against_deepspeeds_estimate(nodes):
    P = XL.student
    gpus = 8 * nodes
    bucket = 2 * REDUCE_BUCKET
    ours = []
    for stage in range(4):
        states = state_bytes(stage, gpus, XL)
        # DeepSpeed knows neither
        ours.append(sum(states.values()) - states["ema"] - states["teacher"])

    where = {"num_gpus_per_node": 8, "num_nodes": nodes, "cpu_offload": False}
    _, theirs = estimate_zero2_model_states_mem_needs(P, **where)
    # theirs has an fp32 copy of the gradients, which the one-pass update does not make; ours has the bucket
    assert ours[2] == pytest.approx(theirs - 4 * P / gpus + bucket)
    # stage 1 keeps all gradients, stage 0 the whole optimizer
    assert ours[1] - ours[2] == pytest.approx(2 * P - 2 * P / gpus - bucket)
    assert ours[0] == 16 * P

    _, theirs, _ = estimate_zero3_model_states_mem_needs(P, 0, cpu_offload_params=False, **where)
    # of weights, gradients and optimizer theirs counts 18 bytes, ours 16; theirs counts one gathered layer,
    # given as 0, ours all that DeepSpeed keeps
    assert ours[3] == pytest.approx(theirs - 2 * P / gpus + 2 * MAX_LIVE + bucket)


def test_ema_and_teacher_are_partitioned_as_the_engine_partitions_them():
    states = [state_bytes(stage, 8, XL) for stage in range(4)]
    eighth = 4 * XL.student / 8
    assert [each["ema"] for each in states] == [4 * XL.student, eighth, eighth, eighth]
    whole = 2 * XL.teacher
    assert [each["teacher"] for each in states] == [whole, whole, whole, whole / 8]


def test_one_gpu_takes_the_measured_time():
    for stage in range(4):
        assert step_seconds(stage, 1, XL, TIMES, H100S) == pytest.approx(0.083)


def test_links_without_limit_leave_latency_and_copies(monkeypatch):
    monkeypatch.setattr(scaling, "HOP_SECONDS", 0.0)
    found = [step_seconds(stage, 64, XL, TIMES, UNLIMITED) for stage in range(4)]
    assert found[0] == pytest.approx(0.083 + COPIES[0], abs=1e-4)
    for stage in (1, 2, 3):
        # the update is partitioned
        assert found[stage] == pytest.approx(0.071 + 0.012 / 64 + COPIES[stage], abs=1e-4)


def test_what_is_hidden_and_what_is_not(monkeypatch):
    monkeypatch.setattr(scaling, "HOP_SECONDS", 0.0)
    fast = Cluster(intra=1e12, inter=1e12, efficiency=1.0)
    # stage 1 waits for its weights, 2 P bytes, half of them from the other GPU, and for the last bucket of
    # gradients
    last_bucket = wire_bytes("all_reduce", 2 * REDUCE_BUCKET, 2) / 1e12
    expected = 0.077 + XL.student / 1e12 + last_bucket + COPIES[1]
    assert step_seconds(1, 2, XL, TIMES, fast) == pytest.approx(expected)

    # a link that is a hundred times slower cannot hide the gradients any more
    slow = Cluster(intra=1e10, inter=1e10, efficiency=1.0)
    last_bucket *= 100
    gradients = 2 * XL.student / 1e10
    weights = XL.student / 1e10
    teacher = XL.teacher / 1e10
    expected = 0.077 + last_bucket + (gradients - last_bucket - 0.040) + weights + (teacher - 0.020)
    assert step_seconds(1, 2, XL, TIMES, slow) == pytest.approx(expected + COPIES[1])


def test_with_a_graph_nothing_of_the_gradients_is_hidden(monkeypatch):
    monkeypatch.setattr(scaling, "HOP_SECONDS", 0.0)
    fast = Cluster(intra=1e12, inter=1e12, efficiency=1.0)
    # half of 2 P bytes goes to the other GPU; then the same of the weights, and of the teacher's
    sent = (2 * XL.student + XL.teacher) / 1e12
    expected = 0.077 + sent + GRAPH_COPIES * XL.student / 3e12
    for stage in GRAPH_STAGES:
        assert step_seconds(stage, 2, XL, TIMES, fast, graph=True) == pytest.approx(expected)
    # of stage 2 as well the whole gradient is kept, twice; on one GPU once
    for gpus, times in ((8, 2), (1, 1)):
        kept = [state_bytes(stage, gpus, XL, True)["gradients"] for stage in GRAPH_STAGES]
        assert kept == 2 * [times * 2 * XL.student]


def test_stage_3_gathers_twice_what_it_cannot_keep():
    assert collectives(3, XL)["weights"] == ("all_gather", 4 * XL.student)
    kept = Sizes(300_000_000, 200_000_000)
    assert collectives(3, kept)["weights"] == ("all_gather", 600_000_000)


def test_nodes_are_as_fast_as_their_adapters():
    def seconds(gpus: int, per_node: int) -> float:
        return Cluster(450e9, 50e9, per_node).seconds("all_gather", 1e10, gpus, 1e12)

    # 80 % of NVLink, of eight adapters, of one
    assert seconds(8, 8) == pytest.approx(7 / 8 * 1e10 / 360e9, rel=0.01)
    assert seconds(16, 8) == pytest.approx(15 / 16 * 1e10 / 320e9, rel=0.01)
    assert seconds(16, 1) == pytest.approx(15 / 16 * 1e10 / 40e9, rel=0.01)


CASE = {"model": "SiT-B/2", "resolution": 256, "batch": 32, "variant": "sra"}
PHASES = {
    "forward": 20.0,
    "teacher": 10.0,
    "backward": 40.0,
    "optimizer": 12.0,
    "communication": 0.0,
}
PEAK = 8 * 2**30


def measured_row(kind: str, name: str, ms: float, commit: str = "new", **more) -> dict:
    where = {"device": "NVIDIA X", "commit": commit}
    return {**CASE, **where, "kind": kind, "name": name, "ms": ms, **more}


@pytest.fixture(scope="module")
def cfg():
    return Variant.parse("sra").configuration("SiT-B/2", 256, 32, "cuda")


STEP = measured_row("train_step", "step", 83.0, peak_bytes=PEAK)


def test_the_newest_measured_rows_count(cfg):
    old = measured_row("train_step", "step", 999.0, commit="old")
    rows = [old, *(measured_row("phase", name, ms) for name, ms in PHASES.items()), STEP]
    times, peak, device = one_gpu.measured(rows, CASE, cfg)
    assert times.forward == 0.02
    assert times.other == pytest.approx(0.001)
    assert (peak, device) == (PEAK, "NVIDIA X")
    with pytest.raises(ValueError, match="hold no phases"):
        one_gpu.measured([old], CASE, cfg)


def test_the_time_of_a_graph_is_split_by_arithmetic(cfg):
    phases = {"graph": 70.0, "optimizer": 12.0}
    rows = [STEP, *(measured_row("phase", name, ms) for name, ms in phases.items())]
    split, _, _ = one_gpu.measured(rows, CASE, cfg)
    guess = one_gpu.predicted(cfg)
    assert split.forward + split.teacher + split.backward == pytest.approx(0.07)
    assert split.optimizer == 0.012
    assert split.teacher / split.backward == pytest.approx(guess.teacher / guess.backward)


def test_predictions_start_from_one_gpu(cfg):
    graphs = list(scaling.predictions(cfg, TIMES, PEAK, H100S, (1, 8), graph=True))
    assert [(each["stage"], each["gpus"]) for each in graphs] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    found = list(scaling.predictions(cfg, TIMES, PEAK, H100S, (1, 8)))
    one = found[0]
    eight = [each for each in found if each["gpus"] == 8]
    assert one["ms"] == pytest.approx(83.0)
    assert one["images_per_s"] == pytest.approx(32 / 0.083)
    assert one["efficiency"] == 1
    assert one["sent"] == 0
    assert all(each["sent"] > 0 for each in eight)
    assert one["peak_bytes"] == pytest.approx(PEAK)
    # stage 1 partitions the optimizer
    assert eight[1]["peak_bytes"] < one["peak_bytes"]


def test_without_rows_a_fraction_of_the_peak_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "load_results", lambda: [])
    assert scaling.main(["--model", "SiT-B/2"]) == 2
    assert "or give --assume-mfu" in capsys.readouterr().err

    path = tmp_path / "rows.json"
    words = "--model SiT-B/2 --assume-mfu 0.4 --gpus 1 8 --json"
    assert scaling.main([*words.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    assert len(written) == 8
    assert {row["kind"] for row in written} == {"prediction"}
    assert "(assumed)" in written[0]["device"]
    # 32 images
    assert written[0]["ms"] * written[0]["images_per_s"] == pytest.approx(32000)


def test_what_arithmetic_says_of_one_gpu():
    """By hand, for 32 images of SiT-XL/2.

    Products at 692 TFLOP/s, passes over memory at 2.55 TB/s, attention at 250 TFLOP/s.
    """
    times = {}
    for name in ("plain", "sra", "sra_fp8"):
        cfg = Variant.parse(name).configuration("SiT-XL/2", 256, 32, "cuda")
        times[name] = one_gpu.predicted(cfg)
    sra = times["sra"]
    elements = 32 * 256 * 1152
    blocks = 28
    attention = 4 * 256 * elements * (1 / 250e12 - 1 / 692.3e12)
    # 237.2 GFLOP of the student and 2.7 of its head per image
    products = 32 * 239.9e9 / 692.3e12
    forward = products + blocks * (elements * 32 / 2.55e12 + attention)
    backward = 2 * products + blocks * (elements * 60 / 2.55e12 + 2.5 * attention)
    assert sra.forward == pytest.approx(forward, rel=2e-3)
    assert sra.backward == pytest.approx(backward, rel=2e-3)

    teacher_products = 32 * 169.4e9 / 692.3e12
    teacher = teacher_products + 20 * (elements * 16 / 2.55e12 + attention)
    assert sra.teacher == pytest.approx(teacher, rel=2e-3)
    assert sra.optimizer == pytest.approx(42 * 680.1e6 / 2.55e12, rel=1e-3)
    # fp8 is 1.5 times as fast
    assert sra.teacher - times["sra_fp8"].teacher == pytest.approx(teacher_products / 3, rel=2e-3)
    assert times["plain"].teacher == 0


@pytest.mark.parametrize(
    "name, heads",
    [
        # the projection head is part of the model
        ("plain", 0),
        ("self_flow", 0),
        # 1152 -> 2048 -> 2048 -> 768 with biases
        ("cached_features", 1152 * 2048 + 2048 * 2048 + 2048 * 768 + 2 * 2048 + 768),
    ],
)
def test_parameters_of_every_target(name, heads):
    sra = Sizes.of(Variant.parse("sra").configuration("SiT-XL/2", 256, 32, "cuda"))
    found = Sizes.of(Variant.parse(name).configuration("SiT-XL/2", 256, 32, "cuda"))
    assert found.student - sra.student == heads
    assert found.teacher == (sra.teacher if name == "self_flow" else 0)


def test_what_arithmetic_says_of_other_targets():
    """Against SRA's step of 32 images of SiT-XL/2, from the products that differ."""
    times = {}
    for name in (
        "plain",
        "sra",
        "self_flow",
        "dual_time",
        "cached_features",
        "dual_time+align.every=2",
    ):
        cfg = Variant.parse(name).configuration("SiT-XL/2", 256, 32, "cuda")
        times[name] = one_gpu.predicted(cfg)
    sra = times["sra"]
    # a second conditioning: modulations of 28 blocks and the last layer, and the time's embedder
    second = 32 * 2 * (170 * 1152**2 + 1152 * (256 + 1152)) / 692.3e12
    assert times["self_flow"].forward - sra.forward == pytest.approx(second, rel=2e-2)
    assert times["self_flow"].teacher == sra.teacher

    # attention inside runs has fewer products, but takes 1.2 times as long
    attention = 28 * 4 * 256 * 32 * 256 * 1152 / 250e12
    difference = times["dual_time"].forward - sra.forward
    assert difference == pytest.approx(second + 0.2 * attention, rel=2e-2)
    assert times["dual_time"].teacher - sra.teacher == pytest.approx(20 / 28 * difference, rel=5e-2)
    assert times["dual_time+align.every=2"].teacher == pytest.approx(times["dual_time"].teacher / 2)

    # a head of three layers, of which the backward pass costs two forwards
    plain = times["plain"]
    head = 32 * 256 * 2 * (1152 * 2048 + 2048**2 + 2048 * 768) / 692.3e12
    assert times["cached_features"].teacher == 0
    assert times["cached_features"].forward - plain.forward == pytest.approx(head, rel=1e-3)
    assert times["cached_features"].backward - plain.backward == pytest.approx(2 * head, rel=1e-3)


@pytest.mark.parametrize("mfu", ["0", "-0.1", "1.1"])
def test_a_fraction_of_the_peak_that_is_none_is_refused(mfu, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--model", "SiT-B/2", "--assume-mfu", mfu])
    assert "expected --efficiency and --assume-mfu in (0, 1]" in capsys.readouterr().err


def test_without_rows_of_a_variant_those_of_others_are_named(capsys, monkeypatch):
    recompute = {**STEP, "variant": "sra+train.recompute=norm"}
    rows = [
        recompute,
        recompute,
        {**STEP, "variant": "plain", "batch": 64},
        {**STEP, "variant": "sra_fp8", "device": "cpu"},
        {**STEP, "variant": "dual_time", "kind": "phase", "name": "forward"},
        # a program without phases of its own
        {**STEP, "variant": "strong"},
    ]
    monkeypatch.setattr(scaling, "load_results", lambda: rows)
    assert scaling.main(["--model", "SiT-B/2"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("; there are rows of the variants sra+train.recompute=norm\n")
    assert said.count("\n") == 1
