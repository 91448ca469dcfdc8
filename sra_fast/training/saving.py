"""Write and resume checkpoints, start from other weights, export.

A checkpoint is DeepSpeed's, for the exact resume of a run, with the sharded EMA and a small JSON
file next to it (see ``checkpoint/reading.py``). All random numbers are functions of (seed, step,
image), so no generator state is stored. DeepSpeed writes ``latest`` last: an interrupted save is
never picked up.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from sra_fast.checkpoint.export import write_export
from sra_fast.checkpoint.identity import identity_of
from sra_fast.checkpoint.optimizer_state import MOMENTS, match_optimizer, numbered
from sra_fast.checkpoint.reading import STATE, read_state
from sra_fast.config.schema import Config
from sra_fast.data.facts import DataFacts
from sra_fast.training.trainer import Trainer
from sra_fast.utils.files import write_atomic, write_json


def _identity(trainer: Trainer) -> dict:
    return identity_of(trainer.cfg, trainer.plan.world, trainer.plan.stage)


def save(trainer: Trainer, folder: Path, step: int, epoch: int) -> Path:
    """Write ``folder/step_XXXXXXXX`` after ``step`` optimizer steps; collective."""
    tag = f"step_{step:08d}"
    path = folder / tag
    path.mkdir(parents=True, exist_ok=True)
    # clones: torch.save would write the whole storage that a view belongs to
    pieces = {
        name: (start, values.clone()) for name, (start, values) in trainer.ema.pieces().items()
    }
    write_atomic(path / f"ema_rank_{trainer.rank:05d}.pt", lambda p: torch.save(pieces, p))
    teacher = trainer.teacher.state() if trainer.teacher is not None else None
    if trainer.rank == 0:
        state = {
            "step": step,
            "epoch": epoch,
            **_identity(trainer),
            "teacher": teacher,
            "updates": trainer.guard.counts.tolist(),
        }
        write_json(path / STATE, state)
    # all EMA files are complete before DeepSpeed writes `latest`
    dist.barrier()
    # the frozen teacher is not stored: it is rebuilt from the EMA
    trainer.engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
    return path


def load(trainer: Trainer, path: Path) -> int:
    """Restore weights, optimizer, EMA and teacher from a checkpoint folder.

    Returns:
        The number of optimizer steps taken.

    Raises:
        ValueError: see ``read_state``.
    """
    state = read_state(path, _identity(trainer))
    folder, tag = str(path.parent), path.name
    # not strict: the file lacks the frozen teacher
    loaded, _ = trainer.engine.load_checkpoint(folder, tag=tag, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"DeepSpeed found no checkpoint at {path}")
    optim = trainer.cfg.optim
    # the settings are the configuration's, not those of the interrupted run
    for group in trainer.engine.optimizer.param_groups:
        group.update(betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay)
    # DeepSpeed has replaced the optimizer's state, with its counts
    trainer.guard.load(state["updates"])
    # the scales as they were: new ones would round the fp8 teacher differently
    trainer.refresh_teacher(state["teacher"])
    return state["step"]


def start_from(trainer: Trainer, initial: dict) -> int:
    """Take over EMA and optimizer state of a published checkpoint, as far as it has them; collective.

    Args:
        trainer: built with the checkpoint's weights.
        initial: from ``training/initial.py``, or an empty dict.

    Returns:
        The number of optimizer steps that the checkpoint has taken.

    Raises:
        ValueError: the optimizer state does not fit the parameters.
    """
    masters = trainer.masters
    if "ema" in initial:
        ema = initial["ema"]
        # parameters that are fresh: their EMA is still a copy of the student's
        if not set(masters.shapes) <= set(ema):
            ema = {**trainer.ema.full(), **ema}
        trainer.ema.load(ema)
    states = match_optimizer(initial["opt"], masters.shapes) if "opt" in initial else {}
    if states:
        for key in MOMENTS:
            moments = {name: state[key] for name, state in states.items()}
            masters.scatter(moments, masters.state(key))
        # one count for all parameters: each has taken every step
        count = float(next(iter(states.values()))["step"])
        trainer.guard.load([count, 0.0, 0.0])
    trainer.refresh_teacher()
    return int(initial.get("steps", 0))


def export_published(
    trainer: Trainer, path: Path, step: int, epoch: int, facts: DataFacts | None = None
) -> None:
    """The published code's ``.pt`` with fp32 weights, EMA and AdamW state; collective, rank 0
    writes.

    ``facts``: about the training data, which the file then keeps.
    """
    masters = trainer.masters
    weights = masters.gather(masters.flats)
    ema = trainer.ema.full()
    moments = {key: masters.gather(masters.state(key)) for key in MOMENTS}
    if trainer.rank:
        return
    # as torch's AdamW keeps it on a CPU
    step_count = masters.optimizer_states()[0]["step"].to("cpu", torch.float32, copy=True)
    states = {
        name: {**{key: moments[key][name] for key in MOMENTS}, "step": step_count}
        for name in masters.shapes
    }
    optim = trainer.cfg.optim
    group = {
        "lr": optim.lr,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }
    checkpoint = {
        "model": trainer.state_dict(weights),
        "ema": trainer.state_dict(ema),
        "opt": numbered(states, group),
        "args": published_args(trainer.cfg, facts),
        "epoch": epoch,
        "steps": step,
    }
    write_atomic(path, lambda p: torch.save(checkpoint, p))


def published_args(cfg: Config, facts: DataFacts | None = None) -> argparse.Namespace:
    """The published code's arguments that describe the model.

    ``num_heads`` is ours, because the published code has it in the model's name; so are
    ``input_size`` and ``data``, the facts about the training data.
    """
    model = cfg.model
    # the published code trains on latents, whose side is an eighth of the image's
    pixels = facts is not None and facts.pixels
    args = argparse.Namespace(
        model=model.name,
        resolution=model.input_size * (1 if pixels else 8),
        num_classes=model.num_classes,
        qk_norm=model.qk_norm,
        cfg_prob=model.class_dropout_prob,
        path_type=cfg.diffusion.path,
        num_heads=model.arguments()["num_heads"],
        input_size=model.input_size,
    )
    if facts is not None:
        args.data = facts.as_json()
    return args


def export_safetensors(trainer: Trainer, path: Path, step: int, facts: DataFacts) -> None:
    """EMA weights in fp32 as an export; collective, rank 0 writes."""
    ema = trainer.ema.full()
    if trainer.rank == 0:
        write_export(path, trainer.state_dict(ema), asdict(trainer.cfg), step, facts)
