"""The scores of a study's runs: which there are, which direction is better, and where they are kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from sra_fast.training.logger import STATS, read_rows

# before a score that a run's own evaluation has left in its summary (the digits': EVALUATIONS)
SUMMARY = "own_"


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
    # comparable between runs of one target only
    "align_distance": Score("alignment distance"),
    "feature_norm": Score("feature norm"),
    # of the data and the classifier, to read the scores by
    "frechet_floor": Score("Fréchet distance of real images", compared=False),
    "classifier_accuracy": Score("accuracy of the classifier", compared=False),
    f"{SUMMARY}frechet": Score("Fréchet distance, own evaluation", "lower"),
    f"{SUMMARY}label_accuracy": Score("label accuracy, own evaluation", "higher"),
    f"{SUMMARY}frechet_train": Score(
        "Fréchet distance of training images, own evaluation", compared=False
    ),
    f"{SUMMARY}svm_accuracy": Score("accuracy of the classifier, own evaluation", compared=False),
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
    if key.startswith(SUMMARY):
        title = f"{title.removeprefix('own ')}, own evaluation"
    return SCORES.get(key, Score(title))


def finished_run(runs: Path) -> Path | None:
    """The run folder in ``runs`` that has a summary, if any."""
    return next((file.parent for file in sorted(runs.glob("*/summary.json"))), None)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def recorded_scores(runs: Path, how: Mapping) -> dict[str, float] | None:
    """The scores of a finished run; None if there are none that were made like this.

    Args:
        runs: folder of a variant's run.
        how: function and options.
    """
    run = finished_run(runs)
    try:
        held = json.loads((runs / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if run is None or held.get("made_with") != made_like(run, how):
        return None
    return held["scores"]


def made_like(run: Path, how: Mapping) -> dict:
    """What a run's scores follow from: ``how``, and which weights it has trained."""
    # through JSON and back, as the file was written
    return json.loads(json.dumps({**how, "checkpoint": summary_of(run).get("checkpoint")}))


def training_scores(run: Path, base: Path | None) -> dict[str, float]:
    """Scores that a run has from its training.

    Args:
        run: a run folder.
        base: run folder of the baseline with the same seed; None: it is not finished.

    Returns:
        ``denoise``: the mean of the last tenth of the logged denoising losses.
        ``curve``: the largest relative difference of any logged loss from the baseline's, if that
        is there.
        ``images_per_s``; and what the run's own evaluation has left in the summary, with ``SUMMARY``
        before its name.

    Raises:
        ValueError: the two runs have not logged the same number of steps.
    """
    losses = [row["denoise"] for row in read_rows(run / STATS)]
    # one loss is noisy: the mean of the last tenth, at least of the last one
    last = max(1, len(losses) // 10)
    scores = {"denoise": mean(losses[-last:])}
    if base is not None:
        scores["curve"] = _curve(run, losses, base)
    summary = summary_of(run)
    if summary.get("images_per_s") is not None:
        scores["images_per_s"] = summary["images_per_s"]
    for key, value in summary.items():
        if isinstance(value, int | float) and key not in NO_SCORES:
            scores[f"{SUMMARY}{key}"] = value
    return scores


def _curve(run: Path, losses: list[float], base: Path) -> float:
    base_losses = [row["denoise"] for row in read_rows(base / STATS)]
    if len(losses) != len(base_losses):
        raise ValueError(
            f"variants must log the same steps: {run} logged {len(losses)}, {base} {len(base_losses)}"
        )
    return max(abs(a - b) / abs(b) for a, b in zip(losses, base_losses, strict=True))
