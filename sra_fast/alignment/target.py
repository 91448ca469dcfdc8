"""What the student's features are aligned to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.alignment.heads import Head
from sra_fast.alignment.schedule import images_per_cycle
from sra_fast.config.schema import AlignConfig, Config, ModelConfig
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import NoisyImages, Times
from sra_fast.diffusion.process import Process
from sra_fast.models import ALIGN_HEADS, Backbone, DiffusionTransformer, Features, preset
from sra_fast.models.token_groups import Segments
from sra_fast.utils.checks import require_that
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


def named_size(model: ModelConfig) -> str | None:
    """The size (S, B, L, XL) that a model's name says, unless it has another depth."""
    _, sizes = preset(model.name)
    if model.arguments()["depth"] != sizes["depth"]:
        return None
    return model.name.partition("-")[2].partition("/")[0]


def default_layers(model: ModelConfig) -> tuple[int, int]:
    """The layers (m, n) of student and teacher: the paper's, else the authors' rule for other
    models: a quarter and three quarters of the depth.
    """
    pair = PAPER_LAYERS.get((model.family, named_size(model)))
    return pair or (share_of_depth(model, 1 / 4), share_of_depth(model, 3 / 4))


def paper_layer(model: ModelConfig, layers: dict[str, int]) -> int:
    """The student layer that a paper gives for the size of a model; for others the share of the
    depth that XL's layer 8 of 28 is.
    """
    return layers.get(named_size(model) or "") or share_of_depth(model, 8 / 28)


def share_of_depth(model: ModelConfig, share: float) -> int:
    """A layer at this share of the depth, at least 1; halves are rounded up."""
    return max(1, int(share * model.arguments()["depth"] + 0.5))


@dataclass(frozen=True)
class Inputs:
    """What a target may see of a micro-batch.

    Attributes:
        noisy: the images with their noise; the target's network sees ``x_teacher [B, C, H, W]``.
        sinusoid: ``timestep_features`` of the teacher's times, ``[B, 256]`` or ``[B, G, 256]``.
        images: ``[b]`` int64, those that are aligned; None: all of them.
    """

    noisy: NoisyImages
    sinusoid: Tensor
    images: Tensor | None = None

    def select(self, rows: Tensor) -> Tensor:
        """The rows ``[b, ...]`` of the aligned images, of ``[B, ...]``."""
        return rows if self.images is None else rows[self.images]


