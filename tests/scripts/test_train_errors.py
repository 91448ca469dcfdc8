"""What stops a run after it has begun is one line, on every rank of it."""

import re

import numpy as np
import pytest
from launch import ROOT, call, deepspeed, error_of, free_port, run_python

TINY = (
    *("--config", ROOT / "configs/digits.yaml", "--model.hidden_size", 32, "--model.depth", 4),
    *("--model.num_heads", 2, "--align.student_layer", 2, "--align.teacher_layer", 3),
    *("--train.global_batch", 16, "--train.steps", 8, "--train.log_every", 2),
    *("--train.loggers", "[]"),
)
DIVERGES = ("--optim.lr", 1e30, "--optim.warmup_steps", 0)
MESSAGE = r"gradients not finite: \d+ updates in a row were skipped up to step \d+; there is no"


def test_divergence_is_one_line(tmp_path):
    done = call("train", *TINY, *DIVERGES, cwd=tmp_path)
    assert re.match(f"error: {MESSAGE}", error_of(done)), done.stderr
    assert done.returncode == 1
    assert not list(tmp_path.glob("runs/digits/000/checkpoints/step_*"))


def test_a_missing_file_of_the_monitor_is_one_line(tmp_path):
    (tmp_path / "weights.pth").write_text("no weights")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.zeros((2, 2)))
    monitor = ("--monitor.every", 2, "--monitor.inception", "weights.pth")
    reference = ("--monitor.reference", "reference.npz")
    done = call("train", *TINY, *monitor, *reference, cwd=tmp_path)
    assert error_of(done).startswith("error: ")
    assert "weights.pth" in error_of(done)
    assert done.returncode == 2


def test_two_processes_that_diverge_say_it_once(tmp_path):
    done = deepspeed("train", *TINY, *DIVERGES, "--train.out", tmp_path / "runs")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    # also not as "error on rank 1: .."
    (said,) = re.findall("^error.*", done.stderr, re.MULTILINE)
    assert re.match(f"error: {MESSAGE}", said)


# a run in which one rank fails while the other waits for it
ALONE = """
import sys

sys.path.insert(0, {root!r})
import torch.distributed as dist

from sra_fast import train
from sra_fast.training import run


def fails_alone(plan, device, stop):
    if dist.get_rank() == {rank}:
        raise ValueError("this rank alone")
    dist.barrier()
    dist.barrier()


run.run = fails_alone
train.main()
"""


@pytest.mark.parametrize("launcher, rank", [("deepspeed", 1), ("torchrun", 0)])
def test_a_rank_that_fails_alone_says_so_and_stops_the_others(tmp_path, launcher, rank):
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(root=str(ROOT), rank=rank))
    options = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", 2],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", 2],
    }
    arguments = (*TINY, "--train.out", tmp_path / "runs")
    # ends, or the time limit of the launch is an error
    port = ("--master_port", free_port())
    done = run_python(*options[launcher], *port, script, *arguments)
    assert done.returncode != 0
    who = "error on rank 1" if rank else "error"
    assert f"{who}: this rank alone\n" in done.stderr, done.stderr[-3000:]


def test_what_deepspeed_refuses_when_it_is_built_leaves_no_folder(tmp_path):
    """A run that has written nothing has no number: the next one is 000."""
    (tmp_path / "ds.json").write_text('{"zero_allow_untested_optimizer": false}')
    out = tmp_path / "runs"
    asked = (*TINY, "--train.steps", 1, "--train.out", out)
    done = call("train", *asked, "--deepspeed_config", tmp_path / "ds.json")
    assert "DeepSpeed refuses --deepspeed_config" in error_of(done)
    assert [*out.iterdir()] == []
    done = call("train", *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "000/summary.json").exists()
