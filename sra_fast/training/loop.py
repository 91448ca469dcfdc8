"""The training loop: SRA's algorithm (arXiv 2505.02831, Sec. 3) under DeepSpeed."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sra_fast.alignment.schedule import align_weights
from sra_fast.checkpoint.manifest import Progress
from sra_fast.config.lr_schedules import scheduled_lr
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.plots import report
from sra_fast.training import store_averages
from sra_fast.training.control import Control
from sra_fast.training.logger import StepFacts, TrainLogger
from sra_fast.training.monitor import Monitor
from sra_fast.training.rows import STATS, read_rows
from sra_fast.training.saver import Saver
from sra_fast.training.signals import StopSignals, stopped
from sra_fast.training.step_watch import History, StepWatch
from sra_fast.training.trainer import Trainer
from sra_fast.training.watchdog import Watchdog
from sra_fast.zero.guard import warm_up

log = logging.getLogger("sra_fast")

BEGINNING = Progress(0)
# seconds between two drawings of loss.png: each takes half a second, and all processes wait for it
REDRAW = 60.0


def set_lr(trainer: Trainer, step: int) -> float:
    """Set the learning rate of a 0-based optimizer step, and return it."""
    optim = trainer.cfg.optim
    lr = scheduled_lr(optim, step, trainer.cfg.train.steps)
    lr *= warm_up(step + 1, optim.warmup_steps)
    # updates that were left out do not count for the warm-up; only the device knows them, and
    # multiplies by ``lr_factor``
    trainer.guard.begin(step)
    # a function of the step: a resumed run needs no scheduler state
    for group in trainer.engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def micro_batch(
    trainer: Trainer,
    batch: tuple[Tensor, ...],
    stream: ShuffledBatches,
    data: TrainingData,
    position: int,
    micro_step: int,
) -> MicroBatch:
    """What the loss of a micro-batch is computed from.

    ``position``: the step whose images these are; noise and times are drawn for it.
    """
    cfg = trainer.cfg
    objective = trainer.engine.module
    # copied while the device still computes: the loader pins its batches
    on_device = [item.to(trainer.device, non_blocking=True) for item in batch]
    images, told, external = data.split(on_device)
    # numbers of (seed, step, image): any split into ranks and micro-batches draws the same
    draws = draw(
        cfg.train.seed,
        position,
        stream.first(micro_step),
        (trainer.plan.micro, *data.shape),
        trainer.device,
        drop_prob=cfg.model.class_dropout_prob,
        posterior=data.posterior,
        flip=data.flip,
        tokens=trainer.student.num_tokens if objective.has_groups else 0,
    )
    x0 = draws.mirror(data.to_latent(images, draws.posterior))
    mean = None
    if objective.needs_mean and data.posterior:
        mean = data.to_latent(images, torch.zeros_like(draws.posterior))
    # the same labels or captions are dropped for student and teacher
    condition = data.condition(told).dropped(draws.drop)
    return MicroBatch(x0, condition, draws.noise, objective.times(draws), external, mean)


def optimizer_step(
    trainer: Trainer,
    batches: Iterator[tuple[Tensor, ...]],
    stream: ShuffledBatches,
    data: TrainingData,
    step: int,
    logger: TrainLogger,
    shift: int = 0,
    watchdog: Watchdog | None = None,
) -> StepFacts:
    """All micro-steps of one optimizer step, then the EMA and the teacher.

    ``shift``: the images, times and noise are those of step ``step + shift``.

    Returns:
        What the host knows of the step; ``lr`` is on the device where there is a warm-up.
    """
    cfg = trainer.cfg
    engine = trainer.engine
    at = watchdog.at if watchdog is not None else lambda step, phase: None
    position = step + shift
    epoch = stream.epoch(position)
    weights = align_weights(cfg, step, epoch)
    lr = set_lr(trainer, step)
    for micro_step in range(trainer.plan.accumulation):
        at(step + 1, "next batch")
        batch = next(batches)
        at(step + 1, "gradients")
        drawn = micro_batch(trainer, batch, stream, data, position, micro_step)
        values = trainer.micro_step(drawn, list(weights.values()), first=micro_step == 0)
        logger.add(values, step, micro_step)
        at(step + 1, "update")
        # DeepSpeed counts the micro-steps. At the last one it calls our optimizer step, which
        # ``build`` has put in place of its own (zero/fused_step.py): the norm of the gradient, then
        # clipping, AdamW, the rounded weights, the EMA and the teacher's copy of it in one pass
        engine.step()
    assert engine.was_step_applied(), "DeepSpeed counts other micro-steps"
    # what that pass has not done: the teacher, if the next step runs it, and averages for
    # evaluation. The teacher's all-gather starts here; without a graph it overlaps with the
    # student's forward
    next_weights = align_weights(cfg, step + 1, stream.epoch(position + 1))
    trainer.after_step(trainer.teacher_runs(list(next_weights.values())))
    # tensors on the device: they are not read here
    logger.add({"grad_norm": trainer.grad_norm}, step)
    logger.add({"skipped": ~trainer.guard.taken}, step)
    factor = trainer.guard.lr_factor()
    if factor is not None:
        # the rate of this update: a warm-up does not count those that were left out
        lr = lr * factor
    return StepFacts(step + 1, epoch, lr, weights)


@torch.no_grad()
def is_sound(
    trainer: Trainer, stream: ShuffledBatches, data: TrainingData, step: int, shift: int = 0
) -> bool:
    """Whether the weights give a finite loss on the images of a step (0-based) that was fine.

    After updates that were skipped this tells weights that are to blame from images that are.
    Collective.
    """
    position = step + shift
    finite = torch.ones((), device=trainer.device)
    for micro_step in range(trainer.plan.accumulation):
        batch = data.__getitems__(stream.numbers(position, micro_step))
        drawn = micro_batch(trainer, batch, stream, data, position, micro_step)
        # without alignment: the student's weights are what is asked about
        loss, _ = trainer.engine(drawn, [0.0] * len(trainer.cfg.alignments))
        finite *= loss.isfinite()
    if trainer.plan.world > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def image_order(trainer: Trainer, num_images: int, start: Progress) -> ShuffledBatches:
    """The images of this process's micro-batches from ``start`` on."""
    return ShuffledBatches(
        num_images=num_images,
        seed=trainer.cfg.train.seed,
        micro=trainer.plan.micro,
        accumulation=trainer.plan.accumulation,
        rank=trainer.rank,
        world=trainer.plan.world,
        step=start.step + start.shift,
        steps=trainer.cfg.train.steps + start.shift,
    )


