"""The backward of tanh-GELU with the gradient of the bias before it, for the backward of an MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import gelu as kernels
from sra_fast.ops._backend import upcast
from sra_fast.ops._register import register


def gelu_bwd_ref(dy: Tensor, x: Tensor, recompute_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp32: dx, dbias and y (empty unless ``recompute_y``), rounded once."""
    wide = upcast(x.detach()).requires_grad_()
    with torch.enable_grad():
        y = F.gelu(wide, approximate="tanh")
    (dx,) = torch.autograd.grad(y, wide, upcast(dy))
    y = y.detach() if recompute_y else y.new_empty(0)
    return dx.to(x.dtype), dx.sum(0).to(x.dtype), y.to(x.dtype)


def _fake(dy, x, recompute_y):
    dx = x.new_empty(x.shape)
    dbias = x.new_empty(x.shape[1])
    return dx, dbias, x.new_empty(x.shape if recompute_y else 0)


# dx, dbias [N] and y (empty unless recompute_y) of contiguous dy, x [M, N] on a device with kernels
gelu_bwd = register(
    "gelu_bwd(Tensor dy, Tensor x, bool recompute_y) -> (Tensor, Tensor, Tensor)",
    kernels.gelu_bwd,
    _fake,
)
