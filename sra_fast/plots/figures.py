"""Pictures of an analysis: curves of runs, accuracy against depth, PCA maps, samples side by side."""

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from sra_fast.evaluation.npz import NpzImages
from sra_fast.plots.report import STEP, UNITS, pyplot, save_figure
from sra_fast.utils.files import why_unreadable, write_atomic

# the columns of stats.jsonl that are drawn
CURVES = (
    "denoise",
    "vb",
    "align",
    "align2",
    "student_norm",
    "teacher_norm",
    "student_norm2",
    "teacher_norm2",
    "grad_norm",
)


def plot_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """A panel per loss or norm, a line per run.

    Args:
        path: the PNG to write.
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
        # the legend is only in the first panel
        axis.set(title=name, xlabel=STEP, ylabel=UNITS[name])
        axis.grid(linewidth=0.4)
    axes[0, 0].legend()
    figure.tight_layout()
    save_figure(plt, figure, path)


def plot_probe(path: Path, rows: list[dict], title: str, chance: float) -> None:
    """Accuracy against depth: a line per time, and dashed in the same colour the probe of the noisy input.

    Args:
        path: the PNG to write.
        rows: see ``linear_probe.probe_layers``.
        title: above the axes.
        chance: accuracy without features, a dotted line.
    """
    plt = pyplot(path)
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    # one colour per time, in the order of the rows
    times = list(dict.fromkeys(row["time"] for row in rows))
    for i, time in enumerate(times):
        colour = plt.get_cmap("viridis")(i / max(len(times), 1))
        accuracy = {row["layer"]: row["accuracy"] for row in rows if row["time"] == time}
        # layer 0 is the noisy input
        noisy_input = accuracy.pop(0)
        blocks = list(accuracy)
        heights = list(accuracy.values())
        axis.plot(blocks, heights, "o-", color=colour, markersize=4, label=f"t = {time:g}")
        axis.axhline(noisy_input, color=colour, linestyle="--", linewidth=0.8)
    axis.axhline(chance, color="grey", linestyle=":", label=f"chance ({chance:.0%})")
    axis.set(xlabel="block", ylabel="accuracy on held-out images", title=title, ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(linewidth=0.4)
    axis.legend(title="dashed: noisy input", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(plt, figure, path)


def mosaic(cells: np.ndarray, gap: int) -> np.ndarray:
    """uint8 ``[rows, columns, H, W, C]`` -> one picture with white gaps ``[rows (H + gap), columns (W + gap), C]``."""
    cells = np.pad(cells, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in cells]
    return np.concatenate(rows, axis=0)


def plot_maps(path: Path, maps: np.ndarray, times: list[float], layers: list[int]) -> None:
    """PCA maps: a row per image and time; the first column is the noisy input, then a column per layer.

    Args:
        path: the PNG to write.
        maps: of ``pca_maps.draw_maps``.
        times, layers: what they were drawn for.
    """
    plt = pyplot(path)
    if plt is None:
        return
    count, _, columns, size = maps.shape[:4]
    # small images are enlarged to at least 64 pixels
    scale = max(1, 64 // size)
    rows = maps.reshape(count * len(times), *maps.shape[2:]).repeat(scale, 2).repeat(scale, 3)
    gap = 4
    cell = scale * size + gap
    picture = mosaic(rows, gap)
    figure, axis = plt.subplots(figsize=(0.75 * columns, 0.75 * len(rows)))
    axis.imshow(picture, interpolation="nearest")
    # a tick at the centre of every cell
    centres = [(cell - gap) / 2 + i * cell for i in range(max(columns, len(rows)))]
    axis.set_xticks(centres[:columns], ["input", *map(str, layers)])
    axis.set_yticks(centres[: len(rows)], [f"t = {time:g}" for time in times] * count)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(xlabel="block")
    axis.xaxis.set_label_position("top")
    axis.spines[:].set_visible(False)
    save_figure(plt, figure, path)


def read_samples(paths: list[str], count: int) -> np.ndarray:
    """The first images of several ``samples.npz``.

    Args:
        paths: of the files.
        count: how many of each.

    Returns:
        uint8 ``[len(paths), n, H, W, C]``; n is ``count`` or the length of the shortest file.

    Raises:
        ValueError: a file cannot be read, or its images have other sizes or labels than the first
            file's.
    """
    images = []
    labels = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as held:
                # raises unless arr_0 is an array of images
                NpzImages(path)
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
                f"{path} holds no samples (arr_0 and arr_1 of sample.py): {why_unreadable(error)}"
            ) from None
    # the samples are compared one by one: as many as all files have, and of the same labels
    n = min(map(len, images))
    for path, x, y in zip(paths, images, labels, strict=True):
        if x.shape[1:] != images[0].shape[1:] or not np.array_equal(y[:n], labels[0][:n]):
            raise ValueError(
                f"samples must have the sizes and labels of {paths[0]}, those of {path} differ"
            )
    return np.stack([x[:n] for x in images])


def save_samples(path: Path, images: np.ndarray, columns: int, scale: int) -> None:
    """Samples of several runs as one PNG. The same sample of the other runs is below that of the first run.

    Args:
        path: the PNG to write.
        images: uint8 ``[runs, n, H, W, C]``.
        columns: samples in a row.
        scale: enlargement of every pixel.
    """
    from PIL import Image

    runs, n, height, width, channels = images.shape
    # white images fill the last row
    images = np.pad(images, ((0, 0), (0, -n % columns), *[(0, 0)] * 3), constant_values=255)
    # [block, run, column, H, W, C]: a block shows the same samples of every run
    rows = images.reshape(runs, -1, columns, height, width, channels).swapaxes(0, 1)
    below = ((0, height // 4 if runs > 1 else 0), (0, 0), (0, 0))
    blocks = [np.pad(mosaic(block, 1), below, constant_values=255) for block in rows]
    picture = np.concatenate(blocks).repeat(scale, 0).repeat(scale, 1)
    image = Image.fromarray(picture.squeeze(2) if channels == 1 else picture)
    write_atomic(path, lambda p: image.save(p, format="png"))
