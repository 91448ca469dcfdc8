"""Studies: variants of one configuration, several seeds each; a table and a plot with mean and standard deviation."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import yaml

from sra_fast.analysis.jobs import Outcome, Pool, Task, threads_of
from sra_fast.training.logger import read_rows
from sra_fast.training.run_lock import RunLock
from sra_fast.utils.files import write_atomic, write_json

# in the folder of a variant's run: what it was made with
MADE_WITH = "study.json"
# in the same folder: what the run has printed
LOG = "log.txt"
# what a worker does with a run
RUNS = "sra_fast.analysis.study_runs:start"
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

    path: Path
    """the file"""
    base: Path
    """configuration that all variants share"""
    seeds: list[int]
    variants: dict[str, list[str]]
    """name -> arguments of train.py; the others are compared with the first"""

    @property
    def name(self) -> str:
        return self.path.stem


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
    return Study(path, base, held["seeds"], variants)


def _finished_run(runs: Path) -> Path | None:
    """The run folder in ``runs`` that has a summary, if any."""
    return next((file.parent for file in sorted(runs.glob("*/summary.json"))), None)


def runs_folder(study: Study, variant: str, seed: int, folder: Path) -> Path:
    """Where the run of a variant with a seed lies, in the folder of the study."""
    # by number: a variant's name may have characters that a folder's must not
    return folder / f"{list(study.variants).index(variant):02d}_seed{seed}"


def _check_made_with(runs: Path, variant: str, now: dict) -> None:
    """ValueError if what lies in ``runs`` was made with something else than ``now``."""
    file = runs / MADE_WITH
    if not file.exists():
        return
    held = json.loads(file.read_text())
    # through JSON and back, as the file was written
    for key, value in json.loads(json.dumps(now)).items():
        if held.get(key) != value:
            raise ValueError(
                f"{runs} was made with {key} {held.get(key)}, {variant} now has {value}: "
                "delete it or choose another --out"
            )


def _made_with(study: Study, variant: str) -> dict:
    return {
        "arguments": study.variants[variant],
        "base": yaml.safe_load(study.base.read_text()),
    }


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


@dataclass
class Result:
    """What ``run_study`` leaves.

    Attributes:
        rows: one per finished run whose seed's first variant is finished too: ``variant``, ``seed``
            and its ``outcome``.
        failed: a line for each run that failed.
        left: how many runs are not finished and have not failed.
    """

    rows: list[dict]
    failed: list[str]
    left: int


def run_study(
    study: Study,
    folder: Path,
    jobs: int = 1,
    asked: Callable[[], object] = lambda: None,
    report: Callable[[str], object] = print,
    start: str = RUNS,
    path: Sequence[Path] = (),
) -> Result:
    """Run every variant with every seed: all variants of a seed, then those of the next.

    Finished runs are not repeated, and a run that has a checkpoint goes on from it. A run that fails
    takes no other one along. ``rows.json`` and ``table.md`` in ``folder`` are written anew after
    each run.

    Args:
        study: what to run.
        folder: of its runs.
        jobs: runs at once, each in a process.
        asked: whether to stop: runs that have begun write a checkpoint and end.
        report: called with a line after every run.
        start, path: of ``jobs.Pool``.

    Raises:
        ValueError: runs in ``folder`` were made by another study or in another way.
        RuntimeError: no worker can be started.
    """
    threads = threads_of(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    runs = {
        (variant, seed): runs_folder(study, variant, seed, folder)
        for seed in study.seeds
        for variant in study.variants
    }
    made_with = {variant: _made_with(study, variant) for variant in study.variants}
    for (variant, _), place in runs.items():
        _check_made_with(place, variant, made_with[variant])
    names = {f"{variant}, seed {seed}": (variant, seed) for variant, seed in runs}
    failed = []

    def check(about: dict) -> None:
        """Before the first run is trained: those that are there must be comparable with it."""
        for (variant, seed), place in runs.items():
            _check_made_with(place, f"{variant}, seed {seed},", {"machine": about})
            made_with[variant]["machine"] = about

    def tasks() -> Iterator[Task]:
        for name, (variant, seed) in names.items():
            place = runs[variant, seed]
            if _finished_run(place) is None:
                place.mkdir(parents=True, exist_ok=True)
                yield Task(name, place / LOG, {"train": _command(study, variant, seed, place)})

    def note(outcome: Outcome) -> None:
        if outcome.state == "failed":
            failed.append(f"{study.name}: {outcome.task.name} failed: {outcome.reason}")
        report(f"{outcome.task.name}: {outcome.reason or outcome.state}")
        write_results(folder, gather(study, runs))

    with lock(folder), Pool(start, jobs, threads, [study.path.parent, *path], check) as pool:
        pool.run(tasks(), note, asked, before=lambda task: _begin(task, names, made_with))
    rows = gather(study, runs)
    left = sum(_finished_run(place) is None for place in runs.values()) - len(failed)
    write_results(folder, rows)
    return Result(rows, failed, left)


def _begin(task: Task, names: dict, made_with: dict) -> None:
    """Note what a run is made with, when it begins."""
    variant, _ = names[task.name]
    write_json(task.log.parent / MADE_WITH, made_with[variant])


def _command(study: Study, variant: str, seed: int, place: Path) -> list[str]:
    """Arguments of ``train.py``."""
    common = ["--config", str(study.base), *study.variants[variant]]
    return [*common, "--train.seed", str(seed), "--train.out", str(place)]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One command at a time works on a study; ValueError if another one does."""
    held = RunLock(folder)
    try:
        yield
    finally:
        held.release()


def gather(study: Study, runs: dict[tuple[str, int], Path]) -> list[dict]:
    """A row for each run that can be compared with the first variant's of the same seed."""
    first = next(iter(study.variants))
    rows = []
    for (variant, seed), place in runs.items():
        run = _finished_run(place)
        base = _finished_run(runs[first, seed])
        if run is not None and base is not None:
            rows.append({"variant": variant, "seed": seed, **outcome(run, base)})
    return rows


def write_results(folder: Path, rows: list[dict]) -> None:
    """``rows.json`` and ``table.md``; nothing without rows."""
    if rows:
        text = json.dumps(rows, indent=1) + "\n"
        write_atomic(folder / "rows.json", lambda p: p.write_text(text))
        write_atomic(folder / "table.md", lambda p: p.write_text(table(rows)))


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
