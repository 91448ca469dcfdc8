import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.engine.config import SampleConfig
from sra_fast.engine.generate import generate
from sra_fast.engine.samplers import Guidance, sample
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


@pytest.mark.parametrize("family", ["SiT", "DiT"])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_some_channels_are_guided(family, channels):
    golden = Golden(family)
    model, x, y = golden.model().eval(), golden["z"], golden["ys"]
    t = torch.tensor(0.5 if family == "SiT" else 500)
    out = Guidance(model, y, 3.0, channels=channels)(x, t, inside=True)
    c, u = (model(x, t.expand(len(x)), labels) for labels in (y, torch.full_like(y, model.null_class)))
    n = channels or x.shape[1]
    assert_matches(out[:, :n], u[:, :n] + 3 * (c - u)[:, :n])
    assert_matches(out[:, n:], c[:, n:]) if out.shape[1] > n else None
    assert (c - u)[:, :n].abs().amax((0, 2, 3)).min() > 1e-3, "the classes differ"


def test_guided_channels_reach_the_samplers():
    golden = Golden("DiT")
    model = golden.model().eval()
    for method in ("ddim", "ddpm"):
        z, few = golden["z"], dict(guidance=3.0, noise=torch.zeros_like)
        full = sample(model, z, golden["ys"], method, 2, guided_channels=model.in_channels, **few)
        assert torch.equal(full, sample(model, z, golden["ys"], method, 2, **few))
        assert not torch.equal(full, sample(model, z, golden["ys"], method, 2, guided_channels=3, **few))
    some, everything = (
        generate(model, golden["ys"], SampleConfig(steps=2, guidance=3.0, guided_channels=n), "linear", 0, 4, "cpu") for n in (3, 4)
    )
    assert not torch.equal(some, everything)
    with pytest.raises(ValueError, match=r"steps must lie in \[2, 1000\]"):
        sample(model, z, golden["ys"], "ddim", 1)
