"""The compiler backend inside DDP, FSDP2 and ZeRO 1 and 2."""

import json
import subprocess
import sys

import launch
import pytest

EVERYTHING = {"adaln": 1, "gated_residual_adaln": 3, "gated_residual": 1}
# one graph for blocks whose input needs no gradient, one for the others
ONE_BY_ONE = {"adaln": 2, "gated_residual_adaln": 2, "gated_residual": 2}
# the hooks of FSDP2 around every block break the graph there
EXPECTED = {
    "ddp": EVERYTHING,
    "ddp, blocks": ONE_BY_ONE,
    "fsdp2": ONE_BY_ONE,
    "fsdp2, blocks": ONE_BY_ONE,
    "zero 1": EVERYTHING,
    "zero 2": EVERYTHING,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("wrapped") / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={launch.free_port()}", launch.ROOT / "tests/wrapped_worker.py", out]
    done = subprocess.run(
        command, env=launch.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("wrapper", EXPECTED)
def test_the_same_training(results, wrapper):
    found = results[wrapper]
    assert found["moved"] > 1e-3
    assert found["distance"] < 2e-6
    assert found["rewrites"] == EXPECTED[wrapper]
