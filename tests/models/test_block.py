"""What a block keeps for its backward pass, and that it compiles whole."""
import contextlib
import gc
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sra_fast.models.layers import Block
from sra_fast.ops import attention

# activations kept per token and channel of one block: qkv 3, attention 1, proj 1, fc1 4, fc2 1 and the input, against those
# and two norms, one more residual stream and the GELU's output; statistics and modulations on top
KEPT = {"none": 16.2, "norm": 11.2, "full": 2.2}


def inputs(B, T, D, dtype=torch.float32):
    torch.manual_seed(1)
    x, c, y, gate = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((B, T, D), (B, D), (B, T, D), (B, D)))
    return x, c, (y, gate)


def live_bytes():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor or type(o) is torch.nn.Parameter]
    sizes = {}
    for t in tensors:
        with contextlib.suppress(RuntimeError):  # what other tests leave of fake tensors has no memory
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", KEPT)
def test_activations_kept_for_the_backward(monkeypatch, recompute):
    """In SiT-XL's width, with the kernels: at 256 tokens and 28 blocks in bf16 266, 183 and 36 MB per image."""
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    B, T, D = 1, 32, 1152
    blocks, (x, c, pending), after = [Block(D, 16, 4.0, False) for _ in range(3)], inputs(B, T, D), []
    for block in blocks:
        block.recompute = recompute
        x, pending = block(x, c, pending)
        after.append(live_bytes())
    kept = (after[2] - after[1]) / (x.element_size() * x.numel())
    # modulations of an image are 6D for T tokens; 32 tokens only, to be quick
    assert KEPT[recompute] - 1.2 <= kept - (6 + 1) / T <= KEPT[recompute], kept


@pytest.mark.parametrize("recompute", ["norm", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_changes_nothing(recompute, compiled):
    def gradients(mode, compiled=False):
        torch.manual_seed(0)
        block = Block(32, 2, 4.0, False)
        block.recompute = mode
        if compiled:
            block.compile(fullgraph=True, dynamic=False)
        x, c, pending = inputs(2, 8, 32)
        x_new, (y, gate) = block(x, c, pending)
        leaves = (x, c, *pending, *block.parameters())
        return torch.autograd.grad((x_new * 2 + gate[:, None] * y).square().sum(), leaves)

    for ours, expected in zip(gradients(recompute, compiled), gradients("none"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4) if compiled else torch.testing.assert_close(
            ours, expected, rtol=0, atol=0
        )


def test_traces_whole_with_the_kernels_on_cuda_tensors(monkeypatch):
    """No graph break between the kernels and a measured attention backend; fake tensors stand for those of a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.device("meta"):
        block = Block(64, 4, 4.0, False).to(torch.bfloat16)
    graphs = []
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda:0"):
        for module in block.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
        x, c = torch.empty(2, 16, 64, dtype=torch.bfloat16), torch.empty(2, 64, dtype=torch.bfloat16)
        key = (x.device, x.dtype, 2, 16, 4, 16, False, False)
        # the others want to see a device even for fake tensors, where torch is built for one
        monkeypatch.setitem(attention.__globals__["_chosen"], key, "math")
        traced = torch.compile(block, fullgraph=True, backend=lambda graph, example: graphs.append(graph) or graph.forward)
        x_new, (y, _) = traced(x, c, (x.clone(), c.clone()))
    assert x_new.device.type == y.device.type == "cuda" and len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("gated_residual_adaln_fwd" in name for name in called) == 2
    assert any("sdpa_kernel" in name for name in called), "the measured backend is in the graph"
    assert any("linear_gelu" in name for name in called) and not any("gelu" in name and "linear" not in name for name in called)
