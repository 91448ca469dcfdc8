"""The body of preprocess.py: images to VAE moments or pixels, or one layout of moments to another."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import ImageColor
from torch import Tensor

from sra_fast.data.arrays import ArraySource
from sra_fast.data.batch import Report
from sra_fast.data.folders import open_folder
from sra_fast.data.huggingface import PREFIX, is_saved, open_huggingface
from sra_fast.data.images import MODES, Crop
from sra_fast.data.latents import PLAUSIBLE_DEVIATION, MomentDataset, open_latents
from sra_fast.data.packed import HELD_OUT_FOLDER, INDEX, VERSIONS, read_index
from sra_fast.data.pixels import read_image_array
from sra_fast.data.sources import ImageSource
from sra_fast.data.tars import TarSource, holds_tars
from sra_fast.data.vae import load_vae, make_encoder, moments_shape, vae_identity
from sra_fast.data.writer import Finished, PackingJob, read_ahead
from sra_fast.utils.checks import require_that
from sra_fast.utils.launcher import cuda_index


@dataclass
class Options:
    """What to make of what. Interrupted, the same command resumes, on any number of processes."""

    source: str
    """images: a folder or .zip (class folders, train/ and val/, a dataset.json, or no classes),
    WebDataset tars (one, a folder, or name-{000..010}.tar), a Hugging Face data set (a saved folder,
    or hf:NAME), or an .npz (arr_0 uint8 [N, H, W, C], arr_1 labels); moments: a folder with vae-sd/
    or index.json"""
    out: str | None = None
    """folder to make; with `bad list` nothing is written"""
    vae: str | None = None
    """folder of a diffusers AutoencoderKL: images become its moments"""
    pixels: bool = False
    """keep the images themselves, in uint8, for models without a VAE"""
    layout: Literal["packed", "published"] = "packed"
    """what to write: shards, or the published code's vae-sd/**/*.npy and vae-sd/dataset.json"""
    resolution: int | None = None
    """side of the images' centre crop; default: 256 with a VAE, 64 for pixels, and for the images of
    an .npz their own"""
    channels: int = 3
    """of pixels: 1 (grey), 3 or 4 (with alpha); an .npz keeps its own"""
    num_classes: int | None = None
    """how many classes there must be; default: as many as there are"""
    holdout: float = 0.0
    """share of every class, at least one image, that is held out: OUT/held_out is then a data set of
    its own"""
    mirror: bool = False
    """add the mirror image of every training image"""
    background: str = "white"
    """colour under transparent pixels: a name or #rrggbb"""
    orientation: bool = False
    """rotate images as their EXIF orientation says (ImageNet's were ignored by all published work)"""
    bad: Literal["stop", "skip", "list"] = "stop"
    """an image that cannot be read: stops the command, is left out and counted, or is listed, without
    making anything"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """of the shards of moments; float16 is eight times as fine as bfloat16"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of the encoder"""
    shard_size: int = 8192
    """images per shard, and the most that a restart makes again"""
    batch: int = 64
    """images per call of the encoder"""
    threads: int = 8
    """threads per process that read, decode and crop"""


# options of a source of images, and those of the decoding of their files
DECODING_OPTIONS = ("channels", "background", "orientation", "bad")
IMAGE_OPTIONS = ("vae", "pixels", "mirror", "holdout", "resolution", "precision", *DECODING_OPTIONS)


def _refuse(options: Options, names: tuple[str, ...], are: str, source_is: str) -> None:
    """ValueError for options that were given and would have no effect on this source."""
    defaults = {field.name: field.default for field in fields(Options)}
    for name in names:
        require_that(
            getattr(options, name) == defaults[name],
            f"--{name} {are}, {options.source} {source_is}",
        )


def holds_moments(source: Path) -> bool:
    """Whether there are moments at ``source``, and no images."""
    return (source / INDEX).exists() or (source / "vae-sd").is_dir()


def open_images(options: Options) -> tuple[ImageSource, ImageSource | None]:
    """Training and held-out images. ValueError: they cannot be opened."""
    crop = Crop(options.resolution, options.channels, options.background, options.orientation)
    source = options.source
    bad = "stop" if options.bad == "stop" else "skip"
    common = (crop, options.num_classes, options.mirror, bad)
    path = Path(source)
    if source.startswith(PREFIX) or is_saved(path):
        train, held_out = open_huggingface(source, *common)
    elif holds_tars(path):
        train, held_out = TarSource(source, *common), None
    elif path.suffix == ".npz":
        _refuse(options, DECODING_OPTIONS, "is for image files", "is an array")
        train = ArraySource(source, crop, options.num_classes, options.mirror)
        held_out = None
    else:
        train, held_out = open_folder(source, *common)
    if options.holdout:
        require_that(
            held_out is None,
            f"holdout {options.holdout} was asked for, {source} has held-out images already",
        )
        train, held_out = train.hold_out(options.holdout)
    if held_out is not None:
        # mirror images are for training
        held_out.copies = 1
    return train, held_out


