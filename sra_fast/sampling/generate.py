"""Labels, noise and latents of a batch of samples: functions of (seed, image number), whatever the batch size."""

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.diffusion.draws import block_seed
from sra_fast.diffusion.samplers import Call, sample
from sra_fast.models import Conditioning, DiffusionTransformer


def choose_labels(count: int, num_classes: int, mode: str, seed: int) -> Tensor:
    """Labels ``[count]``: ``balanced`` repeats 0 .. num_classes - 1, ``random`` draws them."""
    if mode == "balanced":
        return torch.arange(count) % num_classes
    # -2 keeps these draws apart from those of training and of the noise
    generator = torch.Generator().manual_seed(block_seed(seed, 0, -2))
    return torch.randint(num_classes, (count,), generator=generator)


def labels_like(count: int, labels: Tensor) -> Tensor:
    """Labels ``[count]`` with the frequencies of others, nothing being drawn.

    The classes take turns until each has its share, rounded by the largest remainders (of equal ones
    the first classes'). Where all are equally frequent this is ``balanced`` among the classes that
    there are.

    Args:
        count: how many.
        labels: ``[N]`` int64, at least one.
    """
    classes, found = labels.unique(return_counts=True)
    shares = count * found
    quotas = shares // len(labels)
    left = count - int(quotas.sum())
    order = (shares % len(labels)).argsort(descending=True, stable=True)
    quotas[order[:left]] += 1
    turns = torch.cat([torch.arange(int(quota)) for quota in quotas])
    return classes.repeat_interleave(quotas)[turns.argsort(stable=True)]


class ImageNoise:
    """Standard normals with one generator per image, so that an image is the same in any batch.

    Args:
        seed: of the run.
        indices: image numbers of the batch.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, indices: range, device):
        # -3: see choose_labels
        self.generators = [
            torch.Generator(device).manual_seed(block_seed(seed, i, -3)) for i in indices
        ]
        self.device = device

    def draw(self, *shape: int) -> Tensor:
        """``[B, *shape]`` fp32, the next numbers of every image."""
        return torch.stack(
            [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        )

    def like(self, x: Tensor) -> Tensor:
        """The next numbers, with the shape and dtype of ``x [B, ...]``."""
        return self.draw(*x.shape[1:]).to(x.dtype)


def time_shift(cfg: SampleConfig, diffusion: DiffusionConfig) -> float:
    """The shift of a sampler's times: its own, or that of the training."""
    return diffusion.time_shift if cfg.time_shift is None else cfg.time_shift


def generate(
    model: DiffusionTransformer,
    condition: Conditioning | Tensor,
    cfg: SampleConfig,
    diffusion: DiffusionConfig,
    seed: int,
    batch: int,
    device: torch.device | str,
    progress: Callable[[int], object] | None = None,
    *,
    first: int = 0,
    call: Call | None = None,
) -> Tensor:
    """Sample latents.

    Args:
        model: in eval mode, on ``device``.
        condition: N of them, or labels ``[N]`` int64.
        cfg: sampler and guidance.
        diffusion: what the model was trained with: its interpolant and, unless ``cfg`` has another,
            its shift of times.
        seed: of the noise.
        batch: images per call of the sampler.
        device: where the model runs.
        progress: called after every batch with its number of images.
        first: number of the first image. The noise of an image depends on its number.
        call: runs the model; default: the model itself.

    Returns:
        ``[N, C, H, W]`` fp32 on the CPU.
    """
    latents = []
    condition = model.as_condition(condition)
    for start in range(0, len(condition), batch):
        part = condition.select(slice(start, start + batch)).to(device)
        numbers = range(first + start, first + start + len(part))
        noise = ImageNoise(seed, numbers, device)
        # the start of the trajectory; the sampler takes its later noise from the same generators
        z = noise.draw(model.in_channels, model.input_size, model.input_size)
        x = sample(
            model,
            z,
            part,
            cfg.method,
            cfg.steps,
            guidance=cfg.guidance,
            interval=tuple(cfg.interval),
            guided_channels=cfg.guided_channels,
            path=diffusion.path,
            time_shift=time_shift(cfg, diffusion),
            noise=noise.like,
            call=call,
        )
        # the ODE's and SDE's state is float64
        latents.append(x.float().cpu())
        if progress:
            progress(len(part))
    return torch.cat(latents)
