"""A program that ends in one of several ways while its loader process does one of several things.

Usage: loader_worker.py. It reads lines "ENDING, WORK", and forks itself for each, which saves the
imports. That child prints the number of its loader process; then its exit code is printed.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

# before multiprocessing is imported: the order in which things end at exit follows that of imports
ours = threading.Event()
weakref.finalize(ours, ours.set)

import multiprocessing  # noqa: E402

import torch  # noqa: E402

sys.path[0] = str(Path(__file__).resolve().parents[1])

from sra_fast.data.loader import Batches  # noqa: E402
from sra_fast.data.order import ShuffledBatches  # noqa: E402
from sra_fast.data.training_data import TrainingData  # noqa: E402

HOUR = 3600
# each with the exit code that the program then has
ENDINGS = {"returns": 0, "exits": 3, "at once": 4, "killed": -signal.SIGKILL}


def hold_everything() -> None:
    """A library's call during which no other thread runs, such as a page that does not arrive."""
    ctypes.PyDLL(None).sleep(HOUR)


# what a loader process does from the second image on
WORK = {
    "idle": lambda: None,
    "reads": lambda: time.sleep(HOUR),
    "fails": lambda: 1 / 0,
    "is stuck": hold_everything,
}


class SaysWho(TrainingData):
    """Says which process reads, and does something when the first image has come."""

    def __init__(self, work: str):
        self.labels = torch.zeros(64, dtype=torch.long)
        self.work = WORK[work]
        self.has_come = multiprocessing.Event()
        self.at_work = multiprocessing.Event()

    def __getitems__(self, indices):
        if indices == [1]:
            self.has_come.wait()
            self.at_work.set()
            self.work()
        return torch.tensor([os.getpid()]), self.labels[indices]


def started(work: str) -> tuple[Batches, int]:
    """Batches whose loader process is at work, and its number."""
    data = SaysWho(work)
    batches = Batches(data, InOrder(), 1, cuda=torch.cuda.is_available())
    worker = int(next(batches)[0])
    data.has_come.set()
    data.at_work.wait()
    return batches, worker


class InOrder(ShuffledBatches):
    """Image 0, then image 1, and so on to 59."""

    def __init__(self):
        super().__init__(64, 0, 1, 1, 0, 1, 0, 60)

    def numbers(self, step, micro_step):
        return [step]


def start_thread() -> None:
    threading.Thread(target=time.sleep, args=(HOUR,), daemon=True).start()


def forked() -> tuple[str, str]:
    """Ending and work of this process, which is a child, one for each line of stdin."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            ending, work = line.strip().split(", ")
            return ending, work
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    sys.exit()


if __name__ == "__main__":
    ending, work = forked()
    # what a library may do: a thread is there before anything else, and blocks no signal
    os.register_at_fork(after_in_child=start_thread)
    # a pipe may have a number that select() does not take
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    # they live as long as this process, as they do where a traceback holds them
    batches, worker = started(work)
    print(worker, flush=True)
    if ending == "exits":
        sys.exit(ENDINGS[ending])
    if ending == "at once":
        os._exit(ENDINGS[ending])
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
