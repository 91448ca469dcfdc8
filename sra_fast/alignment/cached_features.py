"""REPA's target (arXiv 2410.06940): features of another model, which preprocess.py has stored.

iREPA's changes are options: a convolution as head, and features without their mean over the image.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sra_fast.alignment.heads import ConvHead, FeatureHead, Head
from sra_fast.alignment.target import Inputs, Target, compare, paper_layer
from sra_fast.config.schema import Config, Distance, DistanceConfig, ModelConfig, choice
from sra_fast.data.training_data import TrainingData
from sra_fast.models import DiffusionTransformer, Features
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS

# m of the paper's models
PAPER_LAYERS = {"B": 4, "L": 8, "XL": 8}
# iREPA's, which keeps a channel that is constant over an image finite
EPSILON = 1e-6


@dataclass
class CachedFeaturesConfig(DistanceConfig):
    """Alignment to stored features of a vision model (REPA, iREPA)."""

    target: str = choice(TARGETS, "cached_features")
    """where the target features come from"""
    distance: Distance = "cosine_patch"
    """distance between the features; REPA's loss is cosine_patch less the constant 1"""
    weight: float = 0.5
    """lambda: weight of the alignment loss (iREPA: 1)"""
    head: Literal["mlp", "conv"] = "mlp"
    """three layers with SiLU (REPA), or a 3 x 3 convolution (iREPA)"""
    head_width: int = 2048
    """of the two hidden layers of head mlp"""
    target_norm: Literal["none", "spatial"] = "none"
    """spatial: each channel less a part of its mean over the image, over its deviation there
    (iREPA)"""
    spatial_mean: float = 1.0
    """that part (the published training code: 0.6 for latents, 0.8 for pixels)"""
    feature_width: int | None = None
    """channels of the stored features; default: what the data have"""


@TARGETS.register("cached_features")
class CachedFeatures(Target):
    """Features that come with the batch."""

    config = CachedFeaturesConfig
    head_options = ("head", "head_width", "feature_width")
    needs_external = True
    align: CachedFeaturesConfig

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        layer = paper_layer(model, PAPER_LAYERS)
        return layer, layer

    @classmethod
    def make_head(cls, align: CachedFeaturesConfig, model: ModelConfig) -> Head:
        hidden_size = model.arguments()["hidden_size"]
        if align.head == "conv":
            return ConvHead(hidden_size, align.feature_width)
        return FeatureHead(hidden_size, align.head_width, align.feature_width)

    @classmethod
    def fill_in_data(cls, align: CachedFeaturesConfig, cfg: Config, data: TrainingData) -> None:
        stored = data.features
        require_that(
            stored is not None,
            "align.target cached_features needs data.features, the name of stored features "
            "(preprocess.py --features), got nothing",
        )
        require_that(
            align.feature_width in (None, stored.width),
            f"align.feature_width must be that of the stored features, {stored.width}, "
            f"got {align.feature_width}",
        )
        tokens = cfg.model.num_tokens
        require_that(
            stored.tokens == tokens,
            f"align.target cached_features needs stored features of the model's {tokens} tokens, "
            f"{stored.name} has {stored.tokens} (preprocess.py --features_grid)",
        )
        align.feature_width = stored.width

    @classmethod
    def check(cls, align: CachedFeaturesConfig, cfg: Config) -> None:
        for name in ("head_width", "feature_width"):
            value = getattr(align, name)
            require_that(
                value is not None and value >= 1, f"align.{name} must be at least 1, got {value}"
            )
        tokens = cfg.model.num_tokens
        # the deviation over the tokens of an image, which one token does not have
        require_that(
            align.target_norm != "spatial" or tokens >= 2,
            f"align.target_norm spatial needs at least 2 tokens per image, got {tokens}",
        )

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        predicted = self.projected(student, features, inputs)
        target = inputs.select(inputs.noisy.batch.external)
        if self.align.target_norm == "spatial":
            target = spatial_norm(target, self.align.spatial_mean)
        return compare(predicted, target, self.align.distance, self.align.beta)


def spatial_norm(features: Tensor, share: float = 1.0) -> Tensor:
    """``[b, T, D]``: each channel less ``share`` of its mean over the tokens, over its deviation
    there, in fp32 (iREPA).
    """
    features = features.float()
    mean = features.mean(1, keepdim=True)
    return (features - share * mean) / (features.std(1, keepdim=True) + EPSILON)
