"""Exports: EMA weights as safetensors under the published parameter names, with the configuration as metadata."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.load_model import load_checkpoint, run_facts
from sra_fast.data.facts import DataFacts
from sra_fast.utils.files import make_folder, write_atomic

SUFFIX = ".safetensors"


def write_export(
    path: Path,
    state: dict[str, Tensor],
    config: dict,
    step: int | None,
    facts: DataFacts | None = None,
) -> None:
    """Write an export. Its folder is made if it is not there.

    Args:
        path: the file to write.
        state: name -> fp32 tensor.
        config: at least ``model`` and ``diffusion`` of a run's configuration; what reads the export
            needs both.
        step: how many optimizer steps made the weights; None: not known.
        facts: about the data that the model was trained on, if they are known.

    Raises:
        ValueError: the folder cannot be made.
    """
    metadata = {"config": json.dumps(config)}
    if step is not None:
        metadata["step"] = str(step)
    if facts is not None:
        metadata["data"] = json.dumps(facts.as_json())
    # safetensors refuses views that are not contiguous
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    file = make_folder(path.parent) / path.name
    write_atomic(file, lambda p: save_file(tensors, p, metadata=metadata))


def find_checkpoint(path: str) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest one of a run folder.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    # only a complete checkpoint has this file
    if (folder / reading.STATE).exists():
        return folder
    newest = reading.latest(folder / "checkpoints")
    if newest is None:
        raise ValueError(
            f"expected a run folder or one of its checkpoints, found neither at {path}"
        )
    return newest


def export_checkpoint(source: str, out: str) -> Path:
    """Write the EMA of a checkpoint as an export, the same as training writes at its end.

    Args:
        source: a run folder (its newest checkpoint) or a checkpoint folder.
        out: the ``.safetensors`` file to write.

    Returns:
        The checkpoint folder that was read.

    Raises:
        ValueError: no checkpoint, a broken one, or ``out`` cannot be written or has another suffix.
    """
    if not out.endswith(SUFFIX):
        raise ValueError(f"expected out to end with {SUFFIX}, got {out}")
    path = find_checkpoint(source)
    # on the CPU and without DeepSpeed: the EMA of every rank is put together
    model, cfg, step = load_checkpoint(path)
    try:
        facts = run_facts(reading.run_folder(path))
        write_export(Path(out), model.state_dict(), asdict(cfg), step, facts)
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror or error}") from None
    return path
