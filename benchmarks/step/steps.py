"""What runs a variant of a training step: the engine, a plain PyTorch program, or the published code.

Each has ``step(i)``, ``loss_sum`` and ``phases``: (owner, attribute, phase) of the functions to time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.step.published_step import PublishedStep
from benchmarks.step.torch_program import Program
from benchmarks.step.variants import PUBLISHED, Variant
from sra_fast.config.schema import Config, ModelConfig
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.models import TextFeatures
from sra_fast.training.logger import TrainLogger
from sra_fast.training.loop import optimizer_step
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.utils.registry import TARGETS


@dataclass(frozen=True)
class RandomFeatures:
    """What a data set says of the features of another model that come with its batches.

    Attributes:
        name: of the features.
        tokens, width: T and D of an image's features ``[T, D]``.
    """

    name: str
    tokens: int
    width: int


class RandomText:
    """Random features of captions, of the sizes that a model takes, on a device."""

    facts = None

    def __init__(self, model: ModelConfig, count: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(2)
        # as they are stored on the disk, but for a CPU, which has no fast half precision
        dtype = torch.float16 if device.type == "cuda" else torch.float32

        def draw(zeros: TextFeatures) -> TextFeatures:
            own = [
                None
                if part is None
                else torch.randn(part.shape, device=device, generator=generator)
                for part in (zeros.tokens, zeros.pooled)
            ]
            return TextFeatures(*(None if part is None else part.to(dtype) for part in own))

        kind = model.any_condition(count)
        self.captions = replace(draw(kind), empty=draw(kind.empty))
        self.tensors = tuple(
            part for part in (self.captions.tokens, self.captions.pooled) if part is not None
        )

    def condition(self, tensors: Sequence[Tensor]) -> TextFeatures:
        """The captions with the empty prompt: there is one batch of them."""
        return self.captions


class OneBatch(TrainingData):
    """A data set of random VAE moments that gives the same batch forever.

    For a target that needs them the batch also has random features of another model.

    Args:
        cfg: batch size, shape of the latents and alignment are read.
        device: of the batch.
        world: processes that share the configured batch.
    """

    posterior = True

    def __init__(self, cfg: Config, device: torch.device, world: int = 1):
        size = cfg.train.global_batch // world
        channels = cfg.model.in_channels
        side = cfg.model.input_size
        self.shape = (channels, side, side)
        generator = torch.Generator(device).manual_seed(0)
        # mean and standard deviation of every channel
        moments = torch.rand(size, 2 * channels, side, side, device=device, generator=generator)
        if cfg.model.conditioning == "text":
            self.text = RandomText(cfg.model, size, device)
            self.batch = (moments, *self.text.tensors)
        else:
            self.batch = (moments, torch.arange(size, device=device) % cfg.model.num_classes)
        widths = [getattr(align, "feature_width", None) for align in cfg.alignments.values()]
        width = next((width for width in widths if width), None)
        if width is not None:
            tokens = cfg.model.num_tokens
            self.features = RandomFeatures("random", tokens, width)
            # of mean 0 and deviation 1, as those of a vision model after its last norm
            features = torch.randn(size, tokens, width, device=device, generator=generator)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self.batch = (*self.batch, features.to(dtype))

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of this batch's latents in every channel, drawn where the batch is."""
        moments = self.batch[0]
        generator = torch.Generator(moments.device).manual_seed(1)
        shape = (len(moments), *self.shape)
        noise = torch.randn(shape, device=moments.device, generator=generator)
        channels = self.to_latent(moments, noise).transpose(0, 1).flatten(1)
        return channels.mean(1).tolist(), channels.std(1).tolist()

    def to_latent(self, moments, noise):
        """A sample of the posterior, scaled as Stable Diffusion's latents are."""
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise) * 0.18215


class EngineStep:
    """The engine's step on one batch, from the draws to the refresh of the teacher."""

    def __init__(self, cfg: Config, data: OneBatch, device: torch.device):
        # as in a run: before the plan
        for align in cfg.alignments.values():
            TARGETS[align.target].fill_in_data(align, cfg, data)
        self.trainer = build(make_plan(cfg), device)
        self.data = data
        self.batches = itertools.repeat(data.batch)
        trainer = self.trainer
        # tells the step which images these would be; the number of images is endless
        plan = trainer.plan
        self.stream = ShuffledBatches(
            num_images=10**9,
            seed=0,
            micro=plan.micro,
            accumulation=1,
            rank=trainer.rank,
            world=plan.world,
            step=0,
            steps=10**6,
        )
        self.logger = TrainLogger(None, cfg, device, plan.world)
        trainer.engine.train()

    def step(self, i: int) -> None:
        optimizer_step(self.trainer, self.batches, self.stream, self.data, i, self.logger)

    def close(self) -> None:
        """Remove DeepSpeed's hooks on the parameters, which would keep the engine in memory."""
        self.trainer.engine.destroy()

    @property
    def loss_sum(self) -> torch.Tensor:
        return self.logger.values.total("loss")

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        engine = self.trainer.engine
        optimizer = (engine, "step", "optimizer")
        # parts of a CUDA graph cannot be timed
        if self.trainer.graphed is not None:
            return [(self.trainer, "micro_step", "graph"), optimizer]
        found = [(engine, "forward", "forward")]
        with_teacher = [each for each in engine.module.targets if each.network is not None]
        found += [(target, "run", "teacher") for target in with_teacher]
        return [*found, (engine, "backward", "backward"), optimizer]


def make_step(variant: Variant, cfg: Config, device: torch.device, published: str | None = None):
    """What runs the variant.

    Args:
        variant: its name and switches.
        cfg: ``variant.configuration(...)``.
        device: to run on.
        published: a checkout of the published code, for the variant that runs it.
    """
    data = OneBatch(cfg, device)
    if variant.switches is not None:
        return Program(cfg, variant.switches, data, device)
    if variant.base == PUBLISHED:
        return PublishedStep(cfg, published, data, device)
    return EngineStep(cfg, data, device)
