"""Resume checkpoints, which ``training/saver.py`` writes; start from other weights; export.

A checkpoint holds the fp32 masters, AdamW's moments and the EMA in pieces that any number of
processes can read back, in any ZeRO stage (``checkpoint/shards.py``), and a manifest. All random
numbers are functions of (seed, step, image), so no generator state is stored. The frozen teacher is
not stored either: it is rounded from the EMA.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.export import write_export
from sra_fast.checkpoint.manifest import Manifest, Progress
from sra_fast.checkpoint.optimizer_state import match_optimizer
from sra_fast.checkpoint.published import published_args, published_optimizer
from sra_fast.checkpoint.reading import manifest_of
from sra_fast.checkpoint.shards import MOMENTS, Shards, ema_kind
from sra_fast.data.facts import DataFacts
from sra_fast.models import ALIGN_HEADS
from sra_fast.training import provenance
from sra_fast.training.host_copy import flats_by_kind
from sra_fast.training.run_folder import collective_fault
from sra_fast.training.trainer import Trainer
from sra_fast.utils.files import write_atomic
from sra_fast.utils.messages import warn


def load(trainer: Trainer, path: Path, verify: bool = True) -> Progress:
    """Restore weights, moments, averages, teacher and step counts from a checkpoint; collective.

    Any number of processes and any ZeRO stage may have written it: the restored fp32 state is the
    same bit for bit. An average that the checkpoint has not begins with the restored weights.

    Args:
        trainer: built, with a model of the same parameters.
        path: folder of the checkpoint.
        verify: compare the files with their hashes before anything is read.

    Returns:
        How far the run had come.

    Raises:
        ValueError: it is damaged, or does not fit the trainer.
    """
    if verify and (fault := collective_fault(path)):
        raise ValueError(f"checkpoint {path} is damaged: {fault}")
    manifest = manifest_of(path)
    provenance.check(path, manifest, trainer.cfg, None)
    fresh = {name: a for name, a in trainer.averages.items() if name not in manifest.emas}
    kinds = flats_by_kind(trainer)
    for name in fresh:
        del kinds[ema_kind(name)]
    masters = trainer.masters
    shards = Shards(path, manifest.files)
    shards.check(kinds, {name: shape.numel() for name, shape in masters.shapes.items()})
    with torch.no_grad():
        for kind, flats in kinds.items():
            for segment in masters.segments:
                shards.read_into(kind, segment.name, segment.start, segment.of(flats))
    masters.write_weights()
    trainer.guard.load(manifest.counts)
    for name, average in trainer.averages.items():
        if name in fresh:
            average.restart()
        else:
            average.since = float(manifest.emas[name].get("since", 0))
    for line in provenance.average_lines(manifest, trainer.cfg):
        warn("%s", line)
    # what the user's DeepSpeed configuration counts by
    trainer.engine.global_steps = manifest.step
    trainer.engine.global_samples = manifest.step * trainer.cfg.train.global_batch
    trainer.refresh_teacher(_scales(trainer, manifest))
    # the weights are the rounded masters, or this version of DeepSpeed keeps them elsewhere
    masters.verify(dict(trainer.student.named_parameters()))
    return manifest.progress


def _scales(trainer: Trainer, manifest: Manifest) -> list[float] | None:
    """The fp8 scales in use when the checkpoint was written: new ones would round differently.

    None if the teacher has others in fp8, or none: it then takes what fits the EMA best.
    """
    names = [] if trainer.teacher is None else trainer.teacher.fp8_weights()
    if set(names) != set(manifest.scales):
        return None
    return [manifest.scales[name] for name in names]


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
    for average in trainer.averages.values():
        average.restart()
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
    count = float(masters.optimizer_states()[0]["step"])
    cfg = trainer.cfg
    checkpoint = {
        "model": trainer.state_dict(weights),
        "ema": trainer.state_dict(ema),
        "opt": published_optimizer(of_model(moments), count, asdict(cfg.optim)),
        "args": published_args(cfg.model, cfg.diffusion, facts),
        "epoch": epoch,
        "steps": step,
    }
    write_atomic(path, lambda p: torch.save(checkpoint, p))


def of_model(moments: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The moments of the model's parameters, without those of heads that single targets have."""
    return {
        key: {name: value for name, value in found.items() if not name.startswith(ALIGN_HEADS)}
        for key, found in moments.items()
    }


def export_safetensors(
    trainer: Trainer, path: Path, step: int, facts: DataFacts, digest: str | None = None
) -> None:
    """EMA weights in fp32 as an export; collective, rank 0 writes.

    ``digest``: of the checkpoint of the same step, which the file then names.
    """
    ema = trainer.ema.full()
    if trainer.rank == 0:
        write_export(path, trainer.state_dict(ema), asdict(trainer.cfg), step, facts, digest)
