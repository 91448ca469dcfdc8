"""No blocking host sync per step, rows with a lag, failure on a loss that is not finite."""

import gc
import json
import math
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_config import config

from sra_fast.config.cli import parse_train
from sra_fast.data.dataset import make_dataset
from sra_fast.training import logger, run
from sra_fast.training.flops import training_flops
from sra_fast.training.logger import StepFacts, TrainLogger, peak_flops
from sra_fast.training.plan import fill_in
from sra_fast.training.rows import read_rows

CPU = torch.device("cpu")
SYNCS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


def metrics(tmp_path, every=2, start=0):
    return TrainLogger(tmp_path, config("--train.log_every", str(every)), CPU, 1, start)


def test_flops_are_counted_by_layer():
    plain, aligned = training_flops(config())
    none, same = training_flops(config("--align", "none"))
    assert plain == none == same
    d = 32
    t = 16
    block = 2 * t * (12 * d * d) + 2 * 6 * d * d + 2 * 2 * t * t * d
    head = 2 * t * 4 * d * d
    deeper = training_flops(config("--align.teacher_layer", "4"))[1]
    assert deeper - aligned == block
    embed = plain / 3 - 4 * block - (2 * t * d * 4 + 2 * 2 * d * d)  # less the final layer
    assert aligned == plain + 3 * head + embed + 3 * block


def test_paper_flops():
    """SiT-XL/2 at 256 px: 237.2 GFLOP forward, truncated teacher 169.4, head 2.7 (per image)."""
    cfg = parse_train([])[0]
    fill_in(cfg)
    plain, aligned = training_flops(cfg)
    assert plain / 3e9 == pytest.approx(237.2, rel=2e-3)
    assert (aligned - plain) / 1e9 == pytest.approx(169.4 + 3 * 2.7, rel=5e-3)


def test_flops_do_not_depend_on_the_backend(monkeypatch):
    expected = training_flops(config())
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert training_flops(config()) == expected


def test_peak_table(monkeypatch):
    assert peak_flops(CPU, "bf16") is None
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
    }
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16") == rate
        assert peak_flops(torch.device("cuda"), "fp32", tf32=True) == pytest.approx(
            rate / 2, rel=2e-3
        )
        assert peak_flops(torch.device("cuda"), "fp32") is None
    # all but the first begin like others
    slices = ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 NVL")
    for unknown in ("Unheard-of 1", "NVIDIA L40", "NVIDIA A10G", *slices):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, name=unknown: name)
        assert peak_flops(torch.device("cuda"), "bf16") is None


