"""The training loop: Algorithm of SRA (arXiv 2505.02831), Sec. 3, under DeepSpeed."""

from pathlib import Path

from tqdm import tqdm

from sra_fast.alignment.objective import align_weight
from sra_fast.data.dataset import ShuffledBatches, make_loader
from sra_fast.diffusion.draws import draw
from sra_fast.training import saving
from sra_fast.training.logger import Metrics
from sra_fast.training.trainer import Trainer


def warm_up(step: int, warmup_steps: int) -> float:
    """Factor of the learning rate at a 0-based step: linear, then 1."""
    return min(1.0, (step + 1) / max(warmup_steps, 1))


def set_lr(trainer: Trainer, step: int) -> float:
    lr = trainer.cfg.optim.lr * warm_up(step, trainer.cfg.optim.warmup_steps)
    for group in trainer.engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(
    trainer: Trainer, batches, stream: ShuffledBatches, data, step: int, metrics: Metrics
) -> dict:
    """All micro-steps of one optimizer step, then the EMA and the teacher.  Returns what is known on the host."""
    cfg, engine, device = trainer.cfg, trainer.engine, trainer.device
    weight, lr = align_weight(cfg.align, step, stream.epoch(step)), set_lr(trainer, step)
    for micro_step in range(trainer.accumulation):
        batch, y = (item.to(device, non_blocking=True) for item in next(batches))
        shape = (trainer.micro, *data.shape)
        draws = draw(
            cfg.train.seed,
            step,
            stream.first(micro_step),
            shape,
            device,
            drop_prob=cfg.model.class_dropout_prob,
            posterior=data.posterior,
        )
        x0 = data.to_latent(batch, draws.posterior)
        times = engine.module.process.times(draws.uniform, draws.gap)
        metrics.add(
            trainer.micro_step(x0, y, draws.noise, times, draws.drop, weight, first=micro_step == 0)
        )
        engine.step()
    if engine.was_step_applied():
        trainer.after_step(
            teacher_runs=align_weight(cfg.align, step + 1, stream.epoch(step + 1)) > 0
        )
    metrics.add({"grad_norm": trainer.grad_norm})
    return {"align_weight": weight, "lr": lr, "epoch": stream.epoch(step)}


def train(trainer: Trainer, data, folder: Path, start: int = 0, monitor=None) -> list[dict]:
    """Train from optimizer step ``start`` to ``train.steps``.

    Args:
        trainer: from ``build``, restored if resuming.
        data: from ``make_dataset``.
        folder: run folder.
        start: number of optimizer steps already taken.
        monitor: looks at the EMA every ``monitor.every`` steps; None: nobody does.

    Returns:
        The logged rows.

    Raises:
        FloatingPointError: loss or gradient norm not finite (noticed one log interval late).
    """
    cfg, main = trainer.cfg, trainer.rank == 0
    stream = ShuffledBatches(
        len(data),
        cfg.train.seed,
        trainer.micro,
        trainer.accumulation,
        trainer.rank,
        trainer.world,
        start,
        cfg.train.steps,
    )
    batches = iter(make_loader(data, stream, cfg.data.num_workers, trainer.device.type == "cuda"))
    metrics = Metrics(folder if main else None, cfg, trainer.device, trainer.world, start)
    trainer.engine.train()
    extra = {}
    bar = tqdm(
        total=cfg.train.steps,
        initial=start,
        disable=not main,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    for step in range(start, cfg.train.steps):
        extra = optimizer_step(trainer, batches, stream, data, step, metrics)
        row = metrics.step(step + 1, extra)
        bar.update()
        if row:
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")
        if (step + 1) % cfg.train.save_every == 0 or step + 1 == cfg.train.steps:
            metrics.flush(step + 1, extra)  # raises if the weights are not worth saving
            saving.save(trainer, folder / "checkpoints", step + 1, stream.epoch(step))
            metrics.restart_clock()
        if monitor is not None and (step + 1) % cfg.monitor.every == 0:
            metrics.flush(step + 1, extra)
            monitor.look(trainer, step + 1)
            metrics.restart_clock()
    bar.close()
    if trainer.teacher is not None:
        trainer.teacher.wait()
    return metrics.close()
