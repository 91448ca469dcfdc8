"""LayerSync's target (arXiv 2510.12581): a deeper block of the student itself, in the same forward
pass. Neither teacher nor head.
"""

from dataclasses import dataclass

from torch import Tensor

from sra_fast.alignment.target import Inputs, Target, check_layers, compare, share_of_depth
from sra_fast.config.schema import Config, Distance, DistanceConfig, ModelConfig, choice
from sra_fast.models import DiffusionTransformer, Features
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS


@dataclass
class LayerSyncConfig(DistanceConfig):
    """Alignment to a deeper block of the student in the same forward (LayerSync)."""

    target: str = choice(TARGETS, "layer_sync")
    """where the target features come from"""
    distance: Distance = "cosine_patch"
    """distance between the features; the paper's loss is cosine_patch less the constant 1"""
    weight: float = 0.2
    """lambda: weight of the alignment loss"""
    deep_layer: int | None = None
    """n: the student's block whose features are the target (1-based, deeper than m); default: 16 of
    28, as published for XL, else the same share of the depth"""


@TARGETS.register("layer_sync")
class LayerSync(Target):
    """Features after the student's block n, without gradient."""

    config = LayerSyncConfig
    align: LayerSyncConfig

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        return share_of_depth(model, 8 / 28), share_of_depth(model, 16 / 28)

    @classmethod
    def fill_in(cls, align: LayerSyncConfig, cfg: Config) -> None:
        super().fill_in(align, cfg)
        if align.deep_layer is None:
            align.deep_layer = max(cls.layers(cfg.model)[1], align.student_layer + 1)

    @classmethod
    def check(cls, align: LayerSyncConfig, cfg: Config) -> None:
        check_layers(align, cfg, "deep_layer")
        require_that(
            align.student_layer < align.deep_layer,
            f"align.deep_layer must be deeper than align.student_layer {align.student_layer}, "
            f"got {align.deep_layer}",
        )

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.align.student_layer, self.align.deep_layer)

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        target = inputs.select(features.after[self.align.deep_layer]).detach()
        predicted = self.projected(student, features, inputs)
        return compare(predicted, target, self.align.distance, self.align.beta)
