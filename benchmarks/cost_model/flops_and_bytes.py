"""FLOPs and bytes of every variant of a step, without a GPU: python -m benchmarks.cost_model.flops_and_bytes

FLOPs are those of the products (``flops.py``). Bytes are counted in a step of a small model on the CPU
(``memory_traffic.py``). Its batch is so small that the backward pass moves little else than weights and
gradients.
"""

import argparse

from benchmarks.cost_model.flops import step_flops
from benchmarks.cost_model.memory_traffic import bytes_by_phase, fuse_adamw
from benchmarks.cost_model.one_gpu import Sizes
from benchmarks.step.steps import make_step
from benchmarks.step.variants import OTHER_TARGETS, Variant
from sra_fast.zero.process_group import init_distributed

VARIANTS = (
    "plain",
    "sra",
    "sra_fp8",
    "sra+optim.implementation=torch",
    "sra+align.fraction=0.5",
    *OTHER_TARGETS,
    "fp32_teacher",
    "bf16_teacher",
    "truncated",
    "strong",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-XL/2", help="whose FLOPs; default: SiT-XL/2")
    parser.add_argument("--resolution", type=int, default=256, help="pixels (default 256)")
    args = parser.parse_args(argv)
    device = init_distributed()
    print(
        f"{args.model}, {args.resolution} px: GFLOP per image and step, times plain; "
        "bytes per parameter of update and backward"
    )
    plain = None
    for name in VARIANTS:
        variant = Variant.parse(name)
        full_depth = variant.switches is not None and not variant.switches.truncated
        cfg = variant.configuration(args.model, args.resolution, 1, "cuda")
        flops = sum(step_flops(cfg, full_depth).values())
        # the first variant is plain
        plain = plain or flops

        # bytes per parameter hardly depend on the size of the model. Four tokens, so that they can be
        # cut into groups
        small = variant.configuration("SiT-S/4", 64, 2, "cuda")
        run = make_step(variant, small, device)
        fuse_adamw(run)
        moved = bytes_by_phase(run)
        N = Sizes.of(small).student
        print(
            f"{name:30} {float(flops) / 1e9:9.1f} {float(flops / plain):7.3f} "
            f"{moved['optimizer'] / N:7.1f} {moved['backward'] / N:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
