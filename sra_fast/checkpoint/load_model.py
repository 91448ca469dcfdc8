"""A model for sampling from anything that holds weights: run folder, checkpoint, export, the reference's .pt."""

from pathlib import Path

import torch

from sra_fast import models
from sra_fast.checkpoint import reading
from sra_fast.config.cli import load_config
from sra_fast.config.schema import ModelConfig
from sra_fast.models import SiT
from sra_fast.utils.registry import MODEL_FAMILIES


def load_model(path: str, weights: str = "ema", num_heads: int | None = None) -> tuple[SiT, str]:
    """``(model in eval mode, fp32, on the CPU; interpolant it was trained with)``.

    Args:
        path: a run folder (its export, else its newest checkpoint), a checkpoint folder, ``.safetensors`` or ``.pt``.
        weights: ``"ema"``, or ``"model"`` (the student; only a reference ``.pt`` holds it whole).
        num_heads: for a ``.pt`` of a width that is no paper size.

    Raises:
        ValueError: nothing there, unreadable, or without the asked weights.
    """
    p = Path(path)
    if p.is_dir() and not (p / reading.STATE).exists():
        export, newest = p / "ema.safetensors", reading.latest(p / "checkpoints")
        if not export.exists() and newest is None:
            raise ValueError(f"{path} holds neither an export nor a checkpoint")
        p = export if export.exists() else newest
    if not p.exists():
        raise ValueError(f"no checkpoint at {path}")
    if weights == "model" and p.suffix != ".pt":
        raise ValueError(
            f"{p} holds EMA weights only; weights 'model' are in a reference .pt (train.export: [reference])"
        )
    if p.is_dir():
        return _from_checkpoint(p)
    return (
        _from_safetensors(p)
        if p.suffix == ".safetensors"
        else _from_reference(p, weights, num_heads)
    )


def _fill(model: SiT, state: dict) -> SiT:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from None
    return model.eval()


def _from_checkpoint(path: Path) -> tuple[SiT, str]:
    cfg = load_config(path.parents[1] / "config.yaml")
    model = cfg.model.build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ema = {name: flat.view(shapes[name]) for name, flat in reading.load_ema(path).items()}
    return _fill(model, {**model.state_dict(), **ema}), cfg.diffusion.path


def _from_safetensors(path: Path) -> tuple[SiT, str]:
    held = reading.read_weights(str(path))
    state, config = held["ema"], held.get("config")
    if config is None:
        return _fill(*_made(state)), "linear"
    return _fill(ModelConfig(**config["model"]).build(), state), config["diffusion"]["path"]


def _from_reference(path: Path, weights: str, num_heads: int | None) -> tuple[SiT, str]:
    held = reading.read_reference(str(path))
    if weights not in held:
        raise ValueError(f"{path} holds no '{weights}' weights, only {sorted(held)}")
    args = held.get("args")
    family = str(getattr(args, "model", "")).partition("-")[0]
    made = _made(
        held[weights],
        num_heads or getattr(args, "num_heads", None),
        getattr(args, "num_classes", None),
        family if family in MODEL_FAMILIES else None,
    )
    return _fill(*made), getattr(args, "path_type", "linear")


def _made(state: dict[str, torch.Tensor], *given) -> tuple[SiT, dict[str, torch.Tensor]]:
    cls, arguments = models.arguments_from_state_dict(state, *given)
    return cls(**arguments), state
