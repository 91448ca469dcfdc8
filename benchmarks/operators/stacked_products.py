"""Would stacked weights be faster? python -m benchmarks.operators.stacked_products

Two questions. First, the layers of student and teacher, with different inputs and weights: one product
after the other, on two streams, or as one batched product over [2, K, N]. The batched product has no
epilogue for a bias. Second, the modulation of every block, which has the same input everywhere: block by
block, batched, or as one wide product.

Rows have the kind "probe".
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.shapes import Shape
from benchmarks.record import RowFile, command_line, environment, make_row, row_file
from benchmarks.timing import make_randn, matmul_rate, milliseconds, num_sets
from sra_fast.models import preset


def product_shapes(model: str, resolution: int, batch: int) -> dict[str, tuple[int, int, int, int]]:
    """``{layer: (products, rows, K, N)}``"""
    T, D, _ = Shape(model, resolution, batch).sizes
    layers = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
    found = {name: (2, batch * T, K, N) for name, (K, N) in layers.items()}
    depth = preset(model)[1]["depth"]
    found["adaln"] = (depth, batch, D, 6 * D)
    return found


def make_inputs(
    seed: int, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [count, rows, K], weights [count, N, K] and biases [count, N].

    The modulation has one input, which is expanded.
    """
    count, rows, K, N = shape
    randn = partial(make_randn(seed, device), dtype=dtype)
    num_inputs = 1 if name == "adaln" else count
    x = randn(num_inputs, rows, K).expand(count, rows, K)
    return x, randn(count, N, K), randn(count, N)


def make_sets(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Enough different inputs to keep each set out of L2 until its turn comes."""
    first = make_inputs(0, name, shape, dtype, device)
    # the size of the first set says how many more are needed
    seeds = range(1, num_sets(first, device))
    return [first, *(make_inputs(seed, name, shape, dtype, device) for seed in seeds)]


def separate(x: Tensor, weights: Tensor, biases: Tensor) -> list[Tensor]:
    return [F.linear(*each) for each in zip(x, weights, biases, strict=True)]


def streams(x: Tensor, weights: Tensor, biases: Tensor) -> list[Tensor]:
    """The second product on another stream: it may use the SMs that the first one's last wave leaves idle."""
    main_stream = torch.cuda.current_stream()
    side_stream = _side_stream(x.device)
    # the inputs are ready on the main stream only
    side_stream.wait_stream(main_stream)
    with torch.cuda.stream(side_stream):
        second = F.linear(x[1], weights[1], biases[1])
    first = F.linear(x[0], weights[0], biases[0])
    # whoever reads the second product is on the main stream
    main_stream.wait_stream(side_stream)
    return [first, second]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def batched(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Without the biases, which the next pass could add."""
    return torch.bmm(x, weights.mT)


def batched_bias(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return torch.baddbmm(biases[:, None], x, weights.mT)


def wide(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """One input for all products: their weights side by side are one product."""
    return F.linear(x[0], weights.flatten(0, 1), biases.flatten())


def functions_of(name: str, device: str) -> list[Callable]:
    """What is compared for a layer."""
    if name == "adaln":
        return [separate, batched_bias, wide]
    on_gpu = [streams] if device == "cuda" else []
    return [separate, *on_gpu, batched, batched_bias]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--model", default="SiT-XL/2", help="default: SiT-XL/2")
    add("--resolution", type=int, default=256, help="pixels (default 256)")
    add("--batch", type=int, default=32, help="images (default 32)")
    add("--device", choices=("cuda", "cpu"), default=default_device)
    add("--json", type=row_file, help="default: benchmarks/results/<device>-<commit>.json")
    args = parser.parse_args(argv)

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    command = command_line("benchmarks.operators.stacked_products", argv or sys.argv[1:])
    where = environment(args.device, command)
    file = RowFile(args.json, where)
    _, tflops = matmul_rate(args.device, dtype)
    for name, shape in product_shapes(args.model, args.resolution, args.batch).items():
        sets = make_sets(name, shape, dtype, args.device)
        for function in functions_of(name, args.device):
            call = lambda x, function=function: function(*x)
            ms = milliseconds(sets, lambda x: x, call, args.device, 0.2)
            # FLOP/ms over TFLOP/s, in percent
            percent = 2 * math.prod(shape) / ms / 1e7 / tflops
            row = make_row(
                kind="probe",
                name=f"stacked.{name}",
                variant=function.__name__,
                model=args.model,
                resolution=args.resolution,
                batch=args.batch,
                dtype=str(dtype).removeprefix("torch."),
                ms=ms,
                percent_of_ceiling=percent,
                **where,
            )
            file.add(row)
            print(
                f"{name:6} {function.__name__:12} {ms:8.4f} ms, {percent:5.1f} % of the matmul rate",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
