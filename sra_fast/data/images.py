"""One image file -> a square of pixels, and what had to be done to it."""

from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sra_fast.data.batch import Report
from sra_fast.data.reasons import why

# formats that Pillow hands to other programs, or of which it reads the size only
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# EXIF's tag of how a camera was held; 1 is upright
ORIENTATION = 0x0112
# Pillow's modes by number of channels
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_suffixes() -> set[str]:
    """Suffixes of the files that Pillow can open, in lower case, with the dot."""
    suffixes = Image.registered_extensions()
    return {
        suffix
        for suffix, name in suffixes.items()
        if name in Image.OPEN and name not in NOT_DECODED
    }


def holds_images(path: Path) -> bool:
    """Whether a folder, or one of its subfolders, has an image among its first files; or a .zip."""
    if path.is_file():
        return is_zipfile(path)
    suffixes = image_suffixes()
    return any(file.suffix.lower() in suffixes for file in islice(path.rglob("*"), 10000))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square crop of the ADM evaluation, ``size x size``.

    Halve the image with a box filter while the shorter side is at least ``2 * size``. Resize the
    shorter side to ``size`` (bicubic). Cut out the middle; if a margin is odd, its extra pixel is
    on the right or below.
    """
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    # the shorter side becomes exactly size
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Crop:
    """Decodes an image file to a square.

    Attributes:
        size: side of the square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        background: colour under transparent pixels, a name or #rrggbb; with 4 channels they stay
            transparent.
        orientation: rotate as the EXIF tag says. ImageNet's tags were ignored by all who published
            numbers.
    """

    size: int
    channels: int = 3
    background: str = "white"
    orientation: bool = False

    def decode(self, content: bytes, name: str) -> tuple[np.ndarray, Report]:
        """The crop of an image file, uint8 ``[size, size, channels]``.

        Args:
            content: of the file.
            name: for errors.

        Raises:
            ValueError: no readable image of 8 bits per channel.
        """
        try:
            with Image.open(BytesIO(content)) as image:
                return self._square(image)
        except UnidentifiedImageError:
            raise ValueError(
                f"{name} is no readable image: empty, or of an unknown format"
            ) from None
        except Exception as error:
            # Pillow's decoders raise many types
            raise ValueError(f"{name} is no readable image: {why(error)}") from None

    def _square(self, image: Image.Image) -> tuple[np.ndarray, Report]:
        # 16- and 32-bit modes: Pillow would clip them to 255, which is white
        if image.mode[0] in "IF":
            raise ValueError(f"8 bits per channel were expected, its mode is {image.mode}")
        report = Report()
        report.counts["images"] = 1
        if getattr(image, "is_animated", False):
            report.counts["animated"] = 1
        if image.getexif().get(ORIENTATION, 1) != 1:
            report.counts["rotated" if self.orientation else "orientation_ignored"] = 1
            if self.orientation:
                image = ImageOps.exif_transpose(image)
        image = self._convert(image, report)

        width, height = image.size
        report.cut = report.most_cut = 1 - min(width, height) / max(width, height)
        if min(width, height) < self.size:
            report.counts["enlarged"] = 1
        pixels = np.asarray(center_crop(image, self.size))
        return pixels.reshape(self.size, self.size, self.channels), report

    def _convert(self, image: Image.Image, report: Report) -> Image.Image:
        """The image with ``channels`` channels."""
        if self.channels < 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            # an alpha channel that is opaque everywhere changes nothing
            if image.getchannel("A").getextrema()[0] < 255:
                ground = Image.new("RGBA", image.size, self.background)
                image = Image.alpha_composite(ground, image)
                report.counts["composited"] = 1
        return image.convert(MODES[self.channels])
