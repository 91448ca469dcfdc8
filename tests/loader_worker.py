"""A program that ends in one of several ways while its loader process has something to do.

Usage: loader_worker.py ENDING SECONDS. It prints the loader process's number.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from sra_fast.data.loader import Batches  # noqa: E402
from sra_fast.data.order import ShuffledBatches  # noqa: E402
from sra_fast.data.training_data import TrainingData  # noqa: E402

# each with the exit code that the program then has
ENDINGS = {"returns": 0, "fails": 3, "at once": 4, "killed": -signal.SIGKILL}


class SaysWho(TrainingData):
    """Says which process reads, which takes ``seconds`` from the second image on."""

    def __init__(self, seconds: float = 0.0):
        self.labels = torch.zeros(64, dtype=torch.long)
        self.seconds = seconds

    def __getitems__(self, indices):
        if indices != [0]:
            time.sleep(self.seconds)
        return torch.tensor([os.getpid()]), self.labels[indices]


class InOrder(ShuffledBatches):
    """Image 0, then image 1, and so on to 59."""

    def __init__(self):
        super().__init__(64, 0, 1, 1, 0, 1, 0, 60)

    def numbers(self, step, micro_step):
        return [step]


def start_thread() -> None:
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


if __name__ == "__main__":
    # what a library may do: a thread is there before anything else, and blocks no signal
    os.register_at_fork(after_in_child=start_thread)
    # it lives as long as this process, as it does where a traceback holds it
    batches = Batches(SaysWho(float(sys.argv[2])), InOrder(), 1, cuda=False)
    print(int(next(batches)[0]), flush=True)
    ending = sys.argv[1]
    if ending == "fails":
        sys.exit(ENDINGS[ending])
    if ending == "at once":
        os._exit(ENDINGS[ending])
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
