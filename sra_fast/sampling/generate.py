"""Labels, noise and images of a batch of samples: a function of (seed, image index), not of the batch size."""

import torch
from torch import Tensor

from sra_fast.config.schema import SampleConfig
from sra_fast.diffusion.draws import block_seed
from sra_fast.diffusion.samplers import sample
from sra_fast.models import SiT


def choose_labels(count: int, num_classes: int, mode: str, seed: int) -> Tensor:
    """``[count]`` labels: ``balanced`` repeats 0 .. num_classes - 1, ``random`` draws them."""
    if mode == "balanced":
        return torch.arange(count) % num_classes
    return torch.randint(
        num_classes, (count,), generator=torch.Generator().manual_seed(block_seed(seed, 0, -2))
    )


class ImageNoise:
    """Standard normals with one generator per image, so that an image is the same in any batch.

    Args:
        seed: of the run.
        indices: image numbers of the batch.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, indices: range, device):
        self.generators = [
            torch.Generator(device).manual_seed(block_seed(seed, i, -3)) for i in indices
        ]
        self.device = device

    def draw(self, *shape: int) -> Tensor:
        return torch.stack(
            [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        )

    def like(self, x: Tensor) -> Tensor:
        return self.draw(*x.shape[1:]).to(x.dtype)


def generate(
    model: SiT,
    labels: Tensor,
    cfg: SampleConfig,
    path: str,
    seed: int,
    batch: int,
    device,
    progress=None,
    *,
    first: int = 0,
    call=None,
) -> Tensor:
    """Latents ``[N, C, H, W]`` fp32 on the CPU for ``labels [N]``, ``batch`` at a time.

    Args:
        path: the interpolant the model was trained with.
        progress: called with the number of finished images of every batch.
        first: number of the first image, which its noise depends on.
        call: what runs the model; default: the model.
    """
    latents = []
    for at in range(0, len(labels), batch):
        y = labels[at : at + batch].to(device)
        noise = ImageNoise(seed, range(first + at, first + at + len(y)), device)
        z = noise.draw(model.in_channels, model.input_size, model.input_size)
        x = sample(
            model,
            z,
            y,
            cfg.method,
            cfg.steps,
            guidance=cfg.guidance,
            interval=tuple(cfg.interval),
            guided_channels=cfg.guided_channels,
            path=path,
            noise=noise.like,
            call=call,
        )
        latents.append(x.float().cpu())
        if progress:
            progress(len(y))
    return torch.cat(latents)
