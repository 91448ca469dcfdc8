"""Features of a frozen model for noisy images. One pass gives every layer, and the noise is the same at every time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import check_data, fill_in_model, kind_of, open_data
from sra_fast.data.facts import DataFacts, differences, other_inputs, refuse_other_latents
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import block_seed, draw
from sra_fast.models import Conditioning, DiffusionTransformer
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import PROCESSES

log = logging.getLogger("sra_fast")

# of a data set that is split into two parts
LEAST_IMAGES = 2


@dataclass
class Images:
    """Clean images and the noise that they get, on the CPU."""

    x0: Tensor
    """``[N, C, H, W]`` fp32"""
    noise: Tensor
    """``[N, C, H, W]`` fp32"""
    labels: Tensor
    """``[N]`` int64"""
    condition: Conditioning
    """N of them, the images' own: their labels, or their first captions"""


@dataclass
class Part:
    """The training or the held-out images of a data set."""

    dataset: TrainingData
    rows: np.ndarray
    """which of its images"""
    number: int
    """0: training images; 1: held-out images"""

    def choose(self, count: int, seed: int) -> np.ndarray:
        """The rows that ``read`` takes."""
        generator = np.random.default_rng(block_seed(seed, self.number))
        return generator.permutation(self.rows)[:count]

    def read(self, count: int, seed: int, draws: int = 1) -> Images:
        """Images with their noise.

        Args:
            count: the most images to read. If there are more, they are chosen at random.
            seed: of the choice and of the noise.
            draws: noises per image. An image appears once for each.
        """
        rows = self.choose(count, seed)
        # what the data set stores: pixels, or the VAE's moments
        batch = self.dataset.__getitems__(rows.tolist())
        raw, told, _ = self.dataset.split(batch)
        shape = (len(rows), *self.dataset.shape)
        posterior = self.dataset.posterior
        # 2 i + number: the two parts share no noise
        drawn = [
            draw(seed, 2 * i + self.number, 0, shape, "cpu", drop_prob=0.0, posterior=posterior)
            for i in range(draws)
        ]
        # one sample of the VAE's posterior per image, whatever the number of noises
        x0 = self.dataset.to_latent(raw, drawn[0].posterior).float()
        noise = torch.cat([d.noise for d in drawn])
        again = torch.arange(len(rows)).repeat(draws)
        labels = self.dataset.labels[torch.from_numpy(rows)][again]
        condition = self.dataset.condition(told).select(again)
        return Images(x0[again], noise, labels, condition)


def data_of(given: DataConfig, facts: DataFacts | None) -> DataConfig:
    """The data to analyse a model with: those given, else those it was trained on.

    Raises:
        ValueError: neither is known, or a scale or shift contradicts the model's.
    """
    data = replace(given)
    if facts is None:
        require_that(
            data.name != "auto" or data.path is not None,
            "the weights do not tell what they were trained on: give --data PATH, or --data.name digits",
        )
        return data
    if data.name == "auto" and data.path is None:
        require_that(
            facts.path is None or Path(facts.path).exists(),
            f"the model was trained on {facts.path}, which is gone: give --data PATH",
        )
        data.name = facts.name
        data.path = facts.path
        if facts.text is not None and data.text is None:
            data.text = facts.text["name"]
    if not facts.pixels and not _are_pixels(data):
        refuse_other_latents(facts, data.latent_scale, data.latent_shift, "data.")
        data.latent_scale = facts.scale
        data.latent_shift = facts.shift
        require_that(
            not data.latent_statistics,
            "the model was trained with a scale and a shift of its own, got data.latent_statistics "
            "True: leave it out",
        )
    return data


def _are_pixels(data: DataConfig) -> bool:
    """Whether data are images, which have no scale and no shift."""
    return (kind_of(data.path) if data.name == "auto" else data.name) == "pixels"


def sizes_of(model: DiffusionTransformer) -> ModelConfig:
    """What a model asks of its data, as ``make_dataset`` takes it; only that of its depth and width
    is not the model's.
    """
    sizes = ModelConfig(
        name=f"{model.family}-S/2", input_size=model.input_size, in_channels=model.in_channels
    )
    asked = {
        "labels": ("num_classes",),
        "text": ("context_tokens", "context_size", "pooled_size"),
    }
    for name in asked[model.conditioning]:
        setattr(sizes, name, getattr(model, name))
    return sizes


def _kind(pixels: bool) -> str:
    return "pixels" if pixels else "latents"


