"""The body of probe.py: linear probes of every layer at several times, as JSON and as a picture."""

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

from sra_fast.analysis.features import check_times, choose_layers, data_of, split
from sra_fast.analysis.linear_probe import best, probe_layers
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DataConfig
from sra_fast.plots.figures import plot_probe
from sra_fast.utils.files import make_folder, require, write_json


@dataclass
class Options:
    """What to probe."""

    checkpoint: str
    """run folder, checkpoint folder, .safetensors export or published .pt; its EMA is probed"""
    out: str = "analysis"
    """folder for probe.json and probe.png"""
    data: DataConfig = field(default_factory=DataConfig)
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """times in [0, 1]; 0 is data"""
    layers: list[int] | None = None
    """blocks, from 1; default: all"""
    pool: Literal["mean", "patch", "all"] = "mean"
    """what a probe sees: the mean of the patches, each patch by itself, or all patches side by side (small inputs)"""
    images: int = 20000
    """most images, drawn at random, a fifth of them held out"""
    draws: int = 2
    """noises per image"""
    batch: int = 256
    """images per model call"""
    seed: int = 0
    """of the choice of images and of the noise, which is the same at all times"""
    num_heads: int | None = None
    """for a published .pt whose width is no paper size"""


def _check(options: Options) -> None:
    # the classifier is scikit-learn's
    require("sklearn", "scikit-learn", "eval")
    check_times(options.times)
    if min(options.draws, options.batch) < 1 or options.images < 10:
        raise ValueError("draws and batch must be at least 1, images at least 10")


def run(options: Options) -> dict:
    """Probe, print a line for each time, and write.

    Returns:
        What ``probe.json`` holds.

    Raises:
        ValueError: an option, the weights or the data cannot be used.
    """
    _check(options)
    out = make_folder(options.out)
    loaded = load_model(options.checkpoint, num_heads=options.num_heads)
    model, path = loaded.model, loaded.path
    # errors in layers and data before the first pass of the model
    layers = choose_layers(options.layers, model.depth)
    options = replace(options, data=data_of(options.data, loaded.facts))
    parts = split(options.data, model)
    rows = probe_layers(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        path,
        parts,
        options.times,
        layers,
        how=options.pool,
        count=options.images,
        draws=options.draws,
        seed=options.seed,
        batch=options.batch,
        progress=lambda at_one_time: print(describe(at_one_time)),
    )
    report = {"options": asdict(options), "best": best(rows), "rows": rows}
    write_json(out / "probe.json", report)
    plot_probe(out / "probe.png", rows, f"linear probes, {options.checkpoint}")
    return report


def describe(rows: list[dict]) -> str:
    """One line about the rows of one time."""
    top = best(rows)
    # the first row is layer 0, the noisy input
    pixels = rows[0]["accuracy"]
    return (
        f"t = {top['time']:<5g} best after block {top['layer']:2}: {top['accuracy']:6.1%}   "
        f"noisy input: {pixels:6.1%}"
    )
