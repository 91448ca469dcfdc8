"""The suite for a GPU machine: parts in order, bounded in time, nothing lost."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, integrations
from benchmarks.operators import attention_backends, run
from benchmarks.other_models.checkouts import CHECKOUTS
from benchmarks.record import ROOT, VARIABLES
from benchmarks.step import train_step
from benchmarks.step.variants import OTHER_TARGETS


def test_dry_run_of_both_commands(tmp_path, monkeypatch, capsys):
    """From another folder. The second finds what the first has packed, as on another machine."""
    words = "-m benchmarks.gpu_suite first --device cpu --out found --archive kept"
    done = subprocess.run(
        [sys.executable, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "found"
    summary = json.loads((out / "summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == ["ops", "steps", "tests", "fill"]
    assert all(part["returncode"] == 0 for part in summary["parts"])
    assert not any(part["ran_over"] for part in summary["parts"])

    # every part has added its rows to one file; what only fills caches has none
    rows = json.loads((out / "rows.json").read_text())
    assert {"op", "train_step", "host"} <= {row["kind"] for row in rows}
    assert summary["commit"] == rows[0]["commit"]
    steps = {row["variant"]: row for row in rows if row["name"] == "step"}
    assert set(steps) == {"plain", "sra"}
    assert all(row["spread"] > 0 for row in steps.values())

    verdict = done.stdout[done.stdout.index("VERDICT first: cpu") :]
    assert verdict.strip() == (out / "verdict.txt").read_text().strip()
    assert re.search(r"^tests: [1-9]\d* passed, 0 failed", verdict, re.MULTILINE), verdict
    assert "operators: 4 right, 0 wrong" in verdict
    with tarfile.open(tmp_path / "kept" / "found.tgz") as archive:
        packed = set(archive.getnames())
    assert {"rows.json", "summary.json", "verdict.txt", "tests.log", "steps.log"} <= packed

    # in this process, which saves a start
    monkeypatch.chdir(tmp_path)
    words = "second --device cpu --out again --caches kept/caches.tgz"
    code = gpu_suite.main(words.split())
    said = capsys.readouterr().out
    assert code == 0, said
    assert "VERDICT second: cpu" in said
    rows = json.loads((tmp_path / "again" / "rows.json").read_text())
    assert {"swap_ema", "compile"} <= {row["variant"] for row in rows}


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", child.pid, flush=True)
time.sleep(60)
"""
DEAF = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
"""


def is_running(pid: int) -> bool:
    try:
        # the state is the first word after the name; a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def part(program: str, **options) -> gpu_suite.Part:
    return gpu_suite.Part("part", 1, ["-c", program], **options)


@pytest.mark.parametrize("program, returncodes", [(SLOW, (-2, -15)), (DEAF + SLOW, (-9,))])
def test_a_part_that_runs_over_is_ended_with_its_children_and_its_output_stays(
    program, returncodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_suite, "PATIENCE", 1.0)
    (found,) = gpu_suite.run_part(part(program), tmp_path, 3.0, "cpu")
    assert found["ran_over"]
    assert 3 <= found["seconds"] < 20
    assert found["returncode"] in returncodes
    assert found["tail"].startswith("started ")
    child = int(found["tail"].split()[1])
    assert not is_running(child)


def test_parts_side_by_side(tmp_path):
    """Both run at once, with their own variables and records; one that fails does not end the other."""
    show = (
        "import os, time; time.sleep(2); "
        "print(os.environ['TRITON_CACHE_DIR'], os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    )
    beside = gpu_suite.Part("beside", 0, ["-c", f"{show}; raise SystemExit(3)"])
    main_part = part(show, beside=beside, environment={"TRITON_CACHE_DIR": "mine"})
    first, second = gpu_suite.run_part(main_part, tmp_path, 30, "cpu")
    assert (first["part"], first["returncode"], first["ran_over"]) == ("part", 0, False)
    assert (second["part"], second["returncode"], second["ran_over"]) == ("beside", 3, False)
    assert first["tail"].split() == ["mine", "True"]
    assert second["tail"].split() == [str(tmp_path / "caches" / "triton"), "True"]
    # one after the other they would take four seconds
    assert second["seconds"] < 4


def test_dry_run_of_models(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers")
    code = gpu_suite.main(["models", "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == ["fill", "dit"]
    rows = json.loads((tmp_path / "rows.json").read_text())
    # the run that fills caches has none
    assert {(row["kind"], row["variant"]) for row in rows} == {
        ("model", "eager"),
        ("model", "ours"),
    }
    assert re.search(
        r"^  DiTTransformer2DModel, tiny, .*: eager \S+ ms, ours \S+ ms$", said, re.MULTILINE
    )


def test_dry_run_of_alignments(tmp_path, capsys):
    code = gpu_suite.main(["alignments", "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "VERDICT alignments: cpu" in said
    rows = json.loads((tmp_path / "rows.json").read_text())
    steps = {row["variant"]: row for row in rows if row["name"] == "step"}
    assert list(steps) == ["plain", "dual_time"]


def test_time_that_a_part_leaves_goes_to_the_next(tmp_path, monkeypatch):
    limits = []
    now = 0.0

    def run_part(part, out, seconds, device):
        nonlocal now
        limits.append(seconds)
        now += 30
        return [{"part": part.name, "returncode": 0, "ran_over": False, "seconds": 30, "tail": ""}]

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    # the verdict is tested elsewhere, and its predictions take seconds
    monkeypatch.setattr(gpu_suite, "render", lambda out, which: which)
    parts = [gpu_suite.Part("a", 50, []), gpu_suite.Part("b", 100, []), gpu_suite.Part("c", 50, [])]
    gpu_suite.run_suite("first", parts, tmp_path, 240, "cpu")
    # a quarter of 240; two thirds of the 210 that are left; all of the 180
    assert limits == pytest.approx([60, 140, 180])
    assert len(json.loads((tmp_path / "summary.json").read_text())["parts"]) == 3


def parts_by_name(parts: list[gpu_suite.Part]) -> dict[str, gpu_suite.Part]:
    return {part.name: part for part in parts}


OUT = Path("/out")
RED = ["tests/ops/test_adaln.py::test_a"]


def test_the_parts_for_a_gpu_fit_their_budgets():
    first = gpu_suite.first_parts(OUT, "/probe.cu")
    second = gpu_suite.second_parts(OUT, "/published", RED)
    assert sum(part.share for part in first) <= 270
    assert sum(part.share for part in second) <= 310
    models = gpu_suite.models_parts(OUT, [])
    assert sum(part.share for part in models) <= 400
    assert sum(part.share for part in gpu_suite.alignments_parts(OUT)) <= 400


def test_every_target_is_measured_for_two_models_and_batches():
    parts = parts_by_name(gpu_suite.alignments_parts(OUT))
    steps = train_step.parse(parts["steps"].command[2:])
    assert sorted(case for case, _ in steps.cases) == [
        ("SiT-B/2", 256, 32),
        ("SiT-B/2", 256, 256),
        ("SiT-XL/2", 256, 32),
        ("SiT-XL/2", 256, 256),
    ]
    for _, variants in steps.cases:
        assert {"plain", "sra", *OTHER_TARGETS} == {name.partition("+")[0] for name in variants}


def test_commands_for_a_gpu_are_understood():
    first = parts_by_name(gpu_suite.first_parts(OUT, "/probe.cu"))
    second = parts_by_name(gpu_suite.second_parts(OUT, "/published", RED))

    # options follow -m and the module
    assert run.parse(first["ops"].command[2:]).variants == ["ours", "eager"]
    assert run.parse(second["ops"].command[2:]).variants == ["ours", "compile"]
    assert train_step.parse(first["tests"].beside.command[2:]).untimed
    steps = train_step.parse(first["steps"].command[2:])
    assert [case for case, _ in steps.cases] == [("SiT-XL/2", 256, 32)]
    steps = train_step.parse(second["steps"].command[2:])
    assert steps.shrink
    assert steps.published == "/published"
    assert "reference" in steps.cases[0][1]
    # the probe is built while the operators are measured
    assert "nvcc" in first["ops"].beside.command
    assert first["probe"].command == "/out/probe 32 256"
    if not torch.cuda.is_available():
        assert attention_backends.main(first["attention"].command[2:]) == 2

    # without a checkout there is no published code; without red tests none run again
    without = parts_by_name(gpu_suite.second_parts(OUT, None, []))
    assert "reference" not in " ".join(without["steps"].command)
    assert "tests" not in without


def checkout_of(name: str, folder: Path) -> Path:
    """The files by which a checkout is recognised."""
    checkout = next(found for found in CHECKOUTS if found.name == name)
    (folder / checkout.file).parent.mkdir(parents=True, exist_ok=True)
    (folder / checkout.file).touch()
    (folder / checkout.root / checkout.beside).mkdir(parents=True, exist_ok=True)
    return folder


def test_parts_of_models(tmp_path, monkeypatch):
    dit = checkout_of("DiT", tmp_path / "a checkout")
    parts = parts_by_name(gpu_suite.models_parts(OUT, [dit]))
    assert list(parts) == ["ops", "tests", "DiT", *gpu_suite.DIFFUSERS_MODELS]
    args = integrations.parse(parts["DiT"].command[2:])
    assert args.checkout == dit and args.model == "DiT-XL/2" and args.layers == 4
    for name in gpu_suite.DIFFUSERS_MODELS:
        assert integrations.parse(parts[name].command[2:]).model in integrations.RECIPES
    # every model is compiled beforehand
    *fill, end = parts["tests"].beside.command.split("\n")
    assert "wait" in end
    assert len(fill) == len(parts) - 2
    assert all("--untimed & " in line for line in fill)
    assert integrations.parse(shlex.split(fill[0].partition(" & ")[0])[3:]).checkout == dit

    # only operators without a row of a GPU
    assert run.parse(parts["ops"].command[2:]).ops == gpu_suite.unmeasured_operators()
    row = {
        **{"kind": "op", "name": "adaln.forward", "variant": "ours"},
        **{"ms": 1.0, "device": "NVIDIA X"},
    }
    on_cpu = {**row, "name": "gated_residual.forward", "device": "cpu"}
    of_rival = {**row, "name": "noise_pair", "variant": "compile"}
    monkeypatch.setattr(gpu_suite, "load_results", lambda: [row, on_cpu, of_rival])
    found = gpu_suite.unmeasured_operators()
    assert "adaln" not in found and {"gated_residual", "noise_pair"} <= {*found}
    everything = [{**row, "name": f"{name}.forward"} for name in gpu_suite.OPERATORS]
    monkeypatch.setattr(gpu_suite, "load_results", lambda: everything)
    assert "ops" not in parts_by_name(gpu_suite.models_parts(OUT, []))

    with pytest.raises(ValueError, match="expected one checkout of DiT, got two"):
        gpu_suite.models_parts(OUT, [dit, dit])
    repa = checkout_of("REPA", tmp_path / "repa")
    with pytest.raises(ValueError, match="expected one of DiT, SiT, LightningDiT; got .*REPA"):
        gpu_suite.models_parts(OUT, [repa])


def test_side_by_side_fails_with_any_of_its_programs():
    codes = lambda *given: [["-c", f"raise SystemExit({code})"] for code in given]
    for given, expected in (((0, 0), 0), ((0, 3), 1), ((3, 0), 1)):
        line = gpu_suite.side_by_side(codes(*given))
        assert subprocess.run(["bash", "-c", line]).returncode == expected


def test_which_tests_run_on_a_gpu():
    names = (*gpu_suite.TESTS, *gpu_suite.MODEL_TESTS, *gpu_suite.ALIGNMENT_TESTS)
    for name in names:
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        # pytest runs nothing at all if one test is not there
        assert not function or f"def {function}(" in (ROOT / path).read_text(), name
    command = parts_by_name(gpu_suite.first_parts(OUT, None))["tests"].command
    words = [sys.executable, *command, "--collect-only", "-q"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("test_cuda.py", "test_ema_teacher.py", "test_adaln.py"):
        assert name in found
    # what compilers generate needs no GPU
    assert "codegen" not in found
    assert "compiles_without_spills" not in found


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["third"],
        ["models", "--checkout", "/no/such/checkout"],
        ["second", "--caches", "/no/such/file.tgz"],
        ["first", "--published", "/no/such/folder"],
    ],
)
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(words)
    if len(words) == 3:
        expected = f"{words[1]}: expected a path that exists, got {words[2]}"
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-3"])
def test_a_budget_of_nothing_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["first", f"--budget={seconds}"])
    assert f"--budget: expected seconds above 0, got {seconds}" in capsys.readouterr().err


def test_models_need_diffusers(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpu_suite.main(["models"])
    assert "models needs diffusers: pip install diffusers" in capsys.readouterr().err


WHERE = {"device": "cpu", "commit": "b"}


@pytest.mark.parametrize(
    "rows, moves",
    [
        (None, False),
        ("[]", False),
        (json.dumps([WHERE, WHERE]), False),
        (json.dumps([WHERE, {**WHERE, "commit": "a"}]), True),
        (json.dumps([{**WHERE, "device": "NVIDIA H200"}]), True),
        (json.dumps([{"device": "cpu"}]), True),
        ('[{"device": "cp', True),
    ],
)
def test_rows_of_another_run_are_moved_aside(rows, moves, tmp_path):
    """Nothing is lost, and the verdict is about this run alone."""
    out = tmp_path / "found"
    for name in ("found", "found.1"):
        (tmp_path / name).mkdir()
    (out / "tests.log").write_text("old")
    if rows is not None:
        (out / "rows.json").write_text(rows)
    moved = gpu_suite.move_aside(out, WHERE)
    assert moved == (tmp_path / "found.2" if moves else None)
    if moves:
        assert [*out.iterdir()] == []
        assert (moved / "rows.json").read_text() == rows
        assert (moved / "tests.log").read_text() == "old"
    else:
        assert (out / "tests.log").exists()


def test_sigterm_ends_the_parts(tmp_path):
    """They are in groups of their own, which the signal does not reach."""
    program = (
        "from pathlib import Path; from benchmarks import gpu_suite\n"
        f"slow = gpu_suite.Part('slow', 1, ['-c', {SLOW!r}])\n"
        "with gpu_suite.interrupted_by_sigterm():\n"
        f"    gpu_suite.run_part(slow, Path({str(tmp_path)!r}), 60, 'cpu')\n"
    )
    suite = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "slow.log"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.1)
    child = int(log.read_text().split()[1])
    assert is_running(child)
    suite.terminate()
    assert suite.wait(timeout=60) != 0
    assert not is_running(child)


def test_variables_of_the_shell_do_not_reach_a_part(tmp_path, monkeypatch):
    """Rows would not show them."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    program = f"import os; print([name for name in {VARIABLES!r} if name in os.environ])"
    for environment, expected in (({}, "[]"), ({VARIABLES[0]: "1"}, f"['{VARIABLES[0]}']")):
        (record,) = gpu_suite.run_part(part(program, environment=environment), tmp_path, 60, "cpu")
        assert record["tail"].strip() == expected


@pytest.mark.parametrize("gigabytes, images", [(80, 128), (141, 256)])
def test_the_rival_has_as_many_images_as_may_fit(gigabytes, images, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "device_memory", lambda: gigabytes * 10**9)
    parts = {part.name: part for part in gpu_suite.second_parts(tmp_path, None, [])}
    cases = train_step.parse(parts["steps"].command[2:]).cases
    alone = [case for case, variants in cases if variants == ["strong+graph=true"]]
    assert alone == [("SiT-XL/2", 256, images)]


def test_a_checkout_of_a_command_that_takes_none(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["first", "--checkout", "/"])
    assert "--checkout: expected with models alone, got it with first" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_only_the_dry_run(capsys):
    assert gpu_suite.main(["first"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
