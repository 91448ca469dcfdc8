"""What a block keeps for its backward pass, and that it compiles whole."""

import contextlib
import gc
import warnings

import pytest
import torch
from conftest import DEVICE
from torch._subclasses import FakeTensorMode

from sra_fast.models.layers import Block, add_pending
from sra_fast.ops import attention

# arrays [B, T, D] that one block keeps. full: what was pending and the residual stream. norm: also
# a second residual stream, qkv 3, attention 1, proj 1, fc1 4. none: also two norms and GELU's
# output 4. The fraction is for statistics and modulations.
KEPT = {"none": 18.05, "norm": 12.05, "full": 2.05}


def inputs(B, T, D, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = (B, T, D), (B, D), (B, T, D), (B, D)
    x, c, y, gate = (
        torch.randn(shape, dtype=dtype).to(DEVICE).requires_grad_() for shape in shapes
    )
    return x, c, (y, gate, None)


def storages(tensors):
    sizes = {}
    for t in tensors:
        # fake tensors that other tests leave have no memory
        with contextlib.suppress(RuntimeError):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sizes


def live():
    """Every tensor that Python knows of.

    What a checkpoint keeps is among them. Most of what autograd keeps is not.
    """
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = (torch.Tensor, torch.nn.Parameter)
        return [item for item in gc.get_objects() if type(item) in kinds]


@pytest.mark.parametrize("recompute", KEPT)
def test_activations_kept_for_the_backward(monkeypatch, recompute):
    """In SiT-XL's width, with the kernels.

    At 256 tokens and 28 blocks in bf16 that is 298, 199 and 33 MB per image.
    """
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    B, T, D = 1, 32, 1152
    x, c, pending = inputs(B, T, D)
    kept = []
    after = []
    blocks = [Block(D, 16, 4.0, False).to(DEVICE) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for block in blocks:
            block.recompute = recompute
            x, pending = block(x, c, pending)
            after.append(sum(storages([*live(), *kept]).values()))
    arrays = (after[2] - after[1]) / (x.element_size() * x.numel())
    # modulations of an image are 6D for T tokens; 32 tokens only, to be quick
    assert KEPT[recompute] - 0.05 <= arrays - 6 / T <= KEPT[recompute], arrays


def gradients(mode, compiled=False, defer_bias=False):
    torch.manual_seed(0)
    block = Block(32, 2, 4.0, False)
    block.recompute = mode
    block.defer_bias = defer_bias
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    block.to(DEVICE)
    if compiled:
        block.compile(fullgraph=True, dynamic=False)
    x, c, pending = inputs(2, 8, 32)
    leaves = (x, c, *pending[:2], *block.parameters())
    loss = add_pending(*block(x * 2, c, pending)).square().sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["none", "norm", "full"])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.long(10), pytest.mark.timeout(150)])]
)
def test_recomputing_changes_nothing(monkeypatch, recompute, compiled, backend):
    """Nor do the kernels, compilation, or a bias that is left pending."""
    expected = gradients("none")
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    found = gradients(recompute, compiled, defer_bias=compiled)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_traces_whole_with_the_kernels_on_cuda_tensors(monkeypatch):
    """No graph break between the kernels and a measured attention backend.

    Fake tensors stand for those of a GPU.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.device("meta"):
        block = Block(64, 4, 4.0, False).to(torch.bfloat16)
    graphs = []
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda:0"):
        for module in block.modules():
            for name, p in module._parameters.items():
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        x = torch.empty(2, 16, 64, dtype=torch.bfloat16)
        c = torch.empty(2, 64, dtype=torch.bfloat16)
        key = (x.device, x.dtype, 2, 16, 4, 16, 16, 4, (False,) * 3, None, False)
        # the others want to see a device even for fake tensors, where torch is built for one
        monkeypatch.setitem(attention.__globals__["_chosen"], key, "math")
        keep_graph = lambda graph, example: graphs.append(graph) or graph.forward
        traced = torch.compile(block, fullgraph=True, backend=keep_graph)
        x_new, (y, *_) = traced(x, c, (x.clone(), c.clone(), None))
    assert x_new.device.type == y.device.type == "cuda" and len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("gated_residual_adaln_fwd" in name for name in called) == 2
    assert any("sdpa_kernel" in name for name in called), "the measured backend is in the graph"
    assert any("linear_gelu" in name for name in called)
    assert not any("gelu" in name and "linear" not in name for name in called)
