"""Read checkpoints and exports without a trainer and without DeepSpeed.

``<run>/checkpoints/step_00001000/`` holds DeepSpeed's files, ``ema_rank_00000.pt`` of every rank and ``sra_fast.json``
(step, seed, epoch, processes, scales of an fp8 teacher).  ``training/saving.py`` writes them.
"""

import argparse
import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

STATE = "sra_fast.json"


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parents[1]


def read_state(path: Path, identity: dict) -> dict:
    """``sra_fast.json`` of a checkpoint that a run of this identity can go on from.

    Raises:
        ValueError: no checkpoint there, or one of another model, seed, batch, precision, ZeRO stage or process count.
    """
    try:
        state = json.loads((path / STATE).read_text())
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
