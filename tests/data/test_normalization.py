"""Scale and shift of latents, as one number or one per channel: both directions in float64."""

import math

import pytest
import torch

from sra_fast.data.normalization import DEFAULT_SCALE, Normalization, in_words, told_apart

SCALE = [0.5, 2.0, 0.1, 30.0]
SHIFT = [0.0, -3.0, 0.25, 7.0]


def values(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scale", "shift"), [(SCALE, SHIFT), (SCALE, 0.5), (2.0, SHIFT), (0.7, 0.1)]
)
def test_both_directions_are_those_of_the_formula(scale, shift, dtype):
    z = values(dtype)
    used = Normalization.checked(scale, shift, 4)
    latents = used.normalize(z)
    assert latents.dtype == dtype
    # channel by channel, in Python's numbers
    for channel in range(4):
        factor = scale[channel] if isinstance(scale, list) else scale
        middle = shift[channel] if isinstance(shift, list) else shift
        expected = (z[:, channel].double() - middle) * factor
        rtol = 4 * torch.finfo(dtype).eps
        # a difference has the rounding of what it is made from
        atol = rtol * factor * (abs(middle) + z.abs().max().item())
        torch.testing.assert_close(latents[:, channel].double(), expected, rtol=rtol, atol=atol)
    back = used.denormalize(latents)
    assert back.dtype == dtype
    torch.testing.assert_close(back, z, rtol=1e-5, atol=1e-5)
    # one image, and one channel of it, mean the same
    assert torch.equal(used.normalize(z[1]), latents[1])


def test_one_number_gives_the_bits_that_it_always_gave():
    z = values()
    for scale, shift in ((0.18215, 0.0), (1.5305, 0.0609)):
        used = Normalization.checked(scale, shift, 4)
        assert (used.scale, used.shift) == (scale, shift)
        expected = (z - shift if shift else z) * scale
        assert torch.equal(used.normalize(z), expected)
        assert torch.equal(used.denormalize(expected), expected / scale + shift)
        # as a list it is the same number
        assert Normalization.checked([scale] * 4, [shift] * 4, 4) == used


@pytest.mark.parametrize(
    ("scale", "shift", "message"),
    [
        ([1.0, 2.0, 3.0], 0.0, r"latent_scale must be one number, or a list of 4, .* list of 3$"),
        ([1.0] * 5, 0.0, "latent_scale must be .* list of 4, .* got a list of 5"),
        ([], 0.0, "latent_scale must be .* list of 4, .* got a list of 0"),
        (1.0, [0.5], "latent_shift must be .* list of 4, .* got a list of 1"),
        (0.0, 0.0, "latent_scale must be positive and finite, got 0.0$"),
        (-1.0, 0.0, "latent_scale must be positive and finite, got -1.0$"),
        (math.nan, 0.0, "latent_scale must be positive and finite, got nan$"),
        (math.inf, 0.0, "latent_scale must be positive and finite, got inf$"),
        ([1.0, 2.0, 0.0, 4.0], 0.0, r".*positive and finite, got 0.0 in channel 2 \(from 0\)"),
        ([1.0, -2.0, 3.0, 4.0], 0.0, r".*positive and finite, got -2.0 in channel 1 \(from 0\)"),
        ([1.0, 2.0, 3.0, math.nan], 0.0, r".*positive and finite, got nan in channel 3 \(from 0\)"),
        (1.0, math.nan, "latent_shift must be finite, got nan$"),
        (1.0, [0.0, math.inf, 0.0, 0.0], r"latent_shift must be finite, got inf in channel 1"),
        (["a", 1.0, 1.0, 1.0], 0.0, "latent_scale must be .* list of 4; got 'a' in channel 0"),
        (1.0, None, "latent_shift must be one number, or a list of 4; got None"),
        (True, 0.0, "latent_scale must be one number, or a list of 4; got True"),
    ],
)
def test_what_is_no_scale_or_shift_is_one_line(scale, shift, message):
    with pytest.raises(ValueError, match=f"^data.{message}") as refused:
        Normalization.checked(scale, shift, 4, "data.")
    assert "\n" not in str(refused.value)


def test_a_vaes_own_numbers():
    assert Normalization.of_vae(None, 4, "here") == Normalization(DEFAULT_SCALE, 0.0)
    # as an old index has it
    assert Normalization.of_vae({"scaling_factor": 0.3}, 4, "here") == Normalization(0.3, 0.0)
    told = {"scaling_factor": 0.3, "shift_factor": 0.1}
    assert Normalization.of_vae(told, 4, "here") == Normalization(0.3, 0.1)
    # as a copy of a VAE's configuration has it that knows no statistics
    assert Normalization.of_vae({**told, "latents_std": None}, 4, "here") == Normalization(0.3, 0.1)
    # diffusers' SDXL: latents * latents_std / scaling_factor + latents_mean
    std = [2.0, 3.0, 4.0, 5.0]
    used = Normalization.of_vae({**told, "latents_mean": SHIFT, "latents_std": std}, 4, "here")
    latents = values(torch.float64)
    column = lambda numbers: torch.tensor(numbers, dtype=torch.float64).view(1, 4, 1, 1)
    expected = latents * column(std) / 0.3 + column(SHIFT)
    torch.testing.assert_close(used.denormalize(latents), expected)


