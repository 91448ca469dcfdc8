"""Programs of torch.export, which hold the bare operators without their autograd Functions."""

import pytest
import torch
from conftest import DEVICE
from torch import nn

from sra_fast import ops

B, T, D = 2, 4, 16


def block(x, shift, scale, gate, backend):
    h = ops.adaln(x, shift, scale, backend=backend)
    q, k = ops.qk_norm_rope(*h.view(B, T, 2, 1, 8).unbind(2), backend=backend)
    h = ops.gated_residual_norm(h, torch.cat([q, k], dim=-1).flatten(2), gate, backend=backend)
    x, h = ops.gated_residual_adaln(x, h, gate, shift, scale, backend=backend)
    return ops.gated_residual(x, h, gate, backend=backend)


FUNCTIONS = {
    "adaln": lambda x, a, b, c, backend: ops.adaln(x, a, b, backend=backend),
    "adaln_linear": lambda x, a, b, c, backend: ops.adaln_linear(
        x, a, b, torch.eye(D, device=DEVICE), backend=backend
    )[1],
    "linear_swiglu": lambda x, a, b, c, backend: ops.linear_swiglu(
        x, torch.ones(D, D, device=DEVICE), backend=backend
    ),
    "align_distance": lambda x, a, b, c, backend: ops.align_distance(
        x, torch.ones_like(x), "smooth_l1", backend=backend
    ),
    "block": block,
}


class Net(nn.Module):
    def __init__(self, function, backend):
        super().__init__()
        self.embed = nn.Linear(4, D)
        self.modulation = nn.Linear(8, 3 * D)
        self.function = function
        self.backend = backend

    def forward(self, x, c):
        vectors = self.modulation(c).chunk(3, dim=1)
        return self.function(self.embed(x), *vectors, self.backend).square()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_exported_network_runs_and_refuses_gradients(name, compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    net = Net(FUNCTIONS[name], "triton").to(DEVICE)
    inputs = (torch.randn(B, T, 4, device=DEVICE), torch.randn(B, 8, device=DEVICE))
    program = torch.export.export(net, inputs)
    assert "sra_fast" in str(program.graph)
    exported = program.module()
    if compiled:
        exported = torch.compile(exported, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(exported(*inputs), net(*inputs))
    # not a network whose first layers learn nothing
    first = "adaln" if name == "block" else name
    operator = {"linear_swiglu": "swiglu", "adaln_linear": "adaln"}.get(first, first)
    with pytest.raises(RuntimeError, match=f"{operator}: its kernel has no derivative"):
        exported(*inputs)


def test_an_exported_network_of_references_trains():
    """What the error advises."""
    torch.manual_seed(0)
    net = Net(block, "torch").to(DEVICE)
    inputs = (torch.randn(B, T, 4, device=DEVICE), torch.randn(B, 8, device=DEVICE))
    exported = torch.export.export(net, inputs).module()
    grads = []
    for network in (net, exported):
        network.zero_grad()
        network(*inputs).sum().backward()
        grads.append({name: param.grad for name, param in network.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
