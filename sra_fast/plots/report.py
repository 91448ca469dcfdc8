"""What a run leaves for people: loss curve, picture of samples, one-line summary."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sra_fast.utils.files import write_atomic

log = logging.getLogger(__name__)


def to_uint8(images: Tensor, rounding: str = "round") -> np.ndarray:
    """``[N, C, H, W]`` in [-1, 1] -> uint8 ``[N, H, W, C]``; ``truncate`` is what the reference does."""
    scaled = ((images.float() + 1) * 127.5).clamp(0, 255)
    if rounding == "round":
        scaled = scaled.round()
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def save_grid(
    path: Path, images: np.ndarray, columns: int, scale: int = 1, gap_after: int | None = None
) -> None:
    """uint8 ``[N, H, W, C]`` as a PNG with ``columns`` images a row.

    Args:
        scale: enlargement of every pixel.
        gap_after: a wider white gap after this column.
    """
    count, height, width, channels = images.shape
    missing = -count % columns
    images = np.pad(images, ((0, missing), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, count, columns)]
    grid = np.concatenate(rows, axis=0)
    if gap_after:
        gap = np.full((grid.shape[0], width // 2, channels), 255, np.uint8)
        grid = np.concatenate(
            [grid[:, : gap_after * (width + 1)], gap, grid[:, gap_after * (width + 1) :]], axis=1
        )
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid[..., :3])
    write_atomic(path, lambda p: picture.save(p, format="png"))


def pyplot(path: Path):
    """matplotlib without a display; None, and one warning, where it is not installed (the ``plots`` extra)."""
    try:
        import matplotlib
    except ImportError:
        log.warning("matplotlib is not installed: no %s (pip install 'sra-fast[plots]')", path.name)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(path: Path, rows: list[dict]) -> None:
    """Loss parts and feature norms over steps."""
    plt = pyplot(path)
    if plt is None:
        return
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
    """A panel per score, a dot per seed and a bar at the mean of every variant."""
    plt = pyplot(path)
    if plt is None:
        return
    keys = [
        key for key in ("denoise", "frechet", "label_accuracy") if all(key in row for row in rows)
    ]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    size = (4 * len(keys) + 1, 0.35 * len(variants) + 1.2)
    figure, axes = plt.subplots(1, len(keys), figsize=size, squeeze=False, sharey=True)
    for axis, key in zip(axes[0], keys, strict=True):
        for i, variant in enumerate(variants):
            values = [row[key] for row in rows if row["variant"] == variant]
            axis.plot(values, [i] * len(values), "o", color="tab:blue", alpha=0.6)
            axis.plot([sum(values) / len(values)], [i], "|", color="black", markersize=14)
        axis.set_xlabel(key)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", linewidth=0.4)
    axes[0, 0].set_yticks(range(len(variants)), variants)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
