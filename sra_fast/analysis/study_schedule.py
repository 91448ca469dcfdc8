"""A study from start to table: what is left to do, in workers, and what the runs have given."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sra_fast.analysis.jobs import Outcome, Pool, Task, threads_of
from sra_fast.analysis.run_scores import ScoreOptions
from sra_fast.analysis.study import PARTS, Study
from sra_fast.analysis.study_plans import (
    Cost,
    Planned,
    check_made_like,
    initial_weights,
    note_time,
    plan_variants,
    seconds_left,
    steps_done,
    times_of,
)
from sra_fast.analysis.study_scores import (
    finished_run,
    held_out_file,
    recorded_scores,
    training_scores,
)
from sra_fast.analysis.study_table import Results, table
from sra_fast.analysis.worker import find_function
from sra_fast.checkpoint.reading import CHECKPOINTS, FACTS
from sra_fast.training.run_lock import RunLock
from sra_fast.utils.files import plain, read_json, require, write_atomic, write_json

log = logging.getLogger("sra_fast")

# in the folder of a variant's run: what it was made with
MADE_WITH = "study.json"
# in it: the SHA-256 of the weights that the run has started from
INITIAL = "initial_weights"
# in the same folder: what the run has printed
LOG = "log.txt"
# beside the studies: networks that score, which all of them share
NETWORKS = "networks"
# what a worker does with a run
RUNS = "sra_fast.analysis.study_runs:start"


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Attributes:
        jobs: runs at once, each in a process.
        score_only: nothing is trained.
        dry_run: only the cost is told.
        variants, seeds: those that are trained and scored; empty: all of the study.
        start, path: of ``jobs.Pool``.
    """

    jobs: int = 1
    score_only: bool = False
    dry_run: bool = False
    variants: Sequence[str] = ()
    seeds: Sequence[int] = ()
    start: str = RUNS
    path: Sequence[Path] = ()


@dataclass
class Ended:
    """What ``run_study`` leaves.

    Attributes:
        results: of the finished runs.
        failed: a line for each run that failed.
        left: how many runs are not finished, or not scored, and have not failed.
    """

    results: Results
    failed: list[str] = field(default_factory=list)
    left: int = 0


def run_study(
    study: Study,
    folder: Path,
    options: Options | None = None,
    asked: Callable[[], object] = lambda: None,
    report: Callable[[str], object] = print,
) -> Ended:
    """Run every variant with every seed: all variants of a seed, then those of the next.

    Finished runs are not repeated, and a run that has a checkpoint goes on from it. A run that
    fails takes no other one along. ``rows.json`` and ``table.md`` in ``folder`` are written anew
    after each run.

    Args:
        study: what to run.
        folder: of its runs.
        options: how.
        asked: whether to stop: runs that have begun write a checkpoint and end.
        report: called with a line after every run.

    Raises:
        ValueError: the study cannot be run as it is, runs in ``folder`` were made by another one or
            in another way, or their scores cannot be compared.
        RuntimeError: no worker can be started.
    """
    options = options or Options()
    # not after hours of training
    require("scipy", "SciPy", "eval")
    _check_scoring(study, options)
    unknown = [name for name in options.variants if name not in study.variants]
    if unknown:
        raise ValueError(
            f"{study.name}: variants must be among {[*study.variants]}, got {unknown[0]}"
        )
    session = _Session(study, folder, options, report)
    if options.dry_run and not folder.exists():
        session.tell_cost(asked)
        return Ended(Results(study, []))
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if options.dry_run:
            session.tell_cost(asked)
        else:
            session.work(asked)
    # a dry run leaves everything as it is
    return session.end() if not options.dry_run else Ended(Results(study, []))


