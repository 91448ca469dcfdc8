"""The suite for a GPU machine: parts in order, bounded in time, nothing lost; and the probe that is one of its parts."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
import stacked_products  # noqa: E402


def run_suite(which, *words, cwd):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu_suite.py"),
        which,
        "--device",
        "cpu",
        *map(str, words),
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


def test_dry_run_of_both_commands_from_anywhere(tmp_path):
    """The second finds what the first has packed, as on another machine."""
    done = run_suite("first", "--out", "found", "--archive", "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == ["ops", "steps", "tests", "fill"]
    assert all(part["returncode"] == 0 and not part["ran_over"] for part in summary["parts"])
    rows = json.loads((tmp_path / "found" / "rows.json").read_text())
    # every part has added its own to one file; what only fills caches has none
    assert {"op", "train_step", "host"} <= {row["kind"] for row in rows} and summary[
        "commit"
    ] == rows[0]["commit"]
    steps = {
        row["variant"]: row for row in rows if row["kind"] == "train_step" and row["name"] == "step"
    }
    assert set(steps) == {"plain", "sra"} and all(row["spread"] > 0 for row in steps.values())
    verdict = done.stdout[done.stdout.index("VERDICT first: cpu") :]
    assert verdict.strip() == (tmp_path / "found" / "verdict.txt").read_text().strip()
    assert (
        "tests: 2 passed, 0 failed" in verdict
        and "operators: " in verdict
        and ", 0 wrong" in verdict
    )
    with tarfile.open(tmp_path / "kept" / "found.tgz") as archive:
        assert {"rows.json", "summary.json", "verdict.txt", "tests.log", "steps.log"} <= set(
            archive.getnames()
        )
    done = run_suite("second", "--out", "again", "--caches", "kept/caches.tgz", cwd=tmp_path)
    assert done.returncode == 0 and "VERDICT second: cpu" in done.stdout, done.stdout + done.stderr
    rows = json.loads((tmp_path / "again" / "rows.json").read_text())
    assert {"swap_ema", "compile"} <= {row["variant"] for row in rows}


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", child.pid, flush=True)
time.sleep(60)
"""
DEAF = (
    "import signal\nfor n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
    + SLOW
)


def is_running(pid: int) -> bool:
    try:
        # the third field; a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def part(program: str, **options) -> gpu_suite.Part:
    return gpu_suite.Part("part", 1, ["-c", program], **options)


@pytest.mark.parametrize("program, returncodes", [(SLOW, (-2, -15)), (DEAF, (-9,))])
def test_a_part_that_runs_over_is_ended_with_its_children_and_its_output_stays(
    program, returncodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_suite, "PATIENCE", 1.0)
    (found,) = gpu_suite.run_part(part(program), tmp_path, 3.0, "cpu")
    assert found["ran_over"] and 3 <= found["seconds"] < 20 and found["tail"].startswith("started ")
    assert found["returncode"] in returncodes
    assert not is_running(int(found["tail"].split()[1]))


def test_parts_side_by_side(tmp_path):
    """Both run at once, each with its own variables and its own record; one that fails does not end the other."""
    show = "import os, time; time.sleep(2); print(os.environ['TRITON_CACHE_DIR'], os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    beside = gpu_suite.Part("beside", 0, ["-c", show + "; raise SystemExit(3)"])
    found = gpu_suite.run_part(
        part(show, beside=beside, environment={"TRITON_CACHE_DIR": "mine"}), tmp_path, 30, "cpu"
    )
    assert [(each["part"], each["returncode"], each["ran_over"]) for each in found] == [
        ("part", 0, False),
        ("beside", 3, False),
    ]
    assert found[0]["tail"].split() == ["mine", "True"]
    assert found[1]["tail"].split() == [str(tmp_path / "caches" / "triton"), "True"]
    assert found[1]["seconds"] < 4


