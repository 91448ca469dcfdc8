"""What a run says before its first step: six lines, each about one thing, the run folder first."""

import sys
from dataclasses import fields
from math import prod
from pathlib import Path

import torch

from sra_fast.config.schema import Config
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import in_words
from sra_fast.data.training_data import TrainingData
from sra_fast.training.flops import training_flops
from sra_fast.training.trainer import Trainer
from sra_fast.utils.registry import LOGGERS

# columns that the names of the lines take
NAME_WIDTH = 9
# the share of its beginning that an average may keep to the end without a word
MOST_INITIAL = 0.05
# an EMA or another average is fp32
EMA_BYTES = 4


def say_start(
    trainer: Trainer, data: TrainingData, folder: Path, start: int = 0, origin: str | None = None
) -> None:
    """Print ``start_lines`` to stderr, and what a user may not have wanted.

    stdout belongs to the summary, which other programs read.
    """
    lines = start_lines(trainer, data, folder, start, origin)
    warnings = (precision_warning(trainer), decay_warning(trainer.cfg, origin))
    lines += [warning for warning in warnings if warning]
    lines += idle_warnings(trainer.cfg)
    print("\n".join(lines), file=sys.stderr, flush=True)


def start_lines(
    trainer: Trainer, data: TrainingData, folder: Path, start: int = 0, origin: str | None = None
) -> list[str]:
    """The six lines of a run.

    Args:
        trainer: built.
        data: training set.
        folder: run folder.
        start: optimizer steps already taken.
        origin: what ``train.init_from`` has given, of ``read_initial``; None: nothing.
    """
    begun = "new" if start == 0 else f"resumed after step {start}"
    named = {
        "run": f"{folder} ({f'new, {origin}' if origin else begun})",
        "model": _model_line(trainer),
        "data": _data_line(data),
        "machine": _machine_line(trainer),
        "steps": _steps_line(trainer, data, start),
        "curves": _curves_line(trainer.cfg, folder),
    }
    return [f"{name:{NAME_WIDTH}}{line}" for name, line in named.items()]


def _model_line(trainer: Trainer) -> str:
    """Network, parameters, and what the alignment costs."""
    cfg = trainer.cfg
    # not p.numel(): ZeRO-3 leaves empty parameters
    count = sum(prod(shape) for shape in trainer.masters.shapes.values())
    return (
        f"{cfg.model.name}, {_short(count)} parameters; {_alignment(cfg)}; {_ema(trainer, count)}"
    )


def _alignment(cfg: Config) -> str:
    if not cfg.align.active:
        return "no alignment"
    plain, aligned = training_flops(cfg)
    names = " and ".join(align.target for align in cfg.alignments.values())
    return f"target {names} and head add {aligned / plain - 1:.1%} to the FLOPs of the plain step"


def _ema(trainer: Trainer, count: int) -> str:
    more = len(trainer.averages)
    what = f"EMA and {_count(more, 'average')}" if more else "EMA"
    size = f"{what} {_bytes(EMA_BYTES * (1 + more) * count)}"
    world = trainer.plan.world
    if world == 1:
        return size
    return f"{size} on each process" if trainer.plan.stage == 0 else f"{size} over all processes"


def _data_line(data: TrainingData) -> str:
    facts = data.facts()
    # the path says which of several data sets it is; digits come with scikit-learn
    source = f"{facts.name} of {facts.path}" if facts.path else facts.name
    told = _count(facts.num_classes, "class", "classes")
    if facts.text is not None:
        told = f"captions of {facts.text['tokens']} x {facts.text['width']} ({facts.text['name']})"
    return f"{source}: {_count(len(data), 'image')}, {told}; {_input(facts)}"


def _input(facts: DataFacts) -> str:
    """What the model sees of an image."""
    shape = " x ".join(map(str, facts.shape))
    if facts.pixels:
        return f"pixels {shape} in [-1, 1]"
    text = f"latents {shape}, scale {in_words(facts.scale)}"
    return f"{text}, shift {in_words(facts.shift)}" if facts.shift else text


def _machine_line(trainer: Trainer) -> str:
    plan = trainer.plan
    cfg = trainer.cfg
    processes = _count(plan.world, "process", "processes")
    how = "no CUDA graph"
    if trainer.graphed is not None:
        how = "one CUDA graph" if trainer.graphed.graphs else "the program of a CUDA graph"
    blocks = "compiled blocks" if cfg.train.compile else "blocks not compiled"
    return (
        f"{processes} on {_device_name(trainer)}, {cfg.train.precision}, "
        f"ZeRO {plan.stage}, {how}, {blocks}"
    )


def _device_name(trainer: Trainer) -> str:
    if trainer.device.type == "cuda":
        return torch.cuda.get_device_name(trainer.device)
    threads = _count(torch.get_num_threads(), "thread")
    return f"CPU ({threads}{' each' if trainer.plan.world > 1 else ''})"


