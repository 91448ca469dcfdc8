"""A checked run: everything that can be found out before device memory is used."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.steps import cheap_fault, choose, step_folders
from sra_fast.config.schema import Config
from sra_fast.data.dataset import check_data, fill_in_model, open_data
from sra_fast.data.facts import DataFacts
from sra_fast.data.training_data import TrainingData
from sra_fast.data.vae import vae_is_there
from sra_fast.evaluation.held_out import LEAST_IMAGES, HeldOutImages, has_held_out
from sra_fast.training import provenance
from sra_fast.training.checks import (
    check_config,
    check_device,
    check_finite,
    check_graph,
    named_as,
    split_batch,
)
from sra_fast.training.initial import read_initial
from sra_fast.training.loggers import check_loggers
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import is_there
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.deepspeed_config import deepspeed_config, zero_stage
from sra_fast.zero.process_group import deepspeed_log_level

# on which the monitor measures the held-out loss, unless another number is asked for
HELD_OUT_IMAGES = 1024


@dataclass(frozen=True)
class Plan:
    """What a trainer is built from.

    Attributes:
        cfg: checked; ``train.zero_stage`` is the stage that runs.
        ds_config: DeepSpeed's configuration.
        stage: ZeRO stage.
        micro: images per process and forward pass.
        accumulation: micro-batches per optimizer step.
        world: number of processes.
    """

    cfg: Config
    ds_config: dict
    stage: int
    micro: int
    accumulation: int
    world: int


@dataclass(frozen=True)
class RunPlan:
    """A plan with what a whole run needs.

    Attributes:
        plan: of the trainer.
        data: training set.
        resume: checkpoint folder to resume, or None. Once the run folder is locked it is chosen
            again.
        initial: weights (and more) that ``train.init_from`` names, or an empty dict.
        exact: ``train.resume`` names this checkpoint and not its run.
    """

    plan: Plan
    data: TrainingData
    resume: Path | None
    initial: dict
    exact: bool = False


def fill_in(cfg: Config) -> None:
    """Give what the configuration leaves open its default, where the data have not done that."""
    cfg.model.fill_in()
    for align in cfg.alignments.values():
        TARGETS[align.target].fill_in(align, cfg)


def make_plan(cfg: Config, ds_json: str | None = None, world: int | None = None) -> Plan:
    """Check everything about model, step and machine.

    Args:
        cfg: the configuration. Its ``train.zero_stage`` is set to that of DeepSpeed's JSON, and
            what it leaves open to defaults.
        ds_json: path of DeepSpeed's JSON, or None.
        world: number of processes; default: the launcher's.

    Raises:
        ValueError: what is wrong, in one line.
    """
    if world is None:
        world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    fill_in(cfg)
    check_config(cfg)
    micro, accumulation = split_batch(cfg, world)
    # the user's JSON may set another stage, so the machine is checked after it
    ds_config = deepspeed_config(cfg, micro, accumulation, ds_json, cuda)
    stage = zero_stage(ds_config, cfg)
    check_device(cfg, stage, cuda)
    if cfg.train.graph:
        check_graph(cfg, ds_config, stage, world)
    # saved with the run: config.yaml then tells the stage without the JSON
    cfg.train.zero_stage = stage
    return Plan(cfg, ds_config, stage, micro, accumulation, world)


def make_run_plan(cfg: Config, ds_json: str | None = None) -> RunPlan:
    """Output folder, data, ``make_plan``, checkpoint and initial weights; ValueError likewise.

    What the configuration leaves open is taken from the data: sizes and classes of the model, scale
    and shift of the latents.
    """
    _check_writable(Path(cfg.train.out))
    check_loggers(cfg)
    # before the targets take from the data what they need, which may mean reading all of them
    check_finite(cfg)
    # raises if the variable names no level: a process group that is half made would hang
    deepspeed_log_level()
    data = open_data(cfg.data)
    if not cfg.align.active:
        # options of a target that is turned off stay valid, and its features are not read
        data.features = None
    fill_in_model(cfg, data)
    _fill_in_targets(cfg, data)
    plan = make_plan(cfg, ds_json)
    check_data(data, cfg)
    _choose_vae(cfg, data.facts())
    _choose_held_out(cfg, data)
    require_that(
        not cfg.monitor.every or cfg.monitor.count == 0 or cfg.monitor.count >= plan.world,
        f"monitor.count must be at least 1 for each of the {plan.world} processes, "
        f"got {cfg.monitor.count}",
    )
    resume = find_resume(cfg)
    exact = False
    if resume is not None:
        manifest = reading.manifest_of(resume)
        provenance.check_run(resume, manifest, cfg, plan.world, data.facts())
        exact = cfg.train.resume != "auto" and _named_step(Path(cfg.train.resume)) == resume
        _say_where(resume, Path(cfg.train.out))
    # a job that is restarted with the same command resumes, whatever it was started from
    initial = read_initial(cfg, data.facts()) if cfg.train.init_from and not resume else {}
    return RunPlan(plan, data, resume, initial, exact)


def _fill_in_targets(cfg: Config, data: TrainingData) -> None:
    """Give the alignment targets what they need of the data."""
    kinds = [TARGETS[align.target] for align in cfg.alignments.values()]
    require_that(
        data.features is None or any(kind.needs_external for kind in kinds),
        f"data.features {cfg.data.features} is for align.target cached_features, "
        "which this run does not have: add --align cached_features",
    )
    for section, align in cfg.alignments.items():
        fill = TARGETS[align.target].fill_in_data
        named_as(section, lambda align=align, fill=fill: fill(align, cfg, data))


def _choose_vae(cfg: Config, facts: DataFacts) -> None:
    """Samples during training are decoded by the VAE that made the data, unless another is given."""
    monitor = cfg.monitor
    if monitor.every and monitor.count and not facts.pixels and monitor.vae is None:
        require_that(
            facts.vae_path is not None and vae_is_there(facts.vae_path),
            "monitor.every needs monitor.vae, the VAE that decodes the latents",
        )
        monitor.vae = facts.vae_path
    require_that(
        not (facts.pixels and monitor.vae),
        f"monitor.vae is for latents, the data are pixels; got {monitor.vae}",
    )


def _choose_held_out(cfg: Config, data: TrainingData) -> None:
    """How many held-out images the monitor measures the loss on, where that was not given."""
    monitor = cfg.monitor
    if not monitor.every:
        return
    if monitor.held_out is None:
        enough = has_held_out(data) and len(data.held_out_split()[1][1]) >= LEAST_IMAGES
        monitor.held_out = HELD_OUT_IMAGES if enough else 0
        require_that(
            monitor.count > 0 or monitor.held_out > 0,
            "monitor.count 0 needs a held-out share (preprocess.py --holdout), the data have none of "
            f"{LEAST_IMAGES} images or more",
        )
    if monitor.held_out:
        # raises for data without such a share, or one that does not fit the model
        model = cfg.model
        size = (model.in_channels, model.input_size, model.input_size)
        HeldOutImages(data, monitor.held_out).check(size, model.num_classes)


def _check_writable(out: Path) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    require_that(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"train.out {out} cannot be written: {existing} is no writable folder",
    )


def find_resume(cfg: Config) -> Path | None:
    """The checkpoint folder that ``train.resume`` means, None to start afresh.

    The files' hashes are not looked at here: that is done once the run folder is locked.

    Raises:
        ValueError: it names nothing, or nothing that is whole.
    """
    if cfg.train.resume is None:
        return None
    if cfg.train.resume == "auto":
        # newest first; a run that stopped before its first checkpoint is passed over
        numbered = [path for path in Path(cfg.train.out).glob("*") if path.name.isdecimal()]
        for folder in sorted(numbered, key=lambda path: int(path.name), reverse=True):
            if found := _newest(folder):
                return found
            if is_there(folder / reading.CHECKPOINTS):
                warn("%s is passed over: its first checkpoint was not finished", folder)
        return None
    path = Path(cfg.train.resume)
    # a step that was asked for by name is not replaced by another
    named = _named_step(path)
    if named is not None:
        if fault := cheap_fault(named):
            raise ValueError(f"train.resume {path} is damaged: {fault}")
        return named
    found = _newest(path)
    require_that(
        found is not None,
        f"train.resume must name a run folder or one of its checkpoints, found neither at {path}",
    )
    return found


def _named_step(path: Path) -> Path | None:
    """The step's folder that a path names, also by a link or from within; None: it names none."""
    for place in (path, path.resolve()):
        if place.parent.name == reading.CHECKPOINTS and place in step_folders(place.parent):
            return place
    return None


def _say_where(resume: Path, out: Path) -> None:
    """One line if the run that is resumed does not lie in ``train.out``."""
    run = reading.run_folder(resume)
    if run.resolve().parent != out.resolve():
        warn("the run goes on in %s, train.out %s is not used", run, out)


def _newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole; None: it never had one."""
    choice = choose(run / reading.CHECKPOINTS)
    return None if choice is None else choice.path
