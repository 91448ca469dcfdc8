"""The training loop: SRA's algorithm (arXiv 2505.02831, Sec. 3) under DeepSpeed."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sra_fast.alignment.schedule import align_weight
from sra_fast.checkpoint.manifest import Progress
from sra_fast.data.order import ShuffledBatches, make_loader
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import draw
from sra_fast.plots import report
from sra_fast.training import saving
from sra_fast.training.agreement import Agreement
from sra_fast.training.logger import STATS, TrainLogger, read_rows
from sra_fast.training.monitor import Monitor
from sra_fast.training.signals import StopSignals, stopped
from sra_fast.training.trainer import Trainer
from sra_fast.utils.registry import CONDITIONINGS


def warm_up(step: int, warmup_steps: int) -> float:
    """Factor of the learning rate at a 0-based step: linear, then 1."""
    # step + 1: the first step already has a rate above zero
    return min(1.0, (step + 1) / max(warmup_steps, 1))


def set_lr(trainer: Trainer, step: int) -> float:
    """Set the learning rate of a 0-based optimizer step, and return it."""
    lr = trainer.cfg.optim.lr * warm_up(step, trainer.cfg.optim.warmup_steps)
    # a function of the step: a resumed run needs no scheduler state
    for group in trainer.engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(
    trainer: Trainer,
    batches: Iterator[tuple[Tensor, ...]],
    stream: ShuffledBatches,
    data: TrainingData,
    step: int,
    logger: TrainLogger,
) -> dict:
    """All micro-steps of one optimizer step, then the EMA and the teacher.

    Returns:
        What the host knows of the step: ``align_weight``, ``lr``, ``epoch``.
    """
    cfg = trainer.cfg
    engine = trainer.engine
    conditioning = CONDITIONINGS[trainer.student.conditioning]
    epoch = stream.epoch(step)
    weight = align_weight(cfg.align, step, epoch)
    lr = set_lr(trainer, step)
    for micro_step in range(trainer.plan.accumulation):
        batch = next(batches)
        # copied while the device still computes: the loader pins its batches
        images, *labels = (item.to(trainer.device, non_blocking=True) for item in batch)
        # numbers of (seed, step, image): any split into ranks and micro-batches draws the same
        draws = draw(
            cfg.train.seed,
            step,
            stream.first(micro_step),
            (trainer.plan.micro, *data.shape),
            trainer.device,
            drop_prob=cfg.model.class_dropout_prob,
            posterior=data.posterior,
            flip=data.flip,
        )
        x0 = draws.mirror(data.to_latent(images, draws.posterior))
        # the same labels are dropped for student and teacher
        condition = conditioning.from_tensors(*labels).dropped(draws.drop)
        times = engine.module.process.times(draws.uniform, draws.gap)
        first = micro_step == 0
        logger.add(trainer.micro_step(x0, condition, draws.noise, times, weight, first))
        # DeepSpeed counts the micro-steps and takes the optimizer step at the last one
        engine.step()
    if engine.was_step_applied():
        # the teacher's all-gather starts here and overlaps with the next student forward
        next_weight = align_weight(cfg.align, step + 1, stream.epoch(step + 1))
        trainer.after_step(teacher_runs=next_weight > 0)
    # a tensor on the device: it is not read here
    logger.add({"grad_norm": trainer.grad_norm})
    return {"align_weight": weight, "lr": lr, "epoch": epoch}


def image_order(trainer: Trainer, num_images: int, start: int) -> ShuffledBatches:
    """The images of this process's micro-batches from optimizer step ``start`` on."""
    return ShuffledBatches(
        num_images=num_images,
        seed=trainer.cfg.train.seed,
        micro=trainer.plan.micro,
        accumulation=trainer.plan.accumulation,
        rank=trainer.rank,
        world=trainer.plan.world,
        step=start,
        steps=trainer.cfg.train.steps,
    )


def train(
    trainer: Trainer,
    data: TrainingData,
    folder: Path,
    start: int = 0,
    monitor: Monitor | None = None,
    logger: TrainLogger | None = None,
    stop: StopSignals | None = None,
) -> list[dict]:
    """Train from optimizer step ``start`` to ``train.steps``.

    Args:
        trainer: from ``build``, restored if resuming.
        data: from ``make_dataset``.
        folder: run folder.
        start: number of optimizer steps already taken.
        monitor: looks at the EMA every ``monitor.every`` steps; None: no one does.
        logger: stays open, for what is shown after training; None: one that is closed at the end.
        stop: open signals that end the run early; None: nothing does.

    Returns:
        The logged rows.

    Raises:
        FloatingPointError: loss or gradient norm not finite (noticed one log interval late).
        Stopped: somebody asked the run to stop; a checkpoint was written.
    """
    cfg = trainer.cfg
    main = trainer.rank == 0
    stream = image_order(trainer, len(data), start)
    cuda = trainer.device.type == "cuda"
    batches = iter(make_loader(data, stream, cfg.data.num_workers, cuda))
    own_logger = logger is None
    if own_logger:
        logger = TrainLogger(
            folder if main else None, cfg, trainer.device, trainer.plan.world, start
        )
    logger.restart_clock()
    trainer.engine.train()
    bar = tqdm(
        total=cfg.train.steps,
        initial=start,
        disable=not main,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    agreement = Agreement(("stop",))
    # closed also by an error, whose line then has no bar before it
    with bar:
        for step in range(start, cfg.train.steps):
            known = optimizer_step(trainer, batches, stream, data, step, logger)
            row = logger.step(step + 1, known)
            bar.update()
            if row:
                bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")

            if stop is not None:
                agreement.tell(stop=stop.code)
            decided = agreement.step(step + 1)
            asked = decided["stop"] if decided and step + 1 < cfg.train.steps else 0
            if asked or (step + 1) % cfg.train.save_every == 0 or step + 1 == cfg.train.steps:
                # raises if the weights are not worth saving
                logger.flush(step + 1, known)
                progress = Progress(step + 1)
                epoch = stream.epoch(step)
                saving.save(trainer, folder / "checkpoints", progress, epoch, data.facts())
                if main:
                    report.plot_loss(folder / "loss.png", read_rows(folder / STATS))
                if asked:
                    raise stopped(asked, step + 1, saved=True)
                logger.restart_clock()
            if monitor is not None and (step + 1) % cfg.monitor.every == 0:
                logger.flush(step + 1, known)
                scores = monitor.look(trainer, step + 1)
                logger.show("samples/monitor", step + 1, monitor.picture(step + 1), scores)
                logger.restart_clock()
    agreement.close()
    # the all-gather of the last step is still pending, and the process group must outlive it
    if trainer.teacher is not None:
        trainer.teacher.wait()
    return logger.close() if own_logger else logger.rows
