"""The random numbers of a step: a function of (seed, step, image) only.

A run is therefore the same for any number of processes and any split into micro-batches, and a
resumed run needs no generator state but the step. Numbers are drawn on the device in blocks of
``BLOCK`` images, each with a generator of a seed of its own. The cost does not grow with the number
of processes, and nothing comes from the host.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# with one generator per image, seeding and launching would take longer than drawing. Another value
# gives every run other numbers
BLOCK = 32


@dataclass
class Draws:
    """The random numbers of one micro-batch of B images.

    Attributes:
        noise: ``[B, C, H, W]`` standard normals, for both noisy inputs.
        posterior: ``[B, C, H, W]`` standard normals for the VAE posterior, or None.
        uniform: ``[B]`` in [0, 1): the student's time.
        gap: ``[B]`` in [0, 1): how much earlier the teacher's time is.
        drop: ``[B]`` bool: conditioning replaced by nothing.
        flip: ``[B]`` bool: images to mirror, or None.
        second: ``[B, 2]`` in [0, 1): time and gap of the second group of tokens, or None.
        tokens: ``[B, T]`` in [0, 1): how the tokens are dealt to the groups, or None.
    """

    noise: Tensor
    posterior: Tensor | None
    uniform: Tensor
    gap: Tensor
    drop: Tensor
    flip: Tensor | None = None
    second: Tensor | None = None
    tokens: Tensor | None = None

    def mirror(self, x0: Tensor) -> Tensor:
        """The images ``[B, C, H, W]``, those of ``flip`` mirrored."""
        if self.flip is None:
            return x0
        return torch.where(self.flip[:, None, None, None], x0.flip(3), x0)


def block_seed(*key: int) -> int:
    """A 63-bit seed from integers. CUDA's generators use all of it. Those of a CPU use the low 32
    bits: there any two keys have the same numbers with probability 2**-32.
    """
    # repr keeps (1, 23) and (12, 3) apart
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # 63 bits are a valid seed for the generators of every device
    return int.from_bytes(digest, "little") >> 1


def _blocks(fill, key: tuple[int, ...], first: int, count: int, device) -> Tensor:
    """Rows ``first`` to ``first + count`` of an endless table.

    Its block ``i`` is what ``fill`` makes with a generator that is seeded by ``key`` and i.
    """
    generator = torch.Generator(device)
    # all blocks that the rows lie in; rows of theirs that other processes need are dropped
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
    flip: bool = False,
    tokens: int = 0,
) -> Draws:
    """Draws of images ``first`` to ``first + B`` of an optimizer step.

    Args:
        seed: of the run.
        step: optimizer step.
        first: index of the micro-batch's first image in the step's global batch.
        shape: ``(B, C, H, W)`` of the micro-batch.
        device: where the numbers are drawn; CPU and CUDA give different ones.
        drop_prob: probability that an image's label becomes the null class.
        posterior: also draw the noise of the VAE posterior.
        flip: also draw which images are mirrored, each with probability 1/2.
        tokens: T, to draw what two groups of tokens need too; 0: they are not drawn.
    """
    batch, *latent = shape
    # key 0: time, gap and label dropping of each image
    draw_uniforms = lambda g: torch.rand(BLOCK, 3, generator=g, device=device)
    uniforms = _blocks(draw_uniforms, (seed, step, 0), first, batch, device)
    # key 1: noise of the latents, then of the VAE posterior
    sets = 2 if posterior else 1
    draw_normals = lambda g: torch.randn(BLOCK, sets, *latent, generator=g, device=device)
    normals = _blocks(draw_normals, (seed, step, 1), first, batch, device)
    flips = None
    if flip:
        # key 2: a run without mirrored images has the same other numbers
        draw_coins = lambda g: torch.rand(BLOCK, generator=g, device=device)
        flips = _blocks(draw_coins, (seed, step, 2), first, batch, device) < 0.5
    second = None
    dealt = None
    if tokens:
        # key 3: a run with one time per image has the same other numbers
        draw_groups = lambda g: torch.rand(BLOCK, 2 + tokens, generator=g, device=device)
        groups = _blocks(draw_groups, (seed, step, 3), first, batch, device)
        second, dealt = groups.split((2, tokens), dim=1)
    time, gap, drop = uniforms.unbind(1)
    return Draws(
        noise=normals[:, 0],
        posterior=normals[:, 1] if posterior else None,
        uniform=time,
        gap=gap,
        # drawn at probability 0 too: the time and the gap do not depend on it
        drop=drop < drop_prob,
        flip=flips,
        second=second,
        tokens=dealt,
    )


@dataclass
class StratifiedDraws:
    """The random numbers with which B images are measured at one time of each of K bins.

    Attributes:
        noise: ``[B, K, C, H, W]`` standard normals, others in every bin.
        posterior: ``[B, C, H, W]`` standard normals for the VAE posterior, the same in all bins, or
            None.
        uniform: ``[B, K]`` in [0, 1]: that of bin j lies in ``[j / K, (j + 1) / K]``.
    """

    noise: Tensor
    posterior: Tensor | None
    uniform: Tensor


def draw_stratified(
    seed: int, images: Sequence[int], shape: tuple[int, int, int], bins: int, posterior: bool
) -> StratifiedDraws:
    """Draws of images by their numbers, whatever the batch they are in.

    They are made on the CPU, so that every device measures with the same ones.

    Args:
        seed: any whole number; no run draws these numbers, whatever its seed.
        images: numbers of the images.
        shape: (C, H, W) of an image.
        bins: K.
        posterior: also draw the noise of the VAE posterior.
    """
    noise = torch.empty(len(images), bins, *shape)
    sample = torch.empty(len(images), *shape) if posterior else None
    uniform = torch.empty(len(images), bins, dtype=torch.float64)
    for i, image in enumerate(images):
        # -4: training and sampling have other keys
        generator = torch.Generator().manual_seed(block_seed(int(seed), int(image), -4))
        if sample is not None:
            sample[i].normal_(generator=generator)
        uniform[i].uniform_(generator=generator)
        noise[i].normal_(generator=generator)
    # float64 until here: the sum would round away a part of the uniforms
    times = (torch.arange(bins, dtype=torch.float64) + uniform) / bins
    return StratifiedDraws(noise, sample, times.float())
