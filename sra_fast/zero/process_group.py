"""Process group and device, the same for every launcher, for CUDA with NCCL and for a CPU with
gloo.
"""

import logging
import os
import warnings

import deepspeed
import torch
import torch.distributed as dist

LOG_VARIABLE = "SRA_FAST_DEEPSPEED_LOG"
LOG_LEVELS = ("debug", "info", "warning", "error")


def init_distributed(tf32: bool = False) -> torch.device:
    """Join the launcher's process group, or make one with a single process.

    Args:
        tf32: let CUDA's fp32 matrix products round their inputs to TF32.

    Returns:
        This process's device.
    """
    quiet_deepspeed()
    # started without a launcher, as `python sra_fast/train.py`, or by such a process
    alone = "RANK" not in os.environ or (
        os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ
    )
    if alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        _skip_shm_build()
        if "OMP_NUM_THREADS" not in os.environ:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, _num_cores() // processes))
    backend = "nccl" if cuda else "gloo"
    if alone and not dist.is_initialized():
        # no port: two runs that start at the same moment could choose the same one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(backend, verbose=False)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _skip_shm_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator on a CPU.

    It is for inference only, takes 46 s and needs a C++ compiler.
    """
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
