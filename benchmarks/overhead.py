"""The time of an SRA step over a plain one on a CPU that others use too:  python benchmarks/overhead.py --model SiT-S/2 --batch 8

Both run in one process, step by step in turn, and the processor's time counts, not the clock's.  On a GPU: train_step.py.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

from step_case import make_step  # noqa: E402
from variants import Variant  # noqa: E402

from sra_fast.zero.process_group import init_distributed  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--limit",
        type=float,
        default=1.3,
        help="exit code 1 if the ratio of the medians exceeds it",
    )
    args = parser.parse_args(argv)
    device, runs = init_distributed(), {}
    for name in ("plain", "sra"):
        variant = Variant.parse(name)
        runs[name] = make_step(
            variant,
            variant.configuration(args.model, args.resolution, args.batch, "cpu"),
            device,
            None,
        )
        runs[name].step(0)
    seconds = {name: [] for name in runs}
    for i in range(1, args.steps + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run.step(i)
            seconds[name].append(time.process_time() - begin)
    plain, sra = (statistics.median(values) for values in seconds.values())
    spread = ", ".join(f"{b / a:.3f}" for a, b in zip(*seconds.values(), strict=True))
    print(
        f"plain {1e3 * plain:.0f} ms, sra {1e3 * sra:.0f} ms of processor time: {sra / plain:.3f} (pairs: {spread})"
    )
    return int(sra / plain > args.limit)


if __name__ == "__main__":
    sys.exit(main())
