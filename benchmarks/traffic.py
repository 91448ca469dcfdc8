"""What one optimizer step sends, as JSON, for every variant that is named:

    torchrun --nproc_per_node 2 benchmarks/traffic.py sra sra+train.zero_stage=3

A small SiT on the CPU.  Every rank counts the tensors it gives to collectives, what its process has written to sockets, and what
is moved around the collectives of the backward pass.
"""

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch.distributed as dist  # noqa: E402
from counting import ByteCounter  # noqa: E402
from step_case import EngineStep, RandomMoments  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from variants import Variant  # noqa: E402

from sra_fast.zero.process_group import init_distributed  # noqa: E402

KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter", "broadcast": "broadcast",
         "reduce_": "reduce"}  # fmt: skip


class CollectiveCounter(TorchDispatchMode):
    """``sizes[kind]``: bytes of the largest side of every collective (what all ranks have or get together)."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            kind = next(kind for part, kind in KINDS.items() if part in name.strip("_") + "_")
            sides = [
                sum(t.nbytes for t in tree_leaves(side) if isinstance(t, Tensor)) for side in args
            ]
            self.sizes[kind] += max(sides)
        return out


class CopyCounter(ByteCounter):
    """``total``: bytes of what moves and scales tensors, without products, norms and the like."""

    @staticmethod
    def moved(func, args, kwargs, out) -> int:
        names = ("copy_", "div_", "mul_", "cat")
        return (
            ByteCounter.moved(func, args, kwargs, out)
            if func._schema.name.removeprefix("aten::") in names
            else 0
        )


def written(run: EngineStep) -> int:
    """Bytes that this process has written, to sockets and files, once the teacher's weights have arrived."""
    run.trainer.teacher.wait()
    dist.barrier()
    return int(next(line for line in open("/proc/self/io") if line.startswith("wchar")).split()[1])


def count(name: str, device) -> dict:
    """One counted step after two."""
    world, small = dist.get_world_size(), "+model.hidden_size=192+model.num_heads=6"
    cfg = Variant.parse(name + small).configuration("SiT-S/8", 64, 2 * world, "cpu")
    run = EngineStep(cfg, RandomMoments(cfg, device, world), device)
    for i in range(2):
        run.step(i)
    engine, copies, before, counter = (
        run.trainer.engine,
        CopyCounter(),
        written(run),
        CollectiveCounter(),
    )
    backward = engine.backward

    def counted(loss):
        with copies:
            backward(loss)

    engine.backward = counted
    with counter:
        run.step(2)
    sent = written(run) - before
    names = {name for name, _ in run.trainer.engine.module.teacher.named_parameters()}
    shapes = {name: shape.numel() for name, shape in run.trainer.shards.shapes.items()}
    return {
        "parameters": sum(shapes.values()), "teacher": sum(shapes[name] for name in names), "sent": sent,
        "collectives": dict(counter.sizes), "copies": copies.total,
    }  # fmt: skip


def main() -> None:
    device = init_distributed()
    found = {name: count(name, device) for name in sys.argv[1:]}
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
