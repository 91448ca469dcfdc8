"""Checkpoints as the published code writes them: student, EMA, AdamW's state, arguments."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.optimizer_state import numbered
from sra_fast.checkpoint.reading import manifest_of, read_kinds
from sra_fast.checkpoint.shards import MASTER, MOMENTS, ema_kind
from sra_fast.checkpoint.sources import model_of_settings, state_dict_of
from sra_fast.config.schema import DiffusionConfig, ModelConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import DEFAULT_SCALE, in_words
from sra_fast.utils.messages import warn

# arguments of an MMDiT that its shapes do not show, and what they are unless given
OF_TEXT = {"context_tokens": None, "time_scale": 1.0, "position_start": 0.0, "position_step": 1.0}


def published_args(
    model: ModelConfig, diffusion: DiffusionConfig, facts: DataFacts | None = None
) -> argparse.Namespace:
    """The published code's arguments that describe a model.

    ``num_heads`` is ours, because the published code has it in the model's name; so are
    ``input_size``, ``time_shift``, ``OF_TEXT`` of an MMDiT, ``architecture``, the family and its
    constructor's arguments, and ``data``, the facts about the training data.

    Args:
        model: of the run, filled in.
        diffusion: of the run.
        facts: about the training data.
    """
    # the published code trains on latents, whose side is an eighth of the image's
    pixels = facts is not None and facts.pixels
    given = model.arguments()
    args = argparse.Namespace(
        model=model.name,
        resolution=model.input_size * (1 if pixels else 8),
        num_classes=model.num_classes,
        qk_norm=model.qk_norm,
        cfg_prob=model.class_dropout_prob,
        path_type=diffusion.path,
        weighting=diffusion.time,
        time_shift=diffusion.time_shift,
        num_heads=given["num_heads"],
        input_size=model.input_size,
        architecture={"family": model.family, "arguments": given},
    )
    if model.conditioning == "text":
        for name, default in OF_TEXT.items():
            setattr(args, name, given.get(name, default))
    if facts is not None:
        args.data = facts.as_json()
        _warn_of_other_latents(facts)
    if diffusion.time_shift != 1:
        warn(
            "the published code samples at evenly spaced times, the model's have the shift %g: "
            "sample.py reads it from this file, generate.py knows none",
            diffusion.time_shift,
        )
    return args


def _warn_of_other_latents(facts: DataFacts) -> None:
    """One line if the published code would decode samples as other latents."""
    if facts.pixels or (facts.scale, facts.shift) == (DEFAULT_SCALE, 0):
        return
    warn(
        "the published code decodes latents with the scale %g and no shift, the model's have %s "
        "and %s: sample.py reads them from this file, generate.py has to be told",
        *(DEFAULT_SCALE, in_words(facts.scale), in_words(facts.shift)),
    )


def published_optimizer(
    moments: Mapping[str, Mapping[str, Tensor]], count: float, optim: Mapping
) -> dict:
    """``state_dict()`` of the published code's AdamW.

    Args:
        moments: ``exp_avg`` and ``exp_avg_sq`` -> parameter -> fp32 tensor of its shape, in the
            model's order.
        count: updates taken.
        optim: section ``optim`` of the configuration.
    """
    states = {
        name: {
            **{key: moments[key][name] for key in MOMENTS},
            "step": torch.tensor(float(count), dtype=torch.float32),
        }
        for name in moments[MOMENTS[0]]
    }
    group = {
        "lr": optim["lr"],
        "betas": tuple(optim["betas"]),
        "eps": optim["eps"],
        "weight_decay": optim["weight_decay"],
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }
    return numbered(states, group)


def published_step(path: Path) -> int | None:
    """How many steps a published checkpoint says it has taken; None if it does not. The tensors
    are not read.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # torch, pickle, zip and the file system each raise their own types
        return None
    steps = held.get("steps") if isinstance(held, dict) else None
    return steps if isinstance(steps, int) else None


def published_of_checkpoint(path: Path) -> dict:
    """A run's checkpoint in the published code's form.

    Args:
        path: folder of the checkpoint.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    manifest = manifest_of(path)
    settings = manifest.settings
    model = model_of_settings(settings, path)
    ema = ema_kind(manifest.sampled)
    kinds = read_kinds(path, [MASTER, ema, *MOMENTS])[1]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # raises unless the parameters fit
    weights = state_dict_of(model, kinds[MASTER], path)
    moments = {
        key: {name: kinds[key][name].view(shape) for name, shape in shapes.items()}
        for key in MOMENTS
    }
    facts = None if manifest.data is None else DataFacts.from_json(manifest.data)
    return {
        "model": weights,
        "ema": state_dict_of(model, kinds[ema], path),
        "opt": published_optimizer(moments, manifest.counts[0], settings["optim"]),
        "args": published_args(
            ModelConfig(**settings["model"]), DiffusionConfig(**settings["diffusion"]), facts
        ),
        "epoch": manifest.epoch,
        "steps": manifest.step,
    }
