"""Process group and device, the same for every launcher, for CUDA with NCCL and for a CPU with gloo."""

import logging
import os

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: silences a warning

import deepspeed


def init_distributed(tf32: bool = False) -> torch.device:
    """Join the launcher's process group (or make one of a single process) and return this process's device.

    ``tf32``: let CUDA's fp32 matrix products round their inputs to TF32.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # started as `python sra_fast/train.py`, perhaps by a process that was started so
    alone = "RANK" not in os.environ or (
        os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ
    )
    if alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    else:
        _skip_shm_build()
        if "OMP_NUM_THREADS" not in os.environ:
            cores = (
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            )
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    backend = "nccl" if cuda else "gloo"
    if (
        alone and not dist.is_initialized()
    ):  # no port: two runs that start at once could choose the same
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(backend, verbose=False)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _is_news(record: logging.LogRecord) -> bool:
    """Not the warning about an optimizer that DeepSpeed has not tested: it is ours, and the tests cover it."""
    return "untested optimizer" not in record.getMessage()


def _skip_shm_build() -> None:
    """DeepSpeed compiles a shared-memory operator on a CPU for inference only: 46 s and a C++ compiler, for nothing here."""
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
