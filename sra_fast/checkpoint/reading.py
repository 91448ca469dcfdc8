"""Read a run's checkpoints without a trainer and without DeepSpeed.

``<run>/checkpoints/step_00001000/`` holds DeepSpeed's files, ``ema_rank_00000.pt`` of every rank and
``sra_fast.json`` (step, epoch, what identifies the run, scales of an fp8 teacher).
``training/saving.py`` writes them.
"""

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

STATE = "sra_fast.json"
CONFIG = "config.yaml"
EXPORT = "ema.safetensors"
# facts about the training data
FACTS = "data.json"


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


def step_of(path: Path) -> int:
    """How many optimizer steps a checkpoint folder has taken."""
    return json.loads((path / STATE).read_text())["step"]
