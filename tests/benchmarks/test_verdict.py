"""The verdict says what the rows and pytest's log hold: right, wrong, met, missed, or not run."""

import json

import pytest

from benchmarks.report import verdict

WHERE = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "resolution": 256,
}


def row(kind: str, name: str, variant: str, **more) -> dict:
    case = {"model": "SiT-XL/2", "batch": 32}
    return {"kind": kind, "name": name, "variant": variant, **WHERE, **case, **more}


def step(variant: str, batch: int, ms: float, **more) -> dict:
    images_per_s = 1e3 * batch / ms
    return row("train_step", "step", variant, batch=batch, ms=ms, images_per_s=images_per_s, **more)


def operator(name: str, variant: str = "ours", **more) -> dict:
    return row("op", name, variant, **more)


KERNELS = {"matmul": 40.0, "attention": 5.0, "other": 0.1, "a": 0.4, "b": 0.3, "c": 0.2}
ROWS = [
    # a family of kernels of this name is no bandwidth
    row("kernel_share", "copy", "plain", ms=0.5),
    {"kind": "op", "name": "copy", "variant": "torch", "ms": 1.0, "gbps": 3000.0, **WHERE},
    step("plain", 32, 60.0, peak_bytes=30e9),
    step(
        "sra",
        32,
        70.0,
        peak_bytes=33e9,
        mfu=0.33,
        mfu_with_teacher=0.41,
        sm_mhz=1700.0,
        watts=650.0,
        spread=0.004,
        throttled="power cap",
    ),
    step("sra_fp8", 32, 68.0),
    # a setting that this engine may not choose
    step("sra+align.teacher_graph=true", 32, 10.0),
    step("strong", 32, 80.0),
    step("strong+compile=whole", 32, 77.0),
    step("plain+train.recompute=norm", 256, 400.0),
    step("sra+train.recompute=norm", 256, 460.0),
    step("strong", 128, 300.0),
    row("host", "step", "sra", ms=40.0),
    row("host", "start-up", "sra", ms=9000.0),
    *(row("kernel_share", name, "sra", ms=ms) for name, ms in KERNELS.items()),
    operator("gated_residual_adaln.backward", ms=0.042, percent_of_ceiling=91.0),
    operator("gated_residual_adaln.backward", "compile", ms=0.063, percent_of_ceiling=60.0),
    operator("adamw_ema_", batch=None, ms=9.0, percent_of_ceiling=80.0),
    # wrong
    operator("adaln.forward"),
]
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
def lines(tmp_path) -> list[str]:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "tests.log").write_text(LOG)
    return verdict.render(tmp_path, "first").splitlines()


@pytest.fixture
def goals(lines) -> dict[str, str]:
    """Name of a goal to what is said of it, with single spaces."""
    found = {}
    for line in lines[lines.index("goals:") + 1 :]:
        found[line[2:48].strip()] = " ".join(line[48:].split())
    return found


@pytest.mark.parametrize(
    "name, said",
    [
        ("SRA over plain, 32 images (time)", "1.167 goal <= 1.18, met,"),
        ("SRA with fp8 teacher over plain, 32", "1.133 goal <= 1.13, MISSED,"),
        # each with the settings that it may choose, at the batch that fits
        ("SRA over plain, 256 images (time)", "1.150 goal <= 1.18, met,"),
        ("SRA over strong, 32 images", "1.100 goal >= 1.1, met"),
        ("SRA over strong, 256 images (or what fits it)", "1.304 goal >= 1.05, met"),
        ("images/s with SRA, 32 images", "457.1 goal >= 460, MISSED,"),
        ("images/s of B/2 with SRA, 256", "not run goal >= 2000"),
        ("half-block backward over torch.compile's", "1.500 goal >= 1.3, met"),
        ("half-block backward, of the copy's bandwidth", "91.0 % goal >= 85 %, met"),
        ("adamw_ema_ over its bytes", "1.250 goal <= 1.15, MISSED"),
        ("memory over plain, 32 images", "3.000GB goal <= 6GB, met"),
    ],
)
def test_goals_are_met_missed_or_not_run(goals, name, said):
    assert goals[name].startswith(said)


