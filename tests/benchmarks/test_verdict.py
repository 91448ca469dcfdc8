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
    step("sra+train.recompute=norm+align.every=100", 32, 11.0),
    step("sra+train.recompute=norm+SRA_FAST_CUBLASLT=0", 32, 12.0),
    step("plain+train.recompute=norm+align.target=sra", 32, 13.0),
    step("sra+train.recompute=norm+an.old.setting", 32, 14.0),
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
    assert "tests: 2 passed, 1 failed, 1 error, CUT SHORT: the others were not run" in lines
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
        ("=== 1 failed, 3 passed, 1 error in 12.34s (0:00:12) ===\n", "1 failed, 1 error\n"),
    ],
)
def test_tests_that_were_cut_short(tmp_path, last_line, said):
    (tmp_path / "tests.log").write_text(LOG + last_line)
    assert said in verdict.render(tmp_path)


# pytest's output when it is interrupted, alone and under xdist
INTERRUPTED = """
============================= test session starts ==============================
collecting ... collected 6 items

tests/test_slow.py::test_slow[0] PASSED                                  [ 16%]
tests/test_slow.py::test_slow[1] PASSED                                  [ 33%]
tests/test_slow.py::test_slow[2]

!!!!!!!!!!!!!!!!!!!!!!!!!!!!!! KeyboardInterrupt !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
/proj/tests/test_slow.py:5: KeyboardInterrupt
(to show a full traceback on KeyboardInterrupt use --full-trace)
============================== 2 passed in 3.72s ===============================
"""
WORKERS_INTERRUPTED = """
scheduling tests via LoadScheduling

tests/test_slow.py::test_slow[0]
[gw0] [ 16%] PASSED tests/test_slow.py::test_slow[0]
tests/test_slow.py::test_slow[1]
[gw0] [ 33%] PASSED tests/test_slow.py::test_slow[1]
tests/test_slow.py::test_slow[4]

============================= slowest 20 durations =============================

(7 durations < 0.005s hidden.  Use -vv to show these durations.)
!!!!!!!!!!!!! xdist.dsession.Interrupted: session interrupted !!!!!!!!!!!!!!!!!!
============================== 2 passed in 5.84s ===============================
"""
ENDED = "============================== 2 passed in 3.72s ===============================\n"


@pytest.mark.parametrize("log", [INTERRUPTED, WORKERS_INTERRUPTED])
def test_a_run_that_was_interrupted_is_cut_short(tmp_path, log):
    """Its last line is that of a run that was not."""
    (tmp_path / "tests.log").write_text(log)
    said = "tests: 2 passed, 0 failed, CUT SHORT: the others were not run"
    assert said in verdict.render(tmp_path).splitlines()
    # without the line of exclamation marks it was not
    whole = "\n".join(line for line in log.splitlines() if not line.startswith("!"))
    (tmp_path / "tests.log").write_text(whole)
    assert "tests: 2 passed, 0 failed" in verdict.render(tmp_path).splitlines()


def test_what_a_failed_test_has_printed_cuts_nothing_short(tmp_path):
    text = INTERRUPTED + "=== short test summary info ===\nFAILED tests/a.py::b - assert 0\n"
    (tmp_path / "tests.log").write_text(text + "=== 1 failed, 2 passed in 3.72s ===\n")
    assert "CUT SHORT" not in verdict.render(tmp_path)


