"""Images -> packed VAE moments, or one layout of moments -> another:

deepspeed sra_fast/preprocess.py --source imagenet/train --vae sd-vae-ft-mse --resolution 256 --out data/imagenet256
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # launched by path: import the checkout, not this folder


@dataclass
class Options:
    """What to make of what.  Interrupted, the same command goes on where it was, on any number of processes."""

    source: str
    """images: a folder or .zip with class folders or a dataset.json; moments: a folder with vae-sd/ or index.json"""
    out: str
    """folder to make"""
    vae: str | None = None
    """folder of a diffusers AutoencoderKL (for images)"""
    layout: Literal["packed", "reference"] = "packed"
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
    """images per shard, and what a restart makes again at most"""
    batch: int = 64
    """images per call of the encoder"""
    threads: int = 8
    """threads per process that read, decode and crop"""


def open_moments(options: Options):
    """``(data set, function from its batches to moments, what the index says of them)``; ValueError: what is wrong."""
    from sra_fast.data.latents import open_latents

    if options.vae or options.mirror:
        raise ValueError(f"--vae and --mirror are for images, {options.source} holds moments")
    data = open_latents(options.source)
    limit = options.num_classes or data.num_classes
    if not 0 <= int(data.labels.min()) <= int(data.labels.max()) < limit:
        raise ValueError(
            f"labels must lie in [0, {limit}), got {int(data.labels.min())} .. {int(data.labels.max())}"
        )
    facts = {"shape": [*data.moments_shape], "num_classes": limit, "vae": data.vae}
    return data, lambda moments: moments, facts


def open_images(options: Options):
    """``(data set, function from its batches to moments, what the index says of them)``; ValueError: what is wrong."""
    import torch

    from sra_fast.data.images import ImageFolder
    from sra_fast.data.vae import load_vae, make_encoder, moments_shape, vae_identity

    if not options.vae:
        raise ValueError("images need --vae, the folder of an AutoencoderKL")
    torch.set_num_threads(1)  # on a CPU the rounding depends on their number, the output must not
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    data = ImageFolder(options.source, options.resolution, options.num_classes, options.mirror)
    vae = load_vae(options.vae)
    facts = {"num_classes": data.num_classes, "vae": vae_identity(vae)}
    facts |= {key: getattr(options, key) for key in ("resolution", "mirror", "precision")}
    encode = make_encoder(vae, options.precision, device)
    return data, encode, {"shape": [*moments_shape(vae, encode, options.resolution)], **facts}


def prepare(options: Options):
    """The checked ``Plan``; ValueError says what is wrong."""
    from sra_fast.data.latents import INDEX, VERSION
    from sra_fast.data.writer import Plan

    source, out = Path(options.source), Path(options.out)
    for name in ("resolution", "shard_size", "batch", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if source.resolve() == out.resolve():
        raise ValueError(f"out must be another folder than source, got {out} for both")
    packed = (source / INDEX).exists() or (source / "vae-sd").is_dir()
    if (
        not packed and source.resolve() in out.resolve().parents
    ):  # the next run would take it for a class
        raise ValueError(f"out must not lie in the folder of the images, got {out} in {source}")
    data, encode, facts = (open_moments if packed else open_images)(options)
    job = {
        "version": VERSION,
        "layout": options.layout,
        "source_sha256": data.fingerprint,
        "num_images": len(data),
        **facts,
    }
    job |= {
        "shard_size": options.shard_size,
        "dtype": options.dtype if options.layout == "packed" else "float32",
    }
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Plan(data, encode, job, out, options.batch, options.threads, rank, world)


def fail(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def main() -> None:
    from sra_fast.config.cli import make_parser, parse
    from sra_fast.data.writer import execute

    parser = make_parser(Options, __doc__.partition(":\n")[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)
    try:
        plan = prepare(options)
    except ValueError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # every process of this machine finds the same
            sys.exit(2)
        fail(error)
    try:
        if execute(plan):
            print(f"{plan.out}: {len(plan.source)} images of {plan.job['num_classes']} classes")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
