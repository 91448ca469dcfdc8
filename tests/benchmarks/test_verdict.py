"""The verdict says what the rows and pytest's log hold: right, wrong, met, missed, or not run."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import verdict  # noqa: E402

WHERE = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "resolution": 256,
}


def step(variant, batch, ms, model="SiT-XL/2", **more):
    return {"kind": "train_step", "name": "step", "variant": variant, "model": model, "batch": batch, "ms": ms,
            "images_per_s": 1e3 * batch / ms, **WHERE, **more}  # fmt: skip


def op(name, variant="ours", batch=32, **more):
    return {
        "kind": "op",
        "name": name,
        "variant": variant,
        "model": "SiT-XL/2",
        "batch": batch,
        **WHERE,
        **more,
    }


ROWS = [
    {"kind": "op", "name": "copy", "variant": "torch", "ms": 1.0, "gbps": 3000.0, **WHERE},
    step("plain", 32, 60.0, peak_bytes=30e9),
    step("sra", 32, 70.0, peak_bytes=33e9, mfu=0.33, mfu_with_teacher=0.41, sm_mhz=1700.0, watts=650.0, spread=0.004, throttled="power cap"),
    step("sra_fp8", 32, 68.0),
    step("sra+align.teacher_graph=true", 32, 10.0),
    step("strong", 32, 80.0),
    step("strong+compile=whole", 32, 77.0),
    step("plain+train.recompute=norm", 256, 400.0),
    step("sra+train.recompute=norm", 256, 460.0),
    step("strong", 128, 300.0),
    {"kind": "host", "name": "step", "variant": "sra", "model": "SiT-XL/2", "batch": 32, "ms": 40.0, **WHERE},
    {"kind": "host", "name": "start-up", "variant": "sra", "model": "SiT-XL/2", "batch": 32, "ms": 9000.0, **WHERE},
    *({"kind": "kernel_share", "name": name, "variant": "sra", "model": "SiT-XL/2", "batch": 32, "ms": ms, **WHERE}
      for name, ms in {"matmul": 40.0, "attention": 5.0, "other": 0.1, "a": 0.4, "b": 0.3, "c": 0.2}.items()),
    op("gated_residual_adaln.backward", ms=0.042, percent_of_ceiling=91.0),
    op("gated_residual_adaln.backward", "compile", ms=0.063, percent_of_ceiling=60.0),
    op("adamw_ema_", batch=None, ms=9.0, percent_of_ceiling=80.0),
    op("adaln.forward"),
]  # fmt: skip
LOG = """
tests/ops/test_a.py::test_one[x - y]
[gw1] [ 10%] PASSED tests/ops/test_a.py::test_one[x - y]
[gw0] [ 20%] FAILED tests/ops/test_a.py::test_two
tests/ops/test_b.py::test_three PASSED                        [ 50%]
[gw3] [ 60%] ERROR tests/ops/test_b.py::test_four
[gw3] [ 60%] SKIPPED tests/ops/test_b.py::test_five
[gw3] [ 70%] PASSED tests/ops/test_b.py::test_four
=========================== short test summary info ============================
FAILED tests/ops/test_a.py::test_two - AssertionError: kernel error
"""


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "tests.log").write_text(LOG)
    return verdict.render(tmp_path, "first").splitlines()


def test_goals_are_met_missed_or_not_run(lines):
    said = {line[2:49].strip(): line[49:].split() for line in lines[lines.index("goals:") + 1 :]}
    assert said["SRA over plain, 32 images (time)"][:5] == ["1.167", "goal", "<=", "1.18,", "met,"]
    assert said["SRA with fp8 teacher over plain, 32"][:5] == [
        "1.133",
        "goal",
        "<=",
        "1.13,",
        "MISSED,",
    ]
    # each at its best among the settings that it may choose, and at the batch that fits
    assert said["SRA over plain, 256 images (time)"][:5] == ["1.150", "goal", "<=", "1.18,", "met,"]
    assert said["SRA over strong, 32 images"] == ["1.100", "goal", ">=", "1.1,", "met"]
    assert said["SRA over strong, 256 images (or what fits it)"] == [
        "1.304",
        "goal",
        ">=",
        "1.05,",
        "met",
    ]
    assert (
        said["images/s with SRA, 32 images"][0] == "457.1"
        and "MISSED," in said["images/s with SRA, 32 images"]
    )
    assert said["images/s of B/2 with SRA, 256"][:2] == ["not", "run"]
    assert said["half-block backward over torch.compile's"][0] == "1.500"
    assert (
        said["adamw_ema_ over its bytes"][0] == "1.250"
        and said["adamw_ema_ over its bytes"][-1] == "MISSED"
    )
    # beside what was measured, what arithmetic said: within a quarter of it here, as these rows were made up
    (guess,) = (
        float(words[words.index("predicted") + 1])
        for words in [said["images/s with SRA, 32 images"]]
    )
    assert 350 < guess < 570
    assert said["memory over plain, 32 images"][0] == "3.000GB"
    assert len(said) == len(verdict.GOALS)


def test_what_is_wrong_is_named(lines):
    text = "\n".join(lines)
    assert (
        lines[0] == "VERDICT first: NVIDIA H100 80GB HBM3, torch 2.11.0, commit abc, copy 3000 GB/s"
    )
    assert "operators: 2 right, 1 wrong: adaln.forward" in lines
    assert "tests: 2 passed, 2 failed, CUT SHORT: the others were not run" in text
    assert [line for line in lines if "RED" in line] == [
        "  RED tests/ops/test_a.py::test_two",
        "  RED tests/ops/test_b.py::test_four",
    ]
    assert "host: 40.0 ms per step of 70.0 ms, hidden; start-up 9.0 s" in lines
    assert any(
        line.endswith("matmul 40.0 ms, attention 5.0 ms, a 0.4 ms, b 0.3 ms, c 0.2 ms")
        for line in lines
    )
    (mine,) = (line for line in lines if " sra   " in line)
    assert (
        "70.00 ms +-0.2 %" in mine
        and "MFU 33.0 %, with teacher 41.0 %" in mine
        and "at 1700 MHz, 650 W (power cap)" in mine
    )


def test_a_host_that_is_slower_than_the_device_is_not_hidden(tmp_path):
    rows = [
        row | ({"ms": 75.0} if (row["kind"], row["name"]) == ("host", "step") else {})
        for row in ROWS
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "75.0 ms per step of 70.0 ms, NOT hidden" in verdict.render(tmp_path)


def test_other_batches_are_no_answer(tmp_path):
    """Where only 32 images were measured nothing is said of 256; a rival may have fewer where 256 do not fit, but not any."""
    rows = verdict.Rows([row for row in ROWS if row.get("batch") != 256])
    goals = {goal.name: goal.value(rows) for goal in verdict.GOALS}
    assert (
        goals["SRA over plain, 256 images (time)"] is goals["images/s with SRA, 256 images"] is None
    )
    assert rows.step("strong", 256)["batch"] == 128 and rows.step("strong", 512) is None
    assert (
        verdict.Rows([step("swap_ema+graph=true", 32, 140.0), step("sra", 32, 70.0)]).step(
            "swap_ema", 32
        )["ms"]
        == 140.0
    )


def test_tests_that_were_cut_short(tmp_path):
    for last, said in (
        ("", "CUT SHORT"),
        ("=== 2 failed, 3 passed, 1 warning in 12.34s (0:00:12) ===\n", "2 passed, 2 failed\n"),
    ):
        (tmp_path / "tests.log").write_text(LOG + last)
        assert said in verdict.render(tmp_path)


def test_an_empty_folder_has_a_verdict_too(tmp_path):
    text = verdict.render(tmp_path)
    assert (
        "nothing measured" in text
        and "tests: not run" in text
        and text.count("not run") == len(verdict.GOALS) + 2
    )
