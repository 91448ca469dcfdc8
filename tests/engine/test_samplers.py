import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.engine.samplers import sample
from sra_fast.models import DiT, SiT

SIT_CASES = {
    "ode20": dict(method="euler", num_steps=20),
    "ode10_heun": dict(method="heun", num_steps=10),
    "ode20_cfg1.8_hi0.7": dict(method="euler", num_steps=20, guidance=1.8, interval=(0.0, 0.7)),
    "sde20_zero_noise": dict(method="euler_maruyama", num_steps=20),
    "sde20_cfg1.8_hi0.7_zero_noise": dict(
        method="euler_maruyama", num_steps=20, guidance=1.8, interval=(0.0, 0.7)
    ),
}


@pytest.mark.parametrize("key", SIT_CASES)
def test_sit_matches_reference(key):
    golden = Golden("SiT")
    model = golden.model("after").eval()
    out = sample(model, golden["z"], golden["ys"], noise=torch.zeros_like, **SIT_CASES[key])
    assert_matches(out, golden[key], 1e-4)


@pytest.mark.parametrize("key", ["ddim20", "ddpm20_zero_noise"])
def test_dit_matches_reference(key):
    golden = Golden("DiT")
    out = sample(golden.model().eval(), golden["z"], golden["ys"], key[:4], 20, noise=torch.zeros_like)
    assert_matches(out, golden[key], 1e-4)
