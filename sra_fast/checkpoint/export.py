"""Exports: EMA weights as safetensors under the published parameter names, with the configuration as metadata."""

import json
from pathlib import Path

from torch import Tensor

from sra_fast.checkpoint.load_model import LoadedModel
from sra_fast.config.averages import EMA
from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.facts import DataFacts
from sra_fast.models import arguments_of
from sra_fast.utils.outputs import new_folder, save_tensors


def write_export(
    path: Path,
    state: dict[str, Tensor],
    config: dict,
    step: int | None,
    facts: DataFacts | None = None,
    digest: str | None = None,
    weights: str | None = None,
) -> None:
    """Write an export. Its folder is made if it is not there.

    Args:
        path: the file to write.
        state: name -> fp32 tensor.
        config: at least ``model`` (or ``architecture``) and ``diffusion`` of a run's configuration;
            what reads the export needs both.
        step: how many optimizer steps made the weights; None: not known.
        facts: about the data that the model was trained on, if they are known.
        digest: ``Manifest.digest`` of the checkpoint that holds the same weights, if there is one.
        weights: which weights these are, as in ``LoadedModel``; None: nobody knows.

    Raises:
        ValueError: the folder cannot be made.
        OSError: the file cannot be written.
    """
    metadata = {"config": json.dumps(config)}
    if step is not None:
        metadata["step"] = str(step)
    if digest is not None:
        metadata["checkpoint"] = digest
    if weights not in (None, EMA):
        # an export is an EMA unless it says something else
        metadata["weights"] = json.dumps(weights)
    if facts is not None:
        metadata["data"] = json.dumps(facts.as_json())
    # safetensors refuses views that are not contiguous
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with new_folder(path.parent) as folder:
        save_tensors(folder / path.name, tensors, metadata)


def config_of(loaded: LoadedModel) -> dict:
    """The configuration of an export: the run's, or the architecture where there was no run."""
    if loaded.config is not None:
        return loaded.config
    architecture = {"family": loaded.model.family, "arguments": arguments_of(loaded.model)}
    return {"architecture": architecture, "diffusion": described(loaded.diffusion)}


def described(diffusion: DiffusionConfig) -> dict:
    """What an export of other weights says of the process: what ``load_model`` reads."""
    return {"path": diffusion.path, "time_shift": diffusion.time_shift}


def state_of(loaded: LoadedModel) -> dict[str, Tensor]:
    """The weights that were loaded, without the projection head if they had none."""
    state = loaded.model.state_dict()
    return {name: value for name, value in state.items() if name not in loaded.fresh}


def write_loaded(loaded: LoadedModel, path: Path) -> None:
    """Write loaded weights as an export; errors as ``write_export``'s."""
    write_export(
        path,
        state_of(loaded),
        config_of(loaded),
        loaded.step,
        loaded.facts,
        weights=loaded.weights,
    )
