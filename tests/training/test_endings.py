"""Every ending of a run that a user or a machine causes is one line with its exit code."""

import errno
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from launch import call
from safetensors import SafetensorError

from sra_fast import train
from sra_fast.data.digits import Digits
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.training import run
from sra_fast.training.endings import Diverged, Ending, ending_of
from sra_fast.training.signals import stopped
from sra_fast.utils import stopping

ELSEWHERE = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711"
)
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting."
)


def test_full_disk_says_file_and_space(tmp_path, monkeypatch):
    # the nearest folder that exists; other programs write to the real disk too
    free = {tmp_path: SimpleNamespace(free=3_210_000)}
    monkeypatch.setattr(shutil, "disk_usage", free.__getitem__)
    name = tmp_path / "run/rank_00000.safetensors"
    for number in (errno.ENOSPC, errno.EDQUOT):
        error = OSError(number, os.strerror(number), str(name))
        assert ending_of(error) == Ending(
            2,
            f"error: {name} cannot be written: {os.strerror(number)} "
            f"(3.2 MB free on the disk of {tmp_path}); resume with --train.resume auto",
        )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing"
        ),
    ],
)
def test_full_disk_without_a_file_name_is_that_of_the_run(tmp_path, error):
    line = ending_of(error, tmp_path).line
    assert line.startswith(
        f"error: a file of {tmp_path} cannot be written: No space left on device ("
    )


@pytest.mark.parametrize(
    "error, code, line",
    [
        (stopped(signal.SIGTERM, 7, True), 75, "stopped by SIGTERM after step 7; checkpoint "),
        (KeyboardInterrupt(), 130, "interrupted; resume from the last checkpoint"),
        (Diverged("loss not finite"), 1, "error: loss not finite"),
        (ValueError("a was expected,\ngot b"), 2, "error: a was expected, got b"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            2,
            "error: /x/y cannot be read or written: Permission denied",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/x/stats.jsonl"),
            2,
            "error: /x/stats.jsonl cannot be read or written: Is a directory",
        ),
        (
            IsADirectoryError(
                errno.EISDIR, "Is a directory", "/x/.latest.1.tmp", None, "/x/latest"
            ),
            2,
            "error: /x/latest cannot be read or written: Is a directory",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/x/y"),
            2,
            "error: /x/y cannot be opened: Too many open files (ulimit -n)",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            2,
            "error: the package wandb is missing: pip install it",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
            2,
            "error: the GPU's memory is too small: a smaller train.micro_batch or train.recompute "
            "needs less; CUDA out of memory. Tried to allocate 2 GiB.",
        ),
        (
            pickle.UnpicklingError(
                "Weights only load failed. set weights_only=False, if you trust"
            ),
            2,
            "error: a file of weights is damaged, or holds more than numbers",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. \nmore"),
            2,
            "error: DataLoader worker (pid 12) is killed by signal: Killed.",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_its_code(error, code, line):
    ending = ending_of(error)
    assert ending.code == code
    assert ending.line.startswith(line)
    assert "\n" not in ending.line
    assert "trust" not in ending.line
    assert not ending.noticed


@pytest.mark.parametrize("text", [ELSEWHERE, NCCL, "TCPStore recv: Connection reset by peer"])
def test_who_only_notices_another_ones_end_says_so(text):
    first = text.splitlines()[0]
    line = f"error: another process has ended or does not answer: {first}"
    assert ending_of(RuntimeError(text)) == Ending(1, line, noticed=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        # not of other processes
        RuntimeError("the operation has timed out"),
        TypeError("unsupported operand"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        ModuleNotFoundError("No module named 'sra_fast.x'", name="sra_fast.x"),
    ],
)
def test_faults_of_the_program_keep_their_traceback(error):
    assert ending_of(error) is None


class Damaged(Digits):
    """Its images cannot be read."""

    in_memory = False

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitems__(self, indices):
        raise self.error


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("shard 3 was altered"), "error: shard 3 was altered"),
        (
            OSError(errno.EIO, "Input/output error", "shard_3.npy"),
            "error: shard_3.npy cannot be read or written: Input/output error",
        ),
    ],
)
def test_an_error_in_a_loader_process_is_one_line(error, line):
    order = ShuffledBatches(64, 0, 1, 1, 0, 1, 0, 4)
    batches = Batches(Damaged(error), order, 1, cuda=False)
    with batches, pytest.raises(type(error), match="Caught") as raised:
        next(batches)
    assert ending_of(raised.value) == Ending(2, line)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (OSError(errno.EROFS, "Read-only file system", "/runs/000/x"), 2, "error: /runs/000/x"),
        (stopped(signal.SIGUSR1, 3, True), 75, "stopped by SIGUSR1 after step 3; checkpoint"),
        (KeyboardInterrupt(), 130, "interrupted; resume"),
    ],
)
def test_the_program_ends_so(tmp_path, monkeypatch, error, code, line):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(run, "run", fails)
    done = call("train", "--data.name", "digits", "--train.out", tmp_path, "--train.loggers", "[]")
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False)])
def test_one_rank_says_that_the_run_was_stopped(monkeypatch, capsys, rank, speaks):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended, train.one_line_for_all():
        raise stopped(signal.SIGTERM, 3, True)
    assert ended.value.code == 75
    assert ("stopped by SIGTERM" in capsys.readouterr().err) == speaks


def test_a_rank_that_failed_alone_says_so_later(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    for rank, error in (("0", ValueError("x")), ("2", ValueError("x")), ("0", RuntimeError(NCCL))):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), train.one_line_for_all():
            raise error
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: x"
    assert said[1] == "error on rank 2: x"
    assert said[2].startswith("error: another process has ended")
    # rank 2, and rank 0 for the rank that has more to say
    assert waited == [stopping.LAUNCHER_REACTS] * 2


def test_a_summary_does_not_need_the_rows():
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 5, "loss": 1.5, "ms_per_step": 100.0, "timed_steps": 3},
        {"step": 6, "loss": 1.0, "ms_per_step": 500.0, "timed_steps": 1},
    ]
    # 16 images in 0.8 s
    expected = {"images_per_s": 20.0, "loss_first": 2.0, "loss_last": 1.0}
    assert run.logged(rows, global_batch=4) == expected
    assert run.logged(rows[:1], global_batch=4)["images_per_s"] is None
    # a log that was not flushed before a power cut is empty
    assert run.logged([], global_batch=4) == dict.fromkeys(expected)


def test_what_all_processes_end_with():
    """One of them says it, and the others do not wait; what one has by itself it has to say."""
    agreed_on = ValueError("the disk is full")
    agreed_on.of_all_ranks = True
    for error, alike in (
        (Diverged("gradients not finite"), True),
        (stopped(15, 3, saved=True), True),
        (agreed_on, True),
        # numpy's, in somebody's data set
        (FloatingPointError("divide by zero"), False),
        (ValueError("the disk is full"), False),
    ):
        assert ending_of(error).alike == alike
