"""Everything that weights are read from: files and shards of anybody, run folders, model folders.

``read_weights`` takes all of them and is what sampling, ``train.init_from`` and exports start from.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.average_snapshots import FOLDER as SNAPSHOTS
from sra_fast.checkpoint.average_snapshots import is_snapshot, reconstruct, snapshot_folders
from sra_fast.checkpoint.manifest import STEP_FOLDER
from sra_fast.checkpoint.names import in_short, unwrapped
from sra_fast.checkpoint.shards import MASTER, ema_kind
from sra_fast.checkpoint.steps import has_manifest, named_by_latest, step_of
from sra_fast.checkpoint.values import checked, warn_of_foreign_heads
from sra_fast.config.averages import EMA, POWER, STUDENT, check_known, power_width
from sra_fast.config.schema import ModelConfig
from sra_fast.models import ALIGN_HEADS, DiffusionTransformer
from sra_fast.utils.files import require

# of a Hugging Face model folder
LIBRARY = "sra-fast"
MODEL_FILE = "model.safetensors"
INDEX = ".safetensors.index.json"


def read_weights(path: str, weights: str = "ema") -> dict:
    """Weights from anywhere.

    Args:
        path: a run folder (its newest weights), a checkpoint folder, a ``.safetensors`` file, the
            index of a sharded one or the folder that it lies in, a Hugging Face model folder
            written by ``sra-fast export``, or a file of ``torch.save`` (``.pt``, ``.pth``,
            ``.ckpt``, ``.bin``), of which nothing but tensors, containers and
            ``argparse.Namespace`` is unpickled.
        weights: which of a run's weights are read: ``"ema"``, ``"model"`` (the student), the name
            of one of ``train.averages``, or ``"power:SIGMA"``, an average of that relative width
            made from the run's snapshots. Only a run has the last two.

    Returns:
        ``"ema"`` and ``"model"`` (the student): fp32 state dicts under the published names, as far
        as there are both; a single set of weights is ``"ema"`` unless the file names it otherwise.
        Other weights of a run are ``held_key(weights)``. What else is known: ``config`` (at least
        ``model`` and ``diffusion`` of a run's configuration), ``data`` (facts about the data, as
        JSON), ``step``; ``weights``, which weights an export is of if not the EMA; ``opt``,
        ``args``, ``epoch`` and ``steps`` of a published checkpoint; ``foreign_heads``, names of the
        heads of other training methods, which are left out.

    Raises:
        ValueError: it cannot be read, holds something else, or has weights that are no numbers.
    """
    return read_found(path, find_weights(path, weights), weights)[0]


def held_key(weights: str) -> str:
    """Where ``read_weights`` has weights of a name: names of averages may be anything."""
    return weights if weights in (EMA, STUDENT) else ema_kind(weights)


def read_found(path: str, found: Path, weights: str = "ema") -> tuple[dict, Path]:
    """``read_weights`` of what ``find_weights(path, weights)`` has found.

    Returns:
        The weights, and where they were read from: a run that goes on may have removed the
        checkpoint that was found.
    """
    try:
        return _read(found, weights), found
    except ValueError:
        there = found.is_file() or has_manifest(found) or is_snapshot(found)
        if found == Path(path) or there:
            raise
    again = find_weights(path, weights)
    return _read(again, weights), again


def _read(found: Path, weights: str) -> dict:
    width = power_width(weights)
    if width is not None and not found.is_file():
        return _of_snapshots(found, weights, width)
    removed = STEP_FOLDER.fullmatch(found.name) and not found.exists()
    if found.is_dir() or removed:
        return _of_checkpoint(found, weights)
    if found.suffix != ".safetensors" and not found.name.endswith(INDEX):
        return read_published(str(found))
    tensors, known = _of_safetensors(found)
    return {**_with_checked(unwrapped(tensors, str(found)), str(found)), **known}


def find_weights(path: str, weights: str = "ema") -> Path:
    """The file or checkpoint folder that ``path`` means.

    Args:
        path: see ``read_weights``.
        weights: see ``read_weights``. Other than ``"ema"``: a run's export, which has the EMA only,
            is passed over if there is a checkpoint.

    Returns:
        For ``power:SIGMA`` the folder of the newest snapshot, of a checkpoint's step or before if
        ``path`` is a checkpoint; an export, which may be of these weights.

    Raises:
        ValueError: nothing is there, or a folder of another kind, or ``weights`` is no name.
    """
    found = Path(path)
    width = power_width(weights)
    if not found.exists():
        raise ValueError(f"no checkpoint at {path}")
    if width is not None:
        return _newest_snapshot(found, weights)
    if not found.is_dir():
        return found
    if is_snapshot(found):
        raise ValueError(f"{found} is a snapshot of averages: expected weights power:SIGMA of it")
    if has_manifest(found):
        return found
    export = found / reading.EXPORT
    newest = reading.newest(found)
    # an export is as good as the checkpoint of its step, and quicker to read; a run that was
    # continued has newer checkpoints
    exported = weights == EMA and export.exists()
    if newest is not None and not (exported and _is_current(export, newest)):
        return newest
    if export.exists():
        return export
    return _in_model_folder(found)


def _holds_model(folder: Path) -> bool:
    """Whether a folder is one of a model, and no run's."""
    files = [folder / MODEL_FILE, *folder.glob(f"*{INDEX}")]
    return any(file.exists() for file in files)


