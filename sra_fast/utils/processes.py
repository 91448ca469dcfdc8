"""The processes above this one: which of them launched it, and whether they still live.

Only the standard library is imported here: the first lines of a program look at its launchers.
"""

import os
import re
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
# variables that torchrun, also that of accelerate, and DeepSpeed's launcher set, and no user does
MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
# besides process 1, what takes over the processes of one that has ended
ADOPTERS = {"catatonit", "conmon", "dumb-init", "init", "slurmstepd", "systemd", "tini"}
PYTHON = re.compile(r"python[\d.]*t?|pypy[\d.]*")


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Process:
    """A process by number and start time: numbers are used again."""

    pid: int
    started: int


def program_of(command: list[str]) -> list[str]:
    """A command line from the name of its program on: of Python, from its script or module on.

    ``python -u -m MODULE x`` -> ``[MODULE, x]``; empty for Python without a script.
    """
    words = list(command)
    if not words or not PYTHON.fullmatch(Path(words[0]).name):
        return words
    words.pop(0)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option == "--check-hash-based-pycs":
            words = words[1:]
        elif not option.startswith("--"):
            # the first of these ends a group of letters: its value is the rest, or the next word
            letters, taken, value = re.fullmatch(r"-([^cmWX]*)([cmWX]?)(.*)", option, re.S).groups()
            if taken == "c" or not letters + taken:
                # a program in the command line, or on stdin
                return []
            if taken == "m":
                return [value, *words] if value else words
            if taken and not value:
                words = words[1:]
    return words


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is that of a launcher."""
    program, *words = program_of(command) or [""]
    name = Path(program).name
    if name in PROGRAMS or program in MODULES:
        return True
    # sra-fast ablate, or python -m sra_fast ablate
    return name in ("sra-fast", "sra_fast") and words[:1] == ["ablate"]


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


def _parents() -> list[Process]:
    """The parent of this process; none without /proc."""
    known = _status(os.getppid())
    return [] if known is None else [known[0]]


def was_orphaned() -> bool:
    """Whether a launcher started this process and had already ended when this was called.

    A launcher of another name, or a shell between it and this process, is none that has ended. A
    process 1 that is a Python program, as in a container, may be such a launcher.
    """
    if not any(name in os.environ for name in MARKS):
        return False
    parent = os.getppid()
    command = _command(parent)
    if is_launcher(command):
        return False
    program = program_of(command) or [""]
    # some show more than their name: `slurmstepd: [17.0]`
    if Path(program[0]).name.partition(":")[0] in ADOPTERS:
        return True
    of_python = bool(command) and PYTHON.fullmatch(Path(command[0]).name) is not None
    return parent == 1 and not of_python


class LauncherWatch:
    """Tells whether a launcher of this process has ended.

    Made in the first lines of a program: of a launcher that ended before, only some traces are left
    (``was_orphaned``). Without /proc only the parent is known, and whether it is a launcher is not.

    Args:
        parent: the parent launched this process, whatever its name.
    """

    def __init__(self, parent: bool = False):
        self.launchers = [*_parents(), *launchers()] if parent else launchers()
        # after that look, during which one may have ended
        self.orphaned = was_orphaned()
        # without /proc, a parent that ends shows as another one
        self.parent = None if os.path.exists("/proc/self/stat") else os.getppid()

    def gone(self) -> bool:
        """Whether one of them has ended."""
        if self.orphaned:
            return True
        if self.parent is not None:
            return os.getppid() != self.parent
        for launcher in self.launchers:
            known = _status(launcher.pid)
            if known is None or known[0] != launcher:
                return True
        return False
