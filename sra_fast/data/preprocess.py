"""The body of preprocess.py: images to VAE moments, or one layout of moments to another."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sra_fast.data.images import ImageFolder
from sra_fast.data.latents import INDEX, VERSION, MomentDataset, open_latents
from sra_fast.data.vae import load_vae, make_encoder, moments_shape, vae_identity
from sra_fast.data.writer import PackingJob


@dataclass
class Options:
    """What to make of what. Interrupted, the same command resumes, on any number of processes."""

    source: str
    """images: a folder or .zip with class folders or a dataset.json; moments: a folder with vae-sd/ or index.json"""
    out: str
    """folder to make"""
    vae: str | None = None
    """folder of a diffusers AutoencoderKL (for images)"""
    layout: Literal["packed", "published"] = "packed"
    """what to write: shards, or the published code's vae-sd/**/*.npy and vae-sd/dataset.json"""
    resolution: int = 256
    """side of the images' centre crop"""
    num_classes: int | None = None
    """how many classes there must be; default: as many as there are"""
    mirror: bool = False
    """add the mirror image of every image"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """of the shards; float16 is eight times as fine as bfloat16"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of the encoder"""
    shard_size: int = 8192
    """images per shard, and the most that a restart makes again"""
    batch: int = 64
    """images per call of the encoder"""
    threads: int = 8
    """threads per process that read, decode and crop"""


# a data set, the function from its batches to moments, and what the index says about them
Source = tuple[MomentDataset | ImageFolder, Callable[[Tensor], Tensor], dict]


def open_moments(options: Options) -> Source:
    """A source that holds moments already. ValueError: options for images, or labels outside the range."""
    if options.vae or options.mirror:
        raise ValueError(f"--vae and --mirror are for images, {options.source} holds moments")
    data = open_latents(options.source)
    # a subset may lack the last classes
    num_classes = options.num_classes or data.num_classes
    lowest = int(data.labels.min())
    highest = int(data.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {lowest} .. {highest}")
    facts = {"shape": [*data.moments_shape], "num_classes": num_classes, "vae": data.vae}
    return data, lambda moments: moments, facts


def open_images(options: Options) -> Source:
    """A source of images, with the VAE that encodes them. ValueError: either cannot be used."""
    if not options.vae:
        raise ValueError("images need --vae, the folder of an AutoencoderKL")
    # on a CPU rounding depends on the number of threads, and the output must not
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    # the folder first: a mistake in it shows before the VAE is loaded
    data = ImageFolder(options.source, options.resolution, options.num_classes, options.mirror)
    vae = load_vae(options.vae)
    encode = make_encoder(vae, options.precision, device)
    facts = {
        "shape": [*moments_shape(vae, encode, options.resolution)],
        "num_classes": data.num_classes,
        "vae": vae_identity(vae),
        "resolution": options.resolution,
        "mirror": options.mirror,
        "precision": options.precision,
    }
    return data, encode, facts


def make_job(options: Options) -> PackingJob:
    """Check everything and describe the job; nothing is written yet.

    Raises:
        ValueError: the options, the source or the VAE cannot be used.
    """
    for name in ("resolution", "shard_size", "batch", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    source = Path(options.source)
    out = Path(options.out)
    if source.resolve() == out.resolve():
        raise ValueError(f"out must be another folder than source, got {out} for both")
    holds_moments = (source / INDEX).exists() or (source / "vae-sd").is_dir()
    # the next run would take the output for a class
    if not holds_moments and source.resolve() in out.resolve().parents:
        raise ValueError(f"out must not lie in the folder of the images, got {out} in {source}")

    data, encode, facts = (open_moments if holds_moments else open_images)(options)
    # what a restart must have in common with this run
    recipe = {
        "version": VERSION,
        "layout": options.layout,
        "source_sha256": data.fingerprint,
        "num_images": len(data),
        **facts,
        "shard_size": options.shard_size,
        # the published layout is fp32 whatever was asked for
        "dtype": options.dtype if options.layout == "packed" else "float32",
    }
    return PackingJob(
        data,
        encode,
        recipe,
        out,
        options.batch,
        options.threads,
        rank=int(os.environ.get("RANK", 0)),
        world=int(os.environ.get("WORLD_SIZE", 1)),
    )