def _newest_snapshot(found: Path, weights: str) -> Path:
    """The newest snapshot of averages that a path means: a run's, or that of a step or before."""
    if found.is_file() or is_snapshot(found):
        return found
    if _holds_model(found):
        return _in_model_folder(found)
    checkpoint = found.is_dir() and has_manifest(found)
    run = _run_folder(found) if checkpoint else found
    snapshots = snapshot_folders(run)
    before = ""
    if checkpoint:
        last = reading.manifest_of(found).step
        before = f" up to step {last}"
        snapshots = [path for path in snapshots if step_of(path) <= last]
    if not snapshots:
        raise ValueError(
            f"{found} has no weights {weights}: expected a run folder whose folder {SNAPSHOTS} has "
            f"snapshots of averages{before} (train.average_snapshots writes them), found none"
        )
    return snapshots[0]


def _is_current(export: Path, newest: Path) -> bool:
    """Whether the export of a run has the weights of its newest checkpoint.

    Not by the step: after a rollback there may be an export of the same step, or of a later one,
    that was given up.
    """
    _, digest = export_origin(export)
    # of the newest as well where its tensors are damaged: the export still has them
    named = named_by_latest(newest.parent)
    steps = {step_of(path) for path in (newest, named) if path is not None}
    run = reading.run_folder(newest)
    return digest is not None and digest in {reading.digest_at(run, step) for step in steps}


def export_origin(export: Path) -> tuple[int | None, str | None]:
    """Step and ``Manifest.digest`` of the checkpoint that an export is of, as far as it says so."""
    if not export.exists():
        return None, None
    metadata = read_metadata(export)
    step = _ours({"step": _parsed(metadata.get("step", ""))}).get("step")
    return step, metadata.get("checkpoint")


def _in_model_folder(folder: Path) -> Path:
    """The weights of a Hugging Face model folder."""
    if transformer_folder(folder) is not None:
        raise ValueError(
            f"{folder} is a folder of diffusers: "
            f"import-weights --from {folder} --out FILE.safetensors converts a DiT or an SD3"
        )
    # first the single file: shards beside it would be a second copy
    files = [folder / MODEL_FILE] if (folder / MODEL_FILE).exists() else []
    files = files or sorted(folder.glob(f"*{INDEX}"))
    if len(files) != 1:
        run = _likely_run(folder)
        found = f"{len(files)} indices of shards" if files else "none of them"
        found = f"{found}; give the run folder {run}" if run is not None else found
        raise ValueError(
            f"{folder} holds neither an export nor a checkpoint: expected {reading.EXPORT}, "
            f"checkpoints/, {MODEL_FILE} or one *{INDEX}, found {found}"
        )
    return files[0]


def _likely_run(folder: Path) -> Path | None:
    """The run folder that is meant where ``folder`` holds runs, the newest with weights, or lies in
    a run.
    """
    numbered = [path for path in folder.iterdir() if path.name.isdecimal()]
    runs = sorted(numbered, key=lambda path: int(path.name), reverse=True)
    for path in (*runs, folder.absolute().parent):
        has_weights = (path / reading.EXPORT).exists() or reading.has_checkpoint(path)
        if has_weights and (path / reading.CONFIG).exists():
            return path
    return None


