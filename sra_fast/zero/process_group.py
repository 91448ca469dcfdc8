"""Process group and device, the same for every launcher, for CUDA with NCCL and for a CPU with
gloo.
"""

import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from sra_fast.utils.launcher import cuda_index, read_launcher
from sra_fast.utils.processes import num_cores

LOG_VARIABLE = "SRA_FAST_DEEPSPEED_LOG"
LOG_LEVELS = ("debug", "info", "warning", "error")
# the slowest process may first have to import everything from a busy file server
JOIN_TIMEOUT = timedelta(minutes=5)
# DeepSpeed's variable. its default of 10 minutes would end a run that waits for rank 0's samples,
# and before train.stall_minutes could tell which process is where
TIMEOUT_VARIABLE = "DEEPSPEED_TIMEOUT"
DEFAULT_TIMEOUT = 30


def init_distributed(tf32: bool = False) -> torch.device:
    """Join the launcher's process group, or make one with a single process.

    Args:
        tf32: let CUDA's fp32 matrix products round their inputs to TF32.

    Returns:
        This process's device.

    Raises:
        ValueError: the launcher's variables contradict each other, or the processes do not find
            each other.
    """
    quiet_deepspeed()
    read_launcher(group=not dist.is_initialized())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", cuda_index()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        _skip_shm_build()
        if "OMP_NUM_THREADS" not in os.environ:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, num_cores() // processes))
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        _join(backend)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(backend, verbose=False)
    return device


def _join(backend: str) -> None:
    """Make torch's process group."""
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    if world == 1:
        # no port: two runs that start at the same moment could choose the same one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    host = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR must be the host of rank 0, got {host!r}: {error.strerror}"
        ) from None
    timeout = timedelta(minutes=_timeout_minutes())
    try:
        # torch's own way, which also knows the store of torchrun, with a limit for the start alone
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(timeout)
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise ValueError(_why_apart(str(error), host, port)) from None


def _timeout_minutes() -> int:
    """How long a collective operation may wait for the other processes."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of minutes, got {text!r}")
    return int(text)


def _why_apart(text: str, host: str, port: str) -> str:
    """One line about processes that do not find each other, from torch's many."""
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return (
            f"MASTER_PORT {port} is in use on this machine: set another one (torchrun and deepspeed: "
            "--master_port)"
        )
    if "EADDRNOTAVAIL" in text or "cannot assign requested address" in text.lower():
        return f"MASTER_ADDR must be an address of rank 0's machine, got {host}"
    reason = text.strip().splitlines()[0][:200] if text.strip() else "no reason given"
    return (
        f"the processes do not find each other at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}"
    )


def deepspeed_log_level() -> int:
    """The level from which DeepSpeed reports: errors only, or what ``SRA_FAST_DEEPSPEED_LOG`` names.

    Raises:
        ValueError: the variable names no level.
    """
    name = os.environ.get(LOG_VARIABLE, "error")
    if name not in LOG_LEVELS:
        raise ValueError(f"{LOG_VARIABLE} must be one of {', '.join(LOG_LEVELS)}, got {name!r}")
    return logging.getLevelNamesMapping()[name.upper()]


def quiet_deepspeed() -> None:
    """Keep from the user what DeepSpeed and torch say at a start; errors stay visible.

    DeepSpeed reports about launching, compiling and tuning, which this engine does itself.
    """
    level = deepspeed_log_level()
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    # its handler has a level of its own; handlers of others, a test's for example, are left alone
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(level)
    # DeepSpeed and this engine use names that torch 2.13 has renamed and torch 2.11 has not
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )


@contextmanager
def printed_as_reports() -> Iterator[None]:
    """What DeepSpeed prints becomes reports of its logger: stdout is for a run's summary."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logging.getLogger("DeepSpeed").info("%s", line)


def _skip_shm_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator on a CPU.

    It is for inference only, takes 46 s and needs a C++ compiler.
    """
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
