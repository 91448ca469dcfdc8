"""How much of the class the blocks of two runs tell while they train:

python examples/bad_to_good.py PLAIN_RUN SRA_RUN --out pictures

The figure that motivates SRA: features get better with depth, and with less noise. For every
checkpoint of the two runs, linear probes of every block at several times; of the plain model and of
SRA's student (their weights), and of SRA's teacher (the EMA). Writes bad_to_good.json and
bad_to_good.png.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from sra_fast.analysis.features import check_times, data_of, split
from sra_fast.analysis.linear_probe import probe_layers
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import step_name
from sra_fast.checkpoint.reading import CHECKPOINTS
from sra_fast.checkpoint.steps import step_folders, step_of
from sra_fast.config.schema import DataConfig
from sra_fast.plots.report import pyplot, save_figure
from sra_fast.utils.files import make_folder, write_json

# the networks of the figure, from top to bottom: title -> the run it is in, and its weights there
NETWORKS = {"plain": (0, "model"), "SRA, student": (1, "model"), "SRA, teacher": (1, "ema")}


def common_steps(runs: list[Path]) -> list[int]:
    """Steps of which every run has a checkpoint, ascending; ValueError if there are none."""
    found = {run: sorted(step_of(path) for path in step_folders(run / CHECKPOINTS)) for run in runs}
    steps = sorted(set.intersection(*map(set, found.values())))
    if not steps:
        got = " and ".join(f"{of_run} in {run}" for run, of_run in found.items())
        raise ValueError(
            f"expected checkpoints of the same steps (train.keep 0 keeps all), got {got}"
        )
    return steps


def probe(checkpoint: Path, weights: str, times: list[float], images: int, seed: int) -> list[dict]:
    """Rows ``{"time", "layer", "accuracy"}`` of one network."""
    loaded = load_model(str(checkpoint), weights)
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts = split(data_of(DataConfig(), loaded.facts), model, loaded.facts)
    layers = list(range(1, model.depth + 1))
    # the mean over the patches: few features, so that many probes are quick
    probed = probe_layers(
        model, loaded.path, parts, times, layers, how="mean", count=images, draws=1, seed=seed
    )
    return [row for row in probed.rows if row["layer"]]


def draw(path: Path, rows: list[dict]) -> None:
    """A row of panels per network, a column per step; in each the accuracy over time and depth."""
    plt = pyplot(path)
    if plt is None:
        return
    steps = sorted({row["step"] for row in rows})
    times = sorted({row["time"] for row in rows})
    depth = max(row["layer"] for row in rows)
    # one scale for all panels
    accuracies = [row["accuracy"] for row in rows]
    low, high = min(accuracies), max(accuracies)
    size = (2.1 * len(steps) + 1.6, 2.0 * len(NETWORKS) + 0.6)
    figure, axes = plt.subplots(
        len(NETWORKS), len(steps), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for line, network in zip(axes, NETWORKS, strict=True):
        for axis, step in zip(line, steps, strict=True):
            grid = np.zeros((depth, len(times)))
            for row in rows:
                if (row["network"], row["step"]) == (network, step):
                    grid[row["layer"] - 1, times.index(row["time"])] = row["accuracy"]
            image = axis.imshow(grid, origin="lower", aspect="auto", vmin=low, vmax=high)
            axis.set_xticks(range(len(times)), [f"{time:g}" for time in times])
            axis.set_yticks(range(depth), range(1, depth + 1))
            best = np.unravel_index(grid.argmax(), grid.shape)
            axis.set_title(f"step {step}: best {grid.max():.0%}, block {best[0] + 1}", fontsize=8)
        line[0].set_ylabel(f"{network}\nblock")
    for axis in axes[-1]:
        axis.set_xlabel("time (0: data)")
    figure.tight_layout()
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("accuracy of a linear probe on held-out images")
    save_figure(plt, figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n")[0])
    parser.add_argument("plain", type=Path, help="run folder of a plain model")
    parser.add_argument("aligned", type=Path, help="run folder of a model with SRA")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder to make")
    parser.add_argument("--times", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--images", type=int, default=5000, help="a fifth of them is held out")
    parser.add_argument("--seed", type=int, default=0, help="of the images and the noise")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="checkpoints; default: all of both runs"
    )
    args = parser.parse_args()
    runs = [args.plain, args.aligned]
    try:
        check_times(args.times)
        steps = common_steps(runs)
        missing = sorted(set(args.steps or ()) - set(steps))
        if missing:
            raise ValueError(f"--steps must be among {steps}, got {missing}")
        out = make_folder(str(args.out))
        rows = []
        for step in args.steps or steps:
            for network, (run, weights) in NETWORKS.items():
                folder = runs[run] / CHECKPOINTS / step_name(step)
                found = probe(folder, weights, args.times, args.images, args.seed)
                rows += [{"network": network, "step": step, **row} for row in found]
                best = max(found, key=lambda row: row["accuracy"])
                print(f"step {step}, {network}: {json.dumps(best)}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_json(out / "bad_to_good.json", rows)
    draw(out / "bad_to_good.png", rows)


if __name__ == "__main__":
    main()
