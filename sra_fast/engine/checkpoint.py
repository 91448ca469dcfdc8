"""Checkpoints: DeepSpeed's for the exact resume of a run, the EMA included; the EMA beside them for samplers; exports.

``<run>/checkpoints/step_00001000/`` holds DeepSpeed's files, ``ema_rank_00000.pt`` of every rank and ``sra_fast.json``
(step, seed, sampler position, processes, scales of an fp8 teacher).  All random numbers are functions of (seed, step, image), so
that these are the whole generator state.  DeepSpeed writes ``latest`` last: an interrupted save is never picked up.
"""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.engine.config import Config
from sra_fast.engine.files import write_atomic, write_json

if TYPE_CHECKING:  # sampling reads checkpoints without DeepSpeed
    from sra_fast.engine.build import Trainer

STATE = "sra_fast.json"


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


def read_state(path: Path, identity: dict) -> dict:
    """``sra_fast.json`` of a checkpoint that a run of this identity can go on from.

    Raises:
        ValueError: no checkpoint there, or one of another model, seed, batch, precision, ZeRO stage or process count.
    """
    try:
        state = {
            "fp8_group": False,
            "residual": "bf16",
            "teacher": None,
            **json.loads((path / STATE).read_text()),
        }
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no checkpoint of sra-fast at {path}: {error}") from None
    for key, value in identity.items():
        if state.get(key) != value:
            raise ValueError(
                f"cannot resume {path}: it was made with {key} {state.get(key)}, this run has {value}"
            )
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a ``checkpoints`` folder, or None."""
    if not (folder / "latest").exists():
        return None
    named = folder / ((folder / "latest").read_text().strip() or "?")
    # DeepSpeed writes `latest` last, but in place: a crash in that moment leaves it empty, with the newest step complete
    steps = [named, *sorted(folder.glob("step_*"), reverse=True)]
    return next((path for path in steps if (path / STATE).exists()), None)


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


def load_ema(path: Path) -> dict[str, Tensor]:
    """``{name: flat fp32 tensor}`` of the whole EMA, put together from the files of every rank; not collective.

    Raises:
        ValueError: a rank's file is missing or broken.
    """
    world, pieces = json.loads((path / STATE).read_text())["world_size"], {}
    for rank in range(world):
        file = path / f"ema_rank_{rank:05d}.pt"
        try:
            for name, piece in torch.load(file, map_location="cpu", weights_only=True).items():
                pieces.setdefault(name, []).append(piece)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is missing or broken: {error}") from None
    return {
        name: torch.cat([values for _, values in sorted(parts, key=lambda p: p[0])])
        for name, parts in pieces.items()
    }


def read_reference(path: str) -> dict:
    """The reference's ``.pt`` (``model, ema, opt, args, epoch, steps``) or a bare state dict as ``{"ema": ...}``.

    Nothing but tensors, containers and ``argparse.Namespace`` is unpickled.

    Raises:
        ValueError: unreadable, not a checkpoint, or pickled code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read safely: {(str(error).splitlines() or ['empty'])[0]}"
        ) from None
    if isinstance(checkpoint, dict) and "x_embedder.proj.weight" in checkpoint:
        checkpoint = {"ema": checkpoint}
    if not isinstance(checkpoint, dict) or "x_embedder.proj.weight" not in checkpoint.get(
        "ema", checkpoint.get("model", {})
    ):
        raise ValueError(
            f"{path} holds neither a SiT or DiT state dict nor the reference's checkpoint"
        )
    return checkpoint


def read_weights(path: str) -> dict:
    """``{"ema": state dict, ...}`` from an export (``.safetensors``, with its ``config``) or a reference checkpoint (``.pt``)."""
    if not path.endswith(".safetensors"):
        return read_reference(path)
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as f:
            config = json.loads((f.metadata() or {}).get("config", "null"))
        return {"ema": load_file(path), **({"config": config} if config else {})}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None


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
