"""The configured data set, checked against the model and the batch."""

import math
from pathlib import Path

import numpy as np
import torch

from sra_fast import models
from sra_fast.config.schema import Config, DataConfig, ModelConfig
from sra_fast.data.coco_features import holds_coco_features
from sra_fast.data.huggingface import is_saved
from sra_fast.data.images import holds_images
from sra_fast.data.latents import MomentDataset, open_latents, warn_of_deviation
from sra_fast.data.normalization import in_words
from sra_fast.data.packed import HELD_OUT_FOLDER, INDEX, RECIPE, check_finished, read_index
from sra_fast.data.pixels import PackedPixels, PixelArray, Pixels
from sra_fast.data.stored_text import StoredText
from sra_fast.data.tars import holds_tars
from sra_fast.data.training_data import TrainingData
from sra_fast.utils.checks import require_that
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import DATASETS

# how many numbers of a data set in memory are looked at before a run: that takes hundredths of a
# second; and how many images of another one, each of which may be a file
NUMBERS_LOOKED_AT = 2**22
IMAGES_LOOKED_AT = 8
# pixels are scaled to [-1, 1]: beyond the first a warning, and beyond the second nobody has scaled
# what is never negative
FAR_PIXEL = 1.5
UNSCALED_PIXEL = 2.0


@DATASETS.register("latents")
def make_latents(data: DataConfig) -> TrainingData:
    """VAE moments on disk."""
    require_that(data.path is not None, "data.path must name a folder of VAE moments, got nothing")
    require_that(
        not data.flip,
        "data.flip is for pixels: a mirrored latent is no latent of the mirrored image "
        "(preprocess.py --mirror true adds those)",
    )
    given = {"latent_scale": data.latent_scale, "latent_shift": data.latent_shift}
    for name, value in given.items():
        require_that(
            value is None or not data.latent_statistics,
            f"data.latent_statistics takes scale and shift from the data (a run's config.yaml has "
            f"them already): expected no data.{name}, got {value}",
        )
    found = open_latents(data.path, data.latent_scale, data.latent_shift, data.verify)
    if data.latent_statistics:
        found.use_statistics()
    warn_of_deviation(found)
    return found


@DATASETS.register("pixels")
def make_pixels(data: DataConfig) -> Pixels:
    """Images, packed or in an .npz."""
    require_that(data.path is not None, "data.path must name packed images or an .npz, got nothing")
    if Path(data.path).is_file():
        return PixelArray(data.path, data.flip)
    return PackedPixels(data.path, data.flip, data.verify)


def kind_of(path: str | None) -> str:
    """The name in ``DATASETS`` of what lies at ``path``.

    Raises:
        ValueError: nothing that a run can be trained on. Images have to be prepared first; the
            message has the command.
    """
    require_that(
        path is not None,
        "data.path must name the training data (`--data PATH`), got nothing; `--data.name digits` "
        "needs no path",
    )
    root = Path(path)
    check_finished(root)
    if (root / INDEX).exists():
        return "pixels" if read_index(root).get("kind") == "pixels" else "latents"
    if root.suffix == ".npz":
        return "pixels"
    if holds_coco_features(root):
        raise ValueError(
            f"{path} holds latents and text features of MS-COCO; pack them first: sra-fast preprocess "
            f"--source {path} --out data/NAME; then --data data/NAME"
        )
    is_latents = (root / "vae-sd").is_dir()
    begun = (root / RECIPE).exists() or (root / HELD_OUT_FOLDER / RECIPE).exists()
    is_source = root.exists() and (is_saved(root) or holds_tars(root) or holds_images(root))
    if is_source and not is_latents and not begun:
        raise ValueError(
            f"{path} holds images; prepare them first: sra-fast preprocess --source {path} "
            "--out data/NAME --resolution 256 --vae VAE_FOLDER (latents), or --resolution 64 "
            "--pixels true (small images, no VAE); then --data data/NAME"
        )
    return "latents"


