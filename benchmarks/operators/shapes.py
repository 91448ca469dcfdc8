"""The sizes on which operators are measured: a model at a resolution and a batch, most valuable first."""

import functools
from dataclasses import dataclass

import torch

from sra_fast.models import create_model, preset

# a model small enough for a CPU; it has no entry in the engine's table of models
TINY = "tiny"
TINY_SIZE = {"hidden_size": 64, "num_heads": 4}
TINY_PARAMETERS = ((64, 48), (64,), (24, 8, 2), (1000,))

# most valuable first: a run that stops early has measured these
MODELS = ("SiT-XL/2", "SiT-B/2", "SiT-L/2")
RESOLUTION_BATCH = ((256, 32), (256, 256), (512, 32), (256, 64), (512, 64), (512, 256))


@dataclass(frozen=True)
class Shape:
    """A model at a resolution (pixels) and a batch (images).

    Both are None for operators that work on the model's parameters.
    """

    model: str
    resolution: int | None = None
    batch: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens T, width D and heads H. A latent has 1/8 of the image's side, a patch covers 2x2 of it."""
        size = TINY_SIZE if self.model == TINY else preset(self.model)[1]
        return (self.resolution // 16) ** 2, size["hidden_size"], size["num_heads"]

    @property
    def elements(self) -> int:
        """B * T * D"""
        T, D, _ = self.sizes
        return self.batch * T * D

    @property
    def latent_elements(self) -> int:
        """Elements of the latents [B, 4, side, side]."""
        return self.batch * 4 * (self.resolution // 8) ** 2


@functools.cache
def parameter_shapes(model: str) -> tuple[torch.Size, ...]:
    """Shapes of a model's parameters, in their order."""
    if model == TINY:
        return tuple(torch.Size(shape) for shape in TINY_PARAMETERS)
    with torch.device("meta"):
        return tuple(p.shape for p in create_model(model).parameters())


def num_parameters(shape: Shape) -> int:
    return sum(s.numel() for s in parameter_shapes(shape.model))


def shapes_in_order(
    models: list[str] | None, resolutions: list[int] | None, batches: list[int] | None
) -> list[Shape]:
    """The shapes to measure, most valuable first.

    Args:
        models: None for ``MODELS``.
        resolutions: pixels, None for all in ``RESOLUTION_BATCH``.
        batches: images, None for all in ``RESOLUTION_BATCH``.

    Pairs of a resolution and a batch that ``RESOLUTION_BATCH`` does not list come last.
    """
    models = models or MODELS
    pairs = [
        (resolution, batch)
        for resolution, batch in RESOLUTION_BATCH
        if (resolutions is None or resolution in resolutions)
        and (batches is None or batch in batches)
    ]
    for resolution in resolutions or ():
        for batch in batches or ():
            if (resolution, batch) not in RESOLUTION_BATCH:
                pairs.append((resolution, batch))
    # the next model counts as much as two places in the list of pairs
    ranked = sorted((i + 2 * m, m, i) for m in range(len(models)) for i in range(len(pairs)))
    return [Shape(models[m], *pairs[i]) for _, m, i in ranked]
