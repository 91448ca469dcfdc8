"""Whatever is rewritten in a random program, its results stay."""

from collections import Counter

import torch
from one_line import EQUAL
from random_programs import B, D, RandomProgram, T

from benchmarks.other_models.results import difference, run
from sra_fast import integrations

SEEDS = range(20)


def test_random_programs_stay_the_same():
    """Outputs and gradients of every program, and all operators are among the rewrites."""
    total = Counter()
    for seed in SEEDS:
        torch._dynamo.reset()
        program = RandomProgram(seed)
        inputs = {"x": torch.randn(B, T, D), "c": torch.randn(B, D)}
        original = run(program, inputs)
        integrations.compile(program, then="eager")
        found = difference(run(program, inputs), original)
        assert found <= EQUAL, f"seed {seed}: results differ by {found:.1e}"
        total.update(integrations.report(program).rewrites)
    torch._dynamo.reset()
    for operator in ("adaln", "gated_residual", "gated_residual_adaln", "gated_residual_norm"):
        assert total[operator] >= 3, total
