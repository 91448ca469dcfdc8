"""SRA 2's target (arXiv 2601.17830): the clean latent of each patch, which a head predicts from the
student's features. No teacher.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sra_fast.alignment.heads import Head, LatentHead, output_order
from sra_fast.alignment.target import Inputs, Target, compare, paper_layer
from sra_fast.config.schema import Config, DistanceConfig, ModelConfig, choice
from sra_fast.data.training_data import TrainingData
from sra_fast.models import DiffusionTransformer, Features
from sra_fast.models.layers import patches_of
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS

# m of the paper's models
PAPER_LAYERS = {"B": 2, "L": 8, "XL": 8}


@dataclass
class VAELatentConfig(DistanceConfig):
    """Prediction of the clean latent from the student's features (SRA 2)."""

    target: str = choice(TARGETS, "vae_latent")
    """where the target features come from"""
    weight: float = 1.0
    """lambda: weight of the alignment loss"""
    latent: Literal["sampled", "mean"] = "sampled"
    """of the VAE's posterior: the draw that the student's input is made from, or the mean"""
    zscore: bool = True
    """compare latents of mean 0 and deviation 1 in every channel, whatever the VAE's are; measured
    on latents that are drawn, also for `latent mean`"""
    last_layer: Literal["adaln", "linear"] = "adaln"
    """of the head: with SiT's modulated norm, or linear only"""
    channel_mean: list[float] | None = None
    """of the latents, for `zscore`; default: measured on the data"""
    channel_std: list[float] | None = None
    """likewise"""


@TARGETS.register("vae_latent")
class VAELatent(Target):
    """Latents of the patches, z-scored per channel."""

    config = VAELatentConfig
    head_options = ("last_layer",)
    align: VAELatentConfig

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        layer = paper_layer(model, PAPER_LAYERS)
        return layer, layer

    @classmethod
    def make_head(cls, align: VAELatentConfig, model: ModelConfig) -> Head:
        arguments = model.arguments()
        out_size = arguments["in_channels"] * arguments["patch_size"] ** 2
        return LatentHead(arguments["hidden_size"], out_size, align.last_layer == "adaln")

    @classmethod
    def fill_in_data(cls, align: VAELatentConfig, cfg: Config, data: TrainingData) -> None:
        if align.zscore and align.channel_mean is None and align.channel_std is None:
            align.channel_mean, align.channel_std = data.channel_statistics()

    @classmethod
    def check(cls, align: VAELatentConfig, cfg: Config) -> None:
        given = (align.channel_mean, align.channel_std)
        require_that(
            (given[0] is None) == (given[1] is None),
            f"align.channel_mean and align.channel_std go together, got {given[0]} and {given[1]}",
        )
        if given[0] is None:
            return
        channels = cfg.model.in_channels
        require_that(
            all(len(numbers) == channels for numbers in given)
            and all(math.isfinite(number) for number in (*given[0], *given[1]))
            and min(given[1]) > 0,
            f"align.channel_mean and align.channel_std must hold {channels} finite numbers, "
            f"deviations above 0, got {given[0]} and {given[1]}",
        )

    def __init__(self, align: VAELatentConfig, network: None = None):
        super().__init__(align, None)
        if align.zscore and align.channel_mean is not None:
            shape = (1, 1, -1, 1, 1)
            # fp32 under every precision: DeepSpeed casts buffers too, so they are no buffers
            self.mean = torch.tensor(align.channel_mean).view(shape)
            self.std = torch.tensor(align.channel_std).view(shape)

    @property
    def needs_mean(self) -> bool:
        return self.align.latent == "mean"

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        predicted = self.projected(student, features, inputs)
        return compare(predicted, self._latents(inputs), self.align.distance, self.align.beta)

    def _latents(self, inputs: Inputs) -> Tensor:
        """``[b, T, p p C]`` in fp32."""
        batch = inputs.noisy.batch
        # data without a posterior have nothing but their latents
        latents = batch.x0 if batch.mean is None else batch.mean
        patches = patches_of(inputs.select(latents).float(), inputs.noisy.patch_size)
        if self.align.zscore and self.align.channel_mean is not None:
            # moved once: a copy from the host in every step would wait
            self.mean = self.mean.to(patches.device)
            self.std = self.std.to(patches.device)
            patches = (patches - self.mean) / self.std
        return output_order(patches)
