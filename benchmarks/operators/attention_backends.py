"""Time of every attention backend at a model's shape: python -m benchmarks.operators.attention_backends

``ops.attention`` measures the backends when it first meets a shape. This program writes those times
down, for the forward pass and for forward plus backward. Queries, keys and values are views of one
projection, and gradients end up as rows of tokens. So copies that a backend needs are in its time.
With --segments tokens attend inside runs of these lengths only.

Rows have the kind "probe". A backend that cannot run has none.
"""

import argparse
import sys

import torch

from benchmarks.operators.entry import attention_flops
from benchmarks.operators.shapes import Shape
from benchmarks.record import RowFile, command_line, environment, make_row, row_file
from benchmarks.timing import make_randn, matmul_rate
from sra_fast.ops._attention_segments import checked_runs
from sra_fast.ops.attention import backend_times


def measure_model(
    shape: Shape, segments: list[int] | None, tflops: float, where: dict, file: RowFile
) -> None:
    """Write and print a row for every pass and backend."""
    T, D, H = shape.sizes
    runs = None
    share = 1.0
    kind = "attention_backend"
    if segments:
        runs = checked_runs(segments, shape.batch, T)
        share = sum(length**2 for length in segments) / T**2
        kind = f"attention_backend.segments_{'_'.join(map(str, segments))}"
    # one projection, as the block's linear layer writes it
    qkv = make_randn(0, "cuda")(shape.batch, T, 3, H, D // H, dtype=torch.bfloat16)
    forward_flops, backward_flops = attention_flops(shape)
    flops = {"forward": share * forward_flops, "both": share * (forward_flops + backward_flops)}
    for name, count in flops.items():
        times = backend_times(*qkv.unbind(2), None, name == "both", runs)
        for backend, ms in times.items():
            # FLOP/ms over TFLOP/s, in percent
            percent = count / ms / 1e7 / tflops
            row = make_row(
                kind="probe",
                name=f"{kind}.{name}",
                variant=backend,
                model=shape.model,
                resolution=shape.resolution,
                batch=shape.batch,
                dtype="bfloat16",
                ms=ms,
                percent_of_ceiling=percent,
                **where,
            )
            file.add(row)
            print(
                f"{shape.model} d={D // H} {name:8} {backend:10} {1e3 * ms:7.1f} us, "
                f"{percent:5.1f} % of the matmul rate",
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # head dimensions 72 and 64
    add("--models", nargs="+", default=["SiT-XL/2", "SiT-B/2"], help="default: SiT-XL/2 SiT-B/2")
    add("--resolution", type=int, default=256, help="pixels (default 256)")
    add("--batch", type=int, default=32, help="images (default 32)")
    add("--segments", nargs="+", type=int, help="lengths of runs, such as 64 192; default: all")
    add("--json", type=row_file, help="default: benchmarks/results/<device>-<commit>.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: a CPU has only one backend", file=sys.stderr)
        return 2
    command = command_line("benchmarks.operators.attention_backends", argv or sys.argv[1:])
    where = environment("cuda", command)
    file = RowFile(args.json, where)
    _, tflops = matmul_rate("cuda", torch.bfloat16)
    for model in args.models:
        shape = Shape(model, args.resolution, args.batch)
        measure_model(shape, args.segments, tflops, where, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
