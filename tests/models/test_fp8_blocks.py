"""The fp8 teacher against the bf16 one, both against fp32."""
import copy

import pytest
import torch
from test_models import TINY, batch, randomise

from sra_fast.models import Backbone, SiT
from sra_fast.models.fp8 import use_fp8


def error(features, exact):
    return ((features.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("depth", [1, 4])
def test_features_in_fp8(depth):
    """Relative error of h_n: bf16 under 1 %, fp8 a few times that and under 6 %; the parameters are shared and unchanged."""
    network = randomise(Backbone(**{**TINY, "hidden_size": 64, "depth": 4})).requires_grad_(False).eval()
    x, t, y = batch(network)
    exact, low = network.features(x, t, y, depth), copy.deepcopy(network).bfloat16()
    in_bf16 = error(low.features(x, t, y, depth), exact)
    before = {name: p.data_ptr() for name, p in low.named_parameters()}
    state = copy.deepcopy(low.state_dict())
    use_fp8(low)
    in_fp8 = error(low.features(x, t, y, depth), exact)
    assert in_bf16 < 0.01 and 2 * in_bf16 < in_fp8 < 0.06, (in_bf16, in_fp8)
    assert before == {name: p.data_ptr() for name, p in low.named_parameters()}
    assert all(torch.equal(value, state[name]) for name, value in low.state_dict().items())


def test_follows_its_weights():
    """Nothing quantised is kept: a change of the weights shows at once."""
    network = randomise(Backbone(**TINY)).requires_grad_(False).bfloat16().eval()
    use_fp8(network)
    x, t, y = batch(network)
    before = network.features(x, t, y)
    network.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert error(network.features(x, t, y), before.float()) > 0.02


def test_width_that_cannot_is_named():
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        use_fp8(SiT(**{**TINY, "hidden_size": 24}))
