"""A whole run: build, restore, train, export, report."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.checkpoint import average_snapshots, reading
from sra_fast.checkpoint.manifest import Progress, step_name
from sra_fast.config.averages import power_width
from sra_fast.data.training_data import TrainingData
from sra_fast.plots import report
from sra_fast.sampling.conditions import conditions_of, generate_for
from sra_fast.training import provenance, run_folder, saving
from sra_fast.training.endings import Diverged
from sra_fast.training.logger import TrainLogger
from sra_fast.training.loop import train
from sra_fast.training.monitor import Monitor
from sra_fast.training.plan import RunPlan
from sra_fast.training.rows import STATS, read_rows
from sra_fast.training.run_folder import OpenRun
from sra_fast.training.saver import Saver
from sra_fast.training.signals import StopSignals
from sra_fast.training.start_lines import say_start
from sra_fast.training.step_watch import History, RollBack
from sra_fast.training.trainer import Trainer, build
from sra_fast.training.watchdog import Watchdog
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import write_atomic, write_json
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import EVALUATIONS


def run(run_plan: RunPlan, device: torch.device, stop: StopSignals | None = None) -> dict:
    """Execute a plan in the current process group.

    Args:
        run_plan: from ``make_run_plan``.
        device: from ``init_distributed``.
        stop: open signals that end the run early; None: nothing does.

    Returns:
        The summary, which rank 0 also writes to ``summary.json``; empty on the other ranks.
    """
    out = Path(run_plan.plan.cfg.train.out)
    with run_folder.opened(out, run_plan.resume, run_plan.exact) as opened:
        return _run(run_plan, device, opened, stop)


def _run(
    run_plan: RunPlan, device: torch.device, opened: OpenRun, stop: StopSignals | None
) -> dict:
    """A run in its folder, which no other process writes into."""
    cfg = run_plan.plan.cfg
    folder = opened.folder
    choice = opened.choice
    facts = run_plan.data.facts()
    if choice is not None:
        # again: it may be another checkpoint than the plan's
        provenance.check_run(choice.path, choice.manifest, cfg, run_plan.plan.world, facts)
    initial = run_plan.initial
    trainer = build(run_plan.plan, device, initial.get("model", initial.get("ema")))
    if choice is not None:
        # logs and later checkpoints continue in the same folder
        start = saving.load(trainer, choice.path, verify=False)
        remarks = run_folder.settle(folder, choice.path, cfg.train.keep, run_plan.exact)
        changed = provenance.changed_line(choice.manifest, cfg)
        for line in remarks if changed is None else [*remarks, changed]:
            warn("%s", line)
    else:
        start = Progress(saving.start_from(trainer, initial))
    origin = initial.get("origin")
    # the weights are in the trainer: free this copy
    initial.clear()
    before = None if choice is None else choice.manifest

    def record() -> None:
        provenance.record(folder, cfg, run_plan.plan.ds_config, before)
        write_json(folder / reading.FACTS, facts.as_json())

    # a file that cannot be written ends all processes alike
    run_folder.agreed(record)
    if trainer.rank == 0:
        say_start(trainer, run_plan.data, folder, start.step, origin)
    logger = _train(trainer, run_plan.data, folder, start, stop)
    export(trainer, run_plan.data, folder)
    summary = summarise(trainer, run_plan.data, folder)
    if run_plan.data.evaluation is not None:
        logger.show("samples/final", cfg.train.steps, folder / reading.PICTURE)
    logger.close()
    # rank 0 may still be scoring: the others keep the process group alive
    dist.barrier()
    return summary


def _train(
    trainer: Trainer, data: TrainingData, folder: Path, start: Progress, stop: StopSignals | None
) -> TrainLogger:
    """Train to the last step, from the last checkpoint on as often as training has to go back.

    Returns:
        The logger, still open.

    Raises:
        Diverged: there is nothing to go back to, or going back does not help.
    """
    cfg = trainer.cfg
    # before the first step: a missing file of the monitor stops the run at once
    monitor = Monitor(cfg, trainer.device, folder, data) if cfg.monitor.every else None
    written = folder if trainer.rank == 0 else None
    # how often training has gone back to a step
    returns: Counter[int] = Counter()
    history = History()
    history.read([row for row in read_rows(folder / STATS) if row["step"] <= start.step])
    checkpoints = folder / reading.CHECKPOINTS
    # the lock of the folder outlives the saver, also where training ends with an error
    with (
        Saver(trainer, checkpoints, data.facts()) as saver,
        Watchdog(cfg.train.stall_minutes) as watchdog,
    ):
        if "rollback" in (cfg.train.on_nan, cfg.train.on_spike) and saver.parent is None:
            # there is always a checkpoint to go back to
            saver.save(start, epoch=0)
            saver.wait()
        while True:
            logger = TrainLogger(written, cfg, trainer.device, trainer.plan.world, start.step)
            try:
                train(trainer, data, folder, start, monitor, logger, saver, stop, watchdog, history)
                break
            except RollBack as back:
                logger.close()
                start = _go_back(trainer, saver, start.shift, back.bad_step, returns)
                history.forget(start.step)
    return logger


def _go_back(
    trainer: Trainer, saver: Saver, shift: int, bad_step: int, returns: Counter[int]
) -> Progress:
    """Restore the last checkpoint, and leave out the images up to a step; collective."""
    saver.wait()
    if saver.error is not None and not isinstance(saver.error, Diverged):
        raise saver.error
    # weights that were not finite are left behind
    saver.error = None
    step = saver.parent
    if step is None:
        raise Diverged(f"step {bad_step + 1} asks for the last checkpoint, and there is none")
    returns[step] += 1
    limit = trainer.cfg.train.skip_limit
    if returns[step] > limit:
        raise Diverged(
            f"training went back to step {step} {limit} times without reaching the next checkpoint"
        )
    saving.load(trainer, saver.folder / step_name(step))
    # what the run makes again must not be mixed with what it has given up
    run_folder.agreed(lambda: run_folder.remove_after(saver.folder.parent, step))
    # more each time: steps after the bad one may be bad, too
    left_out = (bad_step + 1 - step) << (returns[step] - 1)
    warn(
        "back to the checkpoint of step %d; the images of the %d step%s after it are left out",
        step,
        left_out,
        "" if left_out == 1 else "s",
    )
    # the images that these steps had, and those that earlier ones have left out
    return Progress(step, shift + left_out)


def export(trainer: Trainer, data: TrainingData, folder: Path) -> None:
    """Write the weights in the forms that ``train.export`` asks for; collective."""
    train_cfg = trainer.cfg.train
    if "safetensors" in train_cfg.export:
        file = folder / reading.EXPORT
        digest = reading.digest_at(folder, train_cfg.steps)
        saving.export_safetensors(trainer, file, train_cfg.steps, data.facts(), digest)
    if "published" in train_cfg.export:
        last = folder / reading.CHECKPOINTS / step_name(train_cfg.steps)
        epoch = reading.manifest_of(last).epoch
        file = folder / reading.PUBLISHED
        saving.export_published(trainer, file, train_cfg.steps, epoch, data.facts())


def summarise(trainer: Trainer, data: TrainingData, folder: Path) -> dict:
    """Summary; samples and their scores if the data set has an evaluation.

    Collective; rank 0 writes.
    """
    weights = _weights_at_end(trainer, folder)
    if trainer.rank:
        return {}
    summary = {
        "run_dir": str(folder),
        # which weights the scores are of: a run that is continued has others
        "step": trainer.cfg.train.steps,
        "checkpoint": reading.digest_at(folder, trainer.cfg.train.steps),
        "weights": trainer.cfg.sample.weights,
        **logged(read_rows(folder / STATS), trainer.cfg.train.global_batch),
    }
    if data.evaluation is not None:
        summary |= evaluate_samples(trainer, data, weights, folder)
    write_atomic(folder / reading.SUMMARY, lambda p: p.write_text(json.dumps(summary) + "\n"))
    return summary


def _weights_at_end(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """The parameters that ``sample.weights`` names; collective. Only rank 0 has those of snapshots.

    Raises:
        ValueError: there is no whole snapshot of the last step, or it cannot be made from them.
    """
    name = trainer.cfg.sample.weights
    width = power_width(name)
    if width is None:
        return trainer.weights(name)
    made: dict[str, Tensor] = {}
    # not returned: it would be sent to every process
    run_folder.agreed(lambda: made.update(_of_snapshots(trainer, folder, width)))
    return made


def _of_snapshots(trainer: Trainer, folder: Path, width: float) -> dict[str, Tensor]:
    snapshot, flat = average_snapshots.reconstruct(folder, width)
    last = trainer.cfg.train.steps
    # the newest may be damaged, or its averages were too large for fp16
    require_that(
        snapshot.step == last,
        f"sample.weights {trainer.cfg.sample.weights} needs the snapshot of averages of step {last} in "
        f"{folder / average_snapshots.FOLDER}, the newest that can be used is of step {snapshot.step}",
    )
    return {key: flat[key].view(shape) for key, shape in trainer.masters.shapes.items()}


def logged(rows: list[dict], global_batch: int) -> dict:
    """Speed and losses of a run's rows; None for each that no row has."""
    if not rows:
        return dict.fromkeys(("images_per_s", "loss_first", "loss_last"))
    # each row as often as it has steps; the first step of a process is in none
    timed = [row for row in rows if "timed_steps" in row]
    steps = sum(row["timed_steps"] for row in timed)
    total_ms = sum(row["timed_steps"] * row["ms_per_step"] for row in timed)
    # rows in which every update was skipped have none
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    return {
        "images_per_s": round(1e3 * global_batch * steps / total_ms, 1) if timed else None,
        "loss_first": next(iter(losses), None),
        "loss_last": next(reversed(losses), None),
    }


def evaluate_samples(trainer: Trainer, data: TrainingData, weights: dict, folder: Path) -> dict:
    """Samples of what the data are about, next to real images in ``samples.png``, and their scores."""
    cfg = trainer.cfg
    evaluation = EVALUATIONS[data.evaluation]()
    model = cfg.model.build().to(trainer.device).eval()
    model.load_state_dict(trainer.state_dict(weights))
    count = evaluation.num_images
    conditions = conditions_of(data, count, cfg.sample.labels, cfg.train.seed)
    labels = conditions.numbers
    settings = (cfg.sample, cfg.diffusion, cfg.train.seed, count, trainer.device)
    images = generate_for(model, conditions, range(count), *settings)
    pixels = report.to_uint8(evaluation.picture(images, labels), cfg.sample.rounding)
    report.save_grid(
        folder / reading.PICTURE,
        pixels,
        evaluation.columns,
        evaluation.scale,
        evaluation.gap_after,
    )
    return evaluation.scores(images, labels)
