"""Time of an SRA step over a plain one on a shared CPU: python -m benchmarks.step.cpu_overhead

Both run in one process, alternating step by step. Processor time counts, not wall-clock time. On a GPU
use ``benchmarks.step.train_step``.
"""

import argparse
import statistics
import sys
import time

from benchmarks.step.steps import make_step
from benchmarks.step.variants import Variant
from sra_fast.zero.process_group import init_distributed


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 if the ratio of the medians exceeds ``--limit``, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="SiT-S/2", help="default: SiT-S/2")
    add("--resolution", type=int, default=256, help="pixels (default 256)")
    add("--batch", type=int, default=8, help="images (default 8)")
    add("--steps", type=int, default=7, help="pairs of steps (default 7)")
    add("--limit", type=float, default=1.3, help="exit code 1 above this ratio (default 1.3)")
    args = parser.parse_args(argv)

    device = init_distributed()
    runs = {}
    for name in ("plain", "sra"):
        variant = Variant.parse(name)
        cfg = variant.configuration(args.model, args.resolution, args.batch, "cpu")
        runs[name] = make_step(variant, cfg, device)
        # warm-up
        runs[name].step(0)

    # in turn: a disturbance hits both alike
    seconds = {name: [] for name in runs}
    for i in range(1, args.steps + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run.step(i)
            seconds[name].append(time.process_time() - begin)

    plain = statistics.median(seconds["plain"])
    sra = statistics.median(seconds["sra"])
    pairs = zip(seconds["plain"], seconds["sra"], strict=True)
    spread = ", ".join(f"{b / a:.3f}" for a, b in pairs)
    print(
        f"plain {1e3 * plain:.0f} ms, sra {1e3 * sra:.0f} ms of processor time: "
        f"{sra / plain:.3f} (pairs: {spread})"
    )
    return int(sra / plain > args.limit)


if __name__ == "__main__":
    sys.exit(main())
