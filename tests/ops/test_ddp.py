"""The kernels under DistributedDataParallel: two processes with half of the images each equal one
with all.
"""

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE
from torch import nn

from sra_fast import ops

D = 16


class Block(nn.Module):
    """Every differentiable operator, its modulation projected from a condition."""

    def __init__(self):
        super().__init__()
        self.mod = nn.Linear(4, 6 * D)
        self.mix = nn.Linear(D, D, bias=False)
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x, condition, target):
        shift, scale, gate, shift2, scale2, gate2 = self.mod(condition).chunk(6, dim=1)
        y = self.mix(ops.adaln(x, shift, scale, backend="triton"))
        x, h = ops.gated_residual_adaln(
            x, y, gate, shift2, scale2, bias=self.bias, backend="triton"
        )
        x = ops.gated_residual(x, self.mix(h), gate2, backend="triton")
        return ops.align_distance(x, target, "smooth_l1", reduction="mean", backend="triton")


def gradients(wrap, images):
    torch.manual_seed(0)
    model = wrap(Block())
    tensors = (torch.randn(4, 3, D), torch.randn(4, 4), torch.randn(4, 3, D))
    model(*(t[images] for t in tensors)).backward()
    return [p.grad for p in model.parameters()]


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(
        gradients(nn.parallel.DistributedDataParallel, slice(2 * rank, 2 * rank + 2)),
        f"{folder}/{rank}.pt",
    )
    # neither closes its connections while the other still uses them
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes on the host")
def test_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    alone = gradients(lambda model: model, slice(None))
    for rank in range(2):
        for ours, expected in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-5)
