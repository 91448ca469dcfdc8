"""The body of preprocess.py: images to VAE moments, pixels or features, captions to text features, or
one layout of moments to another.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import ImageColor
from torch import Tensor

from sra_fast.data.arrays import open_array
from sra_fast.data.coco_features import (
    TRAIN,
    VAL,
    CocoContexts,
    CocoMoments,
    CocoPart,
    holds_coco_features,
    read_empty,
)
from sra_fast.data.feature_jobs import (
    belongs_to,
    check_feature_options,
    check_same_images,
    extracted,
    features_folder,
    made_like,
)
from sra_fast.data.features import FEATURES_FOLDER
from sra_fast.data.folders import ImageFolder, open_folder
from sra_fast.data.huggingface import PREFIX, is_saved, open_huggingface
from sra_fast.data.idx import holds_idx, image_side, open_idx
from sra_fast.data.images import MODES, Crop
from sra_fast.data.latents import MomentDataset, open_latents
from sra_fast.data.options import (
    DECODING_OPTIONS,
    IMAGE_OPTIONS,
    READ_AS,
    SOURCE_OPTIONS,
    Options,
    refuse,
)
from sra_fast.data.packed import HELD_OUT_FOLDER, INDEX, VERSIONS, read_index
from sra_fast.data.pixels import PackedPixels, read_image_array
from sra_fast.data.sources import ImageSource, check_apart
from sra_fast.data.stored_text import TEXT_FOLDER, as_rows
from sra_fast.data.tars import TarSource, holds_tars
from sra_fast.data.text_jobs import (
    Captions,
    TextSource,
    check_source_options,
    check_text_options,
    encoded_text,
    end_of_text,
    load_encoders,
    rows_per_shard,
    text_folder,
    text_name,
    text_recipe,
)
from sra_fast.data.vae import load_vae, make_encoder, moments_shape, vae_identity
from sra_fast.data.writer import PackingJob, read_ahead
from sra_fast.models import TextFeatures
from sra_fast.utils.checks import require_that
from sra_fast.utils.launcher import cuda_index


def holds_data(source: Path) -> bool:
    """Whether there is a data set at ``source``, and no images."""
    return (source / INDEX).exists() or (source / "vae-sd").is_dir()


def holds_pixels(source: Path) -> bool:
    """Whether there are packed pixels at ``source``."""
    return (source / INDEX).exists() and read_index(source).get("kind") == "pixels"


def open_images(options: Options) -> tuple[ImageSource, ImageSource | None]:
    """Training and held-out images, with their captions if these are asked for. ValueError: they
    cannot be opened.
    """
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
        refuse(options, DECODING_OPTIONS, "is for image files", "is an array")
        train = open_array(source, crop, options.num_classes, options.mirror)
        held_out = None
    elif holds_idx(path):
        refuse(options, DECODING_OPTIONS, "is for image files", "holds arrays")
        train, held_out = open_idx(source, crop, options.num_classes, options.mirror)
    else:
        train, held_out = open_folder(source, *common)
    if options.captions:
        parts = [part for part in (train, held_out) if part is not None]
        for part in parts:
            part.open_captions(options.captions)
        check_apart(parts)
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
    if holds_idx(Path(options.source)):
        return image_side(Path(options.source))
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
    check_feature_options(options)
    if holds_coco_features(Path(options.source)):
        check_source_options(options)
    else:
        check_text_options(options)
    if options.out is None:
        require_that(options.bad == "list", "out must name the folder to make, got nothing")
        return
    source = Path(options.source)
    out = Path(options.out)
    same = source.resolve() == out.resolve()
    if options.features and holds_pixels(source):
        require_that(same, f"features of packed pixels lie beside them, in {source}, got out {out}")
        return
    require_that(not same, f"out must be another folder than source, got {out} for both")
    # the next run would take the output for a class
    require_that(
        holds_data(source) or source.resolve() not in out.resolve().parents,
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


def _image_jobs(options: Options) -> list[PackingJob]:
    """Images to moments or pixels, to features, captions to text features, or all of that."""
    both = options.pixels and bool(options.vae)
    makes_data = options.pixels or bool(options.vae)
    adds = bool(options.features or options.captions)
    require_that(
        not both and (makes_data or adds),
        "images need either vae, the folder of an AutoencoderKL (its latents), or pixels true (no "
        f"VAE), got {'both' if both else 'neither'}",
    )
    out = Path(options.out)
    if adds and not makes_data:
        options = made_like(options, out)
    if options.resolution is None:
        options = replace(options, resolution=default_resolution(options))
    # the folder first: a mistake in it shows before a model is loaded
    train, held_out = open_images(options)
    folder = out / HELD_OUT_FOLDER
    # training images would be among them
    remedy = "delete it or choose another out" if makes_data else "give the images of both"
    require_that(
        held_out is not None or not folder.exists(),
        f"{folder} was made by another command: {remedy}",
    )
    # the training data are complete last
    parts = [(train, out)] if held_out is None else [(held_out, folder), (train, out)]
    if makes_data:
        convert = _stored if options.pixels else _encoded
        encode, recipe, extra = convert(options, train)
        side = recipe["shape"][-1]
        extra["classes"] = train.class_names
        jobs = [
            _make_job(options, part, (encode, {**recipe, **_read_as(options, part)}, extra), where)
            for part, where in parts
        ]
    else:
        for part, where in parts:
            check_same_images(part, where)
        side = read_index(out)["shape"][-1]
        jobs = []
    if options.features:
        channels = train.crop.channels
        jobs += _feature_jobs(options, parts, channels, options.resolution, side)
    if options.captions:
        jobs += _text_jobs(options, parts, notes=not makes_data)
    return jobs


def _read_as(options: Options, images: ImageSource) -> dict:
    """How images are read, which a restart must have in common."""
    asked = {name: getattr(options, name) for name in READ_AS}
    # of held-out images there are no mirror images
    return {**asked, "mirror": images.copies == 2, "num_classes": images.num_classes}


def _feature_jobs(
    options: Options,
    parts: list[tuple[ImageSource | PackedPixels, Path]],
    channels: int,
    size: int,
    side: int,
) -> list[PackingJob]:
    """Features of images beside the data sets that are made of them.

    Args:
        options: with ``features``.
        parts: images, and the folder of their data set.
        channels, size: of the images.
        side: of a row of the data sets.
    """
    extract, recipe, extra = extracted(options, channels, size, side, _choose_device())
    jobs = []
    for part, folder in parts:
        from_files = isinstance(part, ImageSource)
        read = _read_as(options, part) if from_files else {"num_classes": part.num_classes}
        conversion = (extract, {**recipe, **read}, extra)
        job = _make_job(options, part, conversion, features_folder(options, folder))
        job.at_end = partial(_end_of_features, job.layout.labels, from_files, folder)
        jobs.append(job)
    return jobs


def _end_of_features(labels: Tensor, from_files: bool, folder: Path, numbers: list[int]) -> dict:
    """The ``at_end`` of features of the data set in ``folder``.

    Args:
        labels: of all images of the source.
        from_files: it is no data set.
        folder: of the data set.
        numbers: of the images that have features.
    """
    missing = sorted({*range(len(labels))} - {*numbers}) if from_files else None
    return belongs_to(folder, labels[numbers], missing)


def _text_jobs(
    options: Options, parts: list[tuple[ImageSource, Path]], notes: bool
) -> list[PackingJob]:
    """Features of captions beside the data sets that are made of their images.

    Args:
        options: with ``captions``.
        parts: images with captions, and the folder of their data set.
        notes: whether the jobs say what a user should know of the images.
    """
    encoders = load_encoders(options, _choose_device())
    encode, recipe, extra = encoded_text(options, encoders)
    null = lambda: encode(encoders.tokenize([""])[0])
    jobs = []
    for part, folder in parts:
        captions = Captions(part, encoders, part.notes if notes else [])
        read = {**_read_as(options, part), "num_classes": captions.num_classes}
        conversion = (encode, {**recipe, **read}, extra)
        out = text_folder(folder, text_name(options))
        jobs.append(_text_job(options, captions, conversion, null, folder, out))
    return jobs


def _text_job(
    options: Options,
    source: TextSource,
    conversion: Conversion,
    null: Callable[[], Tensor],
    folder: Path,
    out: Path,
) -> PackingJob:
    """The job of the captions of the data set in ``folder``."""
    rows = rows_per_shard(conversion[1], options.shard_size)
    job = _make_job(replace(options, shard_size=rows), source, conversion, out)
    job.at_end = end_of_text(source, null, job.recipe, folder, out)
    return job


def _coco_jobs(options: Options) -> list[PackingJob]:
    """Moments, text features and perhaps images as U-ViT and REPA have them.

    Raises:
        ValueError: options for images that would have no effect, or files that are missing.
    """
    used = ("features", "precision", "resolution") if options.features else ()
    unused = tuple(name for name in (*IMAGE_OPTIONS, "num_classes") if name not in used)
    refuse(options, unused, "is for images", "holds latents and features of their captions")
    root = Path(options.source)
    empty = read_empty(root)
    out = Path(options.out)
    places = [(root / VAL, out / HELD_OUT_FOLDER), (root / TRAIN, out)]
    parts = [(CocoPart(place), folder) for place, folder in places if place.is_dir()]
    _choose_device()
    jobs = []
    side = 0
    for part, folder in parts:
        moments = CocoMoments(part)
        side = moments.moments_shape[-1]
        recipe = {
            "kind": "moments",
            "shape": [*moments.moments_shape],
            "num_classes": 1,
            "vae": None,
            "dtype": options.dtype,
        }
        extra = {"vae_path": None, "classes": None, "numbered": True}
        conversion = (_as_they_are, recipe, extra)
        jobs.append(_make_job(options, moments, conversion, folder))
    if options.features:
        images = [(_coco_images(options, part, 8 * side), folder) for part, folder in parts]
        size = images[0][0].crop.size
        jobs += _feature_jobs(options, images, 3, size, side)
    recipe = {**text_recipe(options, *empty.shape, 0, False), "encoders": None}
    for part, folder in parts:
        contexts = CocoContexts(part, empty)
        of_part = {**recipe, "num_classes": contexts.num_classes}
        place = text_folder(folder, text_name(options, "clip"))
        null = lambda: _context_rows(empty[None])
        conversion = (_context_rows, of_part, {"text_paths": None})
        jobs.append(_text_job(options, contexts, conversion, null, folder, place))
    return jobs


def _context_rows(tokens: Tensor) -> Tensor:
    return as_rows(TextFeatures(tokens, None, None, None, None))


def _coco_images(options: Options, part: CocoPart, size: int) -> ImageFolder:
    """The images beside a part's moments, in the same order.

    Raises:
        ValueError: there is not one image for every file of moments.
    """
    images = ImageFolder(part.folder, Crop(options.resolution or size), 1)
    found = [Path(name).stem for name in images.names]
    require_that(
        found == [str(number) for number in part.images],
        f"{part.folder} must hold an image of every number for --features, it has {len(found)} "
        f"images and {len(part.images)} moments",
    )
    return images


def _pixel_jobs(options: Options) -> list[PackingJob]:
    """Features of packed pixels, beside them."""
    refuse(options, (*SOURCE_OPTIONS, "num_classes"), "is for images", "holds packed pixels")
    folders = [Path(options.source) / HELD_OUT_FOLDER, Path(options.source)]
    # a shard that was altered would have features of its own
    parts = [(PackedPixels(path, verify=True), path) for path in folders if path.is_dir()]
    channels, size, _ = parts[-1][0].shape
    return _feature_jobs(options, parts, channels, size, size)


def _moment_jobs(options: Options) -> list[PackingJob]:
    """Moments that are there already, in another layout.

    Raises:
        ValueError: options for images, pixels, or labels outside the range.
    """
    source = Path(options.source)
    refuse(options, IMAGE_OPTIONS, "is for images", "holds no images but a data set")
    if holds_pixels(source):
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
        if (folder / INDEX).exists() and read_index(folder).get("numbered"):
            extra["numbered"] = True
        if folder is source:
            data.notes = _left_behind(source)
        jobs.append(_make_job(options, data, (_as_they_are, recipe, extra), out))
    return jobs


def _left_behind(folder: Path) -> list[str]:
    """A note of the features beside a data set, which stay where they are."""
    indices = [
        *folder.glob(f"{FEATURES_FOLDER}/*/{INDEX}"),
        *folder.glob(f"{TEXT_FOLDER}/*/{INDEX}"),
    ]
    names = sorted(str(index.parent.relative_to(folder)) for index in indices)
    return [f"not taken along from {folder}: {', '.join(names)}"] if names else []


def make_jobs(options: Options) -> list[PackingJob]:
    """Check everything and describe the jobs; nothing is written yet.

    Returns:
        The job of the held-out images, if there are any, and that of the training images; then
        those of their features, and those of their captions.

    Raises:
        ValueError: the options, the source or a model cannot be used.
    """
    source = Path(options.source)
    of_pixels = bool(options.features) and holds_pixels(source)
    if of_pixels and options.out is None:
        options = replace(options, out=options.source)
    _check_options(options)
    if of_pixels:
        return _pixel_jobs(options)
    if holds_coco_features(source):
        return _coco_jobs(options)
    return _moment_jobs(options) if holds_data(source) else _image_jobs(options)


def _make_job(
    options: Options,
    source: ImageSource | MomentDataset | PackedPixels | CocoMoments | TextSource,
    conversion: Conversion,
    out: Path,
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
        not holds_data(Path(options.source)), f"bad list is for images, got {options.source}"
    )
    size = options.resolution or default_resolution(options)
    for source in open_images(replace(options, mirror=False, resolution=size)):
        if source is None:
            continue
        numbers = range(len(source))
        chunks = [[*numbers[i : i + options.batch]] for i in range(0, len(source), options.batch)]
        for batch in read_ahead(source.read, chunks, options.threads):
            yield from batch.report.skipped
