"""SwiGLU of two halves side by side and its backward, for an MLP with a gate (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import swiglu as kernels
from sra_fast.ops._backend import takes_kernel, upcast
from sra_fast.ops._register import apply, guard_double_backward, register, wants_grad


def swiglu_ref(x: Tensor) -> Tensor:
    """The definition, in fp32, rounded once: ``silu(x1) * x2`` of ``x = [x1 | x2] [..., 2 N]``."""
    first, second = upcast(x).chunk(2, dim=-1)
    return (F.silu(first) * second).to(x.dtype)


def swiglu_bwd_ref(
    dy: Tensor, x: Tensor, recompute_y: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp32: dx, dbias and y, the last two empty unless they are wanted."""
    wide = upcast(x.detach()).requires_grad_()
    with torch.enable_grad():
        y = swiglu_ref(wide)
    (dx,) = torch.autograd.grad(y, wide, upcast(dy))
    y = y.detach() if recompute_y else y.new_empty(0)
    dbias = dx.sum(0) if needs_dbias else dx.new_empty(0)
    return dx.to(x.dtype), dbias.to(x.dtype), y.to(x.dtype)


def _fake_bwd(dy, x, recompute_y, needs_dbias):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbias = x.new_empty(x.shape[1] if needs_dbias else 0)
    return dx, dbias, x.new_empty(dy.shape if recompute_y else 0)


# y [M, N] of contiguous x [M, 2 N], on a device with kernels, as is the next one
swiglu_fwd = register(
    "swiglu_fwd(Tensor x) -> Tensor",
    kernels.swiglu_fwd,
    lambda x: x.new_empty(x.shape[0], x.shape[1] // 2),
)
# dx, dbias [2 N] and y, the last two empty unless they are wanted
swiglu_bwd = register(
    "swiglu_bwd(Tensor dy, Tensor x, bool recompute_y, bool needs_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    kernels.swiglu_bwd,
    _fake_bwd,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, x):
        ctx.operator = operator
        # not the output, which no gradient depends on
        ctx.save_for_backward(x)
        return swiglu_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, _, _ = guard_double_backward(ctx.operator, swiglu_bwd, dy.contiguous(), x, False, False)
        return None, dx


def run_swiglu(operator: str, x: Tensor, backend: str | None) -> Tensor:
    """``silu(x1) * x2 [..., N]`` of ``x = [x1 | x2] [..., 2 N]``, which ``operator`` has checked;
    errors begin with its name.
    """
    if not takes_kernel(operator, backend, x):
        return swiglu_ref(x)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = apply(_SwiGLU, operator, rows) if wants_grad(rows) else swiglu_fwd(rows)
    return y.view(*x.shape[:-1], -1)
