"""Images on their way to a packed data set, and what was done to them."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


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

    def add(self, other: "Report") -> None:
        self.counts.update(other.counts)
        self.cut += other.cut
        self.most_cut = max(self.most_cut, other.most_cut)
        self.skipped += other.skipped

    def as_json(self) -> dict:
        return {
            "counts": dict(sorted(self.counts.items())),
            "cut": self.cut,
            "most_cut": self.most_cut,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, held: dict) -> "Report":
        return cls(Counter(held["counts"]), held["cut"], held["most_cut"], held["skipped"])

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
