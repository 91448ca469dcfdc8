"""Pictures of a run and of a study: image grids, loss curves, scores by variant."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sra_fast.utils.files import write_atomic

log = logging.getLogger(__name__)


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
    path: Path, images: np.ndarray, columns: int, scale: int = 1, gap_after: int | None = None
) -> None:
    """Write images as one PNG.

    Args:
        path: the file to write.
        images: uint8 ``[N, H, W, C]``.
        columns: images in a row.
        scale: enlargement of every pixel.
        gap_after: a wider white gap follows this column.
    """
    count, _, width, channels = images.shape
    # a white line on the right of and below every image; white images fill the last row
    missing = -count % columns
    images = np.pad(images, ((0, missing), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, count, columns)]
    grid = np.concatenate(rows, axis=0)
    if gap_after:
        gap = np.full((grid.shape[0], width // 2, channels), 255, np.uint8)
        left, right = np.split(grid, [gap_after * (width + 1)], axis=1)
        grid = np.concatenate([left, gap, right], axis=1)
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid[..., :3])
    write_atomic(path, lambda p: picture.save(p, format="png"))


def pyplot(path: Path):
    """matplotlib without a display. None, with a warning, if it is not installed (the ``plots`` extra).

    Args:
        path: the picture that is missing without it.
    """
    try:
        import matplotlib
    except ImportError:
        log.warning("matplotlib is not installed: no %s (pip install 'sra-fast[plots]')", path.name)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(path: Path, rows: list[dict]) -> None:
    """Loss terms and norms over the steps.

    Args:
        path: the PNG to write.
        rows: of ``stats.jsonl``.
    """
    plt = pyplot(path)
    if plt is None:
        return
    # only panels of which the run has logged something
    panels = [("denoise", "vb", "align"), ("student_norm", "teacher_norm"), ("grad_norm",)]
    panels = [names for names in panels if any(name in row for row in rows for name in names)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, names in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_study(path: Path, rows: list[dict]) -> None:
    """A panel per score; in it a dot per seed, and a bar at the mean of every variant.

    Args:
        path: the PNG to write.
        rows: of ``analysis.study.run_study``.
    """
    plt = pyplot(path)
    if plt is None:
        return
    scores = ("denoise", "frechet", "label_accuracy")
    keys = [key for key in scores if all(key in row for row in rows)]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    size = (4 * len(keys) + 1, 0.35 * len(variants) + 1.2)
    figure, axes = plt.subplots(1, len(keys), figsize=size, squeeze=False, sharey=True)
    for axis, key in zip(axes[0], keys, strict=True):
        for i, variant in enumerate(variants):
            values = [row[key] for row in rows if row["variant"] == variant]
            mean = sum(values) / len(values)
            axis.plot(values, [i] * len(values), "o", color="tab:blue", alpha=0.6)
            axis.plot([mean], [i], "|", color="black", markersize=14)
        axis.set_xlabel(key)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", linewidth=0.4)
    # the first variant at the top
    axes[0, 0].set_yticks(range(len(variants)), variants)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
