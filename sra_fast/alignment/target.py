"""What the student's features are aligned to."""

from collections.abc import Callable

from torch import Tensor, nn

from sra_fast.config.schema import AlignConfig, Config, ModelConfig
from sra_fast.diffusion.process import Noised
from sra_fast.models import Backbone, Conditioning
from sra_fast.utils.registry import TARGETS

# (m, n) of the paper's models; its DiTs have a shallower teacher layer than its SiTs
PAPER_LAYERS = {
    ("SiT", "B"): (3, 8),
    ("SiT", "L"): (6, 16),
    ("SiT", "XL"): (8, 20),
    ("DiT", "B"): (3, 7),
    ("DiT", "L"): (6, 14),
    ("DiT", "XL"): (8, 16),
}


def default_layers(model: ModelConfig) -> tuple[int, int]:
    """The layers (m, n) of student and teacher: the paper's, else the authors' rule for other
    models: a quarter and three quarters of the depth.
    """
    size = model.name.partition("-")[2].partition("/")[0]
    pair = PAPER_LAYERS.get((model.family, size))
    if pair is not None and model.depth is None:
        return pair
    depth = model.arguments()["depth"]
    # halves are rounded up, and a single block is both
    return max(1, (depth + 2) // 4), max(1, (3 * depth + 2) // 4)


class Target(nn.Module):
    """Target features of a micro-batch, without gradient.

    A target is registered in ``TARGETS``. Its options are a dataclass, ``config``, that inherits
    from ``AlignConfig``: the command line and YAML files then have them under ``align``.

    A target may own a network that follows the EMA of the student (``network_depth`` is then not
    None). The trainer builds that network, keeps its weights up to date in every ZeRO stage, and
    hands it to the constructor.

    Args:
        align: the options, of the class ``config``.
        network: the frozen network with the EMA's weights, or None if the target needs none.
    """

    config: type[AlignConfig] = AlignConfig

    def __init__(self, align: AlignConfig, network: Backbone | None):
        super().__init__()
        self.align = align
        # a submodule: DeepSpeed moves it to the device, casts it and (stage 3) partitions it
        self.network = network

    @classmethod
    def network_depth(cls, align: AlignConfig) -> int | None:
        """Blocks of the network that follows the EMA; None: the target has no such network."""
        return None

    @classmethod
    def fill_in(cls, cfg: Config) -> None:
        """Set the layers that were not given."""
        if cfg.align.student_layer is None:
            cfg.align.student_layer = default_layers(cfg.model)[0]

    @classmethod
    def check(cls, cfg: Config) -> None:
        """ValueError for options that do not fit the run."""

    @classmethod
    def check_device(cls, cfg: Config, stage: int, cuda: bool) -> None:
        """ValueError for options that this machine or the ZeRO stage does not allow."""

    def follow(self, wait: Callable[[], None]) -> None:
        """``wait`` returns once the weights of ``network`` are complete. Call it before a
        forward.
        """

    def will_be_captured(self) -> None:
        """Forward and backward pass will be replayed as one CUDA graph: choose defaults for that."""

    def start(
        self, noised: Noised, sinusoid: Tensor, condition: Conditioning, images: Tensor | None
    ) -> None:
        """Take the inputs of a micro-batch, before the student's forward.

        Args:
            noised: both noisy inputs; the target sees ``x_teacher [B, C, H, W]``.
            sinusoid: ``[B, 256]`` ``timestep_features`` of ``noised.t_teacher``.
            condition: B of them, as the student's.
            images: ``[b]`` int64, those that are aligned; None: all of them.
        """
        raise NotImplementedError

    def result(self) -> Tensor:
        """``[b, T, D]`` target features, after the student's forward."""
        raise NotImplementedError


@TARGETS.register("none")
class NoTarget(Target):
    """No alignment: the plain model. The objective never asks it for features."""