def _check_scoring(study: Study, options: Options) -> None:
    """ValueError unless the function that scores is there and takes the options."""
    scoring = study.scoring
    if scoring is None:
        if options.score_only:
            raise ValueError(f"{study.name}: --score-only, and scores says none: nothing to do")
        return
    # a study's own function may lie beside its file
    places = [str(study.path.parent), *map(str, options.path)]
    sys.path[1:1] = places
    try:
        find_function(scoring.function)
        if not scoring.is_own:
            ScoreOptions(**scoring.options).check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{study.name}: scores: {error}") from None
    finally:
        for place in places:
            sys.path.remove(place)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time works on a study; ValueError if another one does."""
    held = RunLock(folder)
    try:
        yield
    finally:
        held.release()


class _Session:
    """One command's work on a study.

    Attributes:
        runs: (variant, seed) -> the folder of the run, in the order of the work.
        failed: lines.
    """

    def __init__(self, study: Study, folder: Path, options: Options, report: Callable):
        # further seeds than the file's are the study's too
        more = [seed for seed in options.seeds if seed not in study.seeds]
        self.study = study = replace(study, seeds=[*study.seeds, *more])
        self.how = {} if study.scoring is None else study.scoring.identity()
        self.folder = folder
        self.options = options
        self.report = report
        self.threads = threads_of(options.jobs)
        self.runs = {
            (variant, seed): study.folder_of(variant, seed, folder)
            for seed in study.seeds
            for variant in study.variants
        }
        self.failed: list[str] = []
        self.planned: dict[str, Planned] = {}
        # by variant; None: it starts from no weights
        self.initial: dict[str, str | None] = {}
        self.machine: dict = {}
        # steps of the checkpoint that each task goes on from
        self.steps: dict[tuple[str, int], int] = {}
        self._check_there()

    def _check_there(self) -> None:
        """ValueError if runs were made with another study, or not all in one way."""
        machines = {}
        for (variant, _), place in self.runs.items():
            held = self._made_with(place)
            if held is None:
                continue
            # through JSON and back, as the file was written
            now = plain(self.study.made_with(variant))
            for key, value in now.items():
                if held.get(key) == value:
                    continue
                differs = f"{key} {held.get(key)}, {variant} now has {value}"
                if key == PARTS:
                    differs = _other_parts(held.get(key) or {}, value or {})
                raise ValueError(
                    f"{place} was made with {differs}: delete it or choose another --out"
                )
            machines.setdefault(json.dumps(held.get("machine")), (held.get("machine"), place))
        if len(machines) > 1:
            (one, first), (other, second), *_ = machines.values()
            raise ValueError(
                f"runs of one study must be made in one way, {first} was made with "
                f"{_difference(one, other)}, {second} with {_difference(other, one)}"
            )

    @staticmethod
    def _made_with(place: Path) -> dict | None:
        """What a run was made with that has trained something; None: there is none."""
        file = place / MADE_WITH
        trained = finished_run(place) or any(place.glob(f"*/{CHECKPOINTS}/*"))
        return read_json(file) if trained and file.exists() else None

    def _check_machine(self, about: dict) -> None:
        """Before the first run is trained: those that are there must be comparable with it."""
        self.machine = about
        for place in self.runs.values():
            held = self._made_with(place)
            if held is not None and held.get("machine") != about:
                was = held.get("machine")
                raise ValueError(
                    f"{place} was made with {_difference(was, about)}, now there are "
                    f"{_difference(about, was)}: runs of one study must be made in one way "
                    "(OMP_NUM_THREADS sets the threads)"
                )

    def _is_scored(self, place: Path) -> bool:
        return self.study.scoring is None or recorded_scores(place, self.how) is not None

    def _is_left(self, place: Path) -> bool:
        return finished_run(place) is None or not self._is_scored(place)

    def _left(self) -> dict[tuple[str, int], Path]:
        """Asked runs that are not finished, or not scored."""
        variants = self.options.variants or self.study.variants
        seeds = self.options.seeds or self.study.seeds
        return {
            (variant, seed): place
            for (variant, seed), place in self.runs.items()
            if variant in variants and seed in seeds and self._is_left(place)
        }

    def tasks(self) -> list[tuple[str, int]]:
        """Variant and seed of what this command has to do."""
        return [
            run
            for run, place in self._left().items()
            if not (self.options.score_only and finished_run(place) is None)
        ]

    def _pool(self) -> Pool:
        options = self.options
        path = [self.study.path.parent, *options.path]
        return Pool(options.start, options.jobs, self.threads, path, self._check_machine)

    def work(self, asked: Callable[[], object]) -> None:
        """Train and score what is left."""
        left = self.tasks()
        if not left:
            return
        with self._pool() as pool:
            # they import while the variants are checked
            pool.add_workers(len(left))
            self._plan()
            self.report(self._cost(left, pool, asked).line(self.study, self.options.jobs))
            names = {self._name(*run): run for run in left}
            tasks = [self._task(*run) for run in left]
            pool.run(
                tasks,
                lambda outcome: self._note(outcome, names[outcome.task.name]),
                asked,
                before=lambda task: self._begin(names[task.name]),
            )
        # what lies at a path may have been replaced while this command ran
        self._check_initial()

    def tell_cost(self, asked: Callable[[], object]) -> None:
        """Report what is left, and train nothing but a trial."""
        left = self.tasks()
        with self._pool() as pool:
            self._plan()
            self.report(self._cost(left, pool, asked).line(self.study, self.options.jobs))

    def _plan(self) -> None:
        self.planned = plan_variants(self.study, self.folder)
        self._read_initial()
        for (variant, _), place in self.runs.items():
            for facts in sorted(place.glob(f"*/{FACTS}")):
                check_made_like(self.planned[variant], facts.parent)

    def _read_initial(self) -> None:
        """What every variant starts from; ValueError if a run has started from something else.

        A path in the arguments stays the same when what lies there changes.
        """
        sources = {
            variant: planned.cfg.train.init_from for variant, planned in self.planned.items()
        }
        # several variants may start from one file, which is large
        digests = {source: initial_weights(source) for source in {*sources.values()}}
        self.initial = {variant: digests[source] for variant, source in sources.items()}
        self._check_initial()

    def _check_initial(self) -> None:
        """ValueError if a run has started from other weights than those of ``_read_initial``."""
        for (variant, _), place in self.runs.items():
            expected = self.initial[variant]
            held = self._made_with(place) or {}
            if held.get(INITIAL, expected) != expected:
                source = self.planned[variant].cfg.train.init_from
                raise ValueError(
                    f"{place} started from other weights than there were at train.init_from "
                    f"{source} when this command began: delete it or choose another --out"
                )

    def _name(self, variant: str, seed: int) -> str:
        return f"{variant}, seed {seed}"

    def _task(self, variant: str, seed: int) -> Task:
        place = self.runs[variant, seed]
        arguments: dict = {"runs": str(place)}
        if finished_run(place) is None:
            arguments["train"] = self.study.command(variant, seed, self.folder)
        scoring = self.study.scoring
        if scoring is not None:
            cache = str(self.folder.parent / NETWORKS)
            arguments["score"] = {
                "function": scoring.function,
                "options": scoring.options,
                "own": scoring.is_own,
                "cache": cache,
                "how": self.how,
            }
        return Task(self._name(variant, seed), place / LOG, arguments)

    def _begin(self, run: tuple[str, int]) -> None:
        """Note what a run is made with, when it begins."""
        variant, _ = run
        place = self.runs[run]
        place.mkdir(parents=True, exist_ok=True)
        self.steps[run] = self._steps(run)
        if self._made_with(place) is None:
            machine = {"machine": self.machine}
            initial = {INITIAL: initial_weights(self.planned[variant].cfg.train.init_from)}
            write_json(place / MADE_WITH, {**self.study.made_with(variant), **initial, **machine})

    def _steps(self, run: tuple[str, int]) -> int:
        """Optimizer steps that a run has taken and kept."""
        planned = self.planned[run[0]]
        if finished_run(self.runs[run]) is not None:
            return planned.cfg.train.steps
        return steps_done(planned, self.runs[run])

    def _note(self, outcome: Outcome, run: tuple[str, int]) -> None:
        """Tell what became of a run, and write what is known now."""
        name = outcome.task.name
        if outcome.state == "failed":
            self.failed.append(f"{self.study.name}: {name} failed: {outcome.reason}")
        else:
            steps = self._steps(run) - self.steps[run]
            if steps > 0:
                images = steps * self.planned[run[0]].cfg.train.global_batch
                note_time(self.runs[run], outcome.seconds, images, self.options.jobs)
        self.report(f"{name}: {outcome.reason or outcome.state}")
        try:
            self.write()
        except ValueError as error:
            # at the end it is raised: the other runs do not end for it
            log.warning("%s", error)

    def _cost(self, left: list[tuple[str, int]], pool: Pool, asked: Callable[[], object]) -> Cost:
        images: dict[str, int] = dict.fromkeys(self.study.variants, 0)
        flops = 0.0
        to_train = [run for run in left if finished_run(self.runs[run]) is None]
        for run in to_train:
            planned = self.planned[run[0]]
            share = 1 - self._steps(run) / planned.cfg.train.steps
            images[run[0]] += round(share * planned.images)
            flops += share * planned.flops
        times = self._times()
        source = "from the speed of its runs"
        if not any(times.values()) and to_train:
            times, source = self._trial(pool, asked)
        seconds = seconds_left(self.planned, images, times)
        scorings = len(left) - len(to_train)
        return Cost(len(to_train), scorings, sum(images.values()), flops, seconds, source)

    def _times(self) -> dict[str, list[dict]]:
        """What parts of runs took with as many jobs as now, by variant."""
        times: dict[str, list[dict]] = {variant: [] for variant in self.study.variants}
        for (variant, _), place in self.runs.items():
            times[variant] += [
                each for each in times_of(place) if each["jobs"] == self.options.jobs
            ]
        return times

    def _trial(
        self, pool: Pool, asked: Callable[[], object]
    ) -> tuple[Mapping[str, list[dict]], str]:
        """The first variant's speed with all jobs at work, and where it is from."""
        variant = next(iter(self.options.variants or self.study.variants))
        arguments = {"trial": self.study.command(variant, self.study.seeds[0], self.folder)}
        # nobody reads what a trial prints, but for its error
        log_file = Path("/dev/null")
        tasks = [Task("trial", log_file, arguments)] * self.options.jobs
        outcomes: list[Outcome] = []
        pool.run(tasks, outcomes.append, asked)
        times = [outcome.result for outcome in outcomes if outcome.state == "done"]
        if len(times) < len(tasks):
            reasons = [outcome.reason for outcome in outcomes if outcome.state != "done"]
            return {}, f"the trial of {variant}: {(reasons or ['was stopped'])[0]}"
        return {variant: times}, f"from a trial of a few steps of {variant}: training alone"

    def results(self) -> Results:
        """What the finished runs have given."""
        rows = []
        for (variant, seed), place in self.runs.items():
            run = finished_run(place)
            if run is None:
                continue
            base = finished_run(self.runs[self.study.baseline, seed])
            row = {"variant": variant, "seed": seed, **training_scores(run, base)}
            if self.study.scoring is not None:
                row |= recorded_scores(place, self.how) or {}
            rows.append(row)
        return Results(self.study, rows, self._held_out_files())

    def _held_out_files(self) -> dict[tuple[str, int], Path]:
        """Where each scored run has the held-out losses of its images."""
        if self.study.scoring is None:
            return {}
        files = {
            run: held_out_file(place)
            for run, place in self.runs.items()
            if recorded_scores(place, self.how) is not None
        }
        return {run: file for run, file in files.items() if file is not None}

    def write(self) -> Results:
        """``rows.json`` and ``table.md``; nothing without rows."""
        results = self.results()
        if results.rows:
            text = json.dumps(results.rows, indent=1) + "\n"
            write_atomic(self.folder / "rows.json", lambda p: p.write_text(text))
            markdown = table(results)
            write_atomic(self.folder / "table.md", lambda p: p.write_text(markdown))
        return results

    def end(self) -> Ended:
        return Ended(self.write(), self.failed, len(self._left()) - len(self.failed))


def _other_parts(before: dict, now: dict) -> str:
    """What differs of ``SRA_FAST_IMPORT``, without checksums, which say nothing to a reader."""
    if [*before] != [*now]:
        was, named = (",".join(names) or "unset" for names in (before, now))
        return f"SRA_FAST_IMPORT {was}, now it is {named}"
    changed = [name for name in now if now[name] != before[name]]
    return f"other code of {', '.join(changed)} (SRA_FAST_IMPORT) than there is now"


def _difference(one: dict | None, other: dict | None) -> str:
    """What one machine has that another has not, in words."""
    one = one or {}
    other = other or {}
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)}" for name in names)