def open_data(data: DataConfig) -> TrainingData:
    """The data set; name, scale and shift are filled in.

    Raises:
        ValueError: it cannot be read, cannot be trained on, or has no use for an option.
    """
    if data.name == "auto":
        data.name = kind_of(data.path)
    try:
        found = DATASETS[data.name](data)
    except FileNotFoundError as error:
        raise ValueError(
            f"the data set {data.name} needs {error.filename or data.path}, which is not there"
        ) from None
    # what a set that somebody has added need not know of itself
    found.name = found.name or data.name
    if found.path is None:
        found.path = data.path
    _check_contract(found)
    if isinstance(found, MomentDataset):
        data.latent_scale = found.normalization.scale
        data.latent_shift = found.normalization.shift
        # the numbers say it: a run's own configuration does not have both
        data.latent_statistics = False
    _check_options(data, found)
    if data.features is not None:
        require_that(
            not found.flip,
            f"data.flip would mirror images and not their features {data.features}: "
            "preprocess.py --mirror true stores both",
        )
        found.open_features(data.features, data.verify)
    return found


def _check_contract(data: TrainingData) -> None:
    """ValueError unless shape and labels are there, and are what ``TrainingData`` says."""
    missing = [name for name in ("shape", "labels", "num_classes") if not hasattr(data, name)]
    require_that(
        not missing,
        f"the data set {data.name} must have shape, labels and num_classes; it has no "
        f"{' and no '.join(missing)}",
    )
    require_that(
        len(data.shape) == 3,
        f"the images of the data set {data.name} must have a shape (C, H, W), got "
        f"{tuple(data.shape)}",
    )
    labels = data.labels
    is_tensor = isinstance(labels, torch.Tensor)
    require_that(
        is_tensor and labels.dtype == torch.int64 and labels.dim() == 1 and len(labels) > 0,
        f"the labels of the data set {data.name} must be a tensor [N] of int64, got "
        + (f"{labels.dtype} {[*labels.shape]}" if is_tensor else type(labels).__name__),
    )


def _check_options(options: DataConfig, data: TrainingData) -> None:
    """ValueError for options that were given and that the data set does nothing with."""
    require_that(
        data.flip or not options.flip,
        f"data.flip is not for the data set {data.name}, which does not mirror its images; "
        "got True",
    )
    facts = data.facts()
    require_that(
        not options.latent_statistics,
        "data.latent_statistics is for latents of a VAE, the data set "
        f"{data.name} has {'pixels' if facts.pixels else 'others'}; got True",
    )
    for name, used in (("latent_scale", facts.scale), ("latent_shift", facts.shift)):
        given = getattr(options, name)
        require_that(
            given is None or not facts.pixels,
            f"data.{name} is for latents, the data are pixels; got {given}",
        )
        # a set that takes the option says so in its facts
        require_that(
            given in (None, used),
            f"data.{name} is not for the data set {data.name}, whose own is {in_words(used)}; got "
            f"{given}",
        )


def open_condition(cfg: Config, data: TrainingData) -> None:
    """Open the text features of the data if the model is one of text.

    Raises:
        ValueError: there are none, or several and no name; or a name that no model asks for.
    """
    conditioning = models.preset(cfg.model.name)[0].conditioning
    if conditioning == "text":
        data.open_text(cfg.data.text, cfg.data.verify)
        # saved with the run: another set beside this one makes no difference later
        cfg.data.text = data.text.name
        return
    require_that(
        cfg.data.text is None,
        f"data.text is for models of text, {cfg.model.name} takes {conditioning}; got "
        f"{cfg.data.text}",
    )


def fill_in_model(cfg: Config, data: TrainingData) -> None:
    """Open the text that the model needs, and give it the sizes and classes of the data, where it
    has none of its own.

    Raises:
        ValueError: labels that are numbered from 1, which would make a class 0 without images; see
            ``open_condition``.
    """
    open_condition(cfg, data)
    channels, height, width = data.shape
    require_that(
        height == width,
        f"images must be square, the data's are {height} x {width}, with {channels} channels: "
        "preprocess.py crops images",
    )
    text = data.text
    if text is not None:
        cfg.model.fill_in_text(text.tokens, text.width, text.pooled)
    smallest = int(data.labels.min())
    counted = data.counted_classes and text is None
    if cfg.model.num_classes is None and counted and smallest > 0:
        raise ValueError(
            f"labels must be numbered from 0, the data has {smallest} .. {data.num_classes - 1}; "
            f"if classes without images are meant, give model.num_classes {data.num_classes}"
        )
    cfg.model.fill_in(data.shape, data.num_classes)


