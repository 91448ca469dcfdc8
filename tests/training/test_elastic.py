"""A checkpoint of any number of processes and any ZeRO stage is resumed by any other.

What is read is the same bit for bit, and the run that goes on is the same to rounding. That of the
same world and stage is compared bit for bit in tests/zero/test_zero.py.
"""

from pathlib import Path

import pytest
import torch
from elastic_worker import WORLDS
from launch import run_python
from safetensors.torch import load_file

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results[world]`` of ``elastic_worker.py``, the folder and what was written to stderr."""
    out = tmp_path_factory.mktemp("elastic")
    done = run_python(HERE / "elastic_worker.py", out)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict = {
        world: torch.load(out / f"results_{world}.pt", weights_only=True) for world in WORLDS
    }
    return {"folder": out, "stderr": done.stderr, **found}


def saved_state(folder: Path) -> dict:
    """``{kind: {parameter: flat tensor}}`` of a checkpoint, put together by hand."""
    pieces: dict = {}
    for file in sorted(folder.glob("rank_*.safetensors")):
        for key, values in load_file(file).items():
            kind, name, start = key.split("/")
            pieces.setdefault(kind, {}).setdefault(name, []).append((int(start), values))
    return {
        kind: {
            name: torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
            for name, parts in parameters.items()
        }
        for kind, parameters in pieces.items()
    }


CROSSED = [
    (before, world, stage)
    for before, world in zip(WORLDS, WORLDS[1:], strict=False)
    for stage in range(4)
]


@pytest.mark.parametrize("before, world, stage", CROSSED)
def test_another_world_and_stage_restores_the_same_bits(results, before, world, stage):
    ours = results[world][f"from_{stage}"]["restored"]
    folder = results["folder"] / f"world{before}_stage{stage}"
    saved = saved_state(folder / "checkpoints/step_00000002")
    averages = {"ema.main", "ema.slow", "ema.wide"}
    assert set(saved) == {"master", "exp_avg", "exp_avg_sq", *averages}
    for kind, parameters in saved.items():
        assert parameters.keys() == ours[kind].keys()
        for name, value in parameters.items():
            assert torch.equal(ours[kind][name].flatten(), value), (kind, name)
    assert set(ours["counts"]) == {2.0}


@pytest.mark.parametrize("before, world, stage", CROSSED)
def test_the_run_that_goes_on_is_the_uninterrupted_one(results, before, world, stage):
    whole = results[before][f"whole_{stage}"]
    ours = results[world][f"from_{stage}"]
    assert ours["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)
    for kind in ("master", "ema.main", "ema.slow", "ema.wide"):
        for name, value in whole["final"][kind].items():
            assert torch.allclose(ours["final"][kind][name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(results, world):
    assert results[world]["imported"] is False


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_stored_twice(results, world, stage):
    """Six fp32 numbers of every parameter over all ranks, no padding, and every rank its part: weight,
    moments, EMA and two averages.
    """
    name = f"world{world}_stage{stage}" if world != WORLDS[-1] else f"world{world}_from_{stage}"
    folder = results["folder"] / name / "checkpoints/step_00000004"
    sizes = [sum(v.numel() for v in load_file(f).values()) for f in folder.glob("rank_*")]
    masters = results[WORLDS[0]]["whole_0"]["final"]["master"]
    assert len(sizes) == world
    assert sum(sizes) == 6 * sum(v.numel() for v in masters.values())
    assert max(sizes) <= 1.1 * sum(sizes) / world


def test_a_save_that_fails_on_one_rank_is_the_same_error_on_all(results):
    failing = results[2]["failing"]
    folder = results["folder"] / "failing"
    fallback = f"; the last whole checkpoint is {folder / 'step_00000001'}"
    kinds = {"full": "SaveFailed: ", "broken": "SaveFailed: ", "nan": "Diverged: "}
    for case, kind in kinds.items():
        first, second = failing[case]
        assert first == second and first.startswith(kind) and first.endswith(fallback)
        assert "on rank 1" in first
    assert "/disk/file: No space left on device" in failing["full"][0]
    assert "could not be written on rank 1: KeyError: 'planted'; the last" in failing["broken"][0]
    assert failing["left"] == ["latest", "step_00000001"]
    # a rollback goes back to it: every rank has to know it
    assert failing["parents"] == [1, 1]


def test_snapshots_that_fail_on_one_rank_are_the_same_error_on_all(results):
    line = "the averages of step 4 could not be stored on rank 1: "
    full, broken = results[2]["failing_snapshots"]
    assert full == [f"ValueError: {line}[Errno 28] No space left on device: '/disk/file'"] * 2
    assert broken == [f"RuntimeError: {line}KeyError: 'planted'"] * 2


def test_a_folder_that_cannot_be_made_is_the_same_error_on_all(results):
    line = "RuntimeError: TypeError: 'NoneType' object is not callable"
    assert results[2]["failing_folder"] == [line] * 2


def test_faults_of_the_program_are_logged_with_their_traceback(results):
    """By the rank that has them: one of a save, of a snapshot and of a folder."""
    lines = results["stderr"].splitlines()
    said = [line for line in lines if line.startswith("a fault of the program")]
    assert sorted(said) == [f"a fault of the program on rank {rank}" for rank in (0, 1, 1)]
    ends = [line for line in lines if line.startswith(("KeyError", "TypeError"))]
    assert sorted(ends) == ["KeyError: 'planted'"] * 2 + [
        "TypeError: 'NoneType' object is not callable"
    ]


def test_every_rank_takes_the_same_checkpoint(results):
    remark = (
        "checkpoint step 4 is damaged: rank_00001.safetensors has another SHA-256; "
        "going on from step 2"
    )
    assert results[2]["damaged"] == [["step_00000002", remark]] * 2


def test_a_folder_that_one_rank_does_not_see_is_refused(results):
    """A new run: there is no checkpoint that the ranks could compare."""
    first, second, later = results[2]["unshared"]
    folder = results["folder"] / "unshared"
    assert first == second
    assert first.startswith(f"rank 0 writes into {folder / '000'}, which rank 1 does not see")
    # nothing was written into the first folder, so it was removed
    assert later == "000"
