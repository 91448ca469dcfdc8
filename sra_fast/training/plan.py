"""A checked run: everything that can be found out before device memory is used."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.identity import identity_of
from sra_fast.config.schema import Config, ModelConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.training_data import TrainingData
from sra_fast.training.checks import check_config, check_device, split_batch
from sra_fast.training.loggers import check_loggers
from sra_fast.utils.checks import require_that
from sra_fast.zero.deepspeed_config import deepspeed_config, zero_stage
from sra_fast.zero.process_group import deepspeed_log_level


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
        resume: checkpoint folder to resume, or None.
        initial: weights (and more) that ``train.init_from`` names, or an empty dict.
    """

    plan: Plan
    data: TrainingData
    resume: Path | None
    initial: dict


def make_plan(cfg: Config, ds_json: str | None = None, world: int | None = None) -> Plan:
    """Check everything about model, step and machine.

    Args:
        cfg: the configuration. Its ``train.zero_stage`` is set to that of DeepSpeed's JSON.
        ds_json: path of DeepSpeed's JSON, or None.
        world: number of processes; default: the launcher's.

    Raises:
        ValueError: what is wrong, in one line.
    """
    if world is None:
        world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    check_config(cfg)
    micro, accumulation = split_batch(cfg, world)
    # the user's JSON may set another stage, so the machine is checked after it
    ds_config = deepspeed_config(cfg, micro, accumulation, ds_json, cuda)
    stage = zero_stage(ds_config, cfg)
    check_device(cfg, stage, cuda, world)
    # saved with the run: config.yaml then tells the stage without the JSON
    cfg.train.zero_stage = stage
    return Plan(cfg, ds_config, stage, micro, accumulation, world)


def make_run_plan(cfg: Config, ds_json: str | None = None) -> RunPlan:
    """``make_plan``, then output folder, checkpoint, data and initial weights; ValueError
    likewise.
    """
    # the cheap checks first: opening the data set may take a while
    _check_writable(Path(cfg.train.out))
    check_loggers(cfg)
    # raises if the variable names no level: a process group that is half made would hang
    deepspeed_log_level()
    plan = make_plan(cfg, ds_json)
    require_that(
        not cfg.monitor.every or cfg.monitor.count >= plan.world,
        f"monitor.count must be at least 1 for each of the {plan.world} processes, "
        f"got {cfg.monitor.count}",
    )
    resume = find_resume(cfg)
    if resume:
        # raises for a checkpoint of another run, before the data is opened
        reading.read_state(resume, identity_of(cfg, plan.world, plan.stage))
    data = make_dataset(cfg)
    # a job that is restarted with the same command resumes, whatever it was started from
    initial = _read_initial(cfg) if cfg.train.init_from and not resume else {}
    return RunPlan(plan, data, resume, initial)


def _read_initial(cfg: Config) -> dict:
    """What ``train.init_from`` names; ValueError if it does not fit the run."""
    source = cfg.train.init_from
    initial = reading.read_weights(source)
    _check_heads(cfg, initial)
    # shapes only: no memory is used
    with torch.device("meta"):
        expected = {name: [*value.shape] for name, value in cfg.model.build().state_dict().items()}
    # the student starts from "model" and the EMA from "ema": both have to fit
    for key in {"model", "ema"} & set(initial):
        found = {name: [*value.shape] for name, value in initial[key].items()}
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"train.init_from {source} does not fit the model: {name} should be "
                    f"{expected.get(name, 'absent')}, it is {found.get(name, 'absent')}"
                )
    # a published checkpoint with its optimizer continues at its step count
    steps = initial.get("steps", 0)
    require_that(
        steps < cfg.train.steps,
        f"train.steps must exceed the {steps} of train.init_from, got {cfg.train.steps}",
    )
    return initial


def _check_heads(cfg: Config, initial: dict) -> None:
    """The number of heads is the one property of a model that the shapes of its weights do not
    show.
    """
    ours = cfg.model.arguments()["num_heads"]
    if "config" in initial:
        theirs = ModelConfig(**initial["config"]["model"]).arguments()["num_heads"]
    else:
        theirs = getattr(initial.get("args"), "num_heads", ours)
    require_that(
        theirs == ours,
        f"train.init_from {cfg.train.init_from} was made with {theirs} heads, the model has {ours}",
    )


def _check_writable(out: Path) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    require_that(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"train.out {out} cannot be written: {existing} is no writable folder",
    )


def find_resume(cfg: Config) -> Path | None:
    """The checkpoint folder that ``train.resume`` means, None to start afresh.

    Raises:
        ValueError: it names nothing.
    """
    if cfg.train.resume is None:
        return None
    if cfg.train.resume == "auto":
        # newest first; a run that stopped before its first checkpoint is passed over
        numbered = [path for path in Path(cfg.train.out).glob("*") if path.name.isdigit()]
        for folder in sorted(numbered, key=lambda path: int(path.name), reverse=True):
            if found := reading.latest(folder / "checkpoints"):
                return found
        return None
    path = Path(cfg.train.resume)
    if (path / reading.STATE).exists():
        return path
    found = reading.latest(path / "checkpoints")
    require_that(
        found is not None,
        f"train.resume must name a run folder or one of its checkpoints, found neither at {path}",
    )
    return found