class Target(nn.Module):
    """One alignment loss: target features of a micro-batch, and their distance from the student's.

    A target is registered in ``TARGETS``. Its options are a dataclass, ``config``, that inherits
    from ``AlignConfig``: the command line and YAML files then have them under ``align``.

    A target may own a network that follows the EMA of the student (``network_depth`` is then not
    None). The trainer builds that network, keeps its weights up to date in every ZeRO stage, and
    hands it to the constructor. ``TeacherTarget`` has what such a target needs.

    A target may also have a head of its own, which the trainer makes (``make_head``), trains and
    saves as a part of the student, ``student.align_heads[name]``. Nothing else of a target is
    trained or saved, and ``make_objective`` refuses parameters and buffers that would be lost.

    ``__init__``, ``times``, ``start`` and ``loss`` run once on meta tensors, which have no values:
    FLOPs are counted on them.

    Args:
        align: the options, of the class ``config``.
        network: with the EMA's weights, or None if the target needs none. It is frozen here.
    """

    config: type[AlignConfig] = AlignConfig
    # whether the tokens of an image belong to two groups, for which more is drawn
    has_groups = False
    # whether the loss may be negative
    may_be_negative = False
    # whether batches must have features of another model
    needs_external = False
    # options that decide about the parameters of a head that only this target has
    head_options: tuple[str, ...] = ()

    @property
    def needs_mean(self) -> bool:
        """Whether batches must have the means of the posterior."""
        return False

    def __init__(self, align: AlignConfig, network: Backbone | None):
        super().__init__()
        self.align = align
        # a submodule: DeepSpeed moves it to the device, casts it and (stage 3) partitions it
        self.network = None if network is None else network.requires_grad_(False)
        # the trainer replaces it (``follow``); without a trainer the weights are always complete
        self.wait: Callable[[], None] = lambda: None

    @classmethod
    def network_depth(cls, align: AlignConfig) -> int | None:
        """Blocks of the network that follows the EMA; None: the target has no such network."""
        return None

    @classmethod
    def has_network(cls, align: AlignConfig) -> bool:
        """Whether the target has a network that follows the EMA."""
        return cls.network_depth(align) is not None

    @classmethod
    def make_head(cls, align: AlignConfig, model: ModelConfig) -> Head | None:
        """A head that only this target has. A target without this method has none of its own."""
        return None

    @classmethod
    def has_own_head(cls) -> bool:
        """Whether there is a ``make_head``."""
        return getattr(cls.make_head, "__func__", None) is not Target.make_head.__func__

    @classmethod
    def has_head(cls, align: AlignConfig) -> bool:
        """Whether the student's features pass a head: its own, else the student's ``ap_head``."""
        return cls.has_own_head()

    @classmethod
    def head_name(cls, align: AlignConfig) -> str | None:
        """Name of the head among the student's submodules, None without a head."""
        if not cls.has_head(align):
            return None
        return own_head(align.target) if cls.has_own_head() else AP_HEAD

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        """Default of student layer and, where the target has one, teacher layer."""
        return default_layers(model)

    @classmethod
    def fill_in(cls, align: AlignConfig, cfg: Config) -> None:
        """Set the layers that were not given."""
        if align.student_layer is None:
            align.student_layer = cls.layers(cfg.model)[0]

    @classmethod
    def fill_in_data(cls, align: AlignConfig, cfg: Config, data: TrainingData) -> None:
        """Set what depends on the data; ValueError if they lack what the target needs."""

    @classmethod
    def check(cls, align: AlignConfig, cfg: Config) -> None:
        """ValueError for options that do not fit the run."""

    @classmethod
    def check_batch(cls, align: AlignConfig, micro: int) -> None:
        """ValueError for a share of the images that ``micro`` images cannot have."""
        images_per_cycle(align.share, micro)

    @classmethod
    def images_compared(cls, align: AlignConfig, micro: int, world: int) -> int:
        """How many images the loss compares with each other, with ``micro`` images in each of
        ``world`` processes. The loss depends on that number: a run cannot be resumed with another.
        """
        return 1

    @classmethod
    def check_device(cls, align: AlignConfig, cfg: Config, stage: int, cuda: bool) -> None:
        """ValueError for options that this machine or the ZeRO stage does not allow."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of the student whose features the loss reads."""
        return (self.align.student_layer,)

    def segments(self, batch: int, tokens: int) -> Segments | None:
        """Runs of tokens inside which attention stays, in student and teacher; see
        ``TokenGroups``.
        """
        return None

    def times(self, process: Process, draws: Draws) -> Times:
        """Student's and teacher's times, and the groups of tokens if there are any."""
        return Times(*process.times(draws.uniform, draws.gap))

    def follow(self, wait: Callable[[], None]) -> None:
        """``wait`` returns once the weights of ``network`` are complete. The objective calls it
        before ``loss``; a target whose network runs earlier has to call it itself.
        """
        self.wait = wait

    def will_be_captured(self) -> None:
        """Forward and backward pass will be replayed as one CUDA graph: choose defaults for that."""

    def start(self, inputs: Inputs) -> None:
        """Take the inputs of a micro-batch, before the student's forward."""

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        """The alignment loss, after the student's forward.

        Args:
            student: whose head the features pass.
            features: of the student, after ``depths``.
            inputs: those of ``start``.

        Returns:
            ``"align"``, the loss without lambda, fp32 ``[]``, and what is logged besides: tensors
            ``[]`` under names that the log does not have yet. Nothing here may read a value on the
            host: it may be captured as a CUDA graph.
        """
        raise NotImplementedError

    def projected(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> Tensor:
        """``[b, T, ...]``: the student's features of the aligned images after the target's head.

        After a head that only this target has they are in the order of the image, else in that of
        the student's sequence.
        """
        # the head runs only on the images that are compared
        found = inputs.select(features.after[self.align.student_layer])
        name = self.head_name(self.align)
        if name is None:
            return found
        if name == AP_HEAD:
            return student.ap_head(found)
        head = student.get_submodule(name)
        groups = features.groups
        if groups is None:
            return head(found, inputs.select(features.conditioning))
        if inputs.images is not None:
            groups = groups.select(inputs.images)
        # what such a head is compared with has the order of the image
        index = groups.restore(groups.index)
        return head(groups.restore(found), inputs.select(features.conditioning), index)


# the head that every model of the published code has
AP_HEAD = "ap_head"


def own_head(target: str) -> str:
    """Name, among the student's submodules, of a head that only one target has."""
    return f"{ALIGN_HEADS}{target}"


def trained_heads(alignments: Iterable[Any]) -> set[str]:
    """Names of the heads that targets train.

    ``alignments``: options of targets that are on, or objects with the same attributes.
    """
    names = {TARGETS[align.target].head_name(align) for align in alignments}
    return {name for name in names if name is not None}


def compare(predicted: Tensor, target: Tensor, distance: str, beta: float) -> dict[str, Tensor]:
    """The mean distance of the student's from the target features ``[b, T, D]``, and the mean
    lengths of their tokens.
    """
    distances = ops.align_distance(predicted, target, distance, beta=beta)
    return {
        "align": distances.mean(),
        "student_norm": mean_norm(predicted),
        "teacher_norm": mean_norm(target),
    }


def mean_norm(features: Tensor) -> Tensor:
    """Mean length of the tokens ``[b, T, D]``, fp32."""
    # in fp32, or in fp64 of fp64
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.linalg.vector_norm(features.detach(), dim=-1, dtype=dtype).mean().float()


def check_layers(align: AlignConfig, cfg: Config, name: str = "teacher_layer") -> None:
    """ValueError unless student layer and the deeper layer lie in the model, in this order."""
    depth = cfg.model.arguments()["depth"]
    deeper = getattr(align, name)
    require_that(
        1 <= align.student_layer <= deeper <= depth,
        f"align needs 1 <= student_layer <= {name} <= depth ({depth}), got "
        f"student_layer {align.student_layer} and {name} {deeper}",
    )


@TARGETS.register("none")
class NoTarget(Target):
    """No alignment: the plain model. The objective never asks it for features."""
