"""The suite for a GPU machine: parts in order, bounded in time, nothing lost; and the probe that is one of its parts."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
import stacked_products  # noqa: E402


def test_dry_run_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--device", "cpu", "--out", "found", "--skip", "ladder"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == ["tests", "ops", "steps", "large", "probe"]
    assert all(part["returncode"] == 0 and not part["ran_over"] for part in summary["parts"])
    assert "passed" in (tmp_path / "found" / "tests.log").read_text()
    rows = json.loads((tmp_path / "found" / "rows.json").read_text())
    # every part has added its own to one file
    assert {"op", "train_step", "probe"} <= {row["kind"] for row in rows} and summary["commit"] == rows[0]["commit"]


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", child.pid, flush=True)
time.sleep(60)
"""
DEAF = "import signal\nfor n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n" + SLOW


def is_running(pid: int) -> bool:
    try:
        # the third field; a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("program, returncodes", [(SLOW, (-2, -15)), (DEAF, (-9,))])
def test_a_part_that_runs_over_is_ended_with_its_children_and_its_output_stays(program, returncodes, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "PATIENCE", 1.0)
    part = gpu_suite.run_part(["-c", program], tmp_path / "log", 3.0, "cpu")
    assert part["ran_over"] and 3 <= part["seconds"] < 20 and part["tail"].startswith("started ")
    assert part["returncode"] in returncodes
    assert not is_running(int(part["tail"].split()[1]))


def test_time_that_a_part_leaves_goes_to_the_next(tmp_path, monkeypatch):
    limits, now = [], [0.0]

    def run_part(command, log, seconds, device):
        limits.append(seconds)
        now[0] += 30
        return {"returncode": 0, "ran_over": False, "seconds": 30, "tail": ""}

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = gpu_suite.run_suite(dict.fromkeys(gpu_suite.PARTS, []), tmp_path, 540, "cpu")
    shares = list(gpu_suite.PARTS.values())
    expected = [(540 - 30 * i) * share / sum(shares[i:]) for i, share in enumerate(shares)]
    assert limits == pytest.approx(expected) and limits[-1] == 390
    assert len(found) == 6 == len(json.loads((tmp_path / "summary.json").read_text())["parts"])


def test_the_parts_for_a_gpu_are_within_nine_minutes_and_parse():
    assert sum(gpu_suite.PARTS.values()) <= 540
    import run
    import train_step

    todo = gpu_suite.commands(Path("/out"), "cuda", "/published")
    assert list(todo) == list(gpu_suite.PARTS) and all((ROOT / path).exists() for path in gpu_suite.TESTS)
    found = subprocess.run([sys.executable, *todo["tests"], "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "test_cuda.py" in found and "test_teacher_pass.py" in found and "compiles_without_spills" not in found
    assert "test_adaln.py" in found and "codegen" not in found, found
    assert run.parse(todo["ops"][1:]).variants == ["ours", "eager", "compile"]
    steps, large, ladder = (train_step.parse(todo[name][1:]) for name in ("steps", "large", "ladder"))
    assert steps.names["SiT-XL/2"] == ["plain", "sra", "sra_fp8", "strong", "reference"] and steps.batch == [32]
    assert large.names["SiT-XL/2"][1:] == ["sra+train.recompute=norm", "strong", "reference"] and large.batch == [256]
    assert ladder.names["SiT-XL/2"][0] == "reference" and ladder.names["SiT-XL/2"][-1] == "fp8"


def test_unknown_parts_are_refused(capsys):
    for words in (["--only", "everything"], ["--only", "ops", "--skip", "ops"]):
        with pytest.raises(SystemExit):
            gpu_suite.main(words)
        assert "expected parts of tests, ops, steps, large, ladder, probe" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_suite.main([]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_the_probes_products_are_the_same():
    for name, shape in stacked_products.shapes("SiT-S/8", 64, 3).items():
        given = stacked_products.make(0, name, shape, torch.float32, "cpu")
        one_by_one = stacked_products.separate(*given)
        expected = {"wide": torch.cat(one_by_one, 1), "batched": torch.stack(one_by_one) - given[2][:, None]}
        for function in stacked_products.functions(name, "cpu")[1:]:
            same = expected.get(function.__name__, torch.stack(one_by_one))
            torch.testing.assert_close(function(*given), same, rtol=1e-4, atol=1e-4)
    assert stacked_products.shapes("SiT-XL/2", 256, 32) == {
        "qkv": (2, 8192, 1152, 3456), "proj": (2, 8192, 1152, 1152), "fc1": (2, 8192, 1152, 4608), "fc2": (2, 8192, 4608, 1152),
        "adaln": (28, 32, 1152, 6912),
    }  # fmt: skip
