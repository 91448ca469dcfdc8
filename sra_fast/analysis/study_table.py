"""What a study has found, as Markdown: scores, differences with intervals, verdicts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean

import numpy as np

from sra_fast.analysis.intervals import bootstrap_interval, paired, seeds_needed, t_interval
from sra_fast.analysis.study import HIGHER, LOWER, Claim, Study
from sra_fast.analysis.study_scores import OF_TRAINING, OWN_PREFIX, SCORES, score_named
from sra_fast.plots.study import StudyPanel

HELD_OUT = "held_out"
ONE_SEED = "one seed: no interval"
# Student's t of differences that do not vary would be certain of their mean
EQUAL = "the same in every seed: no interval"
# the difference that a study should be able to see, as a part of the baseline's mean
RELATIVE = 0.05
NONE = "–"
# below any score's precision
CANCELLED = 1e-12
NOT_FINITE = "a score is not finite"


@dataclass(frozen=True)
class Results:
    """What the finished runs of a study have given.

    Attributes:
        study: the study.
        rows: one per run: ``variant``, ``seed`` and its scores.
        held_out: (variant, seed) -> its file of held-out losses, where there is one.
    """

    study: Study
    rows: list[dict]
    held_out: dict[tuple[str, int], Path] = field(default_factory=dict)

    def by_seed(self, variant: str, key: str) -> dict[int, float]:
        """Seed -> score, of the runs that have it."""
        return {
            row["seed"]: row[key] for row in self.rows if row["variant"] == variant and key in row
        }

    @property
    def keys(self) -> list[str]:
        """Scores that some run has: those of ``SCORES`` in its order, then others."""
        there = dict.fromkeys(key for row in self.rows for key in row)
        others = [key for key in there if key not in SCORES and key not in ("variant", "seed")]
        return [*(key for key in SCORES if key in there), *others]

    @property
    def compared(self) -> list[str]:
        """Scores whose differences are of interest."""
        return [key for key in self.keys if score_named(key).compared]


@dataclass(frozen=True)
class Difference:
    """A variant's score minus another one's, seed by seed.

    Attributes:
        by_seed: seed -> difference, of the seeds that both have.
        interval: of the mean over the seeds (Student's t, 95 %); None with one seed, or if all
            differences are the same and not 0.
    """

    by_seed: dict[int, float]
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return mean(self.by_seed.values())

    @property
    def no_interval(self) -> str:
        """Why there is no interval."""
        return ONE_SEED if len(self.by_seed) == 1 else EQUAL

    def text(self) -> str:
        """``+0.01 [-0.02, +0.04]``."""
        if not any(self.by_seed.values()):
            return "0 in every seed"
        if self.interval is None:
            return f"{signed(self.mean)} ({self.no_interval})"
        return f"{signed(self.mean)} {bounds(self.interval)}"


def signed(value: float) -> str:
    """A difference with its sign; what is left of differences that cancel is 0."""
    return "0" if abs(value) < CANCELLED else f"{value:+.3g}"


def bounds(interval: tuple[float, float]) -> str:
    """An interval in brackets."""
    return f"[{signed(interval[0])}, {signed(interval[1])}]"


def difference(results: Results, variant: str, baseline: str, key: str) -> Difference | None:
    """The paired difference of a score; None if no seed has both, or some score is not finite."""
    ours = results.by_seed(variant, key)
    theirs = results.by_seed(baseline, key)
    seeds = _shared_seeds(results, variant, baseline, key)
    values = paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    if not seeds or not np.isfinite(values).all():
        return None
    varies = values.std() > CANCELLED * np.abs(values).max() or not values.any()
    interval = t_interval(values) if len(seeds) > 1 and varies else None
    return Difference(dict(zip(seeds, values.tolist(), strict=True)), interval)


def _shared_seeds(results: Results, variant: str, baseline: str, key: str) -> list[int]:
    """Seeds whose runs have a score of both variants."""
    ours = results.by_seed(variant, key)
    theirs = results.by_seed(baseline, key)
    return [seed for seed in results.study.seeds if seed in ours and seed in theirs]


def rounding_of(results: Results, key: str) -> float | None:
    """The largest difference of a seed that rounding alone has made; None: it is not known."""
    study = results.study
    if study.rounding is None:
        return None
    found = difference(results, study.rounding, study.baseline, key)
    return None if found is None else max(abs(value) for value in found.by_seed.values())


def is_rounding(results: Results, found: float, key: str) -> bool:
    """Whether a difference is smaller than what rounding alone does to the baseline."""
    largest = rounding_of(results, key)
    return largest is not None and abs(found) < largest


def verdict(results: Results, claim: Claim) -> tuple[Difference | None, str]:
    """The difference that a claim is about, and whether the study shows it.

    ``shown``: the interval over the seeds lies on the claimed side of 0. ``contradicted``: on the
    other side. ``not shown``: it holds 0.

    Raises:
        ValueError: the runs of both variants are there, and none has the score.
    """
    found = difference(results, claim.variant, claim.baseline, claim.score)
    if found is None:
        _check_score(results, claim)
        shared = _shared_seeds(results, claim.variant, claim.baseline, claim.score)
        return None, NOT_FINITE if shared else "not finished"
    if found.interval is None:
        return found, found.no_interval
    low, high = found.interval
    sign = {LOWER: high < 0, HIGHER: low > 0}
    against = {LOWER: low > 0, HIGHER: high < 0}
    word = "not shown"
    if sign[claim.expect]:
        word = "shown"
    elif against[claim.expect]:
        word = "contradicted"
    if is_rounding(results, found.mean, claim.score):
        word += ", smaller than rounding alone"
    missing = len(results.study.seeds) - len(found.by_seed)
    return (
        found,
        f"{word} ({missing} of {len(results.study.seeds)} seeds missing)" if missing else word,
    )


def _check_score(results: Results, claim: Claim) -> None:
    """ValueError if the score of a claim will not come, however long the study goes on."""
    variants = {row["variant"] for row in results.rows}
    if claim.score in results.keys or not {claim.variant, claim.baseline} <= variants:
        return
    # what training leaves is there at once; other scores are all there when one of them is
    of_training = lambda key: key in OF_TRAINING or key.startswith(OWN_PREFIX)
    is_scored = results.study.scoring is None or not all(map(of_training, results.keys))
    if of_training(claim.score) or is_scored:
        raise ValueError(
            f"{results.study.name}: the claim {claim.claim!r} is about the score {claim.score}, "
            f"which no run has; there are {', '.join(results.keys)}"
        )


def table(results: Results) -> str:
    """Everything that a study has found, as Markdown.

    Raises:
        ValueError: held-out losses were measured in different ways, or a claim is about a score
            that no run has.
    """
    parts = [_claims(results), _overview(results)]
    parts += [_differences(results, key) for key in results.compared]
    return "\n".join(part for part in parts if part)


def _lines(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    # a bar inside of a name would end the cell
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _claims(results: Results) -> str:
    """The table of claims; nothing without any."""
    if not results.study.claims:
        return ""
    rows = []
    for claim in results.study.claims:
        found, word = verdict(results, claim)
        about = f"{claim.variant} against {claim.baseline}"
        expected = f"{score_named(claim.score).title} {claim.expect}"
        rows.append([claim.claim, about, expected, found.text() if found else NONE, word])
    titles = ["claim", "variants", "expected", "difference [95 %]", "verdict"]
    return "### Claims\n\n" + _lines(titles, rows)


def mean_and_std(values: list[float]) -> str:
    """The mean, with the standard deviation if there are several values."""
    deviation = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{deviation}"


def _mean_of_seeds(values: list[float], seeds: int) -> str:
    """``mean_and_std``, and how many seeds it is of if not of all ``seeds``."""
    if not values:
        return NONE
    count = "" if len(values) == seeds else f" ({len(values)} of {seeds} seeds)"
    return mean_and_std(values) + count


def _overview(results: Results) -> str:
    """Mean and standard deviation over the seeds, of every score."""
    rows = []
    for variant in results.study.variants:
        seeds = [row for row in results.rows if row["variant"] == variant]
        if seeds:
            scores = [[*results.by_seed(variant, key).values()] for key in results.keys]
            cells = [_mean_of_seeds(values, len(seeds)) for values in scores]
            rows.append([variant, str(len(seeds)), *cells])
    titles = ["variant", "seeds", *(score_named(key).title for key in results.keys)]
    note = ""
    if any(key.startswith(OWN_PREFIX) for key in results.keys):
        note = (
            "\nOwn evaluation: what every run on these data ends with. Its samples and its "
            "classifier are others than those of the scores.\n"
        )
    return "### Scores: mean ± standard deviation over the seeds\n\n" + _lines(titles, rows) + note


def _differences(results: Results, key: str) -> str:
    """The section of a score: differences from the baseline, with intervals."""
    study = results.study
    score = score_named(key)
    base = [*results.by_seed(study.baseline, key).values()]
    if not base:
        return ""
    direction = f" ({score.better} is better)" if score.better else ""
    rows = []
    for variant in study.variants:
        values = [*results.by_seed(variant, key).values()]
        if variant == study.baseline:
            rows.append([variant, _mean_of_seeds(values, len(study.seeds)), "", "", "baseline"])
        elif values:
            mean_of_all = _mean_of_seeds(values, len(study.seeds))
            rows.append([variant, mean_of_all, *_compared(results, variant, key, base)])
    titles = [
        "variant",
        "mean ± deviation",
        f"difference from {study.baseline} [95 % over seeds]",
        f"seeds for {100 * RELATIVE:g} %",
        "finding",
    ]
    text = f"### {score.title[0].upper()}{score.title[1:]}{direction}\n\n" + _lines(titles, rows)
    text += "\n" + "\n".join([_spread_line(study, base), *_rounding_line(results, key)]) + "\n"
    if key == HELD_OUT:
        text += _within_seeds(results)
    return text


def _compared(results: Results, variant: str, key: str, base: list[float]) -> list[str]:
    """Difference, seeds needed and finding of a variant."""
    found = difference(results, variant, results.study.baseline, key)
    if found is None:
        shared = _shared_seeds(results, variant, results.study.baseline, key)
        return [NONE, NONE, NOT_FINITE if shared else "no seed has both"]
    needed = NONE
    if found.interval is not None and math.isfinite(mean(base)) and mean(base) != 0:
        count = seeds_needed([*found.by_seed.values()], mean(base), RELATIVE)
        needed = "more than anybody trains" if count is None else str(count)
    finding = _finding(results, found, key)
    if variant == results.study.rounding:
        finding = "what rounding alone does"
    pairs, seeds = len(found.by_seed), len(results.study.seeds)
    of_some = "" if pairs == seeds else f" ({pairs} of {seeds} seeds)"
    return [found.text() + of_some, needed, finding]


def _finding(results: Results, found: Difference, key: str) -> str:
    """What a difference says, in words."""
    if not any(found.by_seed.values()):
        return "no difference"
    if found.interval is None:
        word = found.no_interval
    elif found.interval[0] <= 0 <= found.interval[1]:
        word = "no difference shown"
    else:
        side = LOWER if found.interval[1] < 0 else HIGHER
        better = score_named(key).better
        word = side
        if better:
            word = "better" if side == better else "worse"
    rounding = ", smaller than rounding alone" if is_rounding(results, found.mean, key) else ""
    return word + rounding


def _spread_line(study: Study, base: list[float]) -> str:
    """How far the baseline's seeds lie apart."""
    if len(base) < 2:
        return f"Spread of the seeds of {study.baseline}: {ONE_SEED}."
    deviation = np.std(base, ddof=1)
    part = f" ({deviation / abs(np.mean(base)):.1%} of the mean)" if np.mean(base) else ""
    return (
        f"Spread of the {len(base)} seeds of {study.baseline}: standard deviation "
        f"{deviation:.3g}{part}."
    )


def _rounding_line(results: Results, key: str) -> list[str]:
    """What rounding alone does; no line if the study does not name it."""
    study = results.study
    if study.rounding is None:
        return []
    found = difference(results, study.rounding, study.baseline, key)
    if found is None:
        return [f"Rounding alone ({study.rounding}): not known yet."]
    largest = rounding_of(results, key)
    most = f", at most {largest:.3g} in a seed" if largest else ""
    return [f"Rounding alone ({study.rounding}): {found.text()}{most}."]


def _within_seeds(results: Results) -> str:
    """Held-out loss minus the baseline's on the same images, in each seed."""
    study = results.study
    others = [variant for variant in study.variants if variant != study.baseline]
    rows = []
    for variant in others:
        cells = [_on_images(results, variant, seed) for seed in study.seeds]
        if any(cell != NONE for cell in cells):
            rows.append([variant, *cells])
    if not rows:
        return ""
    titles = [
        "difference in each seed [95 % over images]",
        *(f"seed {seed}" for seed in study.seeds),
    ]
    return "\n" + _lines(titles, rows)


def _on_images(results: Results, variant: str, seed: int) -> str:
    ours = results.held_out.get((variant, seed))
    theirs = results.held_out.get((results.study.baseline, seed))
    if ours is None or theirs is None:
        return NONE
    try:
        found, interval = _paired_losses(_version(ours), _version(theirs))
    except ValueError as error:
        reason = (
            f"{results.study.name}: {variant} and {results.study.baseline}, seed {seed}: {error}"
        )
        raise ValueError(
            f"{reason}; `scores: {{held_out_images: 0}}` leaves the held-out loss out"
        ) from None
    small = " (smaller than rounding)" if is_rounding(results, found, HELD_OUT) else ""
    return f"{signed(found)} {bounds(interval)}{small}"


def _version(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns


@cache
def _paired_losses(
    ours: tuple[Path, int], theirs: tuple[Path, int]
) -> tuple[float, tuple[float, float]]:
    """Mean difference of two files of held-out losses, and its interval over the images.

    Remembered: the table is made anew after every run.
    """
    from sra_fast.evaluation.held_out import HeldOutLoss

    values = HeldOutLoss.load(ours[0]).paired(HeldOutLoss.load(theirs[0]))
    return float(values.mean()), bootstrap_interval(values)


def panels(results: Results) -> list[StudyPanel]:
    """The differences of every score, for ``plot_study``."""
    study = results.study
    found = []
    for key in results.compared:
        differences = {
            variant: difference(results, variant, study.baseline, key)
            for variant in study.variants
            if variant != study.baseline
        }
        if not any(differences.values()):
            continue
        score = score_named(key)
        direction = f"\n{score.better} is better" if score.better else ""
        found.append(
            StudyPanel(
                f"{score.title}: difference{direction}",
                {
                    name: [*each.by_seed.values()] if each else []
                    for name, each in differences.items()
                },
                {name: each.interval if each else None for name, each in differences.items()},
                rounding_of(results, key),
            )
        )
    return found