def _steps_line(trainer: Trainer, data: TrainingData, start: int) -> str:
    cfg = trainer.cfg
    plan = trainer.plan
    train = cfg.train
    epochs = train.steps / (len(data) // train.global_batch)
    batch = (
        f"batch {train.global_batch} = {_count(plan.world, 'process', 'processes')} x "
        f"{_count(plan.micro, 'image')} x {_count(plan.accumulation, 'micro-step')}"
    )
    # a checkpoint is always written at the end
    often = [f"every {train.save_every} steps"] if train.save_every < train.steps else []
    often += [f"every {train.save_minutes:g} minutes"] if train.save_minutes else []
    saved = ", ".join(often) + " and at the end" if often else "at the end"
    if train.keep:
        saved += f", the newest {train.keep} kept"
    what = ["samples"] * (cfg.monitor.count > 0) + ["held-out loss"] * bool(cfg.monitor.held_out)
    looks = f"{' and '.join(what)} every {cfg.monitor.every} steps"
    looks = looks if cfg.monitor.every else "no samples"
    return (
        f"{start} to {train.steps} ({epochs:.1f} epochs), {batch}; "
        f"checkpoint {saved}, {looks} while training"
    )


def _curves_line(cfg: Config, folder: Path) -> str:
    places = [f"{folder}/stats.jsonl", "loss.png at checkpoints"]
    places += [LOGGERS[name].place(folder) for name in cfg.train.loggers]
    return "; ".join(places)


def precision_warning(trainer: Trainer) -> str | None:
    """One line if this device computes in bf16 slowly, else None."""
    if trainer.device.type == "cpu" and trainer.cfg.train.precision == "bf16":
        return "warning: bf16 is slow on a CPU, set --train.precision fp32"
    return None


def decay_warning(cfg: Config, origin: str | None = None) -> str | None:
    """One line if much of the average that will be sampled is the random weights of the beginning,
    else None.

    Args:
        cfg: of the run.
        origin: what the weights come from; None: they are random.
    """
    name = cfg.sample.weights
    steps = cfg.train.steps
    decay = cfg.train.ema_decay
    option = "train.ema_decay"
    if name != "ema":
        # the student, and averages without a decay, keep nothing of the beginning
        decay = getattr(cfg.train.averages.get(name), "decay", None)
        option = f"train.averages.{name}.decay"
    if origin is not None or decay is None or decay**steps <= MOST_INITIAL:
        return None
    # remembers a twentieth of the run; of a very short one less
    better = min(max(0.9, 1 - 20 / steps), (MOST_INITIAL / 2) ** (1 / steps))
    return (
        f"warning: after {steps} steps {decay**steps:.0%} of the weights that are sampled ({name}, of "
        f"decay {decay:g}) will still be the random ones of the beginning: take a smaller --{option}, "
        f"such as {better:.4g}, or more steps"
    )


def idle_warnings(cfg: Config) -> list[str]:
    """A line for each group of options that were given and do nothing in this run, and for each
    default that is probably not meant.

    They are not refused: a configuration may have them for another run.
    """
    found = []
    for section, align in cfg.alignments.items():
        idle = _given(align, "hold", "decay")
        if align.schedule == "steps":
            # both are not left out: ``check_config`` refuses that
            found += [
                f"warning: {section}.{name} is {getattr(align, name)} steps, its default, which is "
                "the paper's number of epochs"
                for name in ("hold", "decay")
                if name not in idle
            ]
        if idle and align.schedule not in ("epochs", "steps"):
            what = f"{section}.schedule is {align.schedule}, not epochs or steps"
            found.append(_idle(section, idle, what))
        noise = cfg.model.process == "gaussian_diffusion"
        if align.target == "ema_teacher" and noise and not _given(align, "weight"):
            found.append(
                f"warning: {section}.weight is {align.weight:g}, the paper's for SiT; "
                "for DiT it has 0.04 (configs/dit_xl2_256.yaml)"
            )
    if cfg.optim.schedule == "constant" and cfg.optim.min_lr:
        found.append(_idle("optim", ["min_lr"], "optim.schedule is constant"))
    if not cfg.monitor.every:
        idle = _given(cfg.monitor, *(option.name for option in fields(cfg.monitor)))
        if idle:
            found.append(_idle("monitor", idle, "monitor.every is 0: add --monitor.every STEPS"))
    return found


def _given(options: object, *names: str) -> list[str]:
    """Those of the names that have another value than their default."""
    defaults = {option.name: option.default for option in fields(options)}
    return [name for name in names if getattr(options, name) != defaults[name]]


def _idle(section: str, names: list[str], why: str) -> str:
    options = ", ".join(f"{section}.{name}" for name in names)
    return f"warning: nothing reads {options}, because {why}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _short(number: int) -> str:
    """A count in three digits: 675.1 M, 12.3 k."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