def test_time_that_a_part_leaves_goes_to_the_next(tmp_path, monkeypatch):
    limits, now = [], [0.0]

    def run_part(part, out, seconds, device):
        limits.append(seconds)
        now[0] += 30
        return [{"part": part.name, "returncode": 0, "ran_over": False, "seconds": 30, "tail": ""}]

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    shares = [45, 90, 110]
    parts = [gpu_suite.Part(f"{share}", share, []) for share in shares]
    found = gpu_suite.run_suite("first", parts, tmp_path, 270, "cpu")
    expected = [(270 - 30 * i) * share / sum(shares[i:]) for i, share in enumerate(shares)]
    assert limits == pytest.approx(expected) and limits[-1] == 210
    assert len(found) == 3 == len(json.loads((tmp_path / "summary.json").read_text())["parts"])


def test_the_parts_for_a_gpu_fit_their_budgets_and_parse():
    import attention_backends
    import run
    import train_step

    first = {part.name: part for part in gpu_suite.first_parts(Path("/out"), "/probe.cu")}
    second = {
        part.name: part
        for part in gpu_suite.second_parts(
            Path("/out"), "/published", ["tests/ops/test_adaln.py::test_a"]
        )
    }
    assert list(first) == ["ops", "attention", "probe", "steps", "tests"] and list(second) == [
        "steps",
        "tests",
        "ops",
    ]
    for parts, which in ((first, "first"), (second, "second")):
        assert sum(part.share for part in parts.values()) <= gpu_suite.BUDGETS[which]
    assert all((ROOT / path).exists() for path in gpu_suite.TESTS)
    found = subprocess.run(
        [sys.executable, *first["tests"].command, "--collect-only", "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert (
        "test_cuda.py" in found
        and "test_ema_teacher.py" in found
        and "compiles_without_spills" not in found
    )
    assert "test_adaln.py" in found and "codegen" not in found, found
    assert run.parse(first["ops"].command[1:]).variants == ["ours", "eager"]
    assert run.parse(second["ops"].command[1:]).variants == ["ours", "compile"]
    assert (
        first["tests"].beside.command[1:]
        and train_step.parse(first["tests"].beside.command[1:]).untimed
    )
    # the probe is built while operators are measured, which takes no device
    assert "nvcc" in first["ops"].beside.command and first["probe"].command == "/out/probe 32 256"
    large = ("SiT-XL/2", 256, 32)
    assert [case for case, _ in train_step.parse(first["steps"].command[1:]).cases] == [large]
    args = train_step.parse(second["steps"].command[1:])
    assert args.shrink and args.cases[0] == (
        large,
        ["plain", "sra", "strong+graph=true", "plain", "sra", "sra_fp8", "reference"],
    )
    larger = ("SiT-XL/2", 256, 256)
    assert [case for case, _ in args.cases[1:]] == [
        larger,
        ("SiT-B/2", 256, 256),
        large,
        larger,
        large,
    ]
    # without a checkout there is no published code; without red tests none run again
    without = {part.name: part for part in gpu_suite.second_parts(Path("/out"), None, [])}
    assert "reference" not in " ".join(without["steps"].command) and "tests" not in without
    assert torch.cuda.is_available() or attention_backends.main([]) == 2


def test_bad_arguments_are_refused(tmp_path, capsys):
    for words in (
        [],
        ["third"],
        ["second", "--caches", str(tmp_path / "none.tgz")],
        ["first", "--reference", "/no/such/folder"],
    ):
        with pytest.raises(SystemExit):
            gpu_suite.main(words)
    assert "--reference: there is no /no/such/folder" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_suite.main(["first"]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_the_probes_products_are_the_same():
    for name, shape in stacked_products.shapes("SiT-S/8", 64, 3).items():
        given = stacked_products.make(0, name, shape, torch.float32, "cpu")
        one_by_one = stacked_products.separate(*given)
        expected = {
            "wide": torch.cat(one_by_one, 1),
            "batched": torch.stack(one_by_one) - given[2][:, None],
        }
        for function in stacked_products.functions(name, "cpu")[1:]:
            same = expected.get(function.__name__, torch.stack(one_by_one))
            torch.testing.assert_close(function(*given), same, rtol=1e-4, atol=1e-4)
    assert stacked_products.shapes("SiT-XL/2", 256, 32) == {
        "qkv": (2, 8192, 1152, 3456), "proj": (2, 8192, 1152, 1152), "fc1": (2, 8192, 1152, 4608), "fc2": (2, 8192, 4608, 1152),
        "adaln": (28, 32, 1152, 6912),
    }  # fmt: skip
