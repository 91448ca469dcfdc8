"""Train, save often, and print what this process holds after an early step and after a late one.

Usage: flat_worker.py FOLDER. It is a process of its own because what other tests have left in
theirs may be let go at any time.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from bare_training import train  # noqa: E402
from tiny_config import config  # noqa: E402

from sra_fast.data.dataset import make_dataset  # noqa: E402
from sra_fast.training import control  # noqa: E402
from sra_fast.training.plan import make_plan  # noqa: E402
from sra_fast.training.trainer import build  # noqa: E402
from sra_fast.zero.process_group import init_distributed  # noqa: E402

# equally long after a row of the log and after a save
EARLY, LATE = 85, 205
ARGS = (
    f"--train.steps {LATE + 3} --train.save_every 10 --train.log_every 20 --train.keep 2 "
    "--train.loggers [] --train.precision fp32"
)


def held() -> dict[str, int]:
    """Tensors, open files and threads of this process."""
    gc.collect()
    return {
        "tensors": sum(isinstance(item, torch.Tensor) for item in gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def main() -> None:
    torch.set_num_threads(1)
    cfg = config(*ARGS.split())
    trainer = build(make_plan(cfg), init_distributed())
    seen = []
    finished = control.Control.after_step

    def after_step(self, done):
        if done in (EARLY, LATE):
            self.saver.wait()
            seen.append(held())
        finished(self, done)

    control.Control.after_step = after_step
    train(trainer, make_dataset(cfg), Path(sys.argv[1]))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
