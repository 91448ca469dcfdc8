"""A whole run: check, build, restore, train, export, report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sra_fast.checkpoint import reading
from sra_fast.config.cli import save_config
from sra_fast.config.schema import Config, ModelConfig
from sra_fast.data.dataset import Digits, Latents, make_dataset
from sra_fast.plots import report
from sra_fast.sampling.generate import choose_labels, generate
from sra_fast.training import saving
from sra_fast.training.checks import check, check_device, split_batch
from sra_fast.training.logger import read_rows
from sra_fast.training.loop import train
from sra_fast.training.monitor import Monitor
from sra_fast.training.trainer import Trainer, build
from sra_fast.utils.files import write_atomic
from sra_fast.zero.deepspeed_config import deepspeed_config, zero_stage

DIGITS_PER_CLASS = 40


@dataclass
class Plan:
    """A checked run: nothing large was allocated for it yet."""

    cfg: Config
    ds_json: str | None
    data: Digits | Latents
    resume: Path | None
    start: dict


def prepare(cfg: Config, ds_json: str | None) -> Plan:
    """Check everything that can be checked before GPU memory is used; ValueError says what is wrong."""
    check(cfg)
    _check_writable(Path(cfg.train.out))
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulation = split_batch(cfg, world)
    if cfg.monitor.every and cfg.monitor.count < world:
        raise ValueError(
            f"monitor.count must be at least 1 for each of the {world} processes, got {cfg.monitor.count}"
        )
    stage = zero_stage(
        deepspeed_config(cfg, micro, accumulation, ds_json, torch.cuda.is_available()), cfg
    )
    check_device(cfg, stage, torch.cuda.is_available(), world)
    cfg.train.zero_stage = stage
    resume = find_resume(cfg)
    if resume:
        reading.read_state(resume, saving.identity_of(cfg, world, stage))
    return Plan(cfg, ds_json, make_dataset(cfg), resume, _read_start(cfg, resume))


def _read_start(cfg: Config, resume: Path | None) -> dict:
    """What ``train.init_from`` names, or an empty dict; ValueError if it does not fit the run."""
    if not cfg.train.init_from:
        return {}
    if resume:  # a job that is restarted with the same command goes on where it was
        return {}
    start = reading.read_weights(cfg.train.init_from)
    _check_heads(cfg, start)
    with torch.device("meta"):
        expected = {name: [*value.shape] for name, value in cfg.model.build().state_dict().items()}
    for key in {"model", "ema"} & set(start):
        found = {name: [*value.shape] for name, value in start[key].items()}
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"train.init_from {cfg.train.init_from} does not fit the model: {name} should be "
                    f"{expected.get(name, 'absent')}, it is {found.get(name, 'absent')}"
                )
    if start.get("steps", 0) >= cfg.train.steps:
        raise ValueError(
            f"train.steps must exceed the {start['steps']} of train.init_from, got {cfg.train.steps}"
        )
    return start


def _check_heads(cfg: Config, start: dict) -> None:
    """The one property of a model that the shapes of its weights do not show."""
    ours = cfg.model.arguments()["num_heads"]
    if "config" in start:
        theirs = ModelConfig(**start["config"]["model"]).arguments()["num_heads"]
    else:
        theirs = getattr(start.get("args"), "num_heads", ours)
    if theirs != ours:
        raise ValueError(
            f"train.init_from {cfg.train.init_from} was made with {theirs} heads, the model has {ours}"
        )


def _check_writable(out: Path) -> None:
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"train.out {out} cannot be written: {existing} is no writable folder")


def find_resume(cfg: Config) -> Path | None:
    """The checkpoint folder that ``train.resume`` means, or None to start afresh; ValueError if it names nothing."""
    if cfg.train.resume is None:
        return None
    if cfg.train.resume == "auto":
        numbered = [f for f in Path(cfg.train.out).glob("*") if f.name.isdigit()]
        folders = sorted(numbered, key=lambda f: int(f.name), reverse=True)
        return next(filter(None, (reading.latest(f / "checkpoints") for f in folders)), None)
    path = Path(cfg.train.resume)
    if (path / reading.STATE).exists():
        return path
    found = reading.latest(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"train.resume must name a run folder or one of its checkpoints, found neither at {path}"
        )
    return found


def new_folder(out: Path) -> Path:
    """``out/000``, ``out/001``, ...: made by rank 0, known to all."""
    box = [None]
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name) for p in out.iterdir() if p.name.isdigit()), default=-1)
        while box[0] is None:
            try:
                (out / f"{number:03d}").mkdir()
                box[0] = str(out / f"{number:03d}")
            except FileExistsError:  # another run started at the same moment
                number += 1
    dist.broadcast_object_list(box, src=0)
    return Path(box[0])


def run(plan: Plan, device: torch.device) -> dict:
    """Execute a plan in the current process group; returns the summary (rank 0's is also in ``summary.json``)."""
    cfg = plan.cfg
    trainer = build(cfg, device, plan.ds_json, plan.start.get("model", plan.start.get("ema")))
    if plan.resume:
        folder, start = plan.resume.parents[1], saving.load(trainer, plan.resume)
    else:
        folder, start = new_folder(Path(cfg.train.out)), saving.start_from(trainer, plan.start)
    plan.start.clear()
    if trainer.rank == 0:
        save_config(cfg, folder / "config.yaml")
        write_atomic(
            folder / "deepspeed.json",
            lambda p: p.write_text(json.dumps(trainer.ds_config, indent=1)),
        )
    train(
        trainer,
        plan.data,
        folder,
        start,
        Monitor(cfg, device, folder) if cfg.monitor.every else None,
    )
    epoch = cfg.train.steps // max(1, len(plan.data) // cfg.train.global_batch)
    if "safetensors" in cfg.train.export:
        saving.export_safetensors(trainer, folder / "ema.safetensors", cfg.train.steps)
    if "reference" in cfg.train.export:
        saving.export_reference(trainer, folder / "reference.pt", cfg.train.steps, epoch)
    summary = summarise(trainer, plan.data, folder)
    dist.barrier()
    return summary


def summarise(trainer: Trainer, data, folder: Path) -> dict:
    """Loss curve and summary; for digits also samples and their scores.  Collective; rank 0 writes."""
    shards = trainer.shards
    use_ema = trainer.cfg.sample.weights == "ema"
    weights = trainer.ema.full() if use_ema else shards.gather(shards.flats)
    if trainer.rank:
        return {}
    rows = read_rows(folder / "stats.jsonl")
    # the first row holds the first step alone, warm-up included
    steady = rows[1:] or rows
    total_ms = sum(row["ms_per_step"] for row in steady)
    summary = {
        "run_dir": str(folder),
        "images_per_s": round(1e3 * trainer.cfg.train.global_batch * len(steady) / total_ms, 1),
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
    }
    report.plot_loss(folder / "loss.png", rows)
    if isinstance(data, Digits):
        summary.update(digits_report(trainer, weights, folder))
    write_atomic(folder / "summary.json", lambda p: p.write_text(json.dumps(summary) + "\n"))
    return summary


def digits_report(trainer: Trainer, weights: dict, folder: Path) -> dict:
    """Samples of every class, beside real digits in ``samples.png``, and their scores."""
    from sra_fast.evaluation.digits import evaluate_digits, real_rows

    cfg, device = trainer.cfg, trainer.device
    model = cfg.model.build().to(device).eval()
    model.load_state_dict(trainer.state_dict(weights))
    labels = choose_labels(
        DIGITS_PER_CLASS * Digits.num_classes, Digits.num_classes, cfg.sample.labels, cfg.train.seed
    )
    images = generate(
        model, labels, cfg.sample, cfg.diffusion.path, cfg.train.seed, len(labels), device
    )
    columns = 10
    fake = [images[labels == c][:columns] for c in range(10)]
    grid = torch.cat(
        [
            torch.cat([f, r])
            for f, r in zip(fake, real_rows(columns), strict=True)
            if len(f) == columns
        ]
    )
    report.save_grid(
        folder / "samples.png", report.to_uint8(grid, cfg.sample.rounding), 2 * columns, 6, columns
    )
    return evaluate_digits(images, labels)
