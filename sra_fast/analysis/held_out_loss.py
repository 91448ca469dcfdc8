"""The body of held_out.py: the loss of one checkpoint, and its paired difference from another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from sra_fast.analysis.features import data_of, open_for
from sra_fast.analysis.intervals import ENOUGH_IMAGES, bootstrap_interval
from sra_fast.checkpoint.load_model import LoadedModel, load_model
from sra_fast.config.schema import DataConfig
from sra_fast.data.training_data import TrainingData
from sra_fast.evaluation.held_out import (
    BLOCK,
    TIME_BINS,
    HeldOutImages,
    HeldOutLoss,
    check_counts,
    held_out_loss,
)
from sra_fast.utils.checks import require_that
from sra_fast.utils.launcher import cuda_index, read_launcher
from sra_fast.utils.outputs import check_output, refuse_input

# of the intervals
LEVEL = 0.95


@dataclass
class Options:
    """What to measure."""

    checkpoint: str
    """weights, as for sample.py: a run folder, a checkpoint folder, an export, a .pt, ..."""
    weights: str = "ema"
    """which of a run's weights: ema, model (the student), or the name of an average"""
    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = None
    """an .npz for the loss of every image and bin, for --against"""
    against: str | None = None
    """what --out has written for other weights: the mean of the paired differences is printed"""
    images: int | None = None
    """most images, at least 2, drawn at random; default: all of the held-out share"""
    bins: int = TIME_BINS
    """times of an image, one in each of so many equal parts of [0, 1]"""
    seed: int = 0
    """of the choice of images, the times and the noise"""
    batch: int = BLOCK
    """images per model call; another value rounds differently"""
    trained: bool = False
    """take every fifth image of data that have no held-out share: a run trains on these"""
    num_heads: int | None = None
    """for weights that do not say it and whose width is no paper size"""


def _check_classes(data: TrainingData, loaded: LoadedModel) -> None:
    """ValueError if the data's labels are other classes than the model's: it would be asked for a
    cat where there is a wolf.
    """
    found, trained = data.facts(), loaded.facts
    if trained is None or loaded.model.conditioning != "labels":
        return
    where = f"{found.path or found.name} has other classes than the model was trained on"
    names = [facts.class_names for facts in (found, trained)]
    require_that(
        None in names or names[0] == names[1],
        f"{where}: expected {_first(names[1])}, got {_first(names[0])}",
    )
    # a number that is only counted is that of the classes with images
    require_that(
        data.counted_classes or found.num_classes == trained.num_classes,
        f"{where}: expected {trained.num_classes} classes, got {found.num_classes}",
    )


def _first(names: list[str] | None) -> str:
    shown = ", ".join((names or [])[:3])
    return f"{shown}, ... ({len(names or [])})"


def run(options: Options) -> dict:
    """Measure and write; collective under a launcher.

    Returns:
        What ``table`` shows; empty on other ranks than 0.

    Raises:
        ValueError: an option, the weights or the data cannot be used, or the loss is not finite.
        OSError: ``out`` cannot be written.
    """
    read_launcher()
    check_counts(options.images, options.bins)
    # read first: nothing is computed for a file that is none
    other = HeldOutLoss.load(options.against) if options.against is not None else None
    inputs = {"against": options.against, "checkpoint": options.checkpoint}
    if options.out is not None:
        check_output("out", options.out, inputs, _is_losses)
    loaded = load_model(options.checkpoint, options.weights, options.num_heads)
    chosen = data_of(options.data, loaded.facts)
    if options.out is not None:
        refuse_input("out", Path(options.out), {"data.path": chosen.path}, _is_losses)
    data = open_for(chosen, loaded.model, loaded.facts)
    _check_classes(data, loaded)
    images = HeldOutImages(data, options.images, options.bins, options.seed, options.trained)
    if other is not None:
        # raises before anything is computed, if the two cannot be compared
        settings = images.settings(loaded.model.process, loaded.path)
        HeldOutLoss(other.losses, other.times, other.images, settings).paired(other)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", cuda_index()) if cuda else torch.device("cpu")
    about = {
        "checkpoint": str(Path(options.checkpoint).absolute()),
        "weights": loaded.weights,
        "step": loaded.step,
    }
    with _process_group() as (rank, world):
        loss = held_out_loss(
            loaded.model.to(device),
            loaded.path,
            images,
            batch=options.batch,
            device=device,
            rank=rank,
            world=world,
            about=about,
        )
    loss.check_finite(options.checkpoint)
    if rank:
        return {}
    if options.out is not None:
        loss.save(options.out)
    report = {
        **about,
        "held_out": loss.mean(),
        "interval": bootstrap_interval(loss.per_image(), LEVEL),
        "bins": loss.bins().tolist(),
        "images": len(loss.images),
        "key": loss.key,
    }
    if other is not None:
        difference = loss.paired(other)
        report["against"] = options.against
        report["difference"] = float(difference.mean())
        report["difference_interval"] = bootstrap_interval(difference, LEVEL)
    return report


def _is_losses(path: Path) -> bool:
    """Whether a file is what an earlier call has written to ``out``."""
    try:
        HeldOutLoss.load(path)
    except ValueError:
        return False
    return True


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of the launcher's processes, which can talk to each other meanwhile."""
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    if world == 1 or dist.is_initialized():
        yield rank, world
        return
    # a few numbers on the host are exchanged: no NCCL
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


def table(report: dict) -> str:
    """The loss with its interval, a line per bin, and the difference."""
    few = report["images"] < ENOUGH_IMAGES
    remark = f"; the interval is too narrow below {ENOUGH_IMAGES} images" if few else ""
    low, high = report["interval"]
    lines = [
        f"held-out loss {report['held_out']:.5f}  [{low:.5f}, {high:.5f}] "
        f"({LEVEL:.0%}, {report['images']} images, weights {report['weights']}, "
        f"step {report['step']}){remark}"
    ]
    count = len(report["bins"])
    for i, value in enumerate(report["bins"]):
        lines.append(f"t {i / count:.2f} to {(i + 1) / count:.2f}  {value:.5f}")
    if "difference" in report:
        low, high = report["difference_interval"]
        lines.append(
            f"minus {report['against']}: {report['difference']:+.5f}  "
            f"[{low:+.5f}, {high:+.5f}]{remark}"
        )
    return "\n".join(lines)