def train(
    trainer: Trainer,
    data: TrainingData,
    folder: Path,
    start: Progress,
    monitor: Monitor | None,
    logger: TrainLogger,
    saver: Saver,
    stop: StopSignals | None,
    watchdog: Watchdog,
    history: History,
) -> None:
    """Train from ``start`` to optimizer step ``train.steps``.

    Args:
        trainer: from ``build``, restored if resuming.
        data: from ``make_dataset``.
        folder: run folder.
        start: what was trained already.
        monitor: looks at the weights every ``monitor.every`` steps; None: no one does.
        logger: stays open, for what is shown after training.
        saver: writes the checkpoints.
        stop: open signals that end the run early; None: nothing does.
        watchdog: is told where this process is.
        history: how large losses and norms usually were so far.

    Raises:
        Diverged: too many updates in a row were skipped, or weights are not finite.
        RollBack: training has to go back to the last checkpoint.
        Stopped: somebody asked the run to stop; a checkpoint was written.
        ValueError: a checkpoint could not be written.
    """
    cfg = trainer.cfg
    # one for the loader, which is ahead, and one for who asks about steps that are past
    stream = image_order(trainer, len(data), start)
    ahead = image_order(trainer, len(data), start)
    watch = StepWatch(cfg, stream, data, trainer.rank, start.shift, history)
    logger.watch = watch.look
    control = Control(trainer, saver, watch, stop)
    session = _Session(
        trainer, data, folder, start.step, logger, control, saver, stream, monitor, watchdog
    )
    batches = Batches(data, ahead, cfg.data.num_workers, trainer.device.type == "cuda")
    bar = tqdm(
        total=cfg.train.steps,
        initial=start.step,
        disable=trainer.rank != 0,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    # the bar is closed also by an error, whose line then has no bar before it; a warning of a step
    # gets a line of its own
    with batches, bar, control, logging_redirect_tqdm():
        if monitor is not None and monitor.was_missed(trainer, start.step):
            session.look(start.step)
        logger.restart_clock()
        trainer.engine.train()
        for step in range(start.step, cfg.train.steps):
            facts = optimizer_step(
                trainer, batches, stream, data, step, logger, start.shift, watchdog
            )
            row = logger.step(facts)
            bar.update()
            if row:
                speed = {"images_s": f"{row['images_per_s']:.0f}"} if "images_per_s" in row else {}
                bar.set_postfix(loss=f"{row['loss']:.3f}", **speed)
            control.after_step(step + 1)
            looks = monitor is not None and monitor.is_due(step + 1)
            if looks:
                # samples take long: what any process knows is acted on before
                control.agree_now(step + 1)
            if store_averages.is_due(cfg.train, step + 1):
                # before the checkpoint: a run that goes on from it does not make them again
                session.store_averages(step + 1)
            if control.due:
                session.save(Progress(step + 1, start.shift))
            if control.asked:
                # a look that is due is made up for when the run goes on
                saved = saver.last == Progress(step + 1, start.shift)
                raise stopped(control.asked, step + 1, saved)
            if looks:
                session.look(step + 1)
        control.finish(cfg.train.steps)
    # the all-gather of the last step is still pending, and the process group must outlive it
    if trainer.teacher is not None:
        trainer.teacher.wait()


@dataclass
class _Session:
    """What training does besides its steps: checkpoints, snapshots of averages and samples."""

    trainer: Trainer
    data: TrainingData
    folder: Path
    start: int
    logger: TrainLogger
    control: Control
    saver: Saver
    stream: ShuffledBatches
    monitor: Monitor | None
    watchdog: Watchdog
    # when loss.png was drawn
    drawn: float = -math.inf

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint, if the weights are worth one; collective."""
        self.watchdog.at(progress.step, "checkpoint")
        self.logger.flush()
        if self._is_worth_it(progress):
            # an earlier save may have failed
            self.control.finish(progress.step)
            epoch = self.stream.epoch(progress.step - 1 + progress.shift)
            self.saver.save(progress, epoch)
            self.control.saved()
            if self.trainer.rank == 0:
                self._draw(progress.step)
            if self.control.asked:
                self.control.finish(progress.step)
        self.logger.restart_clock()

    def _draw(self, step: int) -> None:
        """The course of the run as loss.png: at its last checkpoint, and not too often before."""
        if self.control.is_last(step) or time.monotonic() - self.drawn >= REDRAW:
            report.plot_loss(self.folder / "loss.png", read_rows(self.folder / STATS))
            self.drawn = time.monotonic()

    def _is_worth_it(self, progress: Progress) -> bool:
        """Whether these weights are worth a checkpoint; collective. The device has been waited for.

        After an update that was skipped, the next one that is taken shows whether the weights are
        to blame. Where no step comes after this one, they are tried on images that were fine. A run
        that is over without a single update has trained nothing.

        Raises:
            Diverged: training is over, and the weights are not worth a checkpoint.
        """
        done = progress.step
        # processes may have noticed different things: ask them all
        self.control.agree_now(done)
        skipped = self.control.skipped_in_a_row
        if not skipped:
            return True
        if not self.control.is_last(done):
            return False
        fine = done - skipped - 1
        if fine >= self.start:
            sound = is_sound(self.trainer, self.stream, self.data, fine, progress.shift)
        else:
            # these weights are the ones that training began with: of a checkpoint, or untrained
            sound = self.control.taken > 0 or bool(self.control.asked)
        if not sound:
            raise self.control.diverged(done)
        if self.trainer.rank == 0:
            log.warning("the last updates were skipped, %d in a row up to step %d", skipped, done)
        return True

    def store_averages(self, step: int) -> None:
        """Store the power-function averages; collective."""
        self.watchdog.at(step, "averages")
        self.logger.flush()
        store_averages.store(self.trainer, self.folder, step, self.data.facts())
        self.logger.restart_clock()

    def look(self, step: int) -> None:
        """Sample, and measure the held-out loss; collective."""
        self.watchdog.at(step, "samples")
        self.logger.flush()
        scores = self.monitor.look(self.trainer, step)
        picture = self.monitor.picture(step) if self.trainer.cfg.monitor.count else None
        self.logger.show("samples/monitor", step, picture, scores)
        self.logger.restart_clock()
