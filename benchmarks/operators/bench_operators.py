"""The operators under pytest-benchmark: pytest benchmarks/ --benchmark-only

Every call is synchronised, so the host's time is included. ``benchmarks.operators.run`` measures the
device's time with a cold L2.
"""

import pytest
import torch

from benchmarks.operators.correctness import Oracle, as_leaves
from benchmarks.operators.registry import OPERATORS
from benchmarks.operators.run import PASSES, functions_of, steps_of
from benchmarks.operators.shapes import TINY, Shape

pytest.importorskip("pytest_benchmark")

CASES = [
    (name, which, variant)
    for name, operator in OPERATORS.items()
    for which in (PASSES if operator.grads else ("forward",))
    for variant in ("ours", "eager", "compile")
    if variant != "compile" or operator.compiles
]


def measure(
    benchmark, name: str, which: str, variant: str, shape: Shape, dtype: torch.dtype, device: str
) -> None:
    """Check one variant, then time it."""
    operator = OPERATORS[name]
    # every case compiles from scratch
    torch._dynamo.reset()
    dtype = operator.dtype or dtype
    function = functions_of(operator, [variant], device)[variant]
    oracle = Oracle(operator, shape, dtype, device)
    complaint = oracle.complaint(function)
    assert complaint is None, complaint
    set_up, timed = steps_of(operator, function, which, dtype, device)
    inputs = as_leaves(operator, oracle.inputs())

    def synchronised(state):
        out = timed(state)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.group = f"{name} {which}"
    benchmark.pedantic(
        synchronised,
        # pytest-benchmark expects positional and keyword arguments
        setup=lambda: ((set_up(inputs),), {}),
        rounds=50 if device == "cuda" else 5,
        warmup_rounds=3,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, which, variant", CASES)
def test_on_cuda(benchmark, name, which, variant):
    # the headline's shape
    shape = Shape("SiT-XL/2") if OPERATORS[name].per_model else Shape("SiT-XL/2", 256, 32)
    measure(benchmark, name, which, variant, shape, torch.bfloat16, "cuda")


def test_on_cpu(benchmark):
    shape = Shape(TINY, 64, 4)
    measure(benchmark, "gated_residual_adaln", "both", "ours", shape, torch.float32, "cpu")
