"""The random numbers of a step, as a function of (seed, step, image) alone.

A run is therefore the same for any number of processes and any split into micro-batches, and a
resumed run needs no generator state beyond the step.  Numbers are drawn on the device in blocks of
``BLOCK`` images, each block with a generator of its own seed: the cost does not grow with the
number of processes, and nothing comes from the host.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32


@dataclass
class Draws:
    """For one micro-batch: ``noise [B, C, H, W]``, ``posterior`` alike or None; ``uniform``,
    ``gap`` ``[B]``; ``drop [B]`` bool.
    """

    noise: Tensor
    posterior: Tensor | None
    uniform: Tensor
    gap: Tensor
    drop: Tensor


def block_seed(*key: int) -> int:
    """63-bit seed from integers; unlike a sum, distinct keys do not collide."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    )


def _blocks(fill, key: tuple[int, ...], first: int, count: int, device) -> Tensor:
    """Rows ``first .. first + count`` of an endless table whose block ``i`` is ``fill(generator
    seeded by key, i)``.
    """
    generator = torch.Generator(device)
    blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
    rows = [fill(generator.manual_seed(block_seed(*key, i))) for i in blocks]
    rows = rows[0] if len(rows) == 1 else torch.cat(rows)
    return rows[first % BLOCK : first % BLOCK + count]


def draw(
    seed: int,
    step: int,
    first: int,
    shape: tuple[int, int, int, int],
    device,
    *,
    drop_prob: float,
    posterior: bool,
) -> Draws:
    """Draws of images ``first .. first + B`` of optimizer step ``step``.

    Args:
        seed: of the run.
        step: optimizer step.
        first: index of the micro-batch's first image in the step's global batch.
        shape: ``(B, C, H, W)`` of the micro-batch.
        device: where the numbers are drawn; CPU and CUDA give different ones.
        drop_prob: probability that an image's label becomes the null class.
        posterior: also draw the noise of the VAE posterior.
    """
    batch, *latent = shape
    uniforms = _blocks(
        lambda g: torch.rand(BLOCK, 3, generator=g, device=device),
        (seed, step, 0),
        first,
        batch,
        device,
    )
    sets = 2 if posterior else 1
    normals = _blocks(
        lambda g: torch.randn(BLOCK, sets, *latent, generator=g, device=device),
        (seed, step, 1),
        first,
        batch,
        device,
    )
    time, gap, drop = uniforms.unbind(1)
    return Draws(normals[:, 0], normals[:, 1] if posterior else None, time, gap, drop < drop_prob)
