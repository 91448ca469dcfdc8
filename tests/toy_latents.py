"""Moments whose channels differ, in both layouts."""

import json
from pathlib import Path

import numpy as np

from sra_fast.data.latents import Latents
from sra_fast.data.writer import PackingJob, run_job

CHANNELS = 6
# of z in every channel, nearly
MEAN = [0.0, 2.0, -1.0, 0.5, 10.0, 0.0]
STD = [0.2, 1.0, 3.0, 0.5, 2.0, 8.0]


def write_moments(
    root: Path,
    count: int = 24,
    side: int = 4,
    channels: int = CHANNELS,
    seed: int = 0,
    factor: float = 1.0,
    flat: tuple[int, float] | None = None,
    **told,
) -> Path:
    """Moments in the published layout, of three classes; returns ``root``.

    Args:
        root: folder to make.
        count: images.
        side: of the latents.
        channels: of the latents, the first ones of ``MEAN`` and ``STD``.
        seed: of the numbers.
        factor: of all deviations.
        flat: a channel and the number that it has everywhere.
        told: what ``dataset.json`` says besides.
    """
    rng = np.random.default_rng(seed)
    folder = root / "vae-sd"
    folder.mkdir(parents=True)
    labels = []
    for i in range(count):
        name = f"{i:05d}.npy"
        # a tenth of the deviation is the posterior's
        std = np.reshape(STD[:channels], (-1, 1, 1)) * factor
        mean = np.reshape(MEAN[:channels], (-1, 1, 1)) + std * rng.normal(
            size=(channels, side, side)
        )
        deviation = 0.1 * std * (0.5 + rng.random((channels, side, side)))
        if flat is not None:
            mean[flat[0]] = flat[1]
            deviation[flat[0]] = 0
        np.save(folder / name, np.concatenate([mean, deviation]).astype(np.float32))
        labels.append([name, i % 3])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **told}))
    return root


def pack(source: Path, out: Path) -> Path:
    """The same moments in shards of 7, fp32; returns ``out``."""
    data = Latents(str(source))
    recipe = {
        "version": 2,
        "layout": "packed",
        "source_sha256": data.fingerprint,
        "num_images": len(data),
        "num_classes": 3,
        "shape": [*data.moments_shape],
        "vae": data.vae,
        "shard_size": 7,
        "dtype": "float32",
    }
    extra = {"vae_path": data.vae_path}
    encode = lambda moments: moments
    assert run_job(PackingJob(data, encode, recipe, out, batch=4, threads=2, extra=extra))
    return out
