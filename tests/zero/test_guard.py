"""Updates that are not finite are left out as if they had not been, in every ZeRO stage, precision
and optimizer; and no one waits for the device to know it.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_worker import CASES, ON_SEVERAL, Poison, check, copy_of, make, take_step
from launch import environment
from torch.utils._python_dispatch import TorchDispatchMode

from sra_fast.zero.guard import warm_up

WORKER = Path(__file__).parents[1] / "guard_worker.py"


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """On a GPU other backward passes of attention add in any order."""
    monkeypatch.setenv("SRA_FAST_ATTENTION", "math")


@pytest.mark.parametrize("name", CASES)
def test_a_bad_update_leaves_no_trace(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("1-bf16-fused", math.inf),
        ("3-fp32-torch", -math.inf),
        ("0-fp32-fused", 1e30),
        ("1-bf16-torch", 1e30),
        ("3-bf16-torch", 1e30),
    ],
)
def test_values_whose_squares_are_not_finite(name, value, tmp_path):
    """The last is finite itself, but the second moment, and most norms, would not be."""
    check(name, tmp_path, value, "final_layer.linear.bias")


def test_on_two_processes_one_bad_gradient_is_enough(tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    for rank in (0, 1):
        passed = {file.name for file in (tmp_path / f"rank{rank}").iterdir()}
        assert set(ON_SEVERAL) <= passed, done.stderr[-4000:]


class NoReads(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name not in self.READS, f"{name} reads a tensor on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["0-fp32-fused", "0-bf16-fused", "3-bf16-fused", "1-fp8-fused"])
def test_neither_a_good_nor_a_bad_update_is_read_on_the_host(name, tmp_path, monkeypatch):
    trainer = make(name, tmp_path, "--optim.warmup_steps", "5")
    poison = Poison(trainer, "blocks.1.mlp.fc1.weight")
    step = trainer.engine.step
    after_step = trainer.after_step

    def watched(function):
        def call(*args):
            with NoReads():
                return function(*args)

        return call

    monkeypatch.setattr(trainer.engine, "step", watched(step))
    monkeypatch.setattr(trainer, "after_step", watched(after_step))
    for position in range(4):
        trainer.guard.begin(position)
        take_step(trainer, position, poison=poison if position % 2 else None)
    assert trainer.guard.counts.tolist() == [2, 2, 1]
    with pytest.raises(AssertionError, match="reads a tensor"), NoReads():
        float(trainer.guard.counts[0])


@pytest.mark.parametrize("name", ["0-fp32-fused", "1-bf16-fused", "1-bf16-torch", "3-fp32-torch"])
def test_the_warm_up_counts_updates_that_were_taken(name, tmp_path):
    """The host's rate is that of the step. The same weights as without the bad updates."""
    trainer = make(name, tmp_path, "--optim.warmup_steps", "4")
    poison = Poison(trainer, "blocks.1.mlp.fc1.weight")
    groups = trainer.engine.optimizer.param_groups

    def run(positions, bad):
        for step, position in enumerate(positions):
            rate = 0.01 * min(1.0, (step + 1) / 4)
            for group in groups:
                group["lr"] = rate
            trainer.guard.begin(step)
            take_step(trainer, position, poison=poison if position in bad else None)
            # what the next step's host finds is a number of its own
            assert all(group["lr"] == rate for group in groups)
        return copy_of(trainer)

    with_bad = run([0, 11, 1, 12, 2, 3, 4, 5], bad=(11, 12))
    trainer = make(name, tmp_path, "--optim.warmup_steps", "4")
    poison = Poison(trainer, "blocks.1.mlp.fc1.weight")
    groups = trainer.engine.optimizer.param_groups
    without = run(range(6), bad=())
    for key, value in without.items():
        if key.endswith((".master", ".ema")):
            torch.testing.assert_close(with_bad[key], value, rtol=1e-5, atol=1e-6)
    assert with_bad["updates"] == without["updates"] == 6


@pytest.mark.parametrize("steps, expected", [(0, [1.0, 1.0]), (4, [0.25, 0.5, 0.75, 1.0, 1.0])])
def test_a_warm_up_is_linear(steps, expected):
    """The first update has a rate above zero. On the device it is the same."""
    numbers = range(1, len(expected) + 1)
    assert [warm_up(number, steps) for number in numbers] == expected
    counted = [warm_up(torch.tensor(float(number)), steps) for number in numbers]
    assert [float(factor) for factor in counted] == expected


def test_the_factor_of_a_warm_up_is_that_of_the_last_decision(tmp_path):
    """Made once for a step, and anew after each decision and for each step."""
    guard = make("1-bf16-fused", tmp_path, "--optim.warmup_steps", "4").guard
    guard.begin(1)
    assert guard.lr_factor() == 1 and guard.lr_factor() is guard.lr_factor()
    guard.decide(math.nan)
    assert guard.lr_factor() == 0.5
    guard.begin(3)
    assert guard.lr_factor() == 0.75
    guard.decide(math.nan)
    assert guard.lr_factor() == 0.5


def test_a_warm_up_without_bad_updates_changes_no_bit(tmp_path):
    results = []
    for begins in (True, False):
        trainer = make("1-bf16-fused", tmp_path, "--optim.warmup_steps", "3")
        for step in range(4):
            if begins:
                trainer.guard.begin(step)
            take_step(trainer, step)
        results.append([x.clone() for x in (*trainer.masters.flats, *trainer.ema.flats)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["1-bf16-fused", "1-bf16-torch"])
def test_counts_are_restored_with_those_of_the_optimizer(name, tmp_path):
    trainer = make(name, tmp_path)
    trainer.guard.load([7.0, 2.0, 1.0])
    states = trainer.masters.optimizer_states()
    assert all(state["step"] == 7 for state in states)
    take_step(trainer, 0)
    assert trainer.guard.counts.tolist() == [8, 2, 0]
    assert all(state["step"] == 8 for state in states)
    for counts in (
        [1.0, 0.0],
        [1.0, -1.0, 0.0],
        [0.5, 0.0, 0.0],
        [3.0, 1.0, 2.0],
        [math.inf, 0.0, 0.0],
        [None] * 3,
    ):
        with pytest.raises(ValueError, match="taken, left out, and left out in a row, whole"):
            trainer.guard.load(counts)
    assert trainer.guard.counts.tolist() == [8, 2, 0]
