"""Small programs, and a check that runs one before and after the rewrite."""

import copy

import torch
from conftest import assert_kernel_close
from torch import Tensor, nn

from sra_fast import integrations

B, T, D = 2, 6, 16


class Program(nn.Module):
    """A module around a function of ``(module, x, c)``; its layers are random.

    Args:
        function: x ``[B, T, D]``, c ``[B, D]`` -> one tensor or several.
    """

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.condition = nn.Linear(D, 9 * D)
        self.first = nn.Linear(D, D)
        self.second = nn.Linear(D, D)
        self.weight = nn.Parameter(torch.rand(D) + 0.5)
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, c: Tensor):
        return self.function(self, x, c)

    def vectors(self, c: Tensor, count: int = 6) -> list[Tensor]:
        """``count`` vectors ``[B, 1, D]``."""
        return [v[:, None] for v in self.condition(c).chunk(9, dim=1)[:count]]


def inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=generator)
    c = torch.randn(B, D, generator=generator)
    return x.to(device, dtype), c.to(device, dtype)


def run(module: nn.Module, x: Tensor, c: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of both inputs and of every parameter that is used."""
    x = x.clone().requires_grad_()
    c = c.clone().requires_grad_()
    out = module(x, c)
    outputs = list(out) if isinstance(out, tuple) else [out]
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    wanted = [o for o in outputs if o.requires_grad]
    kept = [d for o, d in zip(outputs, douts, strict=True) if o.requires_grad]
    # not torch.autograd.grad, which reentrant checkpoints refuse
    module.zero_grad()
    torch.autograd.backward(wanted, kept)
    grads = [t.grad for t in (x, c, *parameters)]
    return [*(o.detach() for o in outputs), *grads]


def check(function, expected, *, dtype=torch.float32, then="eager", **options):
    """The rewritten program counts ``expected`` rewrites, and is as exact as the one that was
    written; returns the report.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Program(function).to(dtype)
    x, c = inputs(dtype)
    truth = run(copy.deepcopy(module).double(), x.double(), c.double())
    before = run(module, x, c)
    integrations.compile(module, then=then, fullgraph=True, **options)
    after = run(module, x, c)
    found = integrations.report(module)
    assert dict(found.rewrites) == expected, str(found)
    for mine, theirs, exact in zip(after, before, truth, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            floor = 2e-6 * max(1.0, exact.abs().max().item())
            assert_kernel_close(mine, theirs, exact, floor=floor)
    integrations.undo(module)
    for mine, theirs in zip(run(module, x, c), before, strict=True):
        assert mine is None or torch.equal(mine, theirs)
    return found
