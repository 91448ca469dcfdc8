"""What a study is going to do, found out before anything is trained: whether its variants can be
compared, and what they cost.
"""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from sra_fast.alignment.schedule import align_weight
from sra_fast.analysis.run_scores import ScoreOptions, check_for
from sra_fast.analysis.study import Study
from sra_fast.checkpoint import reading
from sra_fast.checkpoint.sources import read_weights
from sra_fast.config.averages import EMA, STUDENT
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import AlignConfig, Config
from sra_fast.data.facts import DataFacts, differences
from sra_fast.data.vae import weights_digest
from sra_fast.training.endings import ending_of
from sra_fast.training.flops import aligned_share, forward_flops, training_flops
from sra_fast.training.plan import find_resume, make_run_plan
from sra_fast.training.provenance import DEEPSPEED, changes
from sra_fast.utils.files import plain, read_json

# what variants must share to have the same images, noise and labels in every step
DRAWS = {
    "train": ("global_batch", "steps", "log_every"),
    "model": ("class_dropout_prob",),
    "data": ("flip",),
}
# what they must share to have one held-out loss
LOSS = {"model": ("process",), "diffusion": ("path",)}
# sections whose settings a run's training or its scores follow from, and what in them makes no
# difference
DECISIVE = ("model", "align", "align2", "diffusion", "data", "optim", "train", "sample")
FREE = ("train.seed", "data.path", "data.num_workers", "train.loggers")
# in the folder of a variant's run: how long its parts took
TIMING = "timing.json"


@dataclass(frozen=True)
class Planned:
    """A variant as it will run.

    Attributes:
        cfg: filled in.
        ds_config: DeepSpeed's configuration.
        facts: about its data.
        flops: of a whole run.
    """

    cfg: Config
    ds_config: dict
    facts: DataFacts
    flops: float

    @property
    def images(self) -> int:
        """Images that a whole run sees."""
        return self.cfg.train.steps * self.cfg.train.global_batch


def parsed(arguments: list[str]) -> tuple[Config, str | None]:
    """``parse_train``, with a ValueError of one line in place of the end of the process."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse_train(arguments)
    except SystemExit:
        # the usage comes before `error: ` and several lines
        reason = said.getvalue().partition("error: ")[2]
        raise ValueError(" ".join(reason.split())) from None


def plan_variants(study: Study, folder: Path) -> dict[str, Planned]:
    """Every variant, checked as ``train.py`` would check it.

    Raises:
        ValueError: a variant cannot be trained, or cannot be compared with the baseline.
    """
    planned = {}
    for variant in study.variants:
        try:
            planned[variant] = _plan(study, study.command(variant, study.seeds[0], folder))
        except Exception as error:
            ending = ending_of(error)
            if ending is None:
                raise
            line = ending.line.removeprefix("error: ")
            raise ValueError(f"{study.name}: {variant}: {line}") from None
    _check_alike(study, planned)
    return planned


def _plan(study: Study, arguments: list[str]) -> Planned:
    cfg, ds_json = parsed(arguments)
    plan = make_run_plan(cfg, ds_json)
    cfg = plan.plan.cfg
    scoring = study.scoring
    if scoring is not None and not scoring.is_own:
        check_for(ScoreOptions(**scoring.options), cfg, plan.data)
    return Planned(cfg, plan.plan.ds_config, plan.data.facts(), flops_of_run(cfg))


def _check_alike(study: Study, planned: Mapping[str, Planned]) -> None:
    """ValueError unless all variants share data and draws with the baseline."""
    base = planned[study.baseline]
    for variant, other in planned.items():
        different = other_data(other.facts, base.facts)
        if different:
            reason = different.replace("it was", f"{study.baseline} has")
            raise ValueError(
                f"{study.name}: variants must share their data: {variant} has {reason}"
            )
    # an own function may compare what it likes
    is_own = study.scoring is None or study.scoring.is_own
    with_loss = not is_own and study.scoring.options.get("held_out_images") != 0
    alike = [DRAWS, LOSS] if with_loss else [DRAWS]
    for variant, other in planned.items():
        where = f"{study.name}: variants must share"
        for section, names in [item for part in alike for item in part.items()]:
            for name in names:
                ours = getattr(getattr(other.cfg, section), name)
                theirs = getattr(getattr(base.cfg, section), name)
                if ours != theirs:
                    raise ValueError(
                        f"{where} {section}.{name}: {variant} has {ours}, {study.baseline} {theirs}"
                    )


def other_data(found: DataFacts, expected: DataFacts) -> str | None:
    """The first way in which data differ; None: they are the same."""
    # features are read by a target, and are no data of the student's
    different = differences(replace(found, features=None), replace(expected, features=None))
    return next(iter(different), None)


def check_made_like(planned: Planned, run: Path) -> None:
    """ValueError if a run that has begun was made with other settings or data than a variant has
    now.

    The variant's arguments and base may be the same: a second file may be named in them, and what
    lies at a path may have changed.

    Args:
        planned: the variant.
        run: a run folder.
    """
    began = yaml.safe_load((run / reading.CONFIG).read_text())
    settings = [
        (name, pair)
        for name, pair in changes(began, asdict(planned.cfg)).items()
        if name.partition(".")[0] in DECISIVE and name not in FREE
    ]
    if settings:
        name, (old, new) = settings[0]
        raise ValueError(f"{run} was made with {name} {old}, now it is {new}")
    if read_json(run / DEEPSPEED) != plain(planned.ds_config):
        raise ValueError(
            f"{run} was made with another configuration of DeepSpeed than there is now"
        )
    different = other_data(planned.facts, DataFacts.from_json(read_json(run / reading.FACTS)))
    if different:
        raise ValueError(f"{run} was made with other data than there are now: {different}")


def initial_weights(source: str | None) -> str | None:
    """SHA-256 of what ``train.init_from`` names, whatever form it has; None: it names nothing.

    Raises:
        ValueError: it cannot be read.
    """
    if source is None:
        return None
    held = read_weights(source)
    states = {key: held[key] for key in (EMA, STUDENT) if key in held}
    weights = {f"{key} {name}": w for key, state in states.items() for name, w in state.items()}
    return weights_digest(weights).hexdigest()


def flops_of_run(cfg: Config) -> float:
    """FLOPs of all images of a run, of its products: model, targets, backward pass."""
    plain, _ = training_flops(cfg)
    part = forward_flops(cfg)
    per_image = plain
    for section, align in cfg.alignments.items():
        once = float(3 * part[section] + part[f"{section}_teacher"])
        per_image += once * float(aligned_share(align)) * share_of_steps(align, cfg.train.steps)
    return per_image * cfg.train.steps * cfg.train.global_batch


def share_of_steps(align: AlignConfig, steps: int) -> float:
    """Share of a run's steps before the target is turned off, by a milestone or for good."""
    # `every` counts in the FLOPs of a step
    align = replace(align, every=1)
    changes = {0, align.stop_at_step, *align.milestones}
    begins = sorted(step for step in changes if step is not None and step < steps)
    ends = [*begins[1:], steps]
    # lambda is zero in all of such a part, or in none
    lasting = [
        end - begin
        for begin, end in zip(begins, ends, strict=True)
        if align_weight(align, begin, 0) > 0
    ]
    return sum(lasting) / steps


