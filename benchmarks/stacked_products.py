"""Would stacked weights pay?  python benchmarks/stacked_products.py

Two questions to the device: the products of student and teacher (different inputs, different weights) one after the other
against one batched product over [2, K, N], which has no epilogue for a bias, and against two streams; and the modulation of every
block, which has the same input, block by block against one batched product and against one wide one.  Rows of kind "probe".
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import matmul_rate, milliseconds, num_sets
from record import RowFile, environment, make_row
from registry import Shape, random
from torch import Tensor

from sra_fast.models import preset


def shapes(model: str, resolution: int, batch: int) -> dict[str, tuple[int, int, int, int]]:
    """(products, rows, K, N) of every layer."""
    T, D, _ = Shape(model, resolution, batch).sizes
    wide = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
    found = {name: (2, batch * T, K, N) for name, (K, N) in wide.items()}
    return found | {"adaln": (preset(model)[1]["depth"], batch, D, 6 * D)}


def make(
    seed: int, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """Inputs [count, rows, K], for the modulation one for all, weights [count, N, K] and biases [count, N]."""
    (count, rows, K, N), randn = shape, partial(random(seed, device), dtype=dtype)
    x = randn(1, rows, K).expand(count, rows, K) if name == "adaln" else randn(count, rows, K)
    return x, randn(count, N, K), randn(count, N)


def separate(x: Tensor, weights: Tensor, biases: Tensor) -> list[Tensor]:
    return [F.linear(*each) for each in zip(x, weights, biases, strict=True)]


def streams(x: Tensor, weights: Tensor, biases: Tensor) -> list[Tensor]:
    """The second product beside the first one: a wave that the one leaves unfilled the other may fill."""
    now, beside = torch.cuda.current_stream(), _side_stream(x.device)
    beside.wait_stream(now)
    with torch.cuda.stream(beside):
        second = F.linear(x[1], weights[1], biases[1])
    first = F.linear(x[0], weights[0], biases[0])
    now.wait_stream(beside)
    return [first, second]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def batched(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Without the biases, where the next pass can add them."""
    return torch.bmm(x, weights.mT)


def batched_bias(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return torch.baddbmm(biases[:, None], x, weights.mT)


def wide(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """The input is the same for all, so their weights are the columns of one product."""
    return F.linear(x[0], weights.flatten(0, 1), biases.flatten())


def functions(name: str, device: str) -> list[Callable]:
    """What is compared for the layer of this name."""
    if name == "adaln":
        return [separate, batched_bias, wide]
    return [separate, *([streams] if device == "cuda" else []), batched, batched_bias]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/<device>-<commit>.json"
    )
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    where = environment(
        args.device, "python benchmarks/stacked_products.py " + " ".join(argv or sys.argv[1:])
    )
    file, (_, tflops) = RowFile(args.json, where), matmul_rate(args.device, dtype)
    case = {
        "model": args.model,
        "resolution": args.resolution,
        "batch": args.batch,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for name, shape in shapes(args.model, args.resolution, args.batch).items():
        sets = [make(0, name, shape, dtype, args.device)]
        sets += [
            make(seed, name, shape, dtype, args.device)
            for seed in range(1, num_sets(sets[0], args.device))
        ]
        for function in functions(name, args.device):
            ms = milliseconds(sets, lambda x: x, lambda x, f=function: f(*x), args.device, 0.2)
            percent = 2 * math.prod(shape) / ms / 1e7 / tflops
            row = {
                "kind": "probe",
                "name": f"stacked.{name}",
                "variant": function.__name__,
                "ms": ms,
            }
            file.add(make_row(**row, percent_of_ceiling=percent, **case, **where))
            print(
                f"{name:6} {function.__name__:12} {ms:8.4f} ms, {percent:5.1f} % of the matmul rate",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
