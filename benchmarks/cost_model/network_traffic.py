"""What one optimizer step sends, as JSON, for every variant that is named:

    torchrun --nproc_per_node 2 -m benchmarks.cost_model.network_traffic sra sra+train.zero_stage=3

A small SiT on the CPU. Every rank counts the tensors that it gives to collectives, the bytes that its
process has written to sockets, and the bytes of copies around the collectives of the backward pass.
"""

import json
import sys
from collections import Counter

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost_model.memory_traffic import ByteCounter, tensor_bytes
from benchmarks.step.steps import EngineStep, OneBatch
from benchmarks.step.variants import Variant
from sra_fast.zero.process_group import init_distributed

# part of an operator's name to the kind of the collective; the first match counts
KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce_": "reduce",
}
# operators that copy or scale tensors
COPIES = ("copy_", "_foreach_copy_", "div_", "mul_", "cat")
SMALL = "+model.hidden_size=192+model.num_heads=6"
WARMUP_STEPS = 2


class CollectiveCounter(TorchDispatchMode):
    """Counts in ``sizes[kind]`` the bytes of the larger side of every collective: what all ranks hold together."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        # barriers carry no data
        if namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            # names end in an underscore or not, depending on the version
            name = name.strip("_") + "_"
            kind = next(kind for part, kind in KINDS.items() if part in name)
            self.sizes[kind] += max(tensor_bytes(side) for side in args)
        return out


class CopyCounter(ByteCounter):
    """Counts in ``total`` the bytes of ``COPIES``, but no products and norms."""

    @staticmethod
    def moved(func, args, kwargs, out) -> int:
        if func._schema.name.removeprefix("aten::") not in COPIES:
            return 0
        return ByteCounter.moved(func, args, kwargs, out)


def bytes_written(run: EngineStep) -> int:
    """Bytes that this process has written to sockets and files, once the teacher's weights have arrived."""
    run.trainer.teacher.wait()
    dist.barrier()
    with open("/proc/self/io") as lines:
        line = next(line for line in lines if line.startswith("wchar"))
    return int(line.split()[1])


def count_step(name: str, device) -> dict:
    """Counts of one step after the warm-up."""
    world = dist.get_world_size()
    cfg = Variant.parse(name + SMALL).configuration("SiT-S/8", 64, 2 * world, "cpu")
    run = EngineStep(cfg, OneBatch(cfg, device, world), device)
    for i in range(WARMUP_STEPS):
        run.step(i)

    # copies are counted in the backward pass only
    engine = run.trainer.engine
    copies = CopyCounter()
    graphed = run.trainer.graphed
    owner, name = (engine, "backward") if graphed is None else (graphed, "_step")
    backward = getattr(owner, name)

    def counted_backward(*args):
        with copies:
            return backward(*args)

    before = bytes_written(run)
    collectives = CollectiveCounter()
    setattr(owner, name, counted_backward)
    with collectives:
        run.step(WARMUP_STEPS)
    sent = bytes_written(run) - before

    teacher = {name for name, _ in engine.module.teacher.named_parameters()}
    sizes = {name: shape.numel() for name, shape in run.trainer.masters.shapes.items()}
    return {
        "parameters": sum(sizes.values()),
        "teacher": sum(sizes[name] for name in teacher),
        "sent": sent,
        "collectives": dict(collectives.sizes),
        "copies": copies.total,
    }


def main() -> None:
    device = init_distributed()
    found = {name: count_step(name, device) for name in sys.argv[1:]}
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