def steps_done(planned: Planned, runs: Path) -> int:
    """Optimizer steps of the checkpoint that a run would go on from; 0 without one."""
    cfg = replace(planned.cfg, train=replace(planned.cfg.train, out=str(runs), resume="auto"))
    found = find_resume(cfg)
    return 0 if found is None else reading.manifest_of(found).step


def note_time(runs: Path, seconds: float, images: int, jobs: int) -> None:
    """Add how long a part of a run took, with how many runs at once."""
    held = times_of(runs)
    held.append({"seconds": round(seconds, 3), "images": images, "jobs": jobs})
    (runs / TIMING).write_text(json.dumps(held) + "\n")


def times_of(runs: Path) -> list[dict]:
    """What ``note_time`` has added; empty without any."""
    try:
        return json.loads((runs / TIMING).read_text())
    except (OSError, ValueError):
        return []


@dataclass(frozen=True)
class Cost:
    """What is left of a study.

    Attributes:
        runs: to be trained, in whole or in part.
        scorings: finished runs that are to be scored.
        images: that the runs will see.
        flops: of these, without scores.
        seconds: of all jobs together; None: not known.
        source: where the seconds are from, in words.
    """

    runs: int
    scorings: int
    images: int
    flops: float
    seconds: float | None
    source: str

    def line(self, study: Study, jobs: int) -> str:
        """The cost in words."""
        parts = [f"{self.runs} of {len(study.seeds) * len(study.variants)} runs left"]
        if self.scorings:
            parts.append(f"{self.scorings} more to score")
        parts += [f"{self.images:,} images", f"{self.flops:.3g} FLOPs"]
        at_once = f"with {jobs} job{'s' if jobs > 1 else ''}"
        if self.runs and self.seconds is None:
            parts.append(f"hours not known ({self.source})")
        elif self.runs:
            parts.append(f"about {self.seconds / 3600 / jobs:.2g} hours {at_once} ({self.source})")
        return f"{study.name}: {', '.join(parts)}"


def seconds_left(
    planned: Mapping[str, Planned],
    left: Mapping[str, int],
    times: Mapping[str, list[dict]],
) -> float | None:
    """Seconds that images will take, from those that others took; None without any.

    A variant's own speed counts, else that of the others for its FLOPs.

    Args:
        planned: by variant.
        left: images by variant.
        times: by variant, what ``note_time`` wrote.
    """
    seconds = {variant: sum(time["seconds"] for time in times[variant]) for variant in times}
    images = {variant: sum(time["images"] for time in times[variant]) for variant in times}
    per_image = {name: planned[name].flops / planned[name].images for name in planned}
    flops = sum(images[variant] * per_image[variant] for variant in times)
    if not flops:
        return None
    rate = sum(seconds.values()) / flops
    total = 0.0
    for variant, count in left.items():
        if images.get(variant):
            total += count * seconds[variant] / images[variant]
        else:
            total += count * per_image[variant] * rate
    return total
