"""Write and resume checkpoints, start from other weights, export.

A checkpoint is DeepSpeed's, for the exact resume of a run, with the sharded EMA and a small JSON file beside it (see
``checkpoint/reading.py``).  All random numbers are functions of (seed, step, image), so no generator state is stored.
DeepSpeed writes ``latest`` last: an interrupted save is never picked up.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from sra_fast.checkpoint.reading import STATE, read_state
from sra_fast.config.schema import Config
from sra_fast.training.trainer import Trainer
from sra_fast.utils.files import write_atomic, write_json


def save(trainer: Trainer, folder: Path, step: int, epoch: int) -> Path:
    """Write ``folder/step_XXXXXXXX`` after ``step`` optimizer steps; collective."""
    tag = f"step_{step:08d}"
    path = folder / tag
    path.mkdir(parents=True, exist_ok=True)
    pieces = {
        name: (start, values.clone()) for name, (start, values) in trainer.ema.pieces().items()
    }
    write_atomic(path / f"ema_rank_{trainer.rank:05d}.pt", lambda p: torch.save(pieces, p))
    teacher = trainer.teacher.state() if trainer.teacher is not None else None
    if trainer.rank == 0:
        identity = identity_of(trainer.cfg, trainer.world, trainer.stage)
        write_json(path / STATE, {"step": step, "epoch": epoch, **identity, "teacher": teacher})
    dist.barrier()
    # the frozen teacher is not stored: it is the EMA's
    trainer.engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
    return path


def identity_of(cfg: Config, world_size: int, zero_stage: int) -> dict:
    """What must be the same for a resumed run to be the uninterrupted one."""
    return {
        "seed": cfg.train.seed,
        "global_batch": cfg.train.global_batch,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "precision": cfg.train.precision,
        "residual": cfg.train.residual,
        "teacher_layer": cfg.align.teacher_layer if cfg.align.target != "none" else None,
        "fp8_group": cfg.align.target == "ema_teacher"
        and cfg.align.teacher_dtype == "fp8",  # a parameter group of its own
        "model": asdict(cfg.model),
    }


def load(trainer: Trainer, path: Path) -> int:
    """Restore weights, optimizer, EMA and teacher from a checkpoint folder; returns the step.  ValueError: see ``read_state``."""
    state = read_state(path, identity_of(trainer.cfg, trainer.world, trainer.stage))
    loaded, _ = trainer.engine.load_checkpoint(
        str(path.parent), tag=path.name, load_module_strict=False
    )
    if loaded is None:
        raise ValueError(f"DeepSpeed found no checkpoint at {path}")
    o = trainer.cfg.optim
    for group in (
        trainer.engine.optimizer.param_groups
    ):  # the configuration's, not those of the interrupted run
        group.update(betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay)
    if o.implementation == "fused":  # its step count is read on the host
        for moments in trainer.shards.optimizer_states():
            moments["step"] = moments["step"].cpu()
    trainer.refresh_teacher(state["teacher"])
    return state["step"]


def start_from(trainer: Trainer, checkpoint: dict) -> int:
    """EMA and optimizer state of a reference checkpoint into a trainer built with its weights; returns its step."""
    if "ema" in checkpoint:
        trainer.ema.load(checkpoint["ema"])
    if "opt" in checkpoint:
        # the reference's optimizer also lists its position embedding, first and without state
        states = {
            name: checkpoint["opt"]["state"][i]
            for i, name in enumerate(trainer.shards.shapes, start=1)
        }
        for key in ("exp_avg", "exp_avg_sq"):
            trainer.shards.scatter(
                {name: s[key] for name, s in states.items()}, trainer.shards.state(key)
            )
        for state in trainer.shards.optimizer_states():
            state["step"].fill_(float(next(iter(states.values()))["step"]))
    trainer.refresh_teacher()
    return int(checkpoint.get("steps", 0))


def export_reference(trainer: Trainer, path: Path, step: int, epoch: int) -> None:
    """The reference's ``.pt`` with fp32 weights, EMA and AdamW state; collective, rank 0 writes."""
    shards = trainer.shards
    weights, ema = shards.gather(shards.flats), trainer.ema.full()
    moments = {key: shards.gather(shards.state(key)) for key in ("exp_avg", "exp_avg_sq")}
    if trainer.rank:
        return
    o, count = trainer.cfg.optim, shards.optimizer_states()[0]["step"]
    state = {
        i: {"step": count.detach().cpu().clone(), **{key: moments[key][name] for key in moments}}
        for i, name in enumerate(shards.shapes, start=1)
    }
    group = {
        "lr": o.lr,
        "betas": tuple(o.betas),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": list(range(len(shards.shapes) + 1)),
    }
    checkpoint = {
        "model": trainer.state_dict(weights),
        "ema": trainer.state_dict(ema),
        "opt": {"state": state, "param_groups": [group]},
        "args": reference_args(trainer.cfg),
        "epoch": epoch,
        "steps": step,
    }
    write_atomic(path, lambda p: torch.save(checkpoint, p))


def reference_args(cfg: Config) -> argparse.Namespace:
    """The reference's command-line arguments that describe the model, and the head count, which it has in the name."""
    m = cfg.model
    return argparse.Namespace(
        model=m.name,
        resolution=8 * m.input_size,
        num_classes=m.num_classes,
        qk_norm=m.qk_norm,
        cfg_prob=m.class_dropout_prob,
        path_type=cfg.diffusion.path,
        num_heads=m.arguments()["num_heads"],
    )


def export_safetensors(trainer: Trainer, path: Path, step: int) -> None:
    """EMA weights in fp32 under the reference's names, with the model's configuration as metadata; collective."""
    from safetensors.torch import save_file

    ema = trainer.ema.full()
    if trainer.rank == 0:
        metadata = {"step": str(step), "config": json.dumps(asdict(trainer.cfg))}
        tensors = {name: tensor.contiguous() for name, tensor in trainer.state_dict(ema).items()}
        write_atomic(path, lambda p: save_file(tensors, p, metadata=metadata))
