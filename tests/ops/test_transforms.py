"""The operators under torch.func's transforms, where the kernels cannot run: vmap, grad, jvp."""

import pytest
import torch
from conftest import DEVICE
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state

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


def normed(x, c, backend):
    shift, scale, _ = c.chunk(3, dim=-1)
    return ops.adaln(x, shift, scale, backend=backend)


def second_derivative(x, c, backend):
    inner = lambda x: normed(x, c, backend).pow(3).sum()
    return grad(lambda x: grad(inner)(x).square().sum())(x)


def diagonal_of_hessian(x, c, backend):
    return hessian(lambda x: normed(x, c, backend).square().sum())(x).flatten(3).sum(3)


TRANSFORMED = {
    "jacrev": lambda x, c, backend: jacrev(lambda x: normed(x, c, backend).sum(1))(x),
    "grad of grad": second_derivative,
    "hessian": diagonal_of_hessian,
    "jvp": lambda x, c, backend: jvp(
        lambda x: modulated(x, c, backend), (x,), (torch.ones_like(x),)
    )[1],
    "vmap": lambda x, c, backend: torch.vmap(
        lambda x, c: distance(x[None], c[None], backend), in_dims=(0, 0)
    )(x, c),
    "penalty": lambda x, c, backend: grad(lambda x: modulated(x, c, backend).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_compiler_traces_the_references(name):
    """The compiled transform, and the gradient through it, are those of the references."""
    torch.manual_seed(0)
    x, c = torch.randn(B, T, D, device=DEVICE), torch.randn(B, 3 * D, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):

        def run(x, c, backend=backend):
            return TRANSFORMED[name](x, c, backend)

        if backend == "triton":
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaves = [t.clone().requires_grad_() for t in (x, c)]
        out = run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def counting_backend(counts):
    """A compiler backend that appends to ``counts`` how many of our operators a graph calls."""

    def count(graph, _):
        counts.append(sum("sra_fast" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count)


@pytest.mark.parametrize("order", ["plain first", "transform first"])
def test_a_compiled_network_keeps_a_graph_for_each(order):
    """A plain call runs the kernels, a transformed one the references, whichever came first."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Net(normed, "triton").to(DEVICE)
    counts = []
    # torch does not compile a function that an eager transform calls: fullgraph would refuse it
    compiled = torch.compile(net, backend=counting_backend(counts))
    x, c = torch.randn(B, T, D, device=DEVICE), torch.randn(B, 8, device=DEVICE)
    params = {name: param.detach() for name, param in net.named_parameters()}

    def loss(call, x, params):
        params = {f"_orig_mod.{n}": p for n, p in params.items()} if call is compiled else params
        return functional_call(call, params, (x, c)).square().sum()

    def plain(call):
        leaf = x.clone().requires_grad_()
        loss(call, leaf, params).backward()
        return [leaf.grad]

    def transformed(call):
        by_param = grad(lambda params: loss(call, x, params))(params)
        by_image = torch.vmap(lambda x: call(x[None], c[:1]))(x)
        return [grad(lambda x: loss(call, x, params))(x), *by_param.values(), by_image]

    def check(function):
        """The number of kernels in the new graphs."""
        before = len(counts)
        for mine, theirs in zip(function(compiled), function(net), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        return sum(counts[before:])

    orders = {"plain first": (plain, transformed), "transform first": (transformed, plain)}
    for function in orders[order]:
        # a forward and a backward kernel, or none
        assert check(function) == (2 if function is plain else 0)
    # both again, after the other
    for function in orders[order]:
        assert check(function) in ((0, 2) if function is plain else (0,))