def open_for(
    data: DataConfig, model: DiffusionTransformer, facts: DataFacts | None = None
) -> TrainingData:
    """The data set, checked against a model.

    ``facts``: about the data that the model was trained on. A warning says if these are others.

    Raises:
        ValueError: the data cannot be read, do not fit the model, are a single image, or have an
            image as other inputs than the model knows (pixels, or another encoder's).
    """
    found = open_data(data)
    where = data.path or found.name
    if facts:
        kinds = [_kind(told.pixels) for told in (facts, found.facts())]
        require_that(
            kinds[0] == kinds[1],
            f"the model was trained on {kinds[0]}, {where} holds {kinds[1]}",
        )
    # one for training and one that is held out of it
    require_that(
        len(found) >= LEAST_IMAGES,
        f"an analysis needs data of at least {LEAST_IMAGES} images, {where} has {len(found)}",
    )
    cfg = Config(model=sizes_of(model), data=data, train=TrainConfig(global_batch=LEAST_IMAGES))
    fill_in_model(cfg, found)
    check_data(found, cfg)
    if facts:
        other = other_inputs(found.facts(), facts)
        require_that(
            not other,
            f"{where} is nothing that the model was trained to see: {'; '.join(other)}",
        )
        different = differences(found.facts(), facts)
        if different:
            log.warning(
                "%s are not the data that the model was trained on: %s",
                data.path,
                "; ".join(different),
            )
    return found


def split(
    data: DataConfig, model: DiffusionTransformer, facts: DataFacts | None = None
) -> tuple[Part, Part]:
    """Training and held-out images of ``data``; arguments and errors: see ``open_for``.

    No run trains on the held-out digits, nor on what `preprocess.py` holds out. Of other data every
    fifth image counts as held out, which a run may have trained on; a warning says so.
    """
    found = open_for(data, model, facts)
    (train, train_rows), (held_out, held_out_rows) = found.held_out_split()
    if train is held_out:
        log.warning(
            "%s has no held-out images (preprocess.py --holdout): every fifth is taken, on which a "
            "run may have trained",
            data.path,
        )
    return Part(train, train_rows, 0), Part(held_out, held_out_rows, 1)


@torch.no_grad()
def noisy_features(
    model: DiffusionTransformer,
    path: str,
    images: Images,
    condition: Conditioning | Tensor,
    time: float,
    layers: list[int],
    reduce: Callable[[Tensor], Tensor],
    batch: int,
) -> tuple[Tensor, list[Tensor]]:
    """The noisy inputs of a model at one time, and its features.

    Args:
        model: in eval mode, on the device that computes.
        path: the interpolant it was trained with (SiT).
        images: on the CPU.
        condition: N of them, or labels ``[N]``: what the model is conditioned on.
        time: in [0, 1], 0 is data; DiT's integer time is 1000 times that.
        layers: 1-based.
        reduce: ``[B, T, D]`` features -> what is kept of them.
        batch: images per model call.

    Returns:
        The noisy inputs ``[N, C, H, W]``, and for each layer the results of ``reduce`` over all
        images; fp32, on the CPU.
    """
    # noise is added as in training
    process = PROCESSES[model.process].from_config(DiffusionConfig(path=path), t_max=0.0)
    device = model.pos_embed.device
    inputs = []
    kept = {layer: [] for layer in layers}
    condition = model.as_condition(condition)
    for start in range(0, len(images.x0), batch):
        part = slice(start, start + batch)
        x0 = images.x0[part]
        # the student's time; the teacher's, with a gap of zero, is not used
        t, _ = process.times(torch.full((len(x0),), time), torch.zeros(len(x0)))
        x = process.corrupt(x0, images.noise[part], t, t).x
        inputs.append(x)
        # one pass computes every layer: only the asked ones are copied to the CPU
        told = condition.select(part).to(device)
        every_layer = model.all_features(x.to(device), t.to(device), told)
        for layer, features in enumerate(every_layer, start=1):
            if layer in kept:
                kept[layer].append(reduce(features).float().cpu())
    return torch.cat(inputs), [torch.cat(kept[layer]) for layer in layers]


def choose_layers(layers: list[int] | None, depth: int, most: int | None = None) -> list[int]:
    """Layers in ascending order, each once.

    Args:
        layers: the asked ones, 1-based; None: all of them, or ``most``.
        depth: of the model.
        most: how many to choose at most, evenly spaced from the first to the last.

    Raises:
        ValueError: none was given, or one outside [1, depth].
    """
    if layers is None:
        count = min(depth, most or depth)
        intervals = max(count - 1, 1)
        return [round(1 + i * (depth - 1) / intervals) for i in range(count)]
    require_that(len(layers) > 0, "expected at least one of layers, got []")
    if min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"layers must lie in [1, {depth}], got {layers}")
    return sorted(set(layers))


def check_times(times: list[float]) -> None:
    """ValueError unless there is at least one time and all lie in [0, 1]."""
    require_that(len(times) > 0, "expected at least one of times, got []")
    # not by the smallest and the largest: comparisons with NaN are false
    if not all(0 <= time <= 1 for time in times):
        raise ValueError(f"times must lie in [0, 1], got {times}")
