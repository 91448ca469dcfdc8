"""Between the latents z of a VAE and those of a model: ``(z - shift) * scale`` and its inverse."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sra_fast.utils.checks import require_that

# one number for all channels, or one for each of them
Numbers = float | list[float]

# the first Stable Diffusion's VAE: what the published code has
DEFAULT_SCALE = 0.18215
# what a VAE's configuration says of its channels, if it says it
OF_LATENTS = ("latents_mean", "latents_std")
# a whole number in JSON may be more than a float can hold
MOST = sys.float_info.max
# a channel whose deviation is below this share of its mean is one number and its rounding errors
LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Normalization:
    """A latent is (z - shift) * scale, z being the VAE's.

    Attributes:
        scale: one number, or a list of one for each channel.
        shift: likewise.
    """

    scale: Numbers = 1.0
    shift: Numbers = 0.0

    @classmethod
    def checked(
        cls, scale: Numbers, shift: Numbers, channels: int, section: str = ""
    ) -> "Normalization":
        """From what a user or a file has said, in one form: a list of equal numbers is one number.

        Args:
            scale, shift: see ``Normalization``.
            channels: of the latents.
            section: of the options ``latent_scale`` and ``latent_shift``, for messages: ``data.``.

        Raises:
            ValueError: see ``check_scale`` and ``check_shift``.
        """
        check_scale(f"{section}latent_scale", scale, channels)
        check_shift(f"{section}latent_shift", shift, channels)
        return cls(one_if_equal(scale), one_if_equal(shift))

    @classmethod
    def of_vae(cls, identity: dict | None, channels: int, source: str) -> "Normalization":
        """What a VAE's own configuration says.

        As in diffusers' pipelines: ``(z - latents_mean) * scaling_factor / latents_std`` if it has
        statistics of its channels, otherwise ``(z - shift_factor) * scaling_factor``.

        Args:
            identity: ``vae_identity``; None: the VAE is not known, and is taken for SD-VAE.
            channels: of the latents.
            source: what says it, for messages.

        Raises:
            ValueError: it says something that is no number, or not as many as there are channels.
        """
        require_that(
            isinstance(identity, dict | None),
            f"expected what identifies a VAE in {source}, got {identity!r}",
        )
        told = identity or {}
        # some VAEs have no shift, and old indexes do not tell it
        factor = told.get("scaling_factor") or DEFAULT_SCALE
        shift = told.get("shift_factor") or 0.0
        check_scale(f"scaling_factor in {source}", factor, channels)
        check_shift(f"shift_factor in {source}", shift, channels)
        statistics = [told.get(name) for name in OF_LATENTS]
        if None in statistics:
            return cls(factor, shift)
        mean, std = statistics
        check_statistics(mean, std, channels, source)
        scale = [factor / deviation for deviation in std]
        return cls(one_if_equal(scale), one_if_equal(mean))

    @classmethod
    def of_statistics(
        cls, mean: Sequence[float], std: Sequence[float], source: str
    ) -> "Normalization":
        """The one that gives every channel mean 0 and deviation 1, up to 1e-6 of the deviation.

        Args:
            mean, std: of z, one for each channel.
            source: of the latents, for the message.

        Raises:
            ValueError: a channel has no deviation.
        """
        for channel, (middle, deviation) in enumerate(zip(mean, std, strict=True)):
            require_that(
                LEAST_DEVIATION * abs(middle) < deviation < math.inf,
                "data.latent_statistics divides by the deviation of every channel: expected one "
                f"above 0, got {deviation:g} in channel {channel} (from 0) of the latents of "
                f"{source}, whose mean is {middle:g}",
            )
        # to a millionth of the deviation: the last bits of a sum depend on the machine, and a run
        # is resumed only with the numbers that it began with
        places = [6 - math.floor(math.log10(deviation)) for deviation in std]
        shift = [round(middle, digits) for middle, digits in zip(mean, places, strict=True)]
        scale = [float(f"{1 / deviation:.7g}") for deviation in std]
        return cls(one_if_equal(scale), one_if_equal(shift))

    def normalize(self, z: Tensor) -> Tensor:
        """The VAE's latents ``[..., C, H, W]`` -> those of a model, in the same dtype."""
        shifted = z - _column(self.shift, z) if self.shift else z
        return shifted * _column(self.scale, z)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalize``."""
        return latents / _column(self.scale, latents) + _column(self.shift, latents)

    def deviations(self, std: Sequence[float]) -> list[float]:
        """Of the latents in every channel, from those of z."""
        scales = self.scale if isinstance(self.scale, list) else [self.scale] * len(std)
        return [scale * deviation for scale, deviation in zip(scales, std, strict=True)]


def check_statistics(mean: object, std: object, channels: int, source: str) -> None:
    """ValueError unless a VAE's configuration has a mean and a positive deviation of each
    channel.
    """
    for name, numbers in zip(OF_LATENTS, (mean, std), strict=True):
        require_that(
            isinstance(numbers, list) and len(numbers) == channels,
            f"expected {name} in {source} to be a list of {channels} numbers, one for each channel "
            f"of the latents, got {numbers!r}",
        )
    check_shift(f"latents_mean in {source}", mean, channels)
    check_scale(f"latents_std in {source}", std, channels)


def check_scale(name: str, scale: Numbers, channels: int) -> None:
    """ValueError unless it is one positive finite number, or one for each of ``channels``."""
    for number, where in _numbered(name, scale, channels):
        require_that(0 < number <= MOST, f"{name} must be positive and finite, got {number}{where}")


def check_shift(name: str, shift: Numbers, channels: int) -> None:
    """ValueError unless it is one finite number, or one for each of ``channels``."""
    for number, where in _numbered(name, shift, channels):
        require_that(abs(number) <= MOST, f"{name} must be finite, got {number}{where}")


def _numbered(name: str, numbers: Numbers, channels: int) -> list[tuple[float, str]]:
    """Each number, and where it stands, in words; ValueError unless they are numbers, and as many
    as there are channels.
    """
    numbered = [(numbers, "")]
    if isinstance(numbers, list):
        require_that(
            len(numbers) == channels,
            f"{name} must be one number, or a list of {channels}, one for each channel of the "
            f"latents; got a list of {len(numbers)}",
        )
        numbered = [(number, f" in channel {i} (from 0)") for i, number in enumerate(numbers)]
    for number, where in numbered:
        # a file may have anything there; True is an int
        require_that(
            type(number) in (int, float),
            f"{name} must be one number, or a list of {channels}; got {number!r}{where}",
        )
    return numbered


def one_if_equal(numbers: Numbers) -> Numbers:
    """Equal numbers as one: the same latents are said in one way."""
    if isinstance(numbers, list) and numbers:
        return numbers[0] if all(number == numbers[0] for number in numbers) else [*numbers]
    return numbers


def _column(numbers: Numbers, like: Tensor) -> float | Tensor:
    """What ``[..., C, H, W]`` is multiplied with: the number, or ``[C, 1, 1]``."""
    if not isinstance(numbers, list):
        return numbers
    return _on_device(tuple(numbers), like.dtype, like.device)


@lru_cache(maxsize=32)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # kept: a copy from the host in every step would wait for the device
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device).view(-1, 1, 1)


def in_words(numbers: Numbers) -> str:
    """``0.18215``, or ``0.8 to 1.3, by channel``."""
    if isinstance(numbers, list):
        return f"{min(numbers):g} to {max(numbers):g}, by channel"
    return f"{numbers:g}"


def told_apart(first: Numbers, second: Numbers) -> tuple[str, str]:
    """Two that differ, in words: of two lists, the numbers of the first channel that differs."""
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = zip(first, second, strict=True)
        channel, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        return f"{a} in channel {channel} (from 0)", f"{b}"
    return in_words(first), in_words(second)
