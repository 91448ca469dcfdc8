"""How preprocess.py makes features: of which images, with which model, for which data set."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from sra_fast.data.coco_features import in_order_of_names
from sra_fast.data.features import FEATURES_FOLDER, check_name
from sra_fast.data.options import FEATURE_OPTIONS, READ_AS, Options, default, refuse
from sra_fast.data.packed import INDEX, LABELS, REPAIR, Shards, check_finished, load_npy, read_index
from sra_fast.data.sources import ImageSource
from sra_fast.data.vision import features_shape, load_vision_model, make_extractor
from sra_fast.data.writer import refuse_changed
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import why_unreadable


def check_feature_options(options: Options) -> None:
    """ValueError for options that cannot be, or that have no effect."""
    if options.features is None:
        refuse(options, FEATURE_OPTIONS, "is for features", "was given without --features")
        return
    require_that(
        options.layout == "packed", "features are packed beside packed data, got layout published"
    )
    require_that(options.bad != "list", "bad list makes nothing, got features as well")
    grid = options.features_grid
    require_that(grid is None or grid >= 1, f"features_grid must be at least 1, got {grid}")
    check_name(features_name(options), "features_name")


def features_name(options: Options) -> str:
    """The name that features get."""
    if options.features_name is not None:
        return options.features_name
    return Path(options.features).resolve().name


def features_folder(options: Options, folder: Path) -> Path:
    """Where the features of the data set in ``folder`` go."""
    return folder / FEATURES_FOLDER / features_name(options)


def made_like(options: Options, folder: Path) -> Options:
    """Options that read images as those of a finished data set were read.

    Raises:
        ValueError: the data set is not finished, or an option was given that contradicts it.
    """
    check_finished(folder)
    what = "features" if options.features else "captions"
    require_that(
        (folder / INDEX).exists(),
        f"{what} need vae or pixels true, or an out that is finished packed data; there are none in "
        f"{folder}",
    )
    index = read_index(folder)
    # moments that were made of moments do not tell how their images were read
    held = {name: index[name] for name in READ_AS if name in index}
    # an array has the channels that it has
    if index.get("kind") == "pixels" and not options.source.endswith(".npz"):
        held["channels"] = index["shape"][0]
    for name, value in held.items():
        given = getattr(options, name)
        require_that(
            given in (default(name), value),
            f"{folder} was made with {name} {value}, got {given}: leave --{name} out",
        )
    return replace(options, **held)


def check_same_images(source: ImageSource, folder: Path) -> None:
    """ValueError unless a finished data set was made of these images.

    Names, labels and the contents of a few files are compared; of data that were made of no images,
    number and labels, and the numbers in the names if they are MS-COCO's as U-ViT's scripts leave
    it.
    """
    index = read_index(folder)
    if index.get("numbered"):
        stems = [PurePosixPath(name).stem for name in source.names]
        require_that(
            stems == [*map(str, in_order_of_names(range(len(stems))))],
            f"{folder} holds images that are known by their numbers: the images of {source.place} "
            "must be named 0.png, 1.png, ...",
        )
    complete = not index.get("report", {}).get("skipped")
    try:
        labels = torch.from_numpy(load_npy(folder / LABELS))
    except (OSError, ValueError, EOFError) as error:
        reason = why_unreadable(error)
        raise ValueError(
            f"{folder / LABELS} was altered or cannot be read: {reason}. {REPAIR}"
        ) from None
    require_that(
        not complete or len(labels) == len(source),
        f"{folder} holds {len(labels)} images, {source.place} has {len(source)}",
    )
    same = not complete or torch.equal(labels, source.labels)
    if "resolution" in index:
        same = same and index["source_sha256"] == source.fingerprint
    require_that(same, f"{folder} was made of other images than those of {source.place}")
    parts = sorted((folder / "parts").glob("*.json"))
    refuse_changed(source, folder, (json.loads(part.read_text()) for part in parts))


def belongs_to(
    folder: Path, labels: Tensor, missing: list[int] | None, what: str = "features"
) -> dict:
    """What the index of features says of the data set in ``folder``, once both are there.

    Args:
        folder: of the data set.
        labels: of the features' images.
        missing: numbers of the images of the source that could not be read; None: the source is the
            data set itself.
        what: was made of them.

    Raises:
        ValueError: they are not the data set's.
    """
    data = Shards(folder, read_index(folder).get("kind", "moments"))
    require_that(
        torch.equal(labels, data.labels),
        f"{folder} holds {data.length} images, {what} were made of {len(labels)}, or of images of "
        "other classes: have the images changed?",
    )
    # an image that was broken may have been mended since, and another one of its class be broken
    require_that(
        missing is None or missing == data.index.get("missing", []),
        f"{folder} was made without other images than {what}: have images that could not be read "
        "changed?",
    )
    return {"data_sha256": data.fingerprint}


def extracted(
    options: Options, channels: int, size: int, side: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], dict, dict]:
    """Images to features: the function, what a restart must have in common, and what the index says
    besides.

    Args:
        options: with ``features``.
        channels, size: of the images.
        side: of a row of the data set: that of a latent, or of an image.
        device: where the model runs.

    Raises:
        ValueError: the model cannot be used, or not for these images.
    """
    grid = options.features_grid
    if grid is None:
        require_that(
            side % 2 == 0,
            f"the data have a side of {side}, half of which is no number of patches: give "
            "features_grid",
        )
        grid = side // 2
    vision = load_vision_model(options.features)
    extract = make_extractor(vision, grid, options.precision, device)
    recipe = {
        "kind": "features",
        "shape": [*features_shape(vision, extract, grid, channels, size)],
        "model": vision.identity,
        "dtype": options.features_dtype,
        "precision": options.precision,
        # side of the images that the model has seen, in pixels
        "side": grid * vision.patch,
        "scale": vision.scale,
        "mean": vision.mean,
        "std": vision.std,
    }
    return extract, recipe, {"features_path": str(Path(options.features).absolute())}
