"""Images on their way to a packed data set, and what was done to them."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

# characters of a caption in a message
SHOWN = 80


@dataclass
class Report:
    """What was done to images, for one summary at the end."""

    counts: Counter = field(default_factory=Counter)
    """``images``, ``composited``, ``rotated``, ..: see ``lines``"""
    cut: float = 0.0
    """sum over the images of the share of their area that was cut off"""
    most_cut: float = 0.0
    """the largest share that was cut off an image"""
    skipped: list[str] = field(default_factory=list)
    """images that could not be read, each with the reason"""
    too_long: str | None = None
    """the first of the captions that were cut, which ``counts`` counts"""

    def add(self, other: "Report") -> None:
        self.counts.update(other.counts)
        self.cut += other.cut
        self.most_cut = max(self.most_cut, other.most_cut)
        self.skipped += other.skipped
        self.too_long = self.too_long or other.too_long

    def as_json(self) -> dict:
        said = {
            "counts": dict(sorted(self.counts.items())),
            "cut": self.cut,
            "most_cut": self.most_cut,
            "skipped": self.skipped,
        }
        return said if self.too_long is None else {**said, "too_long": self.too_long}

    @classmethod
    def from_json(cls, held: dict) -> "Report":
        counts = Counter(held["counts"])
        return cls(counts, held["cut"], held["most_cut"], held["skipped"], held.get("too_long"))

    def lines(self) -> list[str]:
        """The summary, in words."""
        counts = self.counts
        images = counts["images"]
        lines = []
        # less than half a percent is no news
        if self.most_cut >= 0.005:
            mean = self.cut / images
            lines.append(
                f"cropped to a square: {mean:.0%} of an image's area on average, at most "
                f"{self.most_cut:.0%}"
            )
        worded = {
            "enlarged": "smaller than the resolution, enlarged",
            "composited": "transparent, put on the background",
            "rotated": "rotated as their EXIF orientation says",
            "orientation_ignored": "with an EXIF orientation that was ignored (--orientation true)",
            "animated": "animated, their first frame taken",
        }
        lines += [f"{counts[key]} images {words}" for key, words in worded.items() if counts[key]]
        if self.skipped:
            lines.append(f"{len(self.skipped)} images skipped, the first is {self.skipped[0]}")
        if self.too_long is not None:
            shown = self.too_long if len(self.too_long) <= SHOWN else self.too_long[:SHOWN] + "..."
            lines.append(
                f"warning: {counts['too_long']} captions are too long for the text encoder, their "
                f"end is cut off; the first is {shown!r}"
            )
        return lines


@dataclass
class Batch:
    """Some images on their way to a packed data set.

    Attributes:
        images: ``[B, ...]``, those that could be read.
        numbers: of these images in their source.
        asked: how many images were asked for.
        report: what was done to them.
    """

    images: Tensor
    numbers: list[int]
    asked: int
    report: Report = field(default_factory=Report)
