import pytest
import torch

from sra_fast.diffusion.draws import BLOCK, block_seed, draw

SHAPE = (1, 2, 2)


def draws(step, first, count, seed=0, **kwargs):
    options = {"drop_prob": 0.1, "posterior": False, **kwargs}
    return draw(seed, step, first, (count, *SHAPE), torch.device("cpu"), **options)


@pytest.mark.parametrize("cuts", [(96,), (48, 48), (32, 32, 32), (7, 40, 1, 48)])
def test_any_split_of_a_batch_draws_the_same(cuts):
    whole = draws(3, 0, 96, posterior=True)
    parts = []
    first = 0
    for count in cuts:
        parts.append(draws(3, first, count, posterior=True))
        first += count
    for name in ("noise", "posterior", "uniform", "gap", "drop"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name


def test_steps_seeds_and_blocks_differ():
    base = draws(0, 0, 2 * BLOCK)
    assert not torch.equal(base.noise[:BLOCK], base.noise[BLOCK:])
    for other in (draws(1, 0, 2 * BLOCK), draws(0, 0, 2 * BLOCK, seed=1)):
        assert (other.noise != base.noise).all() and (other.uniform != base.uniform).all()
    # a sum of the parts would collide
    assert len({block_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_distributions():
    d = draws(0, 0, 20000, drop_prob=0.25)
    assert d.posterior is None
    assert d.noise.mean().abs() < 0.01 and (d.noise.std() - 1).abs() < 0.01
    for uniform in (d.uniform, d.gap):
        assert uniform.min() >= 0 and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.01
    assert abs(d.drop.float().mean().item() - 0.25) < 0.01
    correlation = torch.corrcoef(torch.stack([d.uniform, d.gap, d.noise[:, 0, 0, 0]]))
    assert correlation.triu(1).abs().max() < 0.03
    assert not draws(0, 0, 1000, drop_prob=0.0).drop.any()
