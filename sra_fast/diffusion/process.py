"""What a diffusion process is: from clean images to noisy ones, and the loss of a prediction."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sra_fast.config.schema import Config, DiffusionConfig
from sra_fast.utils.registry import PROCESSES


@dataclass
class Noised:
    """What student and teacher see of one micro-batch, and what the loss needs.

    Attributes:
        x, x_teacher: ``[B, C, H, W]`` noisy inputs; the teacher's is cleaner.
        t, t_teacher: ``[B]`` their times, in the units of the process.
        target: ``[B, C, H, W]`` what the student has to predict.
        x0: ``[B, C, H, W]`` clean latents.
    """

    x: Tensor
    t: Tensor
    x_teacher: Tensor
    t_teacher: Tensor
    target: Tensor
    x0: Tensor


class Process(Protocol):
    """A diffusion process. Registered in ``PROCESSES``; a model family names the one it needs.

    Attributes:
        default_sampler: name in ``SAMPLERS``.
    """

    default_sampler: str

    @classmethod
    def from_config(cls, diffusion: DiffusionConfig, t_max: float) -> "Process":
        """The configured process; ValueError for settings that it does not have.

        ``t_max``: the teacher's time is earlier by U(0, t_max), in units of [0, 1].
        """
        ...

    def times(self, uniform: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's times from two uniforms of one shape (SRA, Sec. 3.2)."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
        """Both noisy inputs of clean latents ``[B, C, H, W]``, with the same noise."""
        ...

    def losses(self, prediction: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Terms of the loss, each ``[B]`` fp32; their sum is minimised. One is ``"denoise"``."""
        ...


def check_prediction(prediction: Tensor, noised: Noised, variance: bool = False) -> None:
    """ValueError for a prediction of another shape than what it is compared with: PyTorch would
    repeat a single channel without a word.

    ``variance``: it may have as many channels of variance after its own.
    """
    batch, channels, *size = noised.target.shape
    fitting = [[batch, channels, *size]]
    if variance:
        fitting.append([batch, 2 * channels, *size])
    if [*prediction.shape] not in fitting:
        expected = " or ".join(map(str, fitting))
        raise ValueError(f"expected a prediction {expected}, the model gave {[*prediction.shape]}")


def make_process(cfg: Config) -> Process:
    """The diffusion process of the configured model family."""
    gap = max((align.largest_gap for align in cfg.alignments.values()), default=0.0)
    return PROCESSES[cfg.model.process].from_config(cfg.diffusion, gap)
