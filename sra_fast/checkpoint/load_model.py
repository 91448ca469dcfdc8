"""A model for sampling from anything that holds weights: run folder, checkpoint, export, published .pt."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sra_fast import models
from sra_fast.checkpoint import reading
from sra_fast.config.cli import load_config
from sra_fast.config.schema import Config, ModelConfig
from sra_fast.data.facts import DataFacts
from sra_fast.models import SiT
from sra_fast.utils.registry import MODEL_FAMILIES

# facts about the training data, in a run folder
FACTS = "data.json"


@dataclass
class LoadedModel:
    """Weights from anywhere, with what is known about them.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        path: the interpolant it was trained with.
        facts: about the data it was trained on; None: not known (weights of other projects).
    """

    model: SiT
    path: str
    facts: DataFacts | None = None


def load_model(path: str, weights: str = "ema", num_heads: int | None = None) -> LoadedModel:
    """A model for sampling and analysis.

    Args:
        path: a run folder (its export, else its newest checkpoint), a checkpoint folder,
            ``.safetensors`` or ``.pt``.
        weights: ``"ema"``, or ``"model"`` (the student; only the published code's ``.pt`` has all
            of it).
        num_heads: for a ``.pt`` whose width is not one of the paper's sizes.

    Raises:
        ValueError: nothing is there, it cannot be read, or it does not have these weights.
    """
    found = Path(path)
    # a run folder: its export if training has finished, else its newest checkpoint
    if found.is_dir() and not (found / reading.STATE).exists():
        export = found / "ema.safetensors"
        newest = reading.latest(found / "checkpoints")
        if not export.exists() and newest is None:
            raise ValueError(f"{path} holds neither an export nor a checkpoint")
        found = export if export.exists() else newest
    if not found.exists():
        raise ValueError(f"no checkpoint at {path}")
    if weights == "model" and found.suffix != ".pt":
        raise ValueError(
            f"{found} holds EMA weights only; weights 'model' are in a .pt as the published code "
            "writes it (train.export: [published])"
        )
    if found.is_dir():
        model, cfg, _ = load_checkpoint(found)
        return LoadedModel(model, cfg.diffusion.path, run_facts(reading.run_folder(found)))
    if found.suffix == ".safetensors":
        return _from_safetensors(found)
    return _from_published(found, weights, num_heads)


def run_facts(folder: Path) -> DataFacts | None:
    """The facts about the data of a run; None if its folder has none."""
    file = folder / FACTS
    return DataFacts.from_json(json.loads(file.read_text())) if file.exists() else None


def load_checkpoint(path: Path) -> tuple[SiT, Config, int]:
    """A training checkpoint's EMA.

    Args:
        path: a checkpoint folder, ``<run>/checkpoints/step_XXXXXXXX``.

    Returns:
        The model in eval mode, fp32, on the CPU; the run's configuration; the step of the
        checkpoint.

    Raises:
        ValueError: the run's configuration is missing, a rank's file is missing or broken, or the
            weights do not fit the configured model.
    """
    file = path.absolute().parents[1] / "config.yaml"
    if not file.exists():
        raise ValueError(f"expected {path} in a run folder, but there is no configuration {file}")
    cfg = load_config(file)
    # the EMA's files hold flat tensors: the model knows the shapes
    model = cfg.model.build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ema = {name: flat.view(shapes[name]) for name, flat in reading.load_ema(path).items()}
    # the EMA has no buffers: those of a new model are the same
    _fill(model, {**model.state_dict(), **ema})
    step = json.loads((path / reading.STATE).read_text())["step"]
    return model, cfg, step


def _fill(model: SiT, state: dict) -> SiT:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from None
    return model.eval()


def _from_safetensors(path: Path) -> LoadedModel:
    held = reading.read_weights(str(path))
    state = held["ema"]
    config = held.get("config")
    # a file without our metadata: shapes say what the model is
    if config is None:
        return LoadedModel(_fill(*_made(state)), "linear")
    model = _fill(ModelConfig(**config["model"]).build(), state)
    facts = DataFacts.from_json(held["data"]) if "data" in held else None
    return LoadedModel(model, config["diffusion"]["path"], facts)


def _from_published(path: Path, weights: str, num_heads: int | None) -> LoadedModel:
    held = reading.read_published(str(path))
    if weights not in held:
        raise ValueError(f"{path} holds no '{weights}' weights, only {sorted(held)}")
    # the arguments say what shapes do not: heads, classes apart from the null class, SiT or DiT
    args = held.get("args")
    family = str(getattr(args, "model", "")).partition("-")[0]
    made = _made(
        held[weights],
        num_heads or getattr(args, "num_heads", None),
        getattr(args, "num_classes", None),
        family if family in MODEL_FAMILIES else None,
    )
    return LoadedModel(_fill(*made), getattr(args, "path_type", "linear"))


def _made(state: dict[str, torch.Tensor], *given) -> tuple[SiT, dict[str, torch.Tensor]]:
    """A model of the size that the weights' shapes show; ``given``: what is known besides."""
    cls, arguments = models.arguments_from_state_dict(state, *given)
    return cls(**arguments), state