def test_a_goal_has_its_prediction(goals):
    assert len(goals) == len(verdict.GOALS)
    words = goals["images/s with SRA, 32 images"].split()
    # 450 images/s were measured on an H100
    guess = float(words[words.index("predicted") + 1])
    assert guess == pytest.approx(450, rel=0.25)


def test_what_is_wrong_is_named(lines):
    title = "VERDICT first: NVIDIA H100 80GB HBM3, torch 2.11.0, commit abc, copy 3000 GB/s"
    assert lines[0] == title
    assert "operators: 2 right, 1 wrong: adaln.forward" in lines
    assert "tests: 2 passed, 2 failed, CUT SHORT: the others were not run" in lines
    assert [line for line in lines if "RED" in line] == [
        "  RED tests/ops/test_a.py::test_two",
        "  RED tests/ops/test_b.py::test_four",
    ]


def test_steps_host_and_kernels(lines):
    (sra,) = (line for line in lines if " sra   " in line)
    assert "70.00 ms +-0.2 %" in sra
    assert "MFU 33.0 %, with teacher 41.0 %" in sra
    assert "at 1700 MHz, 650 W (power cap)" in sra
    assert "host: 40.0 ms per step of 70.0 ms, hidden; start-up 9.0 s" in lines
    slowest = "matmul 40.0 ms, attention 5.0 ms, a 0.4 ms, b 0.3 ms, c 0.2 ms"
    assert f"slowest kernel families of sra, 32 images: {slowest}" in lines


def test_a_host_that_is_slower_than_the_device_is_not_hidden(tmp_path):
    slow = row("host", "step", "sra", ms=75.0)
    rows = [slow if (each["kind"], each["name"]) == ("host", "step") else each for each in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "75.0 ms per step of 70.0 ms, NOT hidden" in verdict.render(tmp_path)


def test_other_batches_are_no_answer():
    """Where only 32 images were measured nothing is said of 256."""
    rows = verdict.Rows([each for each in ROWS if each.get("batch") != 256])
    values = {goal.name: goal.value(rows) for goal in verdict.GOALS}
    assert values["SRA over plain, 256 images (time)"] is None
    assert values["images/s with SRA, 256 images"] is None
    # a rival may have half of the images where all of them do not fit, but not fewer
    assert rows.step("strong", 256)["batch"] == 128
    assert rows.step("strong", 512) is None


def test_a_rival_may_choose_its_settings():
    rows = verdict.Rows([step("swap_ema+graph=true", 32, 140.0), step("sra", 32, 70.0)])
    assert rows.step("swap_ema", 32)["ms"] == 140.0


@pytest.mark.parametrize(
    "last_line, said",
    [
        ("", "CUT SHORT"),
        ("=== 2 failed, 3 passed, 1 warning in 12.34s (0:00:12) ===\n", "2 passed, 2 failed\n"),
    ],
)
def test_tests_that_were_cut_short(tmp_path, last_line, said):
    (tmp_path / "tests.log").write_text(LOG + last_line)
    assert said in verdict.render(tmp_path)


def test_an_empty_folder_has_a_verdict_too(tmp_path):
    text = verdict.render(tmp_path)
    assert "nothing measured" in text
    assert "tests: not run" in text
    assert "operators: not run" in text
    assert text.count("goal ") == len(verdict.GOALS)


def test_other_peoples_models_have_a_line():
    row = {"kind": "model", "name": "both", "model": "DiT", "resolution": 256, "batch": 32}
    row["dtype"] = "bfloat16"
    rows = [
        {**row, "variant": "compile", "ms": 6.0},
        {**row, "variant": "ours", "ms": 5.0},
        {**row, "variant": "ours", "model": "SiT"},
        {**row, "variant": "ours", "ms": 1.0, "batch": 4},
        {**row, "variant": "ours", "name": "forward", "ms": 1.0},
    ]
    assert verdict.model_lines(rows) == [
        "other people's models, forward and backward:",
        "  DiT, 256 px, batch 32, bfloat16: compile 6.00 ms, ours 5.00 ms, 1.20x of torch.compile",
        "  SiT, 256 px, batch 32, bfloat16: ours FAILED",
        "  DiT, 256 px, batch 4, bfloat16: ours 1.00 ms",
    ]
    assert verdict.model_lines([]) == []
