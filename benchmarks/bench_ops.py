"""The operators under pytest-benchmark:  pytest benchmarks/ --benchmark-only

Every call is synchronised and the host's share counts; run.py gives the device's time alone and rotates cold buffers.
"""

import pytest
import torch
from measure import Oracle, as_leaves, steps_of
from registry import ENTRIES, TINY, Shape
from run import variants_of

pytest.importorskip("pytest_benchmark")

CASES = [
    (name, which, variant)
    for name, entry in ENTRIES.items()
    for which in (("forward", "backward", "both") if entry.grads else ("forward",))
    for variant in ("ours", "eager", "compile")
    if variant != "compile" or entry.compiles
]


def measure(
    benchmark, name: str, which: str, variant: str, shape: Shape, dtype: torch.dtype, device: str
) -> None:
    entry = ENTRIES[name]
    torch._dynamo.reset()
    dtype = entry.dtype or dtype
    function = variants_of(entry, [variant], device)[variant]
    oracle = Oracle(entry, shape, dtype, device)
    complaint = oracle.complaint(function)
    assert complaint is None, complaint
    prepare, timed = steps_of(entry, function, which, dtype, device)
    inputs = as_leaves(entry, oracle.inputs())

    def synchronised(state):
        out = timed(state)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.group = f"{name} {which}"
    setup = lambda: ((prepare(inputs),), {})
    benchmark.pedantic(
        synchronised, setup=setup, rounds=50 if device == "cuda" else 5, warmup_rounds=3
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, which, variant", CASES)
def test_op(benchmark, name, which, variant):
    shape = Shape("SiT-XL/2") if ENTRIES[name].per_model else Shape("SiT-XL/2", 256, 32)
    measure(benchmark, name, which, variant, shape, torch.bfloat16, "cuda")


def test_op_on_cpu(benchmark):
    measure(
        benchmark, "gated_residual_adaln", "both", "ours", Shape(TINY, 64, 4), torch.float32, "cpu"
    )
