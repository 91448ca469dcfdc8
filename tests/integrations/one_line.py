"""A model before and after its one line: outputs and every gradient, against each other and fp64.

A model and its inputs come from ``own_models`` or ``benchmarks/other_models/diffusers_models.py``.
"""

import torch
from conftest import assert_kernel_close
from torch import nn

from benchmarks.other_models.results import Results, difference, in_dtype, run
from sra_fast import integrations

# relative to a result's size. On CPUs most models differ by nothing and the others by 1.3e-6 at most
EQUAL = 5e-6
# of the comparison with fp64, likewise
FLOOR = 1e-6

KINDS = ("adaln", "gated_residual", "gated_residual_adaln", "gated_residual_norm")


def assert_as_near(actual: Results, original: Results, truth: Results, floor: float) -> None:
    """Results at most twice as far from the truth as the original's, plus ``floor`` of their size."""
    scales = truth.scales()
    truths = truth.named()
    theirs = original.named()
    for name, ours in actual.named().items():
        try:
            slack = floor * scales[name]
            assert_kernel_close(ours, theirs[name], truths[name], floor=slack)
        except AssertionError as error:
            raise AssertionError(f"{name} (size {scales[name]:.2e}): {error}") from None


def assert_bitwise(actual: Results, expected: Results) -> None:
    """The same bits."""
    ours = actual.named()
    theirs = expected.named()
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not changed, f"other bits: {changed}"


def rewrites(model: nn.Module) -> tuple[int, ...]:
    """How often each of ``KINDS`` was put into a compiled model that has run."""
    found = integrations.report(model).rewrites
    return tuple(found[kind] for kind in KINDS)


def enough(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether as much is fused as wanted. One gated residual with its norm is worth one of each."""

    def worth(counts):
        norms, residuals, pairs, normed = counts
        return norms + pairs, residuals + pairs + normed, pairs, normed

    return all(ours >= least for ours, least in zip(worth(found), worth(wanted), strict=True))


def check(
    model: nn.Module,
    inputs: dict,
    counts: tuple[int, ...],
    then: str = "eager",
    equal: float = EQUAL,
    has_truth: bool = True,
) -> None:
    """Forward and gradients before, after and without the one line; and how much it has fused.

    Args:
        model: in fp32, on the CPU.
        inputs: the arguments of its ``forward``.
        counts: of ``KINDS``, at least.
        then: the compiler after the rewrite.
        equal: the largest difference, relative to a result's size.
        has_truth: the model can run in fp64.
    """
    names = [*model.state_dict()]
    original = run(model, inputs)
    assert integrations.compile(model, then=then) is model
    fused = run(model, inputs)
    found = rewrites(model)
    assert [*model.state_dict()] == names
    assert difference(fused, original) <= equal
    if has_truth:
        truth = run(*in_dtype(undone(model), inputs, torch.float64))
        assert_as_near(fused, original, truth, floor=FLOOR)
    assert_bitwise(run(undone(model), inputs), original)
    assert enough(found, counts), f"expected at least {counts} of {KINDS}, got {found}"


def undone(model: nn.Module) -> nn.Module:
    """The model without its one line."""
    assert integrations.undo(model) is model
    return model
