"""The processes above this one: which of them launched it, and whether they still live."""

import os
from dataclasses import dataclass
from pathlib import Path

# programs that start training processes and wait for them, by file name or module
PROGRAMS = {
    "accelerate",
    "accelerate-launch",
    "deepspeed",
    "deepspeed.pt",
    "ds",
    "mpiexec",
    "mpirun",
    "pdsh",
    "torchrun",
    # a study starts a run after the other
    "ablate.py",
}
MODULES = {
    "accelerate.commands.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "sra_fast.ablate",
    "torch.distributed.launch",
    "torch.distributed.run",
}
# python -u -m MODULE
WORDS = 4


@dataclass(frozen=True)
class Process:
    """A process by number and start time: numbers are used again."""

    pid: int
    started: int


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is that of a launcher."""
    words = command[:WORDS]
    if any(Path(word).name in PROGRAMS or word in MODULES for word in words):
        return True
    # sra-fast ablate, or python -m sra_fast ablate
    return "ablate" in words and any(Path(w).name in ("sra-fast", "sra_fast") for w in words)


def _status(pid: int) -> tuple[Process, int] | None:
    """A living process and the number of its parent; None if it is gone, or there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the second field, the name, may hold spaces and brackets
    fields = text.rpartition(")")[2].split()
    state = fields[0]
    # a zombie has ended, and its parent has not looked yet
    if state in "ZX":
        return None
    parent = int(fields[1])
    started = int(fields[19])
    return Process(pid, started), parent


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def launchers() -> list[Process]:
    """The launchers of this process: its parent if that is one, the parent's likewise, and so on."""
    found = []
    pid = os.getppid()
    while (known := _status(pid)) is not None and is_launcher(_command(pid)):
        process, pid = known
        found.append(process)
    return found


class LauncherWatch:
    """Tells whether a launcher of this process has ended since the watch was made.

    Without /proc only the parent is known, and whether it is a launcher is not.
    """

    def __init__(self):
        self.launchers = launchers()
        # without /proc, a parent that ends shows as another one
        self.parent = None if os.path.exists("/proc/self/stat") else os.getppid()

    def gone(self) -> bool:
        """Whether one of them has ended."""
        if self.parent is not None:
            return os.getppid() != self.parent
        for launcher in self.launchers:
            known = _status(launcher.pid)
            if known is None or known[0] != launcher:
                return True
        return False
