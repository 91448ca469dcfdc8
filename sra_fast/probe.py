"""Linear probes of every layer at several times:  python sra_fast/probe.py --checkpoint runs/digits/000 --out analysis"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # launched by path: import the checkout, not this folder

from sra_fast.config.schema import DataConfig  # noqa: E402


@dataclass
class Options:
    """What to probe."""

    checkpoint: str
    """run folder, checkpoint folder, .safetensors export or reference .pt; its EMA is probed"""
    out: str = "analysis"
    """folder for probe.json and probe.png"""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="digits"))
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
    """for a reference .pt whose width is no paper size"""


def check(options: Options) -> None:
    from sra_fast.analysis.features import check_times
    from sra_fast.utils.files import make_folder, require

    require("sklearn", "scikit-learn", "eval")
    check_times(options.times)
    if min(options.draws, options.batch) < 1 or options.images < 10:
        raise ValueError("draws and batch must be at least 1, images at least 10")
    make_folder(options.out)


def run(options: Options) -> dict:
    """Probe and write; returns what ``probe.json`` holds."""
    import torch

    from sra_fast.analysis.features import choose_layers, split
    from sra_fast.analysis.linear_probe import best, probe_layers
    from sra_fast.checkpoint.load_model import load_model
    from sra_fast.plots.figures import plot_probe
    from sra_fast.utils.files import write_json

    check(options)
    model, path = load_model(options.checkpoint, num_heads=options.num_heads)
    layers, out = choose_layers(options.layers, model.depth), Path(options.out)
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
        progress=say,
    )
    report = {"options": asdict(options), "best": best(rows), "rows": rows}
    write_json(out / "probe.json", report)
    plot_probe(out / "probe.png", rows, f"linear probes, {options.checkpoint}")
    return report


def say(rows: list[dict]) -> None:
    """One line about the rows of one time."""
    from sra_fast.analysis.linear_probe import best

    top = best(rows)
    pixels = rows[0]["accuracy"]
    print(
        f"t = {top['time']:<5g} best after block {top['layer']:2}: {top['accuracy']:6.1%}   noisy input: {pixels:6.1%}"
    )


def main() -> None:
    from sra_fast.config.cli import make_parser, parse

    parser = make_parser(Options, "Train linear probes on the frozen features of a SiT or DiT.")
    options, _ = parse(Options, parser)
    try:
        top = run(options)["best"]
    except ValueError as error:
        parser.error(str(error))
    print(
        f"best: block {top['layer']} at t = {top['time']:g}, {top['accuracy']:.1%}; {options.out}/probe.json, probe.png"
    )


if __name__ == "__main__":
    main()
