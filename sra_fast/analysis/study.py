"""Studies: one configuration, variants of it, several seeds; a table and a plot with the spread."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import yaml

from sra_fast.training.logger import read_rows
from sra_fast.utils.files import write_atomic, write_json

GIVEN = "study.json"  # in the folder of a variant's runs: what it was made with
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Study:
    """``variants``: name -> arguments of train.py; the first is what the others are compared with."""

    name: str
    base: Path
    seeds: list[int]
    variants: dict[str, list[str]]


def _arguments(fields: dict) -> list[str]:
    return [
        word
        for key, value in fields.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def read_study(path: Path) -> Study:
    """A study from YAML: ``base`` (a configuration, relative to the file), ``args``, ``seeds``, ``variants``.

    Raises:
        ValueError: unreadable, a key missing or unknown, no variants or seeds, or something else than they are.
    """
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no readable YAML file: {error}") from None
    expected = {"base", "args", "seeds", "variants"}
    if (
        not isinstance(held, dict)
        or set(held) != expected
        or not held["seeds"]
        or not held["variants"]
    ):
        raise ValueError(
            f"{path} must have {sorted(expected)}, none of seeds and variants empty, got {held}"
        )
    fields = [
        held["args"] or {},
        held["variants"],
        *(v or {} for v in dict(held["variants"]).values()),
    ]
    if not all(isinstance(part, dict) for part in fields) or not all(
        type(seed) is int for seed in held["seeds"]
    ):
        raise ValueError(
            f"{path}: args, variants and each variant must be mappings, seeds whole numbers, got {held}"
        )
    if not (path.parent / held["base"]).is_file():
        raise ValueError(f"{path}: there is no base configuration {path.parent / held['base']}")
    common = _arguments(held["args"] or {})
    variants = {
        name: [*common, *_arguments(fields or {})] for name, fields in held["variants"].items()
    }
    return Study(path.stem, path.parent / held["base"], held["seeds"], variants)


def run_one(study: Study, variant: str, seed: int, folder: Path) -> Path:
    """Train one variant with one seed unless that has been done; the run's folder.

    Raises:
        ValueError: it has been done with other arguments or another base.
        RuntimeError: the run failed.
    """
    runs = folder / f"{list(study.variants).index(variant):02d}_seed{seed}"
    given = {"arguments": study.variants[variant], "base": yaml.safe_load(study.base.read_text())}
    held = json.loads((runs / GIVEN).read_text()) if (runs / GIVEN).exists() else given
    for key, value in json.loads(json.dumps(given)).items():
        if held[key] != value:
            raise ValueError(
                f"{runs} was made with {key} {held[key]}, {variant} now has {value}: delete it or choose another --out"
            )
    done = next((f.parent for f in sorted(runs.glob("*/summary.json"))), None)
    if done:
        return done
    runs.mkdir(parents=True, exist_ok=True)
    write_json(runs / GIVEN, given)
    command = [
        sys.executable,
        str(TRAIN),
        "--config",
        str(study.base),
        *study.variants[variant],
        "--train.seed",
        str(seed),
        "--train.out",
        str(runs),
    ]
    child = subprocess.run(command, capture_output=True, text=True)
    done = next((f.parent for f in sorted(runs.glob("*/summary.json"))), None)
    if not done:
        raise RuntimeError(
            f"{study.name}: {variant}, seed {seed} failed: {(child.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    return done


def outcome(run: Path, first: Path) -> dict[str, float]:
    """The summary's scores, and how far the loss curve is from that of the first variant with the same seed.

    ``curve``: the largest relative difference of any logged loss; ``images_per_s`` as the run measured it.
    """
    summary = json.loads((run / "summary.json").read_text())
    curve, reference = (
        [row["denoise"] for row in read_rows(r / "stats.jsonl")] for r in (run, first)
    )
    if len(curve) != len(reference):
        raise ValueError(
            f"variants must log the same steps: {run} logged {len(curve)}, {first} {len(reference)}"
        )
    scores = {
        key: summary[key] for key in ("label_accuracy", "frechet", "images_per_s") if key in summary
    }
    last = max(1, len(curve) // 10)
    difference = max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))
    return {"denoise": mean(curve[-last:]), "curve": difference, **scores}


def execute(study: Study, folder: Path, report=print) -> list[dict]:
    """Every variant with every seed, one after the other; ``rows.json`` and ``table.md`` grow with each.

    Returns:
        One row per run: ``variant``, ``seed`` and its outcome.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, first = [], next(iter(study.variants))
    for seed in study.seeds:
        for variant in study.variants:
            run = run_one(study, variant, seed, folder)
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    **outcome(run, run_one(study, first, seed, folder)),
                }
            )
            report(rows[-1])
            write_atomic(
                folder / "rows.json", lambda p: p.write_text(json.dumps(rows, indent=1) + "\n")
            )
            write_atomic(folder / "table.md", lambda p: p.write_text(table(rows)))
    return rows


def spread(values: list[float]) -> str:
    """Mean, and standard deviation if there are several values."""
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: mean and standard deviation over the seeds."""
    columns = {
        "denoise": "denoising loss",
        "curve": "largest difference of the curve",
        "label_accuracy": "label accuracy",
        "frechet": "Fréchet distance",
        "images_per_s": "images/s",
    }
    columns = {key: title for key, title in columns.items() if all(key in row for row in rows)}
    lines = [
        "| variant | seeds | " + " | ".join(columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [spread([row[key] for row in mine]) for key in columns]
        lines.append(f"| {variant} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