def test_rows_are_means_and_come_one_reading_late(tmp_path):
    m = metrics(tmp_path)
    rows = []
    for step in range(1, 6):
        m.add({"loss": torch.tensor(float(step))})
        rows.append(m.step(StepFacts(step, lr=0.1)))
    # sent after steps 1, 2 and 4; each is read when the next one is on its way
    assert [r and r["step"] for r in rows] == [None, 1, None, 2, None]
    m.flush()
    m.close()
    written = read_rows(tmp_path / "stats.jsonl")
    assert [(r["step"], r["loss"]) for r in written] == [(1, 1.0), (2, 2.0), (4, 3.5), (5, 5.0)]
    assert all("mfu" not in r and "peak_memory_gib" not in r for r in written)
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test moves on."""
    now = [0.0]
    monkeypatch.setattr(logger.time, "perf_counter", lambda: now[0])
    return now


def take_steps(m: TrainLogger, clock: list, seconds: dict[int, float]) -> None:
    """Steps by their numbers, of so many seconds."""
    for step, took in seconds.items():
        clock[0] += took
        m.add({"loss": torch.tensor(1.0)})
        m.step(StepFacts(step))


@pytest.mark.parametrize("start", [0, 4])
def test_speeds_are_those_of_timed_steps(tmp_path, clock, start):
    """Without the first step of a process, which compiles, and what is done between steps."""
    m = metrics(tmp_path, every=4, start=start)
    first, *others = range(start + 1, start + 8)
    take_steps(m, clock, {first: 60.0} | {step: 0.5 for step in others})
    m.flush()
    # a checkpoint, and a single slow step before the next one
    clock[0] += 100.0
    m.restart_clock()
    take_steps(m, clock, {start + 8: 2.0})
    m.flush()
    rows = m.close()
    speeds = [(r["step"], r.get("timed_steps"), r.get("ms_per_step")) for r in rows]
    begun = [(1, None, None)] if start == 0 else []
    assert speeds == [
        *begun,
        (start + 4, 3, 500.0),
        (start + 7, 3, 500.0),
        (start + 8, 1, 2000.0),
    ]
    # of 8 images each
    assert rows[-1]["images_per_s"] == 4.0
    assert run.logged(rows, 8)["images_per_s"] == round(7 * 8 / 5.0, 1)
    if not start:
        assert run.logged(rows[:1], 8)["images_per_s"] is None


def test_the_weight_of_the_alignment_is_a_mean(tmp_path):
    """As the losses are: their sum is the loss, whichever step a row ends with."""
    m = metrics(tmp_path, every=4)
    for step in range(1, 10):
        aligned = step % 2
        denoise, distance = 1.0 + step, 3.0
        m.add({"loss": torch.tensor(denoise + 0.5 * aligned * distance), "denoise": denoise})
        if aligned:
            m.add({"align": torch.tensor(distance)})
        m.step(StepFacts(step, weights={"align": 0.5 * aligned}))
    m.flush()
    rows = m.close()
    assert [row["align_weight"] for row in rows] == [0.5, 0.5 / 3, 0.25, 0.5]
    for row in rows:
        assert row["loss"] == pytest.approx(row["denoise"] + row["align_weight"] * row["align"])


def test_mfu_counts_the_targets_of_each_step(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(logger, "peak_flops", lambda *args: 1e9)
    words = ("--align2", "layer_sync", "--align.every", "2", "--train.log_every", "2")
    cfg = config(*words)
    fill_in(cfg)
    m = TrainLogger(None, cfg, CPU, 1)
    plain, extra = m.flops, m.target_flops
    assert extra["align"] > 0 and set(extra) == {"align", "align2"}
    kinds = [{"align": 1.0, "align2": 0.0}, {"align": 0.0, "align2": 1.0}, {}, {}, {"align": 1.0}]
    for step, weights in enumerate(kinds, 1):
        clock[0] += 1.0
        m.add({"loss": torch.tensor(1.0)})
        m.step(StepFacts(step, weights=weights))
    m.flush()
    found = [row["mfu"] for row in m.close()[1:]]
    # 8 images in a second
    expected = [plain + (extra["align"] + extra["align2"]) / 2, plain, plain + extra["align"]]
    # the first row's own step is not in the second
    expected[0] = plain + extra["align2"]
    assert found == pytest.approx([8 * float(flops) / 1e9 for flops in expected])


def test_resumed_log_drops_rows_beyond_the_checkpoint(tmp_path):
    (tmp_path / "stats.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (2, 4, 6)) + '{"st'
    )
    m = metrics(tmp_path, start=4)
    m.close()
    assert [r["step"] for r in read_rows(tmp_path / "stats.jsonl")] == [2, 4]


def test_the_values_of_every_step_are_handed_on(tmp_path):
    m = metrics(tmp_path)
    seen = []
    m.watch = seen.extend
    for step, loss in enumerate((1.0, math.nan, 3.0)):
        m.add({"loss": torch.tensor(loss)}, step)
        m.step(StepFacts(step + 1))
    m.flush()
    m.close()
    assert [at for table in seen for at in table.at] == [(0, 0), (1, 0), (2, 0)]
    assert [row["loss"] for row in m.rows][::2] == [1.0, 3.0]
    assert math.isnan(m.rows[1]["loss"]), "the row that shows it is kept"


@pytest.fixture
def no_collection():
    """Engines of earlier tests synchronise when they are collected."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    "stage, precision",
    [(0, "fp32"), (0, "bf16"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")],
)
@pytest.mark.parametrize("optimizer", ["fused", "torch"])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, stage, precision, optimizer):
    """A step that logs nothing reads no tensor on the host and does not wait.

    Every way of doing so is recorded, also inside DeepSpeed.
    """
    from deepspeed.accelerator import get_accelerator

    if (stage, precision, optimizer) == (0, "bf16", "torch"):
        pytest.skip("DeepSpeed's own step, which looks for overflow on the host")
    from sra_fast.data.loader import Batches
    from sra_fast.data.order import ShuffledBatches
    from sra_fast.training.loop import optimizer_step
    from sra_fast.training.plan import make_plan
    from sra_fast.training.trainer import build
    from sra_fast.zero.process_group import init_distributed

    words = (
        f"--train.zero_stage {stage} --train.precision {precision} --train.log_every 1000 "
        f"--optim.implementation {optimizer}"
    )
    cfg = config(*words.split())
    trainer = build(make_plan(cfg), init_distributed())
    data = make_dataset(cfg)
    stream = ShuffledBatches(len(data), 0, 8, 1, 0, 1, 0, 6)
    batches = Batches(data, stream, 0, False)
    m = TrainLogger(None, cfg, trainer.device, 1)
    reads = []
    for name in SYNCS:
        original = getattr(torch.Tensor, name)

        def spy(self, *args, name=name, original=original, **kwargs):
            reads.append((name, traceback.extract_stack(limit=12)))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    waits = []
    record_wait = lambda *args: waits.append(traceback.extract_stack(limit=3))
    monkeypatch.setattr(type(get_accelerator()), "synchronize", record_wait)
    for step in range(6):
        # the first steps allocate optimizer state
        if step == 2:
            reads.clear()
        facts = optimizer_step(trainer, batches, stream, data, step, m)
        # no row is due at these steps
        m.step(replace(facts, step=step + 2))
    # the counts of both optimizers are on the device, unread
    assert all(
        state["step"].device == trainer.device for state in trainer.masters.optimizer_states()
    )
    readers = [[n, *(f"{Path(f.filename).name}:{f.name}" for f in s[-5:-1])] for n, s in reads]
    # in these cases DeepSpeed itself looks at the norm, once a step
    if optimizer == "torch" and (stage == 3 or (stage, precision) == (1, "fp32")):
        own = [
            r
            for r in readers
            if r[-1] == "utils.py:is_invalid_grad_norm"
            and r[-2] in ("stage3.py:step", "stage_1_and_2.py:step")
        ]
        assert len(own) == 4, readers
        readers = [r for r in readers if r not in own]
    assert not readers, readers[:4]
    assert not waits, waits[0]
    assert torch.tensor(1.0).item() == 1.0 and reads[-1][0] == "item", "the recorder works"


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b"\xdc\xff\n", b"3\n", b"{}\n", b'{"step": "x"}\n']
)
def test_rows_end_where_a_file_is_damaged(tmp_path, tail):
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n' + tail)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