def check_data(data: TrainingData, cfg: Config) -> None:
    """ValueError unless the data fit the model and the batch, and are what they say of themselves,
    as far as a look at some of the images can tell.
    """
    model = cfg.model
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ValueError(
            f"the model takes latents {expected} (in_channels, input_size), "
            f"the data has {data.shape}"
        )
    if data.text is None:
        _check_labels(data, model.num_classes)
    else:
        _check_text(data.text, model)
    if len(data) < cfg.train.global_batch:
        raise ValueError(
            f"train.global_batch {cfg.train.global_batch} is larger than the data set "
            f"({len(data)} images): give --train.global_batch N, at most {len(data)}"
        )
    if not data.self_checked:
        _check_images(data)
    if data.fingerprint is None:
        warn(
            "the data set %s has no fingerprint: a resumed run cannot tell other images from these",
            data.name,
        )


def _check_images(data: TrainingData) -> None:
    """ValueError unless some of the images can be read, are finite numbers of the right shape, and
    have labels of the data's classes; for pixels that are not scaled, too, or else a warning.
    """
    count = NUMBERS_LOOKED_AT // math.prod(data.shape) if data.in_memory else IMAGES_LOOKED_AT
    rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), max(count, 2))).astype(int))
    low = math.inf
    high = -math.inf
    try:
        for numbers, latents, told in data.blocks(rows.tolist()):
            _check_block(data, numbers, latents, told)
            low = min(low, float(latents.min()))
            high = max(high, float(latents.max()))
    except IndexError as error:
        raise ValueError(
            f"the data set {data.name} has {len(data)} labels, expected as many images: {error}"
        ) from None
    if not data.facts().pixels:
        return
    found = f"the pixels of the data set {data.name} lie in [{low:g}, {high:g}]"
    require_that(
        low < 0 or high <= UNSCALED_PIXEL,
        f"{found}, expected [-1, 1]: of bytes take images / 127.5 - 1; if these are no images, let "
        "its facts say pixels=False",
    )
    if low < -FAR_PIXEL or high > FAR_PIXEL:
        warn("%s, expected [-1, 1]: pictures of samples will be cut off there", found)


def _check_block(
    data: TrainingData, numbers: list[int], latents: torch.Tensor, told: list[torch.Tensor]
) -> None:
    """ValueError unless these images, and their labels, are such as the data set says."""
    expected = (len(numbers), *data.shape)
    require_that(
        tuple(latents.shape) == expected,
        f"{len(numbers)} images of the data set {data.name} must have the shape {expected}, got "
        f"{tuple(latents.shape)}",
    )
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        first = numbers[int((~finite).nonzero()[0])]
        raise ValueError(f"{data.locate(first)} of the data set {data.name} is not finite")
    if data.text is not None:
        return
    labels = told[0]
    wrong = (labels < 0) | (labels >= data.num_classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{data.locate(numbers[place])} of the data set {data.name} has the label "
            f"{labels[place]}, expected one in [0, {data.num_classes})"
        )


def _check_labels(data: TrainingData, num_classes: int) -> None:
    """ValueError unless the labels are ``num_classes`` at most; a warning if a class is empty."""
    smallest = int(data.labels.min())
    if smallest < 0 or data.num_classes > num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}) (model.num_classes), "
            f"the data has {smallest} .. {data.num_classes - 1}"
        )
    empty = (torch.bincount(data.labels, minlength=num_classes) == 0).nonzero().flatten()
    if len(empty):
        warn(
            "%d of the model's %d classes have no image, the first is %d: nothing trains them",
            *(len(empty), num_classes, empty[0]),
        )


def _check_text(text: StoredText, model: ModelConfig) -> None:
    """ValueError unless the features have the sizes that the model takes."""
    takes = model.arguments()
    sizes = {
        "context_tokens": text.tokens,
        "context_size": text.width,
        "pooled_size": text.pooled,
    }
    for option, found in sizes.items():
        expected = takes.get(option)
        # a model may leave the pooled vector aside
        unused = option == "pooled_size" and not expected
        require_that(
            unused or expected == found,
            f"the model takes text features of model.{option} {expected}, {text.root} has {found}",
        )


def make_dataset(cfg: Config) -> TrainingData:
    """The configured training set; what the configuration leaves open is filled in.

    Raises:
        ValueError: it cannot be read, or does not fit the model or the batch.
    """
    data = open_data(cfg.data)
    fill_in_model(cfg, data)
    check_data(data, cfg)
    return data
