"""Attention's backends at a model's shape, forward and forward with backward:  python benchmarks/attention_backends.py

What ``ops.attention`` measures for itself when it first meets a shape, written down: queries, keys and values are views of one
projection, and gradients end as rows of tokens, so that a copy that a backend makes necessary is in its time.  Rows of kind
"probe"; where a backend cannot run, there is none.
"""

import argparse
import sys
from pathlib import Path

import torch
from measure import matmul_rate
from record import RowFile, environment, make_row
from registry import Shape, attention_flops, random

from sra_fast.ops.attention import backend_times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["SiT-XL/2", "SiT-B/2"], help="head dimensions 72 and 64"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/<device>-<commit>.json"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: there is one backend on a CPU", file=sys.stderr)
        return 2
    where = environment(
        "cuda", "python benchmarks/attention_backends.py " + " ".join(argv or sys.argv[1:])
    )
    file, (_, tflops) = RowFile(args.json, where), matmul_rate("cuda", torch.bfloat16)
    for model in args.models:
        shape = Shape(model, args.resolution, args.batch)
        T, D, H = shape.sizes
        case = {
            "model": model,
            "resolution": args.resolution,
            "batch": args.batch,
            "dtype": "bfloat16",
        }
        qkv = random(0, "cuda")(args.batch, T, 3, H, D // H, dtype=torch.bfloat16)
        forward, backward = attention_flops(shape)
        for name, training, flops in (
            ("forward", False, forward),
            ("both", True, forward + backward),
        ):
            for backend, ms in backend_times(*qkv.unbind(2), None, training).items():
                percent = flops / ms / 1e7 / tflops
                row = {
                    "kind": "probe",
                    "name": f"attention_backend.{name}",
                    "variant": backend,
                    "ms": ms,
                }
                file.add(make_row(**row, percent_of_ceiling=percent, **case, **where))
                print(
                    f"{model} d={D // H} {name:8} {backend:10} {1e3 * ms:7.1f} us, {percent:5.1f} % of the matmul rate",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
