"""Which implementation an op runs: "auto" (the default), "triton" or "torch" (the reference).

Every error of an operator begins with its name, and names no argument that it does not have.
"""

import logging
import os
from collections.abc import Mapping

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
# those that single operators have besides
OWN_BACKENDS = {"ema_update_": ("cuda",)}
VARIABLE = "SRA_FAST_BACKEND"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)

_logger = logging.getLogger("sra_fast.ops")
# messages that this process has logged
_said: set[str] = set()


def check_tensors(operator: str, given: Mapping[str, object]) -> None:
    """Raise ValueError unless every argument, given by name, is a dense tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{operator}: expected {name} as a tensor, got {type(value).__name__}")
        # a nested tensor may say that it is strided
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested one" if value.is_nested else value.layout
            raise ValueError(f"{operator}: expected {name} as a dense tensor, got {kind}")


def check_linear(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, shapes: str, multiple: int = 1
) -> None:
    """Raise ValueError unless ``x [..., K]``, ``weight [N, K]`` and ``bias [N]`` or None are of one
    floating dtype and device, and N is a ``multiple``. ``shapes`` says so in the error message.
    """
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_tensors(operator, named)
    fits = (
        x.dim() >= 1
        and weight.dim() == 2
        and weight.shape[0] % multiple == 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(t.device == x.device and t.dtype in FLOAT_DTYPES for t in named.values())
    )
    # autocast chooses the dtypes itself
    alike = fits and (autocast(x) or all(t.dtype == x.dtype for t in named.values()))
    if not alike:
        got = [f"{name} {[*t.shape]} {t.dtype} {t.device}" for name, t in named.items()]
        raise ValueError(
            f"{operator}: expected {shapes} of one floating dtype and device, got {', '.join(got)}"
        )


def asked_backend(operator: str, backend: str | None) -> str:
    """The backend that the caller, or else the environment, asks ``operator`` for.

    Raises:
        ValueError: the operator has no such backend.
    """
    asked = backend or os.environ.get(VARIABLE, "auto")
    known = (*BACKENDS, *OWN_BACKENDS.get(operator, ()))
    if asked in known:
        return asked
    owners = [name for name, own in OWN_BACKENDS.items() if asked in own]
    only = f", which only {' and '.join(owners)} takes" if owners else ""
    source = "" if backend else f" from {VARIABLE}"
    raise ValueError(f"{operator}: backend must be one of {known}, got {asked!r}{source}{only}")


def use_triton(operator: str, x: Tensor, backend: str | None) -> bool:
    """Whether the Triton kernel of ``operator`` runs: it was asked for by name, or "auto" meets a
    CUDA tensor.

    The interpreter (``TRITON_INTERPRET=1``) runs kernels on CPU tensors for tests. "auto" never
    picks it, because it is thousands of times slower than the reference. Under the transforms of
    ``torch.func`` the reference runs, whatever was asked for.

    Raises:
        ValueError: ``backend`` is unknown, or cannot run on the tensor's device.
    """
    backend = asked_backend(operator, backend)
    # a meta tensor has no data: the reference gives its shapes and FLOPs
    if x.is_meta:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (x.is_cuda or interpreted):
        raise ValueError(
            f"{operator}: backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1), "
            f"got {x.device}"
        )
    if backend == "torch" or _is_transformed():
        return False
    return backend == "triton" or (x.is_cuda and x.dtype != torch.float64)


def takes_kernel(
    operator: str,
    backend: str | None,
    x: Tensor,
    *others: Tensor | None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``operator`` runs its kernel: ``use_triton``, and the kernel takes the tensors.

    The reference takes an empty ``x``, and fp64 of any input or of the output (``dtype``).
    """
    if not use_triton(operator, x, backend) or x.numel() == 0:
        return False
    dtypes = [t.dtype for t in (x, *others) if t is not None]
    return dtype != torch.float64 and torch.float64 not in dtypes


def fits_kernel(name: str, what: str, size: int, limit: int) -> bool:
    """Whether ``size`` is at most ``limit``; one beyond it is logged once."""
    if size > limit:
        log_once(
            f"{name} runs unfused in PyTorch: {what} %d elements, the kernel takes %d", size, limit
        )
    return size <= limit


def has_transform() -> bool:
    """Whether a transform of ``torch.func`` is active.

    A compiler calls it while it traces, inside the transforms that it has entered, and keeps the
    answer. Its graphs have a guard on the transforms outside.
    """
    # torch has no public query for it, and its type hints leave this one out
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


# what torch.compiler.assume_constant_result sets, which would import the compiler with this module:
# two seconds
has_transform._dynamo_marked_constant = True


def _is_transformed() -> bool:
    """``has_transform``, which is logged once: the references run then.

    Under vmap a tensor does not say whether it wants a gradient, and an operator without a Function
    would drop it silently.
    """
    active = has_transform()
    if active:
        log_once("torch.func: the references run under vmap, grad and the like, not the kernels")
    return active


def autocast(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device and so chooses the dtypes."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def upcast(x: Tensor) -> Tensor:
    """fp32, or fp64 for an fp64 input: what every reference computes in."""
    return x if x.dtype == torch.float64 else x.float()


def log_once(message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log a choice, or a fallback that costs speed, once per process and message.

    Nothing is logged while a compiler traces.
    """
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _logger.log(level, message, *args)
