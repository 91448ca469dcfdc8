"""What every forked run would do again, done once: imports, and caches that any run fills.

Imported before anything of torch. It starts no thread, which a fork would lose.
"""

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(SRA_FAST_BACKEND="torch", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")
# no pool of compilers, which would be threads and processes
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/chaos")]

import children  # noqa: E402
import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.flop_counter  # noqa: E402

import sra_fast.train  # noqa: E402
from sra_fast.config.cli import parse_train  # noqa: E402
from sra_fast.plots import report  # noqa: E402
from sra_fast.training import endings, run  # noqa: E402, F401
from sra_fast.training.flops import training_flops  # noqa: E402
from sra_fast.training.plan import make_run_plan  # noqa: E402
from sra_fast.zero import process_group  # noqa: E402

torch.set_num_threads(1)


def warm_up(arguments: list[str], folder: Path) -> None:
    """Plan a run, import what any run imports, and take away the curves, which cost a second each.

    Args:
        arguments: of a run of two processes.
        folder: for a list of modules.

    Raises:
        RuntimeError: something has started a thread, which a fork would lose.
    """
    report.plot_loss = lambda path, rows: None
    cfg, _ = parse_train(arguments)
    training_flops(make_run_plan(cfg).plan.cfg)
    # asks the compiler what it can do
    process_group._skip_shm_build()
    _import_what_a_run_imports(arguments, folder)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"expected one thread before the first fork, got {threads}")


def _import_what_a_run_imports(arguments: list[str], folder: Path) -> None:
    known = set(sys.modules)
    listed = folder / "modules"

    def hook(rank: int) -> None:
        main = sra_fast.train.main

        def main_that_tells() -> None:
            try:
                main()
            finally:
                if rank == 0:
                    listed.write_text("\n".join(name for name in sys.modules if name not in known))

        sra_fast.train.main = main_that_tells

    children.run(arguments, 2, folder / "warm.log", hook)
    for name in listed.read_text().splitlines():
        # some exist only once another one has made them
        with suppress(Exception):
            importlib.import_module(name)
