"""Features of a frozen model for noisy images: every layer from one pass, the same noise at every time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sra_fast.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.digits import Digits
from sra_fast.diffusion.draws import block_seed, draw
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from sra_fast.models import SiT

HELD_OUT = 5  # every fifth image


@dataclass
class Images:
    """``x0``, ``noise``: ``[N, C, H, W]`` fp32; ``labels``: ``[N]`` int64; on the CPU."""

    x0: Tensor
    noise: Tensor
    labels: Tensor


@dataclass
class Part:
    """The training (``number`` 0) or the held-out (1) images of a data set: its ``rows``."""

    dataset: Dataset
    rows: np.ndarray
    number: int

    def read(self, count: int, seed: int, draws: int = 1) -> Images:
        """At most ``count`` images, chosen at random where there are more, each with ``draws`` noises: ``draws`` rows."""
        rows = np.random.default_rng(block_seed(seed, self.number)).permutation(self.rows)[:count]
        raw, labels = self.dataset.__getitems__(rows.tolist())
        shape, posterior = (len(rows), *self.dataset.shape), self.dataset.posterior
        # 2 i + number: the two parts share no noise
        drawn = [
            draw(seed, 2 * i + self.number, 0, shape, "cpu", drop_prob=0.0, posterior=posterior)
            for i in range(draws)
        ]
        x0 = self.dataset.to_latent(raw, drawn[0].posterior).float()
        return Images(
            x0.repeat(draws, 1, 1, 1), torch.cat([d.noise for d in drawn]), labels.repeat(draws)
        )


def split(data: DataConfig, model: SiT) -> tuple[Part, Part]:
    """Training and held-out images of ``data``, every fifth image (of digits: those that no run trains on).

    Raises:
        ValueError: the data cannot be read, does not fit the model, or is a single image.
    """
    shape = dict(
        input_size=model.input_size, in_channels=model.in_channels, num_classes=model.num_classes
    )
    dataset = make_dataset(
        Config(model=ModelConfig(**shape), data=data, train=TrainConfig(global_batch=2))
    )
    rows = np.arange(len(dataset))
    if isinstance(dataset, Digits):
        held_out = Digits(held_out=True)
        return Part(dataset, rows, 0), Part(held_out, np.arange(len(held_out)), 1)
    return Part(dataset, rows[rows % HELD_OUT != 0], 0), Part(
        dataset, rows[rows % HELD_OUT == 0], 1
    )


@torch.no_grad()
def noisy_features(
    model: SiT,
    path: str,
    images: Images,
    labels: Tensor,
    time: float,
    layers: list[int],
    reduce: Callable[[Tensor], Tensor],
    batch: int,
) -> tuple[Tensor, list[Tensor]]:
    """What the model sees of ``images`` at one time, and what it makes of them.

    Args:
        model: in eval mode, on the device that computes.
        path: the interpolant it was trained with (SiT).
        labels: ``[N]`` int64, what it is conditioned on.
        time: in [0, 1], 0 is data; DiT's integer time is the thousandfold.
        layers: 1-based.
        reduce: ``[B, T, D]`` features -> what is kept of them.
        batch: images per model call.

    Returns:
        Noisy inputs ``[N, C, H, W]`` and, for each layer, ``reduce``'s results over all images; fp32, on the CPU.
    """
    process = FlowMatching(path) if model.family == "SiT" else GaussianDiffusion()
    device, inputs, kept = model.pos_embed.device, [], {layer: [] for layer in layers}
    for x0, noise, y in zip(
        images.x0.split(batch), images.noise.split(batch), labels.split(batch), strict=True
    ):
        t, _ = process.times(torch.full((len(y),), time), torch.zeros(len(y)))
        x = process.corrupt(x0, noise, t, t).x
        inputs.append(x)
        for layer, features in enumerate(
            model.all_features(x.to(device), t.to(device), y.to(device)), start=1
        ):
            if layer in kept:
                kept[layer].append(reduce(features).float().cpu())
    return torch.cat(inputs), [torch.cat(kept[layer]) for layer in layers]


def choose_layers(layers: list[int] | None, depth: int, most: int | None = None) -> list[int]:
    """The given layers, sorted, once each; None: all of them, or ``most`` evenly spaced from the first to the last.

    Raises:
        ValueError: none given, or one outside [1, depth].
    """
    if layers is None:
        count = min(depth, most or depth)
        return [round(1 + i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
    if not layers or min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"layers must lie in [1, {depth}], got {layers}")
    return sorted(set(layers))


def check_times(times: list[float]) -> None:
    """ValueError unless there are times and all lie in [0, 1]."""
    if not times or min(times) < 0 or max(times) > 1:
        raise ValueError(f"times must lie in [0, 1], got {times}")
