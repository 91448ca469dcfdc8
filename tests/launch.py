"""Running the scripts: launched by path as a user does it, or their ``main()`` in this process,
which is quicker.
"""

import io
import itertools
import os
import socket
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_calls = itertools.count()
# what a launcher, or another test in this process, has set for a process group
GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process: on the CPU, one thread, in no process group."""
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def free_port() -> str:
    """A port below those that the kernel gives to outgoing connections.

    gloo makes many of them, and one could take the port before it is used.
    """
    first = 10000 + (37 * os.getpid() + next(_calls)) % 20000
    for port in range(first, first + 200):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return str(port)
    raise RuntimeError(f"no free port from {first} on")


def run_python(*args, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python ARGS`` in a process; what it prints is captured."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(name: str, *args, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python sra_fast/NAME.py ARGS``."""
    return run_python(ROOT / f"sra_fast/{name}.py", *args, cwd=cwd)


def deepspeed(name: str, *args) -> subprocess.CompletedProcess:
    """``deepspeed sra_fast/NAME.py ARGS`` on two processes."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", 2]
    port = ["--master_port", free_port()]
    return run_python(*launcher, *port, f"sra_fast/{name}.py", *args)


def torchrun(name: str, *args, processes: int = 2) -> subprocess.CompletedProcess:
    """``torchrun sra_fast/NAME.py ARGS``."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    port = ["--master_port", free_port()]
    return run_python(*launcher, *port, f"sra_fast/{name}.py", *args)


def accelerate(name: str, *args) -> subprocess.CompletedProcess:
    """``accelerate launch sra_fast/NAME.py ARGS`` on one process."""
    launcher = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1".split()
    plain = "--mixed_precision no --dynamo_backend no".split()
    return run_python(*launcher, *plain, f"sra_fast/{name}.py", *args)


class Result(NamedTuple):
    """What a launched process would have left."""

    returncode: int
    stdout: str
    stderr: str


def call(name: str, *args, cwd: Path = ROOT) -> Result:
    """``main()`` of ``sra_fast/NAME.py`` in this process, with these arguments."""
    argv = [f"{name}.py", *map(str, args)]
    return _call(f"sra_fast.{name}", argv, cwd)


def call_console(*args, cwd: Path = ROOT) -> Result:
    """The console command ``sra-fast ARGS`` in this process."""
    return _call("sra_fast.__main__", ["sra-fast", *map(str, args)], cwd)


def _call(module: str, argv: list[str], cwd: Path) -> Result:
    if torch.cuda.is_available() and "train" in (module.rpartition(".")[2], *argv[1:2]):
        pytest.skip("DeepSpeed has chosen the GPU in this process: set CUDA_VISIBLE_DEVICES=''")
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    no_group = {name: value for name, value in os.environ.items() if name not in GROUP}
    with (
        patch.object(sys, "argv", argv),
        patch.dict(os.environ, no_group, clear=True),
        # on the CPU, like a launched process
        patch("torch.cuda.is_available", lambda: False),
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            import_module(module).main()
        except SystemExit as error:
            code = error.code or 0
    # sys.exit(text) prints the text, and the exit code is 1
    if isinstance(code, str):
        err.write(code + "\n")
        code = 1
    return Result(code, out.getvalue(), err.getvalue())


def error_of(done: Result | subprocess.CompletedProcess) -> str:
    """The last line on stderr of a command that failed without a traceback."""
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1]
