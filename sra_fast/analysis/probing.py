"""The body of probe.py: linear probes of every layer at several times, as JSON and as a picture."""

import logging
import shutil
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from sra_fast.analysis.features import Part, check_times, choose_layers, data_of, split
from sra_fast.analysis.intervals import ENOUGH_IMAGES
from sra_fast.analysis.linear_probe import (
    Probed,
    best,
    choose_pool,
    probe_layers,
    train_count,
)
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DataConfig
from sra_fast.plots.figures import plot_probe
from sra_fast.utils.files import make_folder, require, write_json
from sra_fast.utils.outputs import check_output

log = logging.getLogger("sra_fast")


@dataclass
class Options:
    """What to probe."""

    checkpoint: str
    """weights, as for sample.py: a run folder, a checkpoint folder in one, an export, a .pt, ..."""
    weights: str = "ema"
    """which of a run's weights: ema (the teacher's), or model (the student)"""
    out: str = "analysis"
    """folder for probe.json and probe.png"""
    data: DataConfig = field(default_factory=DataConfig)
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """times in [0, 1]; 0 is data"""
    layers: list[int] | None = None
    """blocks, from 1; default: all"""
    pool: Literal["auto", "mean", "patch", "all"] = "auto"
    """what a probe sees: the mean of the patches, each patch by itself, or all patches side by side;
    auto: all if these are at most 4096 features, else mean"""
    images: int = 20000
    """most images, drawn at random, a fifth of them held out"""
    draws: int = 2
    """noises per image"""
    batch: int = 256
    """images per model call"""
    seed: int = 0
    """of the choice of images and of the noise, which is the same at all times"""
    num_heads: int | None = None
    """for weights that do not say it and whose width is no paper size"""


def _check(options: Options) -> None:
    # the classifier is scikit-learn's
    require("sklearn", "scikit-learn", "eval")
    check_times(options.times)
    if min(options.draws, options.batch) < 1 or options.images < 10:
        raise ValueError("draws and batch must be at least 1, images at least 10")


def _warn_of_few(held_out: Part, options: Options) -> None:
    """An accuracy on two images is 0, 50 or 100 %."""
    count = len(held_out.choose(options.images - train_count(options.images), options.seed))
    if count < ENOUGH_IMAGES:
        log.warning(
            "the accuracies are those of %d held-out images, below %d they are little more than "
            "chance: images (%d) may be more, or the data have no more",
            *(count, ENOUGH_IMAGES, options.images),
        )


def run(options: Options) -> dict:
    """Probe, print a line for each time, and write.

    Returns:
        What ``probe.json`` holds.

    Raises:
        ValueError: an option, the weights or the data cannot be used.
    """
    _check(options)
    out = make_folder(options.out)
    for name in ("probe.json", "probe.png"):
        check_output("out", str(out / name), {"checkpoint": options.checkpoint}, lambda _: True)
    loaded = load_model(options.checkpoint, options.weights, options.num_heads)
    model, path = loaded.model, loaded.path
    # errors in layers and data before the first pass of the model
    layers = choose_layers(options.layers, model.depth)
    options = replace(options, data=data_of(options.data, loaded.facts))
    parts = split(options.data, model, loaded.facts)
    _warn_of_few(parts[1], options)
    _, patches, width = model.pos_embed.shape
    how = choose_pool(options.pool, patches, width)
    print(f"pool: {how} ({patches} patches of {width} features)")
    probed = probe_layers(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        path,
        parts,
        options.times,
        layers,
        how=how,
        count=options.images,
        draws=options.draws,
        seed=options.seed,
        batch=options.batch,
        progress=lambda at_one_time: print(describe(at_one_time)),
    )
    report = {
        "options": asdict(options),
        "pool": how,
        "weights": loaded.weights,
        "step": loaded.step,
        "chance": probed.chance,
        "best": best(probed.rows),
        "rows": probed.rows,
    }
    write_json(out / "probe.json", report)
    title = f"linear probes ({how} of the patches), {options.checkpoint}, {options.weights}"
    plot_probe(out / "probe.png", probed.rows, title, probed.chance)
    show_in_tensorboard(Path(options.checkpoint), probed, out / "probe.png")
    return report


def show_in_tensorboard(run: Path, probed: Probed, picture: Path) -> None:
    """Put the curves beside those of training, if ``run`` is a run folder that has them.

    They are in ``tensorboard/probe``, by themselves, because their steps are blocks of the network.
    The curves of an earlier probe are replaced.
    """
    board_folder = run / "tensorboard"
    if not (board_folder.is_dir() and find_spec("tensorboard")):
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = board_folder / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as board:
        for row in probed.rows:
            # layer 0 is the noisy input
            board.add_scalar(f"probe/t={row['time']:g}", row["accuracy"], row["layer"])
        for layer in sorted({row["layer"] for row in probed.rows}):
            board.add_scalar("probe/chance", probed.chance, layer)
        if picture.exists():
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            board.add_image("probe/accuracy", pixels, dataformats="HWC")


def describe(rows: list[dict]) -> str:
    """One line about the rows of one time."""
    top = best(rows)
    # the first row is layer 0, the noisy input
    pixels = rows[0]["accuracy"]
    return (
        f"t = {top['time']:<5g} best after block {top['layer']:2}: {top['accuracy']:6.1%}   "
        f"noisy input: {pixels:6.1%}"
    )
