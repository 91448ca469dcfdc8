"""How a run ends that does not reach its last step: the line for the user, and the exit code."""

import errno
import os
import pickle
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sra_fast.training.signals import STOPPED, Stopped
from sra_fast.utils.collectives import of_all_ranks
from sra_fast.utils.outputs import OS_ERROR
from sra_fast.utils.stopping import INTERRUPTED

REFUSED = 2
FAILED = 1
# what the machine lacks or forbids: the user can change it, and resume
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_THE_MACHINE = (
    *FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
    *(errno.EISDIR, errno.ENOTDIR),
)
# how gloo, NCCL and the store say that a process at the other end is gone or does not answer
PEER_GONE = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|remote process exited|ncclRemoteError"
    r"|unhandled system error|socket timeout|timed out|connection refused|recvValue failed"
    r"|failed to (send|recv)|connectFullMesh",
    re.IGNORECASE,
)
FROM_A_LOADER = re.compile(r"^Caught (\w+) in DataLoader worker process \d+\.")
LOADER_ENDED = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")


class Diverged(FloatingPointError):
    """Training has diverged. The processes have agreed on it, and all of them raise it."""

    of_all_ranks = True


@dataclass(frozen=True)
class Ending:
    """What a process says at the end of a run.

    Attributes:
        code: exit code.
        line: without a line break.
        noticed: the fault is another process's, which has more to say.
        alike: all processes end so.
    """

    code: int
    line: str
    noticed: bool = False
    alike: bool = False


def ending_of(error: BaseException, out: Path | None = None) -> Ending | None:
    """How a run ends with this error; None for a fault of the program, which keeps its traceback.

    Args:
        error: what was raised.
        out: folder of the run, whose disk counts if an error does not name its file.
    """
    ending = _ending_of(error, out)
    if ending is not None and of_all_ranks(error):
        ending = replace(ending, alike=True)
    return ending


def _ending_of(error: BaseException, out: Path | None) -> Ending | None:
    if isinstance(error, Stopped):
        return Ending(STOPPED, str(error), alike=True)
    if isinstance(error, KeyboardInterrupt):
        return Ending(INTERRUPTED, "interrupted; resume from the last checkpoint")
    if isinstance(error, FloatingPointError):
        return Ending(FAILED, _line(error))
    number = _number(error)
    if number in OF_THE_MACHINE:
        return Ending(REFUSED, f"error: {_of_the_machine(error, number, out)}")
    if isinstance(error, ValueError):
        return Ending(REFUSED, _line(error))
    if isinstance(error, ModuleNotFoundError) and not (error.name or "sra_fast").startswith(
        "sra_fast"
    ):
        return Ending(REFUSED, f"error: the package {error.name} is missing: pip install it")
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words advise to load such a file all the same
        return Ending(REFUSED, "error: a file of weights is damaged, or holds more than numbers")
    if isinstance(error, torch.OutOfMemoryError):
        advice = "a smaller train.micro_batch or train.recompute needs less"
        return Ending(REFUSED, f"error: the GPU's memory is too small: {advice}; {_first(error)}")
    if isinstance(error, RuntimeError):
        return _of_other_processes(error)
    return None


def _of_other_processes(error: RuntimeError) -> Ending | None:
    if LOADER_ENDED.search(str(error)):
        advice = "is the machine out of memory? fewer data.num_workers need less"
        return Ending(REFUSED, f"error: {_first(error)} ({advice})")
    of_torch = isinstance(error, torch.distributed.DistError) or re.search(
        r"gloo|nccl|TCPStore", str(error), re.IGNORECASE
    )
    if of_torch and PEER_GONE.search(str(error)):
        line = f"another process has ended or does not answer: {_first(error)}"
        return Ending(FAILED, f"error: {line}", noticed=True)
    return None


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, also of libraries that hand on only its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # Python's text in a loader process's error, Rust's in that of safetensors
    match = re.search(rf"\[Errno (\d+)\]|{OS_ERROR.pattern}", str(error))
    if match:
        return int(match[1] or match[2])
    # torch.save tells no reason; there is hardly another one
    if "PytorchStreamWriter failed writing" in str(error):
        return errno.ENOSPC
    return None


def _of_the_machine(error: BaseException, number: int, out: Path | None) -> str:
    # a rename has two names, and the second is the one that a user knows
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if name is None:
        match = re.search(r"\[Errno \d+\] [^:]+: '([^']+)'", str(error))
        name = match[1] if match else None
    reason = os.strerror(number)
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{name or 'a file'} cannot be opened: {reason} (ulimit -n)"
    place = name or out
    what = name or (f"a file of {out}" if out else "a file")
    if number not in FULL:
        return f"{what} cannot be read or written: {reason}"
    return f"{what} cannot be written: {reason}{free_space(place)}; resume with --train.resume auto"


def free_space(place: str | os.PathLike | None) -> str:
    """`` (3.2 MB free on the disk of PATH)``, or nothing if that cannot be found out."""
    if place is None:
        return ""
    path = Path(place).absolute()
    try:
        existing = next(p for p in (path, *path.parents) if p.is_dir())
        free = shutil.disk_usage(existing).free
    except (OSError, StopIteration):
        return ""
    return f" ({free / 1e6:.1f} MB free on the disk of {existing})"


def _first(error: BaseException) -> str:
    """The first line of an error's text, not too long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _line(error: BaseException) -> str:
    """``error: `` and the text; of a loader process's error the last line, which is the cause."""
    text = str(error)
    if FROM_A_LOADER.match(text):
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return "error: " + " ".join(text.split("\n"))
