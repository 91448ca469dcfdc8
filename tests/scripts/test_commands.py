"""The console command: it lists and finds the scripts, imports late, and importing it or a script runs nothing."""

import errno
import sys
from importlib import import_module

import pytest
from launch import ROOT, call, call_console, error_of, launch, run_python

from sra_fast.__main__ import COMMANDS

MODULES = {command: command.replace("-", "_") for command in COMMANDS}


def test_every_script_is_a_command():
    scripts = {file.stem for file in (ROOT / "sra_fast").glob("*.py")}
    assert scripts - {"__init__", "__main__"} == set(MODULES.values())


def test_help_lists_the_commands_without_importing_torch():
    code = (
        "import sys; sys.argv = ['sra-fast', '--help']; from sra_fast.__main__ import main; main(); "
        "print('torch' in sys.modules)"
    )
    done = run_python("-c", code)
    *text, imported = done.stdout.splitlines()
    assert imported == "False"
    listed = dict(line.strip().split(maxsplit=1) for line in text if line.startswith("  "))
    assert listed == COMMANDS


@pytest.mark.parametrize("args, got", [(("sampel", "--count", 3), "sampel"), ((), "nothing")])
def test_an_unknown_command_is_one_line(args, got):
    done = call_console(*args)
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected a command of train, sample,")
    assert line.endswith(f", got {got}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_its_script_under_the_commands_name(command):
    done = call_console(command, "--help")
    assert done.returncode == 0, done.stderr
    # DeepSpeed may log a line before it
    assert f"usage: sra-fast {command} " in done.stdout
    assert call_console(command, "--no_such_option").returncode == 2


@pytest.mark.parametrize("module", ["__main__", *MODULES.values()])
def test_importing_runs_nothing(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sra-fast", "--help"])
    monkeypatch.delitem(sys.modules, f"sra_fast.{module}", raising=False)
    path = [*sys.path]
    import_module(f"sra_fast.{module}")
    assert sys.path == path
    assert capsys.readouterr() == ("", "")


def test_python_m_and_a_launch_by_path_from_another_folder(tmp_path):
    args = ("--checkpoint", "nowhere", "--out", "ema.safetensors")
    message = "no checkpoint at nowhere"
    done = run_python("-m", "sra_fast", "export", *args)
    assert error_of(done) == f"error: {message}"
    done = launch("export", *args, cwd=tmp_path)
    assert error_of(done) == f"error: {message}"


@pytest.mark.parametrize(
    "program, place",
    [
        ("probe", "sra_fast.analysis.probing.run"),
        ("visualize", "sra_fast.analysis.pictures.run"),
        ("evaluate", "sra_fast.evaluation.run.run"),
        ("held_out", "sra_fast.analysis.held_out_loss.run"),
    ],
)
def test_a_disk_that_fills_up_at_the_end_is_one_line(program, place, monkeypatch):
    def run(options):
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")

    monkeypatch.setattr(place, run)
    given = "--samples" if program in ("visualize", "evaluate") else "--checkpoint"
    value = '["x.npz"]' if program == "visualize" else "x.npz"
    done = call(program, given, value)
    assert done.returncode == 1
    assert error_of(done) == "error: [Errno 28] No space left on device: 'report.json'"