def default_resolution(options: Options) -> int:
    """The side of the crop if none was asked for."""
    if options.source.endswith(".npz") and Path(options.source).is_file():
        return read_image_array(Path(options.source))[0].shape[1]
    return 64 if options.pixels else 256


def _check_options(options: Options) -> None:
    for name in ("resolution", "shard_size", "batch", "threads"):
        value = getattr(options, name)
        require_that(value is None or value >= 1, f"{name} must be at least 1, got {value}")
    require_that(0 <= options.holdout < 1, f"holdout must lie in [0, 1), got {options.holdout}")
    require_that(
        options.channels in MODES,
        f"channels must be one of {[*MODES]}, got {options.channels}",
    )
    try:
        ImageColor.getrgb(options.background)
    except ValueError:
        raise ValueError(
            f"background must be a colour, a name or #rrggbb, got {options.background}"
        ) from None
    if options.out is None:
        require_that(options.bad == "list", "out must name the folder to make, got nothing")
        return
    source = Path(options.source)
    out = Path(options.out)
    require_that(
        source.resolve() != out.resolve(),
        f"out must be another folder than source, got {out} for both",
    )
    # the next run would take the output for a class
    require_that(
        holds_moments(source) or source.resolve() not in out.resolve().parents,
        f"out must not lie in the folder of the images, got {out} in {source}",
    )


def _choose_device() -> torch.device:
    # on a CPU rounding depends on the number of threads, and the output must not
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", cuda_index())
    torch.cuda.set_device(device)
    return device


# a function from a source's images to what is stored, what a restart must have in common, and what
# the index says besides
Conversion = tuple[Callable[[Tensor], Tensor], dict, dict]


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _encoded(options: Options, images: ImageSource) -> Conversion:
    """Images to moments."""
    channels = images.crop.channels
    require_that(channels == 3, f"a VAE takes images of 3 channels, got {channels}")
    device = _choose_device()
    vae = load_vae(options.vae)
    encode = make_encoder(vae, options.precision, device)
    recipe = {
        "kind": "moments",
        "shape": [*moments_shape(vae, encode, options.resolution)],
        "vae": vae_identity(vae),
        # the published layout is fp32 whatever was asked for
        "dtype": options.dtype if options.layout == "packed" else "float32",
        "precision": options.precision,
    }
    path = Path(options.vae)
    # a hub id is not turned into a path
    return encode, recipe, {"vae_path": str(path.absolute()) if path.exists() else options.vae}


def _stored(options: Options, images: ImageSource) -> Conversion:
    """Images as they are."""
    require_that(
        options.layout == "packed", "pixels are packed: the published layout is one of moments"
    )
    size = options.resolution
    shape = [images.crop.channels, size, size]
    return _as_they_are, {"kind": "pixels", "shape": shape, "vae": None, "dtype": "uint8"}, {}


def _image_jobs(options: Options) -> list[tuple[ImageSource, Conversion, dict, Path]]:
    require_that(
        options.pixels != bool(options.vae),
        "images need either vae, the folder of an AutoencoderKL (its latents), or pixels true (no "
        f"VAE), got {'both' if options.pixels else 'neither'}",
    )
    # the folder first: a mistake in it shows before the VAE is loaded
    train, held_out = open_images(options)
    encode, recipe, extra = _stored(options, train) if options.pixels else _encoded(options, train)
    recipe |= {
        "resolution": options.resolution,
        "mirror": options.mirror,
        "background": options.background,
        "orientation": options.orientation,
        "bad": options.bad,
        "holdout": options.holdout,
        "num_classes": train.num_classes,
    }
    extra |= {"classes": train.class_names}
    jobs = [(train, (encode, recipe, extra), Path(options.out))]
    folder = Path(options.out) / HELD_OUT_FOLDER
    # training images would be among them
    require_that(
        held_out is not None or not folder.exists(),
        f"{folder} was made by another command: delete it or choose another out",
    )
    if held_out is not None:
        jobs.insert(0, (held_out, (encode, {**recipe, "mirror": False}, extra), folder))
    return jobs


