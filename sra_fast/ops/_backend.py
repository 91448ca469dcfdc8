"""Which implementation an op runs: "auto" (the default), "triton" or "torch" (the reference)."""

import logging
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_logger = logging.getLogger("sra_fast.ops")
_said: set[str] = set()


def use_triton(x: Tensor, backend: str | None) -> bool:
    """True if the Triton kernel runs: asked for by name, or "auto" on a CUDA tensor.

    The interpreter (``TRITON_INTERPRET=1``) runs kernels on CPU tensors for tests; "auto" never picks it, it is
    thousands of times slower than the reference.
    """
    backend = backend or os.environ.get("SRA_FAST_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if x.is_meta:  # shapes and FLOPs only
        return False
    if backend == "triton" and not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            f"backend='triton' needs a CUDA tensor (or TRITON_INTERPRET=1), got {x.device}"
        )
    return backend == "triton" or (backend == "auto" and x.is_cuda and x.dtype != torch.float64)


def autocast(x: Tensor) -> bool:
    """Whether dtypes are autocast's to choose."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def upcast(x: Tensor) -> Tensor:
    """fp32, or fp64 where the input is fp64: what every reference computes in."""
    return x if x.dtype == torch.float64 else x.float()


def log_once(message: str, *args, level: int = logging.WARNING) -> None:
    """Log a choice or a fallback that costs speed, once per process and message; not while a compiler traces."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _logger.log(level, message, *args)
