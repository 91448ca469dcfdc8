"""The operators under torch.func's transforms, where the kernels cannot run: vmap, grad, jvp."""

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state

from sra_fast import ops

B, T, D = 2, 4, 16


def modulated(x, c, backend):
    gate, shift, scale = c.chunk(3, dim=-1)
    x, h = ops.gated_residual_adaln(x, ops.adaln(x, shift, scale, backend=backend), gate, shift,
                                    scale, backend=backend)  # fmt: skip
    return ops.gated_residual(x, h, gate, backend=backend)


def distance(x, c, backend):
    return ops.align_distance(modulated(x, c, backend), x.flip(0), "smooth_l1", backend=backend)


def noised(x, c, backend):
    x = x.view(B, T, 4, 4)
    t = c[:, 0].sigmoid()
    return torch.cat(ops.noise_pair(x, x.flip(0), t, t / 2, backend=backend))


class Net(nn.Module):
    def __init__(self, function, backend):
        super().__init__()
        self.layer = nn.Linear(8, 3 * D)
        self.function = function
        self.backend = backend

    def forward(self, x, c):
        return self.function(x, self.layer(c), self.backend)


def ensemble(function, backend):
    """Loss and weight gradient of three networks at once."""
    torch.manual_seed(0)
    nets = [Net(function, backend).to(DEVICE) for _ in range(3)]
    x, c = torch.randn(B, T, D, device=DEVICE), torch.randn(B, 8, device=DEVICE)
    params, buffers = stack_module_state(nets)
    call = torch.vmap(lambda p, b: functional_call(nets[0], (p, b), (x, c)))
    out = call(params, buffers)
    out.square().sum().backward()
    return out.detach(), params["layer.weight"].grad


@pytest.mark.parametrize("function", [modulated, distance, noised])
def test_vmap_keeps_the_gradient(function):
    """Inside vmap a tensor does not say that it wants one."""
    for mine, theirs in zip(ensemble(function, "triton"), ensemble(function, "torch"), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs)


def test_other_transforms():
    x, c = torch.randn(B, T, D, device=DEVICE), torch.randn(B, 3 * D, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):

        def loss(x, backend=backend):
            return distance(x, c, backend).sum()

        results.append([grad(loss)(x), jacrev(loss)(x), *jvp(loss, (x,), (torch.ones_like(x),))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
