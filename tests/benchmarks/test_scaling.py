"""Predictions rest on bytes that two processes really send, on DeepSpeed's own memory estimate, and on limits that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import scaling  # noqa: E402
from record import load_results  # noqa: E402
from scaling import Cluster, Sizes, Times, collectives, state_bytes, step_seconds, wire_bytes  # noqa: E402
from variants import Variant  # noqa: E402

XL = Sizes(680_000_000, 475_000_000)
TIMES = Times(forward=0.020, teacher=0.010, backward=0.040, optimizer=0.012, other=0.001)
FAST = Cluster(intra=1e15, inter=1e15)
SLOW = Cluster(intra=450e9, inter=50e9)


@pytest.fixture(scope="module")
def traffic():
    """``benchmarks/traffic.py`` in two processes: stages 0-3 in bf16."""
    names = [f"sra+train.precision=bf16+train.zero_stage={stage}" for stage in range(4)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "benchmarks/traffic.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *names], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-4000:]
    return list(json.loads(lines[-1]).values())


@pytest.mark.parametrize("stage", range(4))
def test_two_processes_send_what_is_predicted(traffic, stage):
    found = traffic[stage]
    predicted = collectives(stage, Sizes(found["parameters"], found["teacher"]))
    sizes, sent = {}, 0.0
    for kind, size in predicted.values():
        sizes[kind] = sizes.get(kind, 0) + size
        # gloo reduces and scatters by all-reduce
        sent += wire_bytes("all_reduce" if kind == "reduce_scatter" else kind, size, 2)
    # the norm and a few numbers more
    assert {
        kind: size for kind, size in found["collectives"].items() if size > 1000
    } == pytest.approx(sizes, rel=1e-6)
    assert found["sent"] == pytest.approx(sent, rel=1e-3)


@pytest.mark.parametrize("nodes", [1, 4])
def test_memory_against_deepspeeds_estimate(nodes):
    P, gpus = XL.student, 8 * nodes
    ours = [
        sum(v for k, v in state_bytes(stage, gpus, XL).items() if k not in ("ema", "teacher"))
        for stage in range(4)
    ]
    where = {"num_gpus_per_node": 8, "num_nodes": nodes, "cpu_offload": False}
    _, theirs = estimate_zero2_model_states_mem_needs(P, **where)
    # theirs has a copy of the gradients in fp32, which the one-pass update does not make; ours has the bucket that is sent
    assert ours[2] == pytest.approx(theirs - 4 * P / gpus + 2 * scaling.REDUCE_BUCKET)
    # stage 1 keeps all gradients, stage 0 all of the optimizer
    assert ours[1] - ours[2] == pytest.approx(2 * P - 2 * P / gpus - 2 * scaling.REDUCE_BUCKET)
    assert ours[0] == 16 * P
    _, theirs, _ = estimate_zero3_model_states_mem_needs(P, 0, cpu_offload_params=False, **where)
    kept = 2 * scaling.MAX_LIVE + 2 * scaling.REDUCE_BUCKET
    # of weights, gradients and optimizer theirs counts 18 bytes, ours 16; theirs counts one gathered layer, given as 0
    assert ours[3] == pytest.approx(theirs - 2 * P / gpus + kept)


def test_ema_and_teacher_are_sharded_as_the_engine_shards_them():
    assert [state_bytes(stage, 8, XL)["ema"] for stage in range(4)] == [
        4 * XL.student,
        *[0.5 * XL.student] * 3,
    ]
    assert [state_bytes(stage, 8, XL)["teacher"] for stage in range(4)] == [
        *[2 * XL.teacher] * 3,
        XL.teacher / 4,
    ]


def test_one_gpu_takes_the_measured_time():
    for stage in range(4):
        assert step_seconds(stage, 1, XL, TIMES, SLOW) == pytest.approx(0.083)


COPIES = [bytes_each * XL.student / 3e12 for bytes_each in scaling.GRADIENT_COPIES]


@pytest.mark.parametrize("stage", range(4))
def test_bytes_that_are_moved_around_the_gradients(traffic, stage):
    found = traffic[stage]
    # the rest is of activations: a small model on few images
    assert found["copies"] / found["parameters"] == pytest.approx(
        scaling.GRADIENT_COPIES[stage], abs=0.3
    )


def test_links_without_limit_leave_latency_and_copies(monkeypatch):
    monkeypatch.setattr(scaling, "HOP_SECONDS", 0.0)
    assert step_seconds(0, 64, XL, TIMES, FAST) == pytest.approx(0.083 + COPIES[0], abs=1e-4)
    for stage in (1, 2, 3):
        assert step_seconds(stage, 64, XL, TIMES, FAST) == pytest.approx(
            0.071 + 0.012 / 64 + COPIES[stage], abs=1e-4
        )


def test_what_is_hidden_and_what_is_not(monkeypatch):
    monkeypatch.setattr(scaling, "HOP_SECONDS", 0.0)
    two = Cluster(intra=1e12, inter=1e12, efficiency=1.0)
    # the weights of stage 1 wait for the update: 2 P bytes, half of them from the other GPU; gradients but for one bucket do not
    tail = wire_bytes("all_reduce", 2 * scaling.REDUCE_BUCKET, 2) / 1e12
    assert step_seconds(1, 2, XL, TIMES, two) == pytest.approx(
        0.077 + XL.student / 1e12 + tail + COPIES[1]
    )
    # a link that is a hundred times slower cannot hide the gradients any more
    slow = Cluster(intra=1e10, inter=1e10, efficiency=1.0)
    gradients, weights, teacher = 2 * XL.student / 1e10, XL.student / 1e10, XL.teacher / 1e10
    tail *= 100
    expected = 0.077 + tail + (gradients - tail - 0.040) + weights + (teacher - 0.020)
    assert step_seconds(1, 2, XL, TIMES, slow) == pytest.approx(expected + COPIES[1])
    assert collectives(3, XL)["weights"] == ("all_gather", 4 * XL.student)
    assert collectives(3, Sizes(300_000_000, 200_000_000))["weights"] == ("all_gather", 600_000_000)


def test_nodes_are_as_fast_as_their_adapters():
    seconds = lambda gpus, per_node: Cluster(450e9, 50e9, per_node).seconds(
        "all_gather", 1e10, gpus, 1e12
    )
    assert seconds(8, 8) == pytest.approx(7 / 8 * 1e10 / 360e9, rel=0.01)
    assert seconds(16, 8) == pytest.approx(15 / 16 * 1e10 / 320e9, rel=0.01)
    assert seconds(16, 1) == pytest.approx(15 / 16 * 1e10 / 40e9, rel=0.01)


def test_measured_rows_and_what_is_said_without_them(tmp_path, capsys, monkeypatch):
    case = {"model": "SiT-B/2", "resolution": 256, "batch": 32, "variant": "sra"}
    row = {**case, "device": "NVIDIA X", "commit": "b"}
    phases = {
        "forward": 20.0,
        "teacher": 10.0,
        "backward": 40.0,
        "optimizer": 12.0,
        "communication": 0.0,
    }
    rows = [
        {**row, "kind": "train_step", "name": "step", "ms": 999.0, "commit": "a"},
        *({**row, "kind": "phase", "name": name, "ms": ms} for name, ms in phases.items()),
        {**row, "kind": "train_step", "name": "step", "ms": 83.0, "peak_bytes": 8 * 2**30},
    ]
    cfg = Variant.parse("sra").configuration("SiT-B/2", 256, 32, "cuda")
    times, peak, device = scaling.measured(rows, case, cfg)
    assert (times.forward, times.other, peak, device) == (
        0.02,
        pytest.approx(0.001),
        8 * 2**30,
        "NVIDIA X",
    )
    with pytest.raises(ValueError, match="hold no phases"):
        scaling.measured(rows[:1], case, cfg)
    # the newest by their date, whatever their file is called
    for name, date, commit in (("a", "2026-02-01", "new"), ("b", "2026-01-01", "old")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"date": date, "commit": commit}]))
    assert [row["commit"] for row in load_results(tmp_path)] == ["old", "new"]
    # a graph's time is split as arithmetic has it
    graph = [
        rows[-1],
        *(
            {**rows[1], "name": name, "ms": ms}
            for name, ms in {"graph": 70.0, "optimizer": 12.0}.items()
        ),
    ]
    split, guess = scaling.measured(graph, case, cfg)[0], scaling.predicted(cfg)
    assert (
        split.forward + split.teacher + split.backward == pytest.approx(0.07)
        and split.optimizer == 0.012
    )
    assert split.teacher / split.backward == pytest.approx(guess.teacher / guess.backward)
    found = list(scaling.predictions(cfg, times, peak, SLOW, (1, 8)))
    one, eight = found[0], found[1::2]
    assert (
        one["ms"] == pytest.approx(83.0)
        and one["images_per_s"] == pytest.approx(32 / 0.083)
        and one["efficiency"] == 1
    )
    assert one["sent"] == 0 < min(each["sent"] for each in eight)
    assert eight[1]["peak_bytes"] < one["peak_bytes"] == pytest.approx(peak)
    monkeypatch.setattr(scaling, "load_results", lambda: [])
    assert (
        scaling.main(["--model", "SiT-B/2"]) == 2
        and "run train_step.py there, or give --assume-mfu" in capsys.readouterr().err
    )
    path = tmp_path / "rows.json"
    assert (
        scaling.main(
            ["--model", "SiT-B/2", "--assume-mfu", "0.4", "--gpus", "1", "8", "--json", str(path)]
        )
        == 0
    )
    written = json.loads(path.read_text())
    assert (
        len(written) == 8
        and {r["kind"] for r in written} == {"prediction"}
        and "(assumed)" in written[0]["device"]
    )
    assert written[0]["ms"] * written[0]["images_per_s"] == pytest.approx(32000)


def test_what_arithmetic_says_of_one_gpu():
    """By hand, for 32 images of SiT-XL/2: FLOPs at 692 TFLOP/s, passes over memory at 2.55 TB/s, attention at 250 TFLOP/s."""
    cfg = Variant.parse("sra").configuration("SiT-XL/2", 256, 32, "cuda")
    times = scaling.predicted(cfg)
    elements, blocks = 32 * 256 * 1152, 28
    attention = 4 * 256 * elements * (1 / 250e12 - 1 / 692.3e12)
    # 237.2 GFLOP of the student and 2.7 of its head per image
    products = 32 * 239.9e9 / 692.3e12
    assert times.forward == pytest.approx(
        products + blocks * (elements * 32 / 2.55e12 + attention), rel=2e-3
    )
    assert times.backward == pytest.approx(
        2 * products + blocks * (elements * 60 / 2.55e12 + 2.5 * attention), rel=2e-3
    )
    teacher = 32 * 169.4e9 / 692.3e12
    assert times.teacher == pytest.approx(
        teacher + 20 * (elements * 16 / 2.55e12 + attention), rel=2e-3
    )
    assert times.optimizer == pytest.approx(42 * 680.1e6 / 2.55e12, rel=1e-3)
    fp8 = scaling.predicted(Variant.parse("sra_fp8").configuration("SiT-XL/2", 256, 32, "cuda"))
    assert times.teacher - fp8.teacher == pytest.approx(teacher / 3, rel=2e-3)
    assert (
        scaling.predicted(Variant.parse("plain").configuration("SiT-XL/2", 256, 32, "cuda")).teacher
        == 0
    )
