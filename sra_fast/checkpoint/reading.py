"""Read checkpoints and exports without a trainer and without DeepSpeed.

``<run>/checkpoints/step_00001000/`` holds DeepSpeed's files, ``ema_rank_00000.pt`` of every rank and
``sra_fast.json`` (step, epoch, what identifies the run, scales of an fp8 teacher).
``training/saving.py`` writes them.
"""

import argparse
import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

STATE = "sra_fast.json"
# a parameter that every SiT and DiT has
KNOWN_PARAMETER = "x_embedder.proj.weight"


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parents[1]


def read_state(path: Path, identity: dict) -> dict:
    """``sra_fast.json`` of a checkpoint that a run of this identity can resume.

    Args:
        path: checkpoint folder.
        identity: see ``checkpoint/identity.py``.

    Raises:
        ValueError: no checkpoint there, or one of a run with another identity.
    """
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no checkpoint of sra-fast at {path}: {error}") from None
    for key, value in identity.items():
        if state.get(key) != value:
            raise ValueError(
                f"cannot resume {path}: it was made with {key} {state.get(key)}, "
                f"this run has {value}"
            )
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a ``checkpoints`` folder, or None."""
    file = folder / "latest"
    if not file.exists():
        return None
    named = folder / (file.read_text().strip() or "?")
    # DeepSpeed writes `latest` last, but not atomically: a crash at that moment leaves it empty,
    # and the newest step complete
    for path in [named, *sorted(folder.glob("step_*"), reverse=True)]:
        if (path / STATE).exists():
            return path
    return None


def load_ema(path: Path) -> dict[str, Tensor]:
    """The whole EMA of a checkpoint folder, from the files of every rank; not collective.

    Returns:
        ``{name: flat fp32 tensor}``.

    Raises:
        ValueError: a rank's file is missing or broken.
    """
    world = json.loads((path / STATE).read_text())["world_size"]
    # name -> [(first element, values), ...]
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in range(world):
        file = path / f"ema_rank_{rank:05d}.pt"
        try:
            for name, piece in torch.load(file, map_location="cpu", weights_only=True).items():
                pieces.setdefault(name, []).append(piece)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is missing or broken: {error}") from None
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        whole[name] = torch.cat([values for _, values in parts])
    return whole


def read_published(path: str) -> dict:
    """A checkpoint of the published code, or a bare state dict.

    Nothing but tensors, containers and ``argparse.Namespace`` is unpickled.

    Returns:
        ``model, ema, opt, args, epoch, steps`` as far as the file has them; a bare state dict is
        ``{"ema": ...}``.

    Raises:
        ValueError: unreadable, not a checkpoint, or pickled code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from None
    if isinstance(held, dict) and KNOWN_PARAMETER in held:
        held = {"ema": held}
    weights = held.get("ema", held.get("model", {})) if isinstance(held, dict) else {}
    if KNOWN_PARAMETER not in weights:
        raise ValueError(
            f"{path} holds neither a SiT or DiT state dict nor a checkpoint of the published code"
        )
    return held


def read_weights(path: str) -> dict:
    """Weights from an export (``.safetensors``) or a published checkpoint (``.pt``).

    Returns:
        ``{"ema": state dict, ...}``: an export also has its ``config`` and the facts about its
        ``data``, a checkpoint what ``read_published`` returns.

    Raises:
        ValueError: unreadable, or something else.
    """
    if not path.endswith(".safetensors"):
        return read_published(path)
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
        held = {"ema": load_file(path)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    # the configuration and the facts about the data, if the file is an export of a run
    for key in ("config", "data"):
        if key in metadata:
            held[key] = json.loads(metadata[key])
    return held
