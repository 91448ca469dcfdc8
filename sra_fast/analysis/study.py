"""Studies: variants of one configuration, several seeds each; a table and a plot with mean and standard deviation."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import yaml

from sra_fast.training.logger import read_rows
from sra_fast.utils.files import write_atomic, write_json

# in the folder of a variant's run: what it was made with
MADE_WITH = "study.json"
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
KEYS = {"base", "args", "seeds", "variants"}
# columns of the table: key of a row -> title
COLUMNS = {
    "denoise": "denoising loss",
    "curve": "largest difference of the curve",
    "label_accuracy": "label accuracy",
    "frechet": "Fréchet distance",
    "images_per_s": "images/s",
}


@dataclass(frozen=True)
class Study:
    """A study that was read from a file."""

    name: str
    base: Path
    """configuration that all variants share"""
    seeds: list[int]
    variants: dict[str, list[str]]
    """name -> arguments of train.py; the others are compared with the first"""


def _arguments(fields: dict) -> list[str]:
    """``{"align.weight": 2.0}`` -> ``["--align.weight", "2.0"]``."""
    words = []
    for key, value in fields.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def read_study(path: Path) -> Study:
    """Read a study from YAML: ``base`` (a configuration, relative to the file), ``args``, ``seeds``, ``variants``.

    Raises:
        ValueError: the file cannot be read, a key is missing, unknown or of another type, or seeds
            or variants are empty.
    """
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        # YAML's text has several lines
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable YAML file: {reason}") from None
    complete = isinstance(held, dict) and set(held) == KEYS
    if not complete or not held["seeds"] or not held["variants"]:
        raise ValueError(
            f"{path} must have {sorted(KEYS)}, none of seeds and variants empty, got {held}"
        )
    # an empty mapping in YAML is None
    common = held["args"] or {}
    changes = {name: fields or {} for name, fields in dict(held["variants"]).items()}
    mappings = [common, held["variants"], *changes.values()]
    all_mappings = all(isinstance(part, dict) for part in mappings)
    if not all_mappings or not all(type(seed) is int for seed in held["seeds"]):
        raise ValueError(
            f"{path}: args, variants and each variant must be mappings, seeds whole numbers, got {held}"
        )
    base = path.parent / held["base"]
    if not base.is_file():
        raise ValueError(f"{path}: there is no base configuration {base}")
    variants = {
        name: [*_arguments(common), *_arguments(fields)] for name, fields in changes.items()
    }
    return Study(path.stem, base, held["seeds"], variants)


def _finished_run(runs: Path) -> Path | None:
    """The run folder in ``runs`` that has a summary, if any."""
    return next((file.parent for file in sorted(runs.glob("*/summary.json"))), None)


def run_one(study: Study, variant: str, seed: int, folder: Path) -> Path:
    """Train one variant with one seed, unless that has been done.

    Args:
        study: the variant's.
        variant: its name.
        seed: of the run.
        folder: of the study's runs.

    Returns:
        The run folder.

    Raises:
        ValueError: it was trained before, with other arguments or another base.
        RuntimeError: training failed.
    """
    # by number: a variant's name may have characters that a folder's must not
    number = list(study.variants).index(variant)
    runs = folder / f"{number:02d}_seed{seed}"
    made_with = {
        "arguments": study.variants[variant],
        "base": yaml.safe_load(study.base.read_text()),
    }
    file = runs / MADE_WITH
    if file.exists():
        held = json.loads(file.read_text())
        # through JSON and back, as the file was written
        for key, value in json.loads(json.dumps(made_with)).items():
            if held[key] != value:
                raise ValueError(
                    f"{runs} was made with {key} {held[key]}, {variant} now has {value}: "
                    "delete it or choose another --out"
                )
    done = _finished_run(runs)
    if done:
        return done

    runs.mkdir(parents=True, exist_ok=True)
    write_json(file, made_with)
    # in a separate process, as a user would start it
    command = [sys.executable, str(TRAIN), "--config", str(study.base)]
    command += study.variants[variant]
    command += ["--train.seed", str(seed), "--train.out", str(runs)]
    child = subprocess.run(command, capture_output=True, text=True)
    done = _finished_run(runs)
    if not done:
        reason = (child.stderr.strip().splitlines() or ["?"])[-1]
        raise RuntimeError(f"{study.name}: {variant}, seed {seed} failed: {reason}")
    return done


def outcome(run: Path, first: Path) -> dict[str, float]:
    """Scores of one run.

    Args:
        run: a run folder.
        first: run folder of the first variant with the same seed.

    Returns:
        ``denoise``: the mean of the last tenth of the logged denoising losses.
        ``curve``: the largest relative difference of any logged loss from the first variant's.
        ``label_accuracy``, ``frechet``, ``images_per_s``: of the summary, if it has them.

    Raises:
        ValueError: the two runs have not logged the same number of steps.
    """
    summary = json.loads((run / "summary.json").read_text())
    losses = [row["denoise"] for row in read_rows(run / "stats.jsonl")]
    first_losses = [row["denoise"] for row in read_rows(first / "stats.jsonl")]
    if len(losses) != len(first_losses):
        raise ValueError(
            f"variants must log the same steps: {run} logged {len(losses)}, {first} {len(first_losses)}"
        )
    # one loss is noisy: the mean of the last tenth, at least of the last one
    last = max(1, len(losses) // 10)
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, first_losses, strict=True)]
    scores = {"denoise": mean(losses[-last:]), "curve": max(differences)}
    for key in ("label_accuracy", "frechet", "images_per_s"):
        if key in summary:
            scores[key] = summary[key]
    return scores


def run_study(study: Study, folder: Path, report: Callable[[dict], object] = print) -> list[dict]:
    """Run every variant with every seed, one after the other.

    ``rows.json`` and ``table.md`` in ``folder`` are written anew after each run. Runs that are
    finished are not repeated.

    Args:
        study: what to run.
        folder: of its runs.
        report: called with every row.

    Returns:
        One row per run: ``variant``, ``seed`` and its ``outcome``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    first_variant = next(iter(study.variants))
    for seed in study.seeds:
        for variant in study.variants:
            run = run_one(study, variant, seed, folder)
            # a look-up: the first variant has been trained when its turn came
            first = run_one(study, first_variant, seed, folder)
            row = {"variant": variant, "seed": seed, **outcome(run, first)}
            rows.append(row)
            report(row)
            text = json.dumps(rows, indent=1) + "\n"
            write_atomic(folder / "rows.json", lambda p, text=text: p.write_text(text))
            write_atomic(folder / "table.md", lambda p: p.write_text(table(rows)))
    return rows


def mean_and_std(values: list[float]) -> str:
    """The mean, with the standard deviation if there are several values."""
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{deviation}"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: mean and standard deviation over the seeds."""
    # only scores that every run has
    keys = [key for key in COLUMNS if all(key in row for row in rows)]
    # a line per variant, in the order of the study
    titles = ["variant", "seeds", *(COLUMNS[key] for key in keys)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        seeds = [row for row in rows if row["variant"] == variant]
        scores = [mean_and_std([row[key] for row in seeds]) for key in keys]
        lines.append(f"| {' | '.join([variant, str(len(seeds)), *scores])} |")
    return "\n".join(lines) + "\n"
