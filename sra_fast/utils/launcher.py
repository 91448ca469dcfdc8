"""The variables with which a launcher tells a process its place, whatever the launcher.

``RANK`` of ``WORLD_SIZE`` processes, ``LOCAL_RANK`` of ``LOCAL_WORLD_SIZE`` on this machine, and
``MASTER_ADDR`` with ``MASTER_PORT``, where rank 0 waits for the others. A process without them would
work alone, and several such processes would all do the same work without a word.
"""

import os
import re

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# a port of a job lies below those that the kernel gives to outgoing connections
FIRST_PORT = 15000
NUM_PORTS = 17000

# launchers that start processes and set variables of their own: the number of processes comes first
MPI = {
    "Open MPI": {
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "RANK": "OMPI_COMM_WORLD_RANK",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    "MPICH or Intel MPI": {
        "WORLD_SIZE": "PMI_SIZE",
        "RANK": "PMI_RANK",
        "LOCAL_RANK": "MPI_LOCALRANKID",
        "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS",
    },
}
SLURM = {
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def read_launcher(group: bool = True) -> None:
    """Make the launcher's variables complete and consistent in ``os.environ``.

    Without any of them this is the only process, unless ``srun`` or an MPI launcher has started it:
    then their own variables tell its place.

    Args:
        group: whether the processes will talk to each other, which needs ``MASTER_ADDR`` and
            ``MASTER_PORT``.

    Raises:
        ValueError: some are there and others are missing, or their values contradict each other.
    """
    given = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        given |= _of_others(given, group)
    elif os.environ.get("LOCAL_SIZE") and "LOCAL_WORLD_SIZE" not in given:
        # DeepSpeed's name for it; without it every process would take all cores
        given["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    # what an earlier single process has left behind says nothing
    if given.keys() <= {"LOCAL_WORLD_SIZE"} or given.get("WORLD_SIZE") == "1":
        # the only process needs no place to meet others
        group = False
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        given = alone | given
    _check_complete(given, group)
    _check_numbers(given)
    os.environ.update(given)


def _check_complete(given: dict[str, str], group: bool) -> None:
    optional = {"LOCAL_WORLD_SIZE"} if group else {"LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    missing = [name for name in NAMES if name not in given and name not in optional]
    if missing:
        raise ValueError(
            f"{', '.join(given)} set, but not {', '.join(missing)}: use a launcher, which sets all, "
            "or set none of them for a single process"
        )


def _check_numbers(given: dict[str, str]) -> None:
    numbers = {name: _whole(name, text) for name, text in given.items() if name != "MASTER_ADDR"}
    for index, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        size = numbers.get(count)
        if size == 0:
            raise ValueError(f"{count} must be at least 1, got 0")
        if size is not None and numbers[index] >= size:
            raise ValueError(f"{index} must be below {count} {size}, got {numbers[index]}")
    if numbers.get("LOCAL_WORLD_SIZE", 1) > numbers["WORLD_SIZE"]:
        raise ValueError(
            f"LOCAL_WORLD_SIZE must be at most WORLD_SIZE {numbers['WORLD_SIZE']}, got "
            f"{numbers['LOCAL_WORLD_SIZE']}"
        )
    if not 0 < numbers.get("MASTER_PORT", 1) < 2**16:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, got {numbers['MASTER_PORT']}")


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _of_others(given: dict[str, str], group: bool) -> dict[str, str]:
    """What the variables of MPI's launchers and of ``srun`` say; empty for the only process."""
    # Open MPI starts its daemons by srun, and they leave srun's variables to the processes. srun
    # itself may speak to its tasks as MPICH does
    return (
        _of_mpi("Open MPI", given, group)
        or _of_slurm(given)
        or _of_mpi("MPICH or Intel MPI", given, group)
    )


def _of_mpi(library: str, given: dict[str, str], group: bool) -> dict[str, str]:
    """The place of a process that ``mpirun`` started; empty if it did not, or this is the only one."""
    names = MPI[library]
    first = names["WORLD_SIZE"]
    if os.environ.get(first, "1") == "1":
        return {}
    found = {ours: os.environ.get(theirs, "") for ours, theirs in names.items()}
    if group:
        found |= {name: given.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    missing = [names.get(ours, ours) for ours, value in found.items() if not value]
    if missing:
        raise ValueError(
            f"{library} started this process ({first} is {os.environ[first]}), but "
            f"{', '.join(missing)} not set: pass MASTER_ADDR, the host of rank 0, and "
            "MASTER_PORT, a free port there, or use torchrun"
        )
    return found


def _of_slurm(given: dict[str, str]) -> dict[str, str]:
    """The place of a task of ``srun``; empty outside of one, or if the step has one task.

    The shell of a batch script is no task of a step, though it has most of SLURM's variables.
    """
    count = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if count == "1":
        return {}
    found = {ours: os.environ.get(theirs, "") for ours, theirs in SLURM.items()}
    missing = [SLURM[ours] for ours, value in found.items() if not value]
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    job = os.environ.get("SLURM_JOB_ID")
    if not nodes and "MASTER_ADDR" not in given:
        missing.append("SLURM_STEP_NODELIST")
    if not job and "MASTER_PORT" not in given:
        missing.append("SLURM_JOB_ID")
    if missing:
        raise ValueError(
            f"srun started this process as one of {count}, but {', '.join(missing)} not set: "
            "start the processes with torchrun, one task per node, or set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    if local := _tasks_of_this_node():
        found["LOCAL_WORLD_SIZE"] = str(local)
    if nodes:
        found["MASTER_ADDR"] = first_host(nodes)
    if job:
        # two steps of a job can run side by side
        step = _whole_or_zero(os.environ.get("SLURM_STEP_ID"))
        port = FIRST_PORT + (_whole("SLURM_JOB_ID", job) * 31 + step) % NUM_PORTS
        found["MASTER_PORT"] = str(port)
    # a batch script may have chosen where to meet
    return {**found, **given}


def _whole_or_zero(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _tasks_of_this_node() -> int | None:
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    node = os.environ.get("SLURM_NODEID", "")
    if not counts or not node.isdecimal():
        return None
    numbers = tasks_per_node(counts)
    return numbers[int(node)] if int(node) < len(numbers) else None


def tasks_per_node(text: str) -> list[int]:
    """SLURM's ``8(x2),4`` -> ``[8, 8, 4]``; ValueError for anything else."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must be like 8(x2),4, got {text!r}")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def first_host(nodes: str) -> str:
    """The first name of SLURM's ``node[01-04,7],other``: ``node01``; ValueError for anything else."""
    # the first comma outside of brackets ends the first group
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if not match:
        raise ValueError(f"the list of nodes must be like node[01-04,7],other, got {nodes!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def cuda_index() -> int:
    """Index of this process's GPU among those that it sees.

    Schedulers may show every process one GPU of its own, which then is number 0.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    # only the programs that compute need torch here
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if count == 1:
        return 0
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK {local_rank} needs {local_rank + 1} GPUs, this process sees {count}"
        )
    return local_rank
