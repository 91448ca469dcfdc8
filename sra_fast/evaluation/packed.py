"""The images of a packed data set as an FID reference, and the data that samples belong to."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import make_pixels
from sra_fast.data.facts import DataFacts, differences
from sra_fast.data.packed import HELD_OUT_FOLDER
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.prompts import digest_of, read_prompts
from sra_fast.utils.checks import require_that

# what sample.py writes: the images, what they are, and for models of text the prompts, a JSON
# string for each image
SAMPLES = "samples.npz"
ORIGIN = "samples.json"
PROMPTS = "prompts.jsonl"


class PackedImages:
    """The images that `preprocess.py --pixels` has packed; the same interface as ``NpzImages``.

    They are in a fixed random order: a data set is sorted by class, and the Inception score and
    ``manifold_images`` take consecutive images.

    Attributes:
        path: folder of the data set.
        count: number of images.
        shape: [H, W, C].

    Raises:
        ValueError: no such data set, or images with other than 1 or 3 channels.
    """

    def __init__(self, path: str):
        self.path = path
        self.data = PackedPixels(path)
        channels, height, width = self.data.shape
        if channels not in (1, 3):
            raise ValueError(f"{path} holds images of {channels} channels, 1 or 3 were expected")
        self.count = len(self.data)
        self.shape = [height, width, channels]
        self.order = np.random.default_rng(0).permutation(self.count)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images, writable uint8 ``[<= size, H, W, C]``."""
        for first in range(0, self.count, size):
            images, _ = self.data.__getitems__(self.order[first : first + size].tolist())
            yield np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())

    def state(self) -> str:
        """Changes when an image does: the index has the SHA-256 of every shard."""
        return self.data.fingerprint


def made_of(samples: str) -> dict:
    """``step`` and ``weights`` of the model that samples are of, as far as sample.py has written
    them: a model card shows only the scores of its own weights.
    """
    held = _origin_of(samples) or {}
    return {key: held.get(key) for key in ("step", "weights")}


def folder_of(samples: str) -> Path | None:
    """Where sample.py has written: ``samples`` is that folder, or its ``samples.npz``. What lies
    beside a file of another name may be of samples that were made later: None.
    """
    path = Path(samples)
    if path.is_dir():
        return path
    return path.parent if path.name == SAMPLES else None


def _origin_of(samples: str) -> dict | None:
    """What sample.py has written of samples; None: nothing. ValueError if the file is damaged."""
    folder = folder_of(samples)
    if folder is None or not (folder / ORIGIN).exists():
        return None
    file = folder / ORIGIN
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    require_that(isinstance(held, dict), f"{file} must hold an object, it holds something else")
    return held


def prompts_of(samples: str, given: str | None, count: int) -> list[str]:
    """The prompts of samples, one for each image.

    Args:
        samples: an ``.npz`` or a folder, as for ``open_images``.
        given: a file of prompts, instead of the one beside the samples.
        count: of the images.

    Raises:
        ValueError: there is no such file, it is of other samples, or has more or fewer prompts.
    """
    folder = folder_of(samples)
    if given is None and folder is None:
        raise ValueError(
            "give --prompts, a file with a prompt for each image: only those beside a "
            f"{SAMPLES} are known to be its own, got {samples}"
        )
    file = folder / PROMPTS if given is None else Path(given)
    if not file.is_file():
        what = "prompts must be a file" if given else "give --prompts, a file"
        raise ValueError(f"{what} with a prompt for each image: there is no {file}")
    prompts = read_prompts([str(file)])
    if len(prompts) != count:
        raise ValueError(
            f"a prompt for each image was expected: {samples} has {count} images, {file} has "
            f"{len(prompts)} prompts"
        )
    if given is None:
        expected = (_origin_of(samples) or {}).get("prompts_sha256")
        require_that(
            expected in (None, digest_of(prompts)),
            f"{file} has other prompts than those that {folder / ORIGIN} tells of",
        )
    return prompts


def reference_of(samples: str | None) -> str:
    """The images that samples are compared with if no reference is given.

    Args:
        samples: an ``.npz`` or a folder, as for ``open_images``.

    Returns:
        The held-out images of the data that their model was trained on, else its training images.

    Raises:
        ValueError: it is not known what they are samples of, or those data are latents, gone or
            replaced by others.
    """
    origin = None if samples is None else _origin_of(samples)
    if origin is None:
        raise ValueError("give --reference: what the samples are compared with")
    held = origin.get("data")
    facts = DataFacts.from_json(held) if held else None
    if facts is None:
        raise ValueError("give --reference: it is not known what the samples' model was trained on")
    if not facts.pixels:
        raise ValueError(
            "give --reference: the samples' model was trained on latents, which are no images"
        )
    if facts.path is None:
        raise ValueError(
            f"give --reference: the samples' model was trained on {facts.name}, which is no folder"
        )
    root = Path(facts.path)
    if not root.exists():
        raise ValueError(
            f"give --reference: the samples' model was trained on {root}, which is gone"
        )
    other = differences(make_pixels(DataConfig(path=str(root))).facts(), facts)
    require_that(
        not other,
        f"give --reference: the samples' model was trained on other data than there are now at "
        f"{root}: {'; '.join(other)}",
    )
    held_out = root / HELD_OUT_FOLDER
    return str(held_out if held_out.is_dir() else root)