@pytest.mark.parametrize(
    "told, message",
    [
        ("sd-vae", "expected what identifies a VAE in here, got 'sd-vae'"),
        (dict(scaling_factor="x"), "scaling_factor in here must be .* got 'x'"),
        (dict(scaling_factor=-1.0), "scaling_factor in here must be positive and finite, got -1.0"),
        (dict(scaling_factor=[1.0, 2.0]), "scaling_factor in here must be .* got a list of 2"),
        (dict(shift_factor=10**400), "shift_factor in here must be finite, got 1000"),
        (dict(shift_factor="x"), "shift_factor in here must be .* got 'x'"),
        (dict(latents_mean=[0.0], latents_std=[1.0] * 4), "latents_mean in here .* 4 numbers"),
        (dict(latents_mean=[0.0] * 4, latents_std=[2.0, 2.0]), "latents_std in here .* 4 numbers"),
        (dict(latents_mean=[0.0] * 4, latents_std="x"), "latents_std in here .* got 'x'"),
        (
            dict(latents_mean=[0.0] * 4, latents_std=[0.0, 1.0, 1.0, 1.0]),
            "latents_std in here must be positive and finite, got 0.0 in channel 0",
        ),
        (
            dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 1.0, "a"]),
            "latents_std in here must be .* got 'a' in channel 3",
        ),
    ],
)
def test_what_a_vae_says_wrongly_is_one_line(told, message):
    with pytest.raises(ValueError, match=message):
        Normalization.of_vae(told, 4, "here")


def test_statistics_of_the_data():
    mean = [0.123456789123, 1e3, -2e-4, 0.0]
    std = [1.0 / 3, 7e-3, 7e-6, 123.4]
    used = Normalization.of_statistics(mean, std, "here")
    assert used.deviations(std) == pytest.approx([1] * 4, abs=1e-6)
    for shift, middle, deviation in zip(used.shift, mean, std, strict=True):
        assert abs(middle - shift) <= 1e-6 * deviation
    assert Normalization(2.0).deviations([1.0, 3.0]) == [2.0, 6.0]
    # the last bits of a sum depend on the machine, a run's numbers must not
    other = Normalization.of_statistics(
        [math.nextafter(value, math.inf) for value in mean],
        [math.nextafter(value, 0.0) for value in std],
        "there",
    )
    assert other == used


@pytest.mark.parametrize(
    ("mean", "std", "found"),
    [
        ([1.0, 0.0], [1.0, 0.0], "0 in channel 1 .* of here, whose mean is 0"),
        # what is left of a channel of one number by rounding
        ([5.0, 1.0], [1e-8, 1.0], "1e-08 in channel 0 .* of here, whose mean is 5"),
        ([math.nan, 1.0], [math.nan, 1.0], "nan in channel 0"),
        ([1.0, 1.0], [math.inf, 1.0], "inf in channel 0"),
    ],
)
def test_a_channel_without_deviation_is_one_line(mean, std, found):
    message = f"data.latent_statistics .* expected one above 0, got {found}"
    with pytest.raises(ValueError, match=message):
        Normalization.of_statistics(mean, std, "here")


def test_in_words():
    assert in_words(0.18215) == "0.18215"
    assert in_words([0.5, 2.0, 0.1]) == "0.1 to 2, by channel"
    assert told_apart(0.5, [1.0, 2.0]) == ("0.5", "1 to 2, by channel")
    # two lists may have the same smallest and largest numbers
    first = [1.0, 2.0, 3.0, 9.0]
    assert told_apart(first, [1.0, 2.5, 2.0, 9.0]) == ("2.0 in channel 1 (from 0)", "2.5")


def test_numbers_that_sampling_has_used_first_can_be_trained_with():
    """They are kept on the device, and a tensor of inference mode cannot be part of a gradient."""
    # numbers of no other test, which would be there already
    used = Normalization([1.5, 0.75, 3.0, 0.125], [0.5, -1.0, 2.5, 0.0625])
    with torch.inference_mode():
        used.normalize(values())
    scale = torch.tensor(used.scale).view(1, 4, 1, 1)
    z = values().requires_grad_()
    used.normalize(z).sum().backward()
    torch.testing.assert_close(z.grad, scale.expand_as(z))
    latents = values().requires_grad_()
    used.denormalize(latents).sum().backward()
    torch.testing.assert_close(latents.grad, (1 / scale).expand_as(latents))
