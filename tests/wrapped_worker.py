"""Models compiled with the backend inside DDP, FSDP2 and ZeRO: two processes, every wrapper.

Usage under torchrun: wrapped_worker.py OUT_FILE. Each wrapper trains the same model twice, as it
was written and compiled; rank 0 writes how far the weights are apart, and what was rewritten.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "integrations")]

from blocks import Stack  # noqa: E402
from programs import D, T  # noqa: E402

from sra_fast import integrations  # noqa: E402

STEPS = 3


def compile_model(model):
    integrations.compile(model, then="aot_eager")


def compile_blocks(model):
    for block in model.blocks:
        integrations.compile(block, then="aot_eager")


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


# wrapper: how it is compiled, and whether before or after it is wrapped
CASES = {
    "ddp": (ddp, compile_model),
    "ddp, blocks": (ddp, compile_blocks),
    "fsdp2": (fsdp2, compile_model),
    "fsdp2, blocks": (fsdp2, compile_blocks),
}


def batches():
    """The same for every run, another half for each process."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        x = torch.randn(4, T, D, generator=generator)
        c = torch.randn(4, D, generator=generator)
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        yield x[mine], c[mine]


def make() -> Stack:
    torch.manual_seed(0)
    return Stack(depth=2)


def weights(model: nn.Module) -> list[torch.Tensor]:
    full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return [full(p).detach().clone() for p in model.parameters()]


def train(name: str, compiled: bool) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Weights after a few steps of AdamW, and the rewrites."""
    torch._dynamo.reset()
    wrap, compile_it = CASES[name]
    model = make()
    if compiled:
        compile_it(model)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    for x, c in batches():
        (wrapped(x, c) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), dict(integrations.report(model).rewrites)


def zero(stage: int, compiled: bool) -> tuple[list[torch.Tensor], dict[str, int]]:
    """The same in a DeepSpeed engine."""
    import deepspeed

    torch._dynamo.reset()
    model = make()
    if compiled:
        compile_model(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for x, c in batches():
        engine.backward((engine(x, c) - x).square().mean())
        engine.step()
    return weights(model), dict(integrations.report(model).rewrites)


def compare(run) -> dict:
    written, _ = run(False)
    compiled, rewrites = run(True)
    start = [p.detach() for p in make().parameters()]
    distance = lambda a, b: max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))
    return {
        "distance": distance(written, compiled),
        "moved": distance(written, start),
        "rewrites": rewrites,
    }


def main(out: str) -> None:
    from sra_fast.zero.process_group import init_distributed

    init_distributed()
    results = {name: compare(lambda on, name=name: train(name, on)) for name in CASES}
    for stage in (1, 2):
        results[f"zero {stage}"] = compare(lambda on, stage=stage: zero(stage, on))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
