"""Pictures of an analysis: curves of runs, accuracy against depth, PCA maps, samples side by side."""

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from sra_fast.evaluation.npz import NpzImages
from sra_fast.plots.report import pyplot
from sra_fast.utils.files import write_atomic

CURVES = ("denoise", "vb", "align", "student_norm", "teacher_norm", "grad_norm")


def _save(plt, figure, path: Path) -> None:
    write_atomic(path, lambda p: figure.savefig(p, dpi=120, bbox_inches="tight", format="png"))
    plt.close(figure)


def plot_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """A panel per loss or norm, a line per run.

    Args:
        runs: name -> rows of ``stats.jsonl``.
    """
    plt = pyplot(path)
    if plt is None:
        return
    names = [name for name in CURVES if any(name in row for rows in runs.values() for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        axis.set(title=name, xlabel="step")
        axis.grid(linewidth=0.4)
    axes[0, 0].legend()
    figure.tight_layout()
    _save(plt, figure, path)


def plot_probe(path: Path, rows: list[dict], title: str) -> None:
    """Accuracy against depth: a line per time; dashed in its colour, the probe of the noisy input.

    Args:
        rows: see ``linear_probe.probe_layers``.
    """
    plt = pyplot(path)
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    times = list(dict.fromkeys(row["time"] for row in rows))
    for i, time in enumerate(times):
        colour = plt.get_cmap("viridis")(i / max(len(times), 1))
        points = [
            (row["layer"], row["accuracy"]) for row in rows if row["time"] == time and row["layer"]
        ]
        axis.plot(
            *zip(*points, strict=True), "o-", color=colour, markersize=4, label=f"t = {time:g}"
        )
        axis.axhline(
            next(row["accuracy"] for row in rows if row["time"] == time and not row["layer"]),
            color=colour,
            linestyle="--",
            linewidth=0.8,
        )
    axis.set(xlabel="block", ylabel="accuracy on held-out images", title=title, ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(linewidth=0.4)
    axis.legend(title="dashed: noisy input", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(plt, figure, path)


def mosaic(cells: np.ndarray, gap: int) -> np.ndarray:
    """uint8 ``[rows, columns, H, W, C]`` -> one picture with white gaps ``[rows (H + gap), columns (W + gap), C]``."""
    cells = np.pad(cells, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in cells], axis=0)


def plot_maps(path: Path, maps: np.ndarray, times: list[float], layers: list[int]) -> None:
    """``maps`` of ``pca_maps.draw_maps``: a row per image and time, a column per layer behind the noisy input."""
    plt = pyplot(path)
    if plt is None:
        return
    count, _, columns, size = maps.shape[:4]
    scale = max(1, 64 // size)
    rows = maps.reshape(count * len(times), *maps.shape[2:]).repeat(scale, 2).repeat(scale, 3)
    gap, cell = 4, scale * size + 4
    picture = mosaic(rows, gap)
    figure, axis = plt.subplots(figsize=(0.75 * columns, 0.75 * len(rows)))
    axis.imshow(picture, interpolation="nearest")
    centres = [(cell - gap) / 2 + i * cell for i in range(max(columns, len(rows)))]
    axis.set_xticks(centres[:columns], ["input", *map(str, layers)])
    axis.set_yticks(centres[: len(rows)], [f"t = {time:g}" for time in times] * count)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(xlabel="block")
    axis.xaxis.set_label_position("top")
    axis.spines[:].set_visible(False)
    _save(plt, figure, path)


def read_samples(paths: list[str], count: int) -> np.ndarray:
    """The first ``count`` images of several ``samples.npz``: uint8 ``[len(paths), n, H, W, C]``, n that of the shortest.

    Raises:
        ValueError: no such file, or images of other sizes or labels.
    """
    images, labels = [], []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as held:
                NpzImages(path)  # the checks of arr_0
                images.append(held["arr_0"][:count])
                labels.append(held["arr_1"][:count])
        except (
            OSError,
            ValueError,
            EOFError,
            KeyError,
            IndexError,
            TypeError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise ValueError(
                f"{path} holds no samples (arr_0 and arr_1 of sample.py): {error}"
            ) from None
    n = min(map(len, images))
    for path, x, y in zip(paths, images, labels, strict=True):
        if x.shape[1:] != images[0].shape[1:] or not np.array_equal(y[:n], labels[0][:n]):
            raise ValueError(
                f"samples must have the sizes and labels of {paths[0]}, those of {path} differ"
            )
    return np.stack([x[:n] for x in images])


def save_samples(path: Path, images: np.ndarray, columns: int, scale: int) -> None:
    """``[runs, n, H, W, C]`` as a PNG: under each image of the first run the same one of the others, then the next row."""
    from PIL import Image

    runs, n, height, width, channels = images.shape
    images = np.pad(images, ((0, 0), (0, -n % columns), *[(0, 0)] * 3), constant_values=255)
    rows = images.reshape(runs, -1, columns, height, width, channels).swapaxes(0, 1)
    below = ((0, height // 4 if runs > 1 else 0), (0, 0), (0, 0))
    blocks = [np.pad(mosaic(block, 1), below, constant_values=255) for block in rows]
    picture = np.concatenate(blocks).repeat(scale, 0).repeat(scale, 1)
    write_atomic(
        path,
        lambda p: Image.fromarray(picture.squeeze(2) if channels == 1 else picture).save(
            p, format="png"
        ),
    )
