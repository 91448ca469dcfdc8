"""Images of an array in memory as a source of preprocessing: any number of channels."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from sra_fast.data.batch import Report
from sra_fast.data.images import MODES, Crop, center_crop
from sra_fast.data.pixels import read_image_array
from sra_fast.data.sources import ImageSource


class ArraySource(ImageSource):
    """Images uint8 ``[N, H, W, C]`` with labels ``[N]``.

    Images that are squares of ``crop.size`` are taken as they are, with any number of channels.
    Others are cropped, which needs 1, 3 or 4.

    Args:
        place: where they come from.
        images, labels: the arrays.
        crop: its ``size`` counts; the channels are those of the array.
        num_classes: how many classes there must be; None: as many as there are.
        mirror: see ``ImageSource``.

    Raises:
        ValueError: images that cannot be cropped, or labels outside of the classes.
    """

    def __init__(
        self,
        place: str,
        images: np.ndarray,
        labels: np.ndarray,
        crop: Crop,
        num_classes: int | None = None,
        mirror: bool = False,
    ):
        self.images = images
        _, height, width, channels = images.shape
        if (height, width) != (crop.size, crop.size) and channels not in MODES:
            raise ValueError(
                f"{place} holds images of {height} x {width} and {channels} channels: with "
                f"resolution {crop.size} they must be cropped, which needs 1, 3 or 4 channels"
            )
        # the array has the channels that it has
        super().__init__(Crop(crop.size, channels), mirror)
        self.content_digest = hashlib.sha256(self.images.tobytes()).hexdigest()
        self.place = place
        self.class_names = None
        self.names = [f"{number:08d}" for number in range(len(self.images))]
        self._places = list(range(len(self.images)))
        if not labels.any():
            self.notes.append("no labels, or all 0: all images are of one class")
        self._set_labels(labels.tolist(), num_classes, counted=True)

    def _captions(self, where: list[str]) -> list:
        raise ValueError(f"captions are for image files, {self.place} is an array")

    def _pixels(self, number: int) -> tuple[np.ndarray, Report]:
        pixels = self.images[self._places[number]]
        report = Report()
        report.counts["images"] = 1
        height, width, channels = pixels.shape
        size = self.crop.size
        if (height, width) == (size, size):
            return pixels, report
        report.cut = report.most_cut = 1 - min(height, width) / max(height, width)
        if min(height, width) < size:
            report.counts["enlarged"] = 1
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, MODES[channels])
        return np.asarray(center_crop(image, size)).reshape(size, size, channels), report


def open_array(
    path: str | Path, crop: Crop, num_classes: int | None = None, mirror: bool = False
) -> ArraySource:
    """The images of an ``.npz``: ``arr_0`` uint8 ``[N, H, W, C]`` and ``arr_1`` labels ``[N]``.

    Raises:
        ValueError: the file holds other arrays; see ``ArraySource``.
    """
    images, labels = read_image_array(Path(path))
    return ArraySource(str(path), images, labels, crop, num_classes, mirror)
