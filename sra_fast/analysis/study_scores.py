"""The scores of a study's runs: which there are, which direction is better, and where they are
kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import yaml

from sra_fast.checkpoint.reading import CONFIG, SUMMARY
from sra_fast.training.rows import STATS, read_rows
from sra_fast.utils.files import plain, read_json

# before a score that a run's own evaluation has left in its summary (the digits': EVALUATIONS)
OWN_PREFIX = "own_"


@dataclass(frozen=True)
class Score:
    """What a table says of a score.

    Attributes:
        title: in words.
        better: ``lower``, ``higher``, or None: neither is.
        compared: whether differences from the baseline are of interest.
    """

    title: str
    better: str | None = None
    compared: bool = True


# key of a row -> what it is, in the order of the table
SCORES = {
    "held_out": Score("held-out loss", "lower"),
    "frechet": Score("Fréchet distance", "lower"),
    "label_accuracy": Score("label accuracy", "higher"),
    "probe": Score("probe", "higher"),
    "probe_early": Score("probe, first quarter", "higher"),
    # not the same distance in a plain run, with a head, or with other layers
    "align_distance": Score("alignment distance", compared=False),
    "feature_norm": Score("feature norm"),
    # of the data and the classifier, to read the scores by
    "frechet_floor": Score("Fréchet distance of real images", compared=False),
    "classifier_accuracy": Score("accuracy of the classifier", compared=False),
    f"{OWN_PREFIX}frechet": Score("Fréchet distance, own evaluation", "lower"),
    f"{OWN_PREFIX}label_accuracy": Score("label accuracy, own evaluation", "higher"),
    f"{OWN_PREFIX}frechet_train": Score(
        "Fréchet distance of training images, own evaluation", compared=False
    ),
    f"{OWN_PREFIX}svm_accuracy": Score(
        "accuracy of the classifier, own evaluation", compared=False
    ),
    "denoise": Score("denoising loss in training", "lower"),
    "curve": Score("largest difference of the curve", compared=False),
    "images_per_s": Score("images/s", compared=False),
}
# those that a run has without being scored
OF_TRAINING = {"denoise", "curve", "images_per_s"}
# what a summary holds besides its own evaluation's scores
NO_SCORES = {"step", "images_per_s", "loss_first", "loss_last"}
# in the folder of a variant's run: its scores, and how they were made
RECORD = "scores.json"


def score_named(key: str) -> Score:
    """The entry of ``SCORES``; of a study's own score its name, without a direction."""
    title = key.replace("_", " ")
    if key.startswith(OWN_PREFIX):
        title = f"{title.removeprefix('own ')}, own evaluation"
    return SCORES.get(key, Score(title))


def finished_run(runs: Path) -> Path | None:
    """The run folder in ``runs`` that has a summary, if any."""
    return next((file.parent for file in sorted(runs.glob(f"*/{SUMMARY}"))), None)


def summary_of(run: Path) -> dict:
    """The summary of a finished run; ValueError if it cannot be read."""
    return read_json(run / SUMMARY)


def recorded_scores(runs: Path, how: Mapping) -> dict[str, float] | None:
    """The scores of a finished run; None if there are none that were made like this, or the
    held-out losses that belong to them were made anew by somebody else.

    Args:
        runs: folder of a variant's run.
        how: what scores are made with, see ``Scoring.identity``.
    """
    run = finished_run(runs)
    try:
        held = json.loads((runs / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if run is None or held.get("made_with") != made_like(run, how):
        return None
    losses = held.get("held_out")
    if losses is not None and _key_of(runs / losses["file"]) != losses["key"]:
        return None
    return held["scores"]


def held_out_file(runs: Path) -> Path | None:
    """Where a scored run has the held-out losses of its images, if it has some."""
    losses = read_json(runs / RECORD).get("held_out")
    return None if losses is None else runs / losses["file"]


def _key_of(path: Path) -> str | None:
    """``HeldOutLoss.key`` of a file; None if it has none."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return str(held["key"])
    except Exception:
        # numpy and zipfile raise many types
        return None


def made_like(run: Path, how: Mapping) -> dict:
    """What a run's scores follow from: ``how``, and which weights it has trained."""
    # through JSON and back, as the file was written
    return plain({**how, "checkpoint": summary_of(run).get("checkpoint")})


def training_scores(run: Path, base: Path | None) -> dict[str, float]:
    """Scores that a run has from its training.

    Args:
        run: a run folder.
        base: run folder of the baseline with the same seed; None: it is not finished.

    Returns:
        ``denoise``: the mean denoising loss of the last tenth of the steps. ``curve``: the largest
        relative difference of any ``log_every`` steps from the baseline's, if that is there.
        ``images_per_s``; and what the run's own evaluation has left in the summary, with
        ``OWN_PREFIX`` before its name.

    Raises:
        ValueError: the two runs have not logged the same steps.
    """
    losses = logged_losses(run)
    # one loss is noisy: the mean of the last tenth, at least of the last one
    last = max(1, len(losses) // 10)
    scores = {"denoise": mean([*losses.values()][-last:])}
    if base is not None:
        scores["curve"] = _curve(run, losses, base)
    summary = summary_of(run)
    if summary.get("images_per_s") is not None:
        scores["images_per_s"] = summary["images_per_s"]
    for key, value in summary.items():
        if isinstance(value, int | float) and key not in NO_SCORES:
            scores[f"{OWN_PREFIX}{key}"] = value
    return scores


def logged_losses(run: Path) -> dict[int, float]:
    """Denoising loss by steps: the last of every ``log_every`` steps -> the mean over them.

    A run has more rows than these: one at each checkpoint, stop and look of the monitor, of the
    steps since the row before. Where they are follows from interruptions, which must not change a
    score.

    Raises:
        ValueError: the run does not say how often it has logged.
    """
    try:
        every = int(yaml.safe_load((run / CONFIG).read_text())["train"]["log_every"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{run / CONFIG} does not say train.log_every: {error}") from None
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    before = 0
    for row in read_rows(run / STATS):
        count = row["step"] - before
        before = row["step"]
        # the number of the steps' group
        end = -(-row["step"] // every) * every
        sums[end] = sums.get(end, 0.0) + count * row["denoise"]
        counts[end] = counts.get(end, 0) + count
    return {end: sums[end] / counts[end] for end in sums}


def _curve(run: Path, losses: dict[int, float], base: Path) -> float:
    base_losses = logged_losses(base)
    if losses.keys() != base_losses.keys():
        raise ValueError(
            f"variants must log the same steps: {run} logged {len(losses)} times up to step "
            f"{max(losses)}, {base} {len(base_losses)} up to {max(base_losses)}"
        )
    return max(abs(losses[end] - base_losses[end]) / abs(base_losses[end]) for end in losses)
