"""The body of visualize.py: PCA maps of features, curves of runs, samples side by side."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sra_fast.analysis import pca_maps
from sra_fast.analysis.features import check_times, choose_layers, data_of, split
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DataConfig
from sra_fast.evaluation.packed import folder_of
from sra_fast.plots.figures import plot_curves, plot_maps, read_samples, save_samples
from sra_fast.training.rows import STATS, read_rows
from sra_fast.utils.files import make_folder, require
from sra_fast.utils.outputs import check_output


@dataclass
class Options:
    """What to draw: at least one of checkpoint, runs and samples."""

    checkpoint: str | None = None
    """pca.png: of these weights, as for sample.py: a run folder, an export, a .pt, ..."""
    runs: list[str] = field(default_factory=list)
    """curves.png: of these run folders"""
    samples: list[str] = field(default_factory=list)
    """samples.png: of these samples.npz, or folders that hold one; made with one seed they start from the same noise"""
    out: str = "analysis"
    """folder of the pictures"""
    data: DataConfig = field(default_factory=DataConfig)
    times: list[float] = field(default_factory=lambda: [0.7, 0.5, 0.3, 0.1])
    """times of the maps, in [0, 1]; 0 is data"""
    layers: list[int] | None = None
    """blocks of the maps, from 1; default: seven from the first to the last"""
    images: int = 3
    """held-out images of the maps"""
    seed: int = 0
    """of the choice of these images and of their noise, which is the same at all times"""
    num_heads: int | None = None
    """for weights that do not say it and whose width is no paper size"""
    count: int = 40
    """samples of each file"""
    columns: int = 10
    """samples in a row"""
    scale: int = 1
    """enlargement of a sample's pixel"""


def draw_maps(options: Options, out: Path) -> Path:
    """``pca.png``: the features of a few held-out images."""
    loaded = load_model(options.checkpoint, num_heads=options.num_heads)
    model, path = loaded.model, loaded.path
    layers = choose_layers(options.layers, model.depth, most=7)
    _, held_out = split(data_of(options.data, loaded.facts), model, loaded.facts)
    images = held_out.read(options.images, options.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    maps = pca_maps.draw_maps(model, path, images, options.times, layers)
    plot_maps(out / "pca.png", maps, options.times, layers)
    return out / "pca.png"


def draw_curves(options: Options, out: Path) -> Path:
    """``curves.png``: losses and norms of runs."""
    # a line per run, under the name that was given
    runs = {}
    for folder in options.runs:
        rows = read_rows(Path(folder) / STATS)
        logged = all(isinstance(row, dict) and {"step", "denoise"} <= row.keys() for row in rows)
        if not rows or not logged:
            raise ValueError(f"runs must be run folders, found no losses in {folder}/stats.jsonl")
        runs[folder] = rows
    plot_curves(out / "curves.png", runs)
    return out / "curves.png"


def draw_samples(options: Options, out: Path) -> Path:
    """``samples.png``: the same samples of several runs."""
    # a folder stands for the samples.npz in it
    paths = [str(Path(p) / "samples.npz") if Path(p).is_dir() else p for p in options.samples]
    images = read_samples(paths, options.count)
    save_samples(out / "samples.png", images, options.columns, options.scale)
    return out / "samples.png"


def _check_outputs(options: Options, out: Path) -> None:
    """ValueError unless the pictures can be written: drawing them takes time."""
    for name in ("pca.png", "curves.png"):
        check_output("out", str(out / name), {})
    # beside a samples.npz lies the grid of sample.py, under the name that is written here
    folders = {folder_of(path) for path in options.samples} - {None}
    for folder in folders:
        check_output("out", str(out / "samples.png"), {"samples": folder})


def run(options: Options) -> list[Path]:
    """Draw what was asked for.

    Returns:
        The files that were written.

    Raises:
        ValueError: nothing was asked for, or an option, a file or the weights cannot be used.
    """
    pictures = [
        (options.checkpoint, draw_maps),
        (options.runs, draw_curves),
        (options.samples, draw_samples),
    ]
    asked = [draw for source, draw in pictures if source]
    if not asked:
        raise ValueError("nothing to draw: give --checkpoint, --runs or --samples")
    if min(options.images, options.count, options.columns, options.scale) < 1:
        raise ValueError("images, count, columns and scale must be at least 1")
    check_times(options.times)
    # a missing package is named before a model is loaded
    require("matplotlib", "matplotlib", "plots")
    # the principal components are scikit-learn's
    if options.checkpoint:
        require("sklearn", "scikit-learn", "eval")
    out = make_folder(options.out)
    _check_outputs(options, out)
    return [draw(options, out) for draw in asked]
