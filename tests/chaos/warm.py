"""What every forked run would do again, done once: imports, and caches that any run fills.

Imported before anything of torch. It starts no thread, which a fork would lose.
"""

import os
import sys
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(SRA_FAST_BACKEND="torch", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/chaos")]

import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.flop_counter  # noqa: E402

import sra_fast.train  # noqa: E402, F401
from sra_fast.config.cli import parse_train  # noqa: E402
from sra_fast.plots import report  # noqa: E402
from sra_fast.training import endings, run  # noqa: E402, F401
from sra_fast.training.logger import training_flops  # noqa: E402
from sra_fast.training.plan import make_run_plan  # noqa: E402
from sra_fast.zero import process_group  # noqa: E402

torch.set_num_threads(1)


def warm_up(arguments: list[str]) -> None:
    """Plan a run, and take away the curves, which cost a second at every checkpoint."""
    report.plot_loss = lambda path, rows: None
    cfg, _ = parse_train(arguments)
    training_flops(make_run_plan(cfg).plan.cfg)
    # asks the compiler what it can do
    process_group._skip_shm_build()