@pytest.mark.parametrize(
    "part, is_cut",
    [
        ({"ran_over": True, "returncode": 0}, True),
        # interrupted, out of memory
        ({"ran_over": False, "returncode": 2}, True),
        ({"ran_over": False, "returncode": -9}, True),
        ({"ran_over": False, "returncode": 0}, False),
        ({"ran_over": False, "returncode": 1}, False),
    ],
)
def test_the_suite_knows_whether_the_tests_were_cut_short(tmp_path, part, is_cut):
    (tmp_path / "tests.log").write_text(INTERRUPTED.partition("!")[0] + ENDED)
    other = {"part": "steps", "ran_over": not is_cut, "returncode": 2}
    summary = {"parts": [{"part": "tests", **part}, other]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert ("CUT SHORT" in verdict.render(tmp_path)) == is_cut


# a file that cannot be imported: alone, and with others under xdist
NOT_COLLECTED = """
collecting ... collected 2 items / 1 error

_______________________ ERROR collecting tests/test_b.py _______________________
E   ModuleNotFoundError: No module named 'nothing_of_this_name'
=========================== short test summary info ============================
ERROR tests/test_b.py
!!!!!!!!!!!!!!!!!!!! Interrupted: 1 error during collection !!!!!!!!!!!!!!!!!!!!
=============================== 1 error in 0.07s ===============================
"""
PARTLY_COLLECTED = """
[gw0] [ 50%] PASSED tests/test_c.py::test_fine
[gw1] [100%] ERROR tests/test_c.py::test_with_error
_______________________ ERROR collecting tests/test_b.py _______________________
E   ModuleNotFoundError: No module named 'nothing_of_this_name'
=========================== short test summary info ============================
ERROR tests/test_b.py - ImportError while importing test module '/proj/tests/...
ERROR tests/test_c.py::test_with_error - file /proj/tests/test_c.p...
========================= 1 passed, 2 errors in 0.50s ==========================
"""


@pytest.mark.parametrize(
    "log, said, red",
    [
        (
            NOT_COLLECTED,
            "tests: 0 passed, 0 failed, 1 error, CUT SHORT: the others were not run",
            ["tests/test_b.py"],
        ),
        (
            PARTLY_COLLECTED,
            "tests: 1 passed, 0 failed, 2 errors",
            ["tests/test_b.py", "tests/test_c.py::test_with_error"],
        ),
        # an error without a name
        (ENDED.replace("2 passed", "3 errors"), "tests: 0 passed, 0 failed, 3 errors", []),
    ],
)
def test_a_file_that_cannot_be_imported_is_an_error(tmp_path, log, said, red):
    path = tmp_path / "tests.log"
    path.write_text(log)
    assert verdict.failed_tests(path) == red
    assert verdict.test_lines(path) == [said, *(f"  RED {name}" for name in red)]


OTHER_RUNS = [
    {"device": "cpu"},
    {"commit": "old"},
    {"versions": {"torch": "2.10.0"}},
]


@pytest.mark.parametrize("other", OTHER_RUNS, ids=lambda other: next(iter(other)))
@pytest.mark.parametrize("is_first", [True, False])
def test_rows_of_older_runs_do_not_count(tmp_path, lines, other, is_first):
    """Wherever they stand, and however fast they were."""
    new = [{**each, "date": "2026-11-28 01:49"} for each in ROWS]
    old = [{**each, **other, "date": "2026-11-27 09:32"} for each in ROWS]
    for each in old:
        if "ms" in each:
            each["ms"] = 1.0
    (tmp_path / "rows.json").write_text(json.dumps(old + new if is_first else new + old))
    left_out = f"left out: {len(old)} rows of runs with another device, commit or versions"
    assert verdict.render(tmp_path, "first").splitlines() == [lines[0], left_out, *lines[1:]]


def test_the_verdict_is_on_the_run_of_the_suite(tmp_path):
    """Also where it has measured nothing, and rows of another run are newer."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    run = {name: WHERE[name] for name in ("device", "commit", "versions")}
    (tmp_path / "summary.json").write_text(json.dumps({**run, "commit": "def", "parts": []}))
    text = verdict.render(tmp_path)
    assert "nothing measured" in text and f"left out: {len(ROWS)} rows" in text
    (tmp_path / "summary.json").write_text(json.dumps({**run, "parts": []}))
    assert "left out" not in verdict.render(tmp_path)
    # the suite was killed while it wrote
    (tmp_path / "summary.json").write_text("{")
    assert "commit abc" in verdict.render(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ('[{"kind": "op",', "expected rows in JSON, got a damaged file: "),
        ("\ufffd", "expected rows in JSON, got a damaged file: "),
        ("{}", "expected a list of rows, got dict"),
        ("[3]", "expected rows, got no commit, device, kind, name, variant, versions in number 0"),
        (json.dumps([ROWS[0], {"kind": "op"}]), "got no commit, device, name, variant, versions"),
    ],
)
def test_damaged_rows_are_one_line(tmp_path, capsys, text, said):
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "tests.log").write_text(ENDED)
    assert verdict.main([str(tmp_path)]) == 0
    title, note, *rest = capsys.readouterr().out.splitlines()
    assert title.endswith("nothing measured")
    assert note.startswith(f"{tmp_path}/rows.json: expected ") and said in note
    assert "tests: 0 passed, 0 failed" in rest


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