def _moment_jobs(options: Options) -> list[tuple[MomentDataset, Conversion, Path]]:
    """Moments that are there already, in another layout.

    Raises:
        ValueError: options for images, pixels, or labels outside the range.
    """
    source = Path(options.source)
    _refuse(options, IMAGE_OPTIONS, "is for images", "holds no images but a data set")
    if (source / INDEX).exists() and read_index(source).get("kind") == "pixels":
        raise ValueError(f"{options.source} holds packed pixels, which have one layout only")
    jobs = []
    for folder, out in (
        (source / HELD_OUT_FOLDER, Path(options.out) / HELD_OUT_FOLDER),
        (source, Path(options.out)),
    ):
        if folder is not source and not folder.is_dir():
            continue
        data = open_latents(str(folder))
        # a subset may lack the last classes
        num_classes = options.num_classes or data.num_classes
        lowest = int(data.labels.min())
        highest = int(data.labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(f"labels must lie in [0, {num_classes}), got {lowest} .. {highest}")
        recipe = {
            "kind": "moments",
            "shape": [*data.moments_shape],
            "num_classes": num_classes,
            "vae": data.vae,
            "dtype": options.dtype if options.layout == "packed" else "float32",
        }
        extra = {"vae_path": data.vae_path, "classes": data.class_names}
        jobs.append((data, (_as_they_are, recipe, extra), out))
    return jobs


def make_jobs(options: Options) -> list[PackingJob]:
    """Check everything and describe the jobs; nothing is written yet.

    Returns:
        The job of the held-out images, if there are any, and that of the training images.

    Raises:
        ValueError: the options, the source or the VAE cannot be used.
    """
    _check_options(options)
    if options.resolution is None and not holds_moments(Path(options.source)):
        options = replace(options, resolution=default_resolution(options))
    jobs = _moment_jobs(options) if holds_moments(Path(options.source)) else _image_jobs(options)
    return [_make_job(options, *job) for job in jobs]


def _make_job(
    options: Options, source: ImageSource | MomentDataset, conversion: Conversion, out: Path
) -> PackingJob:
    encode, recipe, extra = conversion
    # what a restart must have in common with this run
    recipe = {
        "version": VERSIONS[-1],
        "layout": options.layout,
        **recipe,
        "shard_size": options.shard_size,
        # last: of several differences the first is named, and this one tells a user least
        "num_images": len(source),
        # of loose moments the list alone: a file that was broken may have been mended since
        "source_sha256": getattr(source, "listing", source.fingerprint),
    }
    return PackingJob(
        source,
        encode,
        recipe,
        out,
        options.batch,
        options.threads,
        rank=int(os.environ.get("RANK", 0)),
        world=int(os.environ.get("WORLD_SIZE", 1)),
        extra=extra,
    )


def list_bad(options: Options) -> Iterator[str]:
    """The images that cannot be read, each with the reason; all are decoded, nothing is written.

    Raises:
        ValueError: the options or the source cannot be used.
    """
    _check_options(options)
    require_that(
        not holds_moments(Path(options.source)), f"bad list is for images, got {options.source}"
    )
    size = options.resolution or default_resolution(options)
    for source in open_images(replace(options, mirror=False, resolution=size)):
        if source is None:
            continue
        numbers = range(len(source))
        chunks = [[*numbers[i : i + options.batch]] for i in range(0, len(source), options.batch)]
        for batch in read_ahead(source.read, chunks, options.threads):
            yield from batch.report.skipped


def summary(job: PackingJob, finished: Finished) -> list[str]:
    """What was made, and what a user should know of it."""
    recipe = job.recipe
    classes = recipe["num_classes"]
    kind = "moments" if recipe["kind"] == "moments" else "pixels"
    shape = " x ".join(map(str, recipe["shape"]))
    lines = [
        f"{job.out}: {finished.images} images of {classes} class{'es' if classes > 1 else ''}, "
        f"{kind} {shape}"
    ]
    lines += getattr(job.source, "notes", [])
    report: Report = finished.report
    lines += report.lines()
    lines += _statistics_lines(recipe, finished.statistics)
    return lines


def _statistics_lines(recipe: dict, statistics: dict) -> list[str]:
    numbers = lambda values: ", ".join(f"{value:.4g}" for value in values)
    mean = numbers(statistics["mean"])
    std = numbers(statistics["std"])
    if recipe["kind"] == "pixels":
        return [f"pixels 0 to 255: mean {mean}; standard deviation {std}"]
    lines = [f"latents: mean {mean}; standard deviation {std}"]
    vae = recipe["vae"] or {}
    if "scaling_factor" not in vae:
        return lines
    scale = vae["scaling_factor"]
    # as a whole: the root of the mean variance
    deviation = (sum(value**2 for value in statistics["std"]) / len(statistics["std"])) ** 0.5
    if deviation == 0:
        return [*lines, "warning: all latents are equal"]
    lines.append(
        f"times the VAE's scaling_factor {scale:g}: standard deviation {scale * deviation:.3g}"
    )
    low, high = PLAUSIBLE_DEVIATION
    if not low <= scale * deviation <= high:
        lines.append(
            f"warning: a model expects about 1; train with --data.latent_scale {1 / deviation:.4g}"
        )
    return lines
