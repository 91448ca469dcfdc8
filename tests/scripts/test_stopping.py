"""Ctrl-C is one line and exit code 130, and the same command resumes; of several processes that
fail alike, one says it.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import ROOT, environment
from PIL import Image

from sra_fast import held_out
from sra_fast.__main__ import COMMANDS
from sra_fast.analysis import held_out_loss
from sra_fast.models import SiT
from sra_fast.utils import stopping

RESUMES = "stopped; the same command resumes"
# train.py has signals of its own
PROGRAMS = [command.replace("-", "_") for command in COMMANDS if command != "train"]


# a program that sends itself SIGINT at a place of its own, whatever the machine does meanwhile. A
# process in the background may have been started with the signal ignored
SENDS_ITSELF = """
import importlib, os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
program, place, calls, *args = sys.argv[1:]
module, _, name = place.rpartition(".")
left = int(calls)


def interrupt():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)


class Importing:
    def find_spec(self, imported, path=None, target=None):
        if imported == name:
            interrupt()


def call(*args, **options):
    result = original(*args, **options)
    interrupt()
    return result


sys.path.insert(0, os.getcwd())
if module:
    original = getattr(importlib.import_module(module), name)
    setattr(sys.modules[module], name, call)
else:
    sys.meta_path.insert(0, Importing())
sys.argv = [program, *args]
runpy.run_path(f"sra_fast/{program}.py", run_name="__main__")
"""


def finish(name: str, *args) -> None:
    command = [sys.executable, str(ROOT / f"sra_fast/{name}.py"), *map(str, args)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)


def interrupted(name: str, place: str, calls: int, *args, **more: str) -> tuple[int, str]:
    """Exit code and stderr of a program that gets SIGINT after so many calls of a function
    (``module.name``), or at the import of a module without a dot.
    """
    done = subprocess.run(
        [sys.executable, "-c", SENDS_ITSELF, name, place, str(calls), *map(str, args)],
        env=environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_during_the_imports_is_one_line(name):
    expected = RESUMES if name in ("sample", "preprocess", "ablate") else "stopped"
    assert interrupted(name, "torch", 1) == (stopping.INTERRUPTED, f"{expected}\n")


def test_other_processes_say_nothing():
    assert interrupted("sample", "torch", 1, RANK="1") == (130, "")


def last_line(said: str) -> str:
    """The last line of stderr, after a bar; no traceback is before it."""
    assert "Traceback" not in said, said[-2000:]
    return said.replace("\r", "\n").rstrip().splitlines()[-1]


def test_interrupted_samples_resume(tmp_path):
    torch.manual_seed(0)
    model = SiT(8, 2, 1, 32, 2, 2, num_classes=10)
    for p in model.parameters():
        p.data.normal_(std=0.05)
    torch.save({"ema": model.state_dict()}, tmp_path / "model.pt")
    # five parts
    given = ["--checkpoint", tmp_path / "model.pt", "--num_heads", 2, "--count", 1100]
    given += ["--sample.method", "euler", "--sample.steps", 4, "--png", "true"]
    out = tmp_path / "out"
    first = out / "parts/000000.npy"
    place = "sra_fast.sampling.parts.save_npy"
    code, said = interrupted("sample", place, 2, *given, "--out", out)
    assert (code, last_line(said)) == (130, RESUMES)
    left = sorted(path.name for path in out.glob("parts/*"))
    # no half-written file: the second part was not yet in its place
    assert not (out / "samples.npz").exists()
    assert left == ["000000.npy", "identity.json"]
    before = first.stat().st_mtime_ns
    finish("sample", *given, "--out", out)
    finish("sample", *given, "--out", tmp_path / "whole")
    images, expected = (np.load(path / "samples.npz") for path in (out, tmp_path / "whole"))
    assert np.array_equal(images["arr_0"], expected["arr_0"])
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    whole = tmp_path / "whole"
    assert names == sorted(str(path.relative_to(whole)) for path in whole.rglob("*"))
    assert before < (out / "samples.npz").stat().st_mtime_ns


def test_interrupted_data_resume(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images/a").mkdir(parents=True)
    for number in range(300):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/a/{number}.png")
    given = ["--source", tmp_path / "images", "--pixels", "true", "--resolution", 8]
    given += ["--shard_size", 2, "--batch", 2, "--threads", 1]
    out = tmp_path / "out"
    code, said = interrupted(
        "preprocess", "sra_fast.data.writer.write_json", 3, *given, "--out", out
    )
    assert (code, last_line(said)) == (130, RESUMES)
    assert len([*out.glob("parts/*.json")]) == 3 and not (out / "index.json").exists()
    finish("preprocess", *given, "--out", out)
    finish("preprocess", *given, "--out", tmp_path / "whole")
    found, expected = (
        {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        for path in (out, tmp_path / "whole")
    )
    assert found.keys() == expected.keys() and "index.json" in found
    shards = [name for name in found if name.startswith("shards/")]
    assert len(shards) == 150
    assert all(found[name] == expected[name] for name in shards)


def test_other_errors_keep_their_traceback():
    code = "from sra_fast.utils.stopping import one_line_on_interrupt as f; f(); f('again'); 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "rank, said, waited",
    [("", "error: no", []), ("0", "error: no", []), ("3", "error on rank 3: no", [3.0])],
)
def test_a_process_lets_the_first_one_speak(monkeypatch, capsys, rank, said, waited):
    """The others wait so long that the launcher ends them; one that lives on failed alone."""
    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(stopping.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as stopped:
        stopping.fail("error: no", code=1)
    assert stopped.value.code == 1 and slept == waited
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("rank, who", [("0", "error"), ("3", "error on rank 3")])
@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("no such\n  images"), 2, "no such images"),
        (OSError(28, "full", "x.npz"), 1, "[Errno 28] full: 'x.npz'"),
    ],
)
def test_one_of_the_processes_that_measure_says_an_error(
    rank, who, error, code, said, monkeypatch, capsys
):
    def run(options):
        raise error

    slept = []
    monkeypatch.setattr(held_out_loss, "run", run)
    monkeypatch.setattr(stopping.time, "sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["held_out.py", "--checkpoint", "run"])
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped:
        held_out.main()
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"{who}: {said}\n"
    assert slept == ([] if rank == "0" else [stopping.LAUNCHER_REACTS])
