"""Weights of checkpoints that version 0.1 wrote; no run can resume them.

A folder of a step holds DeepSpeed's files, which are not read, ``ema_rank_00000.pt`` of every rank
and ``sra_fast.json``. What is read of the ``.pt`` files is tensors and containers, nothing else.
"""

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.steps import has_manifest, latest_text, named_by_latest, step_folders
from sra_fast.utils.files import is_there

STATE = "sra_fast.json"


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of version 0.1.

    A folder with a manifest is a checkpoint of this version, even if it also has the old file.
    """
    return is_there(path / STATE) and not has_manifest(path)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a ``checkpoints`` folder that this version has never
    written to, or None.
    """
    steps = step_folders(folder)
    if latest_text(folder) is None or any(has_manifest(path) for path in steps):
        return None
    named = named_by_latest(folder)
    # `latest` was not written atomically: a crash left it empty, and the newest step complete
    for path in steps if named is None else [named, *steps]:
        if is_checkpoint(path):
            return path
    return None


def _state_of(path: Path) -> dict:
    try:
        state = json.loads((path / STATE).read_text())
        if type(state["step"]) is int and type(state["world_size"]) is int:
            return state
        reason = "step and world_size should be whole numbers"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = repr(error)
    raise ValueError(f"{path / STATE} cannot be read: {reason}")


def step_of(path: Path) -> int:
    """How many optimizer steps a checkpoint has taken; ValueError if it does not say it."""
    return _state_of(path)["step"]


def load_ema(path: Path) -> dict[str, Tensor]:
    """The whole EMA of a checkpoint, from the files of every rank.

    Returns:
        ``{name: flat fp32 tensor}``.

    Raises:
        ValueError: a rank's file is missing or broken.
    """
    # name -> [(first element, values), ...]
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in range(_state_of(path)["world_size"]):
        file = path / f"ema_rank_{rank:05d}.pt"
        try:
            for name, piece in torch.load(file, map_location="cpu", weights_only=True).items():
                pieces.setdefault(name, []).append(piece)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or ["empty"])[0]
            raise ValueError(f"{file} is missing or broken: {reason}") from None
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        whole[name] = torch.cat([values for _, values in parts])
    return whole
