"""What a run holds does not grow, however often it saves."""

import json
import os
import subprocess
import sys

from launch import GROUP, ROOT


def test_what_a_run_holds(tmp_path):
    # on the GPU where there is one, because what is copied from it is held differently
    no_group = {name: value for name, value in os.environ.items() if name not in GROUP}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/flat_worker.py", tmp_path],
        env=no_group,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    early, late = json.loads(done.stdout.splitlines()[-1])
    assert early == late
    assert early["tensors"] > 50
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2