def transformer_folder(folder: Path) -> Path | None:
    """The folder of the transformer in a pipeline's folder of diffusers, or ``folder`` itself if it
    is a transformer's; None: neither.
    """
    for place in (folder / "transformer", folder):
        try:
            held = json.loads((place / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(held, dict) and "_class_name" in held:
            return place
    return None


def _run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint or a snapshot lies in, also if a link from elsewhere names
    it.
    """
    place = checkpoint.absolute()
    if place.parent.name not in (reading.CHECKPOINTS, SNAPSHOTS):
        place = place.resolve()
    # not reading.run_folder: a copy may lie at the top of a disk
    return place.parent.parent


def run_of(path: Path) -> Path | None:
    """The run folder that weights lie in; None if they lie elsewhere.

    Args:
        path: from ``find_weights``.
    """
    folder = _run_folder(path) if path.is_dir() else path.absolute().parent
    return folder if (folder / reading.CONFIG).exists() else None


def _of_checkpoint(path: Path, weights: str) -> dict:
    """A training checkpoint: its EMA, its student or an average, and the run's configuration."""
    manifest = reading.manifest_of(path)
    averages = {name: ema_kind(name) for name in manifest.emas if name != manifest.sampled}
    kinds = {EMA: ema_kind(manifest.sampled), STUDENT: MASTER, **averages}
    check_known(str(path), weights, [*kinds, *_power_names(path)])
    kind = kinds[weights]
    _, held = reading.read_kinds(path, [kind])
    # config.yaml is what the run began with: these are the settings of this step
    settings = manifest.settings
    state = state_dict_of(model_of_settings(settings, path), held[kind], path)
    found = {
        held_key(weights): checked(state, str(path)),
        "config": settings,
        "step": manifest.step,
    }
    if manifest.data is not None:
        found["data"] = manifest.data
    return found


def _power_names(checkpoint: Path) -> list[str]:
    """What an error lists of the averages that could be made from snapshots."""
    run = _run_folder(checkpoint)
    return [f"{POWER}SIGMA"] if snapshot_folders(run) else []


def _of_snapshots(path: Path, weights: str, width: float) -> dict:
    """The average of a width that is made from a snapshot and the run's earlier ones."""
    run = _run_folder(path)
    snapshot, flat = reconstruct(run, width, step_of(path))
    state = state_dict_of(model_of_settings(snapshot.settings, path), flat, path)
    found = {
        held_key(weights): checked(state, str(path)),
        "config": snapshot.settings,
        "step": snapshot.step,
    }
    if snapshot.data is not None:
        found["data"] = snapshot.data
    return found


def model_of_settings(settings: Mapping, path: Path) -> DiffusionTransformer:
    """The model of a run's settings, without memory for its weights; ValueError, which names the
    checkpoint, if this version does not know it.
    """
    try:
        with torch.device("meta"):
            return ModelConfig(**settings["model"]).build()
    except (TypeError, LookupError) as error:
        raise ValueError(f"the settings of {path} are those of another version: {error}") from None


def state_dict_of(
    model: DiffusionTransformer, flat: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """A state dict under the published names, with the position embedding, from the flat tensors of
    a checkpoint; ValueError if they do not fit the model.

    Heads that only an alignment target has are left out: they are no part of the model.
    """
    flat = {name: value for name, value in flat.items() if not name.startswith(ALIGN_HEADS)}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = sorted(
        name
        for name in set(shapes) | set(flat)
        if name not in flat or name not in shapes or flat[name].numel() != shapes[name].numel()
    )
    if wrong:
        raise ValueError(f"the weights of {path} do not fit the run's configuration: {wrong[0]}")
    state = {name: flat[name].view(shape) for name, shape in shapes.items()}
    # checkpoints have no buffers: the position embedding is computed
    return {name: state.get(name, model.make_pos_embed()) for name in model.state_dict()}


def read_published(path: str) -> dict:
    """A file of ``torch.save``: a checkpoint of the published code, or anybody's state dict.

    Returns:
        See ``read_weights``.

    Raises:
        ValueError: unreadable, not a checkpoint, or pickled code.
    """
    held = _load_pickle(path)
    held = _with_checked(unwrapped(held, path), path)
    # the name is ours: other projects may have a path there
    return {**held, **_ours({"data": getattr(held.get("args"), "data", None)})}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or an index of shards under the names that they have there."""
    if path.suffix == ".safetensors" or path.name.endswith(INDEX):
        return _of_safetensors(path)[0]
    held = _load_pickle(str(path))
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _load_pickle(path: str):
    """A file of ``torch.save``. Nothing but tensors, containers and ``argparse.Namespace`` is
    unpickled; ValueError for anything else.
    """
    if path.endswith(".json"):
        raise ValueError(f"{path} holds no weights: expected the folder that it lies in")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch, pickle, zip and the file system each raise their own types
        raise ValueError(
            f"{path} is no checkpoint that can be read safely: {_reason(error)}"
        ) from None


def _with_checked(held: dict, source: str) -> dict:
    roles = [key for key in ("ema", "model") if key in held]
    foreign = warn_of_foreign_heads([held[key] for key in roles], source)
    if foreign:
        held["foreign_heads"] = foreign
    for key in roles:
        held[key] = checked(held[key], source)
    return held


def _reason(error: Exception) -> str:
    """One line about a file that ``torch.load`` refuses."""
    refused = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if refused:
        return (
            f"it holds a pickled {refused[1]}, and only tensors, containers and "
            "argparse.Namespace are read; save its state dict by itself"
        )
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if "can't allocate memory" in str(error):
        return "there is not enough memory for it"
    # torch's own words are about its reader, or advise to run whatever the file holds
    return "it is damaged, or was not written by torch.save"


def _of_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a ``.safetensors`` file or of the shards of an index, and what is known of them."""
    if path.name.endswith(INDEX):
        tensors = _load_shards(path)
        known = {}
    else:
        tensors, metadata = _load_file(path)
        known = _ours({key: _parsed(value) for key, value in metadata.items()})
    if path.name != MODEL_FILE and not path.name.endswith(INDEX):
        return tensors, known
    # other tools drop the metadata of a model folder's weights, and keep its config.json
    return tensors, {**_of_config_json(path.parent / "config.json"), **known}


def _parsed(text: str):
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _ours(told: dict) -> dict:
    """``config``, ``data``, ``step`` and ``weights`` of what is told of weights, as far as they are of
    our form: other projects write other things under these names, which say nothing here.
    """
    known = {}
    config = told.get("config")
    if isinstance(config, dict) and isinstance(config.get("diffusion"), dict):
        models = [config.get(key) for key in ("model", "architecture")]
        if "path" in config["diffusion"] and any(isinstance(held, dict) for held in models):
            known["config"] = config
    data = told.get("data")
    if isinstance(data, dict) and {"name", "shape", "num_classes"} <= set(data):
        known["data"] = data
    if isinstance(told.get("step"), int):
        known["step"] = told["step"]
    if isinstance(told.get("weights"), str) and "config" in known:
        known["weights"] = told["weights"]
    return known


def _load_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a ``.safetensors`` file."""
    require("safetensors", "safetensors", "train")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path), read_metadata(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file; ValueError if it cannot be read."""
    require("safetensors", "safetensors", "train")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}") from None
    tensors = {}
    for name in files:
        # an index names files of its own folder
        held, _ = _load_file(index.parent / Path(name).name)
        tensors |= {key: value for key, value in held.items() if places.get(key) == name}
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"the files of {index} lack {in_short(missing)}")
    return tensors


def files_of(path: Path) -> list[Path]:
    """The files that weights are read from: ``path``, and the shards if it is an index of some."""
    if not path.name.endswith(INDEX):
        return [path]
    try:
        names = {*json.loads(path.read_text())["weight_map"].values()}
        return [path, *(path.parent / Path(name).name for name in sorted(names))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # whoever reads the tensors says what is wrong
        return [path]


def _of_config_json(file: Path) -> dict:
    """What the ``config.json`` of a model folder says, if ``sra-fast export`` has written it."""
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict) or held.get("library_name") != LIBRARY:
        return {}
    return _ours(held)
