"""Pictures of a run: image grids and loss curves."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sra_fast.utils.files import write_atomic

log = logging.getLogger(__name__)

STEP = "optimizer steps"
# pixels of a line of text below an image, and the most lines
LINE = 12
MOST_LINES = 3
DOTS = "..."


@dataclass(frozen=True)
class Panel:
    """Columns of ``stats.jsonl`` that share one pair of axes."""

    title: str
    """label of the axis"""
    units: dict[str, str]
    """column -> what its numbers are"""


# of a run, in reading order
PANELS = (
    Panel(
        "loss terms",
        {
            "denoise": "mean squared error",
            "vb": "bits per dimension",
            "align": "mean distance",
            "align2": "of the second target",
        },
    ),
    Panel(
        "weight of the alignment",
        {"align_weight": "lambda", "align2_weight": "of the second target"},
    ),
    Panel("learning rate", {"lr": "AdamW"}),
    Panel("gradient norm", {"grad_norm": "before clipping"}),
    Panel(
        "length of a token's features",
        {
            "student_norm": "student, projected",
            "teacher_norm": "target",
            "student_norm2": "student, for the second target",
            "teacher_norm2": "second target",
        },
    ),
    Panel("speed", {"images_per_s": "images / s, all processes"}),
)
# what the number in a column of ``stats.jsonl`` is
UNITS = {name: unit for panel in PANELS for name, unit in panel.units.items()}


def to_uint8(images: Tensor, rounding: str = "round") -> np.ndarray:
    """Images for files.

    Args:
        images: ``[N, C, H, W]`` in [-1, 1]; values outside are clipped.
        rounding: ``round``, or ``truncate`` as the published code does.

    Returns:
        uint8 ``[N, H, W, C]``.
    """
    scaled = ((images.float() + 1) * 127.5).clamp(0, 255)
    if rounding == "round":
        scaled = scaled.round()
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def save_grid(
    path: Path,
    images: np.ndarray,
    columns: int,
    scale: int = 1,
    gap_after: int | None = None,
    captions: list[str] | None = None,
) -> None:
    """Write images as one PNG.

    Args:
        path: the file to write.
        images: uint8 ``[N, H, W, C]``; of 2, and of more than 3 channels, the first or the first
            three are shown.
        columns: images in a row.
        scale: enlargement of every pixel.
        gap_after: a wider white gap follows this column.
        captions: a text below each image, in at most three lines of its width; what does not fit is
            cut, and ends in dots.
    """
    count, _, width, channels = images.shape
    images = images[..., :3] if channels >= 3 else images[..., :1]
    images = images.repeat(scale, 1).repeat(scale, 2)
    if captions is not None:
        images = np.concatenate([images, _captions(captions, images)], axis=1)
    # a white line on the right of and below every image; white images fill the last row
    missing = -count % columns
    line = (0, scale)
    images = np.pad(images, ((0, missing), line, line, (0, 0)), constant_values=255)
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, count, columns)]
    grid = np.concatenate(rows, axis=0)
    if gap_after:
        gap = np.full((grid.shape[0], width // 2 * scale, grid.shape[2]), 255, np.uint8)
        left, right = np.split(grid, [gap_after * (width + 1) * scale], axis=1)
        grid = np.concatenate([left, gap, right], axis=1)
    picture = Image.fromarray(grid[..., 0] if grid.shape[2] == 1 else grid)
    write_atomic(path, lambda p: picture.save(p, format="png"))


def _captions(captions: list[str], images: np.ndarray) -> np.ndarray:
    """Texts, black on white: uint8 ``[N, 12 L, W, C]`` for images ``[N, H, W, C]``, L being the
    number of lines of the longest.
    """
    _, _, width, channels = images.shape
    font = ImageFont.load_default(LINE - 2)
    # a pixel is left free on each side
    wrapped = [wrap(caption, width - 2, font.getlength) for caption in captions]
    height = LINE * max(1, *map(len, wrapped))
    pictures = []
    for lines in wrapped:
        picture = Image.new("L", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        for i, line in enumerate(lines):
            draw.text((1, i * LINE), line, fill="black", font=font)
        pictures.append(np.asarray(picture)[..., None].repeat(channels, axis=2))
    return np.stack(pictures)


def wrap(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """A text in at most ``MOST_LINES`` lines. A word that is too wide is broken.

    Args:
        text: any; line ends are spaces.
        width: of a line.
        length: of a piece of a line.

    Returns:
        Lines that fit, unless a single letter does not. The last one ends in dots if there is more.
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > MOST_LINES:
            # the rest of a long text is not measured
            break
    if len(lines) > MOST_LINES:
        last = lines[MOST_LINES - 1]
        while last and length(last + DOTS) > width:
            last = last[:-1]
        lines[MOST_LINES - 1] = last.rstrip() + DOTS
    return lines[:MOST_LINES]


def pyplot(path: Path):
    """matplotlib without a display. None, with a warning, if it is not installed (the ``plots`` extra).

    Args:
        path: the picture that is missing without it.
    """
    try:
        import matplotlib
    except ImportError:
        _say_missing(path.name)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@cache
def _say_missing(name: str) -> None:
    # once per picture: a run draws it again and again
    log.warning("matplotlib is not installed: no %s (pip install 'sra-fast[plots]')", name)


def plot_loss(path: Path, rows: list[dict]) -> None:
    """The course of a run: loss terms, lambda, learning rate, norms and speed over the steps.

    A panel appears if the run has logged something for it.

    Args:
        path: the PNG to write, atomically: somebody may look while a run draws it anew.
        rows: of ``stats.jsonl``.
    """
    plt = pyplot(path)
    if plt is None:
        return
    logged = {name for row in rows for name in row}
    panels = [panel for panel in PANELS if logged & set(panel.units)]
    # at most three in a row; a run without rows has one empty panel
    columns = min(3, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    width = 4.4 * columns
    height = 3.0 * lines
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_panel(axis, panel, rows)
    # the last row may not be full
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    # fixed margins: to fit them takes longer than to draw
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.15 / height,
        wspace=0.3,
        hspace=0.3,
    )
    write_atomic(path, lambda p: figure.savefig(p, dpi=100, format="png"))
    plt.close(figure)


def draw_panel(axis, panel: Panel, rows: list[dict]) -> None:
    """Draw the columns of ``panel`` that ``rows`` have into one pair of axes."""
    for name, unit in panel.units.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=f"{name} ({unit})", linewidth=1.2)
    axis.set(xlabel=STEP, ylabel=panel.title)
    axis.grid(linewidth=0.4)
    axis.legend(loc="best", fontsize="small")


def save_figure(plt, figure, path: Path) -> None:
    """Write a figure as PNG, atomically: an interruption leaves no half picture."""
    write_atomic(path, lambda p: figure.savefig(p, dpi=120, bbox_inches="tight", format="png"))
    plt.close(figure)
