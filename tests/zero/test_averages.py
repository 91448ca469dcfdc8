"""Averages beside the EMA against fp64, with updates that are not taken in between."""

import pytest
import torch
from guard_worker import Poison, make, take_step


def shares_of(name: str, updates: int) -> list[float]:
    """Of the initial weights and those after each taken update, as guard_worker.py configures them.

    sigma_rel 0.1: the root of the cubic that the width gives is 6.93718.
    """
    steps = range(1, updates + 1)
    if name == "slow":
        return [0.7**updates, *(0.3 * 0.7 ** (updates - i) for i in steps)]
    power = 1 + 6.937179
    return [0.0, *((i**power - (i - 1) ** power) / updates**power for i in steps)]


@pytest.mark.parametrize(
    "name", ["1-fp32-fused", "0-bf16-fused", "2-bf16-torch", "3-bf16-fused", "0-fp32-torch"]
)
def test_they_are_sums_of_the_weights_of_taken_updates(tmp_path, name):
    """The time of the power function is the number of updates taken: those that are left out, also
    the first of all, neither move an average nor count.
    """
    trainer = make(name, tmp_path)
    poison = Poison(trainer, "blocks.1.mlp.fc1.weight")
    masters = lambda: torch.cat([flat.double().clone() for flat in trainer.masters.flats])
    history = [masters()]
    for position, good in enumerate((False, True, True, False, False, True, True)):
        take_step(trainer, position, poison=None if good else poison)
        if good:
            history.append(masters())
        else:
            assert torch.equal(masters(), history[-1])
        for average, sharded in trainer.averages.items():
            updates = len(history) - 1
            shares = shares_of(average, updates) if updates else [1.0]
            expected = sum(s * w for s, w in zip(shares, history, strict=True))
            found = torch.cat(sharded.flats).double()
            # each update rounds to fp32
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), (average, position)
            assert sharded.since == 0
    assert len(history) == 5
    moved = (history[-1] - torch.cat(trainer.averages["slow"].flats)).abs().max()
    assert moved > 1e-3, "the weights have moved far more than the tolerance"
    trainer.engine.destroy()
