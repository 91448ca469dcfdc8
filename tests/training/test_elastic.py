"""A checkpoint of any number of processes and any ZeRO stage is resumed by any other.

What is read is the same bit for bit; the run that goes on is, too, in the same world and stage, and
to rounding in another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parents[1]
# the next world resumes what those before it have saved
WORLDS = (2, 1, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results[world]`` of ``elastic_worker.py``, and the folder ``results["folder"]``."""
    out = tmp_path_factory.mktemp("elastic")
    found: dict = {"folder": out}
    for world in WORLDS:
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node={world}"
        done = subprocess.run(
            [sys.executable, *launcher.split(), str(HERE / "elastic_worker.py"), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        file = out / f"results_{world}.pt"
        assert file.exists(), done.stderr[-4000:]
        found[world] = torch.load(file, weights_only=True)
    return found


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
    (world, f"world{before}_stage{stage}")
    for i, world in enumerate(WORLDS)
    for before in WORLDS[:i]
    for stage in range(4)
]


@pytest.mark.parametrize("world, source", CROSSED)
def test_another_world_and_stage_restores_the_same_bits(results, world, source):
    ours = results[world][f"from_{source}"]["restored"]
    saved = saved_state(results["folder"] / f"saved/{source}/checkpoints/step_00000002")
    assert set(saved) == {"master", "exp_avg", "exp_avg_sq", "ema.main"}
    for kind, parameters in saved.items():
        assert parameters.keys() == ours[kind].keys()
        for name, value in parameters.items():
            assert torch.equal(ours[kind][name].flatten(), value), (kind, name)
    assert set(ours["counts"]) == {2.0}


@pytest.mark.parametrize("world, source", CROSSED)
def test_the_run_that_goes_on_is_the_uninterrupted_one(results, world, source):
    before, stage = int(source[5]), source[-1]
    whole = results[before][f"whole_{stage}"]
    ours = results[world][f"from_{source}"]
    assert ours["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)
    for kind in ("master", "ema.main"):
        for name, value in whole["final"][kind].items():
            assert torch.allclose(ours["final"][kind][name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", range(4))
def test_the_same_world_goes_on_bit_for_bit(results, world, stage):
    whole = results[world][f"whole_{stage}"]
    again = results[world][f"same_{stage}"]
    assert again["loss"] == whole["loss"][2:]
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema.main"):
        for name, value in whole["final"][kind].items():
            assert torch.equal(again["final"][kind][name], value), (kind, name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_stored_twice(results, world, stage):
    """Four fp32 numbers of every parameter over all ranks, no padding, and no rank without a part."""
    folder = results["folder"] / f"saved/world{world}_stage{stage}/checkpoints/step_00000004"
    sizes = [sum(v.numel() for v in load_file(f).values()) for f in folder.glob("rank_*")]
    parameters = sum(
        v.numel() for v in results[world][f"whole_{stage}"]["final"]["master"].values()
    )
    assert len(sizes) == world and sum(sizes) == 4 * parameters
    assert max(sizes) <= 1.1 * sum(sizes) / world
