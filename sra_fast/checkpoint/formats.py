"""Weights from anywhere, written in any of four formats: the body of export.py."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from sra_fast.checkpoint import diffusers_folder, huggingface
from sra_fast.checkpoint.export import write_loaded
from sra_fast.checkpoint.load_model import LoadedModel, load_model, model_of
from sra_fast.checkpoint.names import in_short
from sra_fast.checkpoint.optimizer_state import match_optimizer, numbered
from sra_fast.checkpoint.published import published_of_checkpoint
from sra_fast.checkpoint.sources import files_of, find_weights, read_weights
from sra_fast.config.averages import EMA, STUDENT
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import write_atomic
from sra_fast.utils.outputs import as_os_error, new_folder, refuse_input

# what the name of the output ends with, and whether it is a folder that can be pushed
SUFFIXES = {"safetensors": ".safetensors", "published": ".pt", "huggingface": "", "diffusers": ""}
FORMATS = tuple(SUFFIXES)
# what a folder of these formats may hold: all of it is uploaded
CONTENTS = {
    "huggingface": {huggingface.CONFIG, huggingface.MODEL_FILE, huggingface.CARD},
    "diffusers": {"model_index.json", "transformer", "scheduler", "vae"},
}
# the end of a folder's name that is no suffix: v1.0, digits.v2, dit-1.5b
VERSION = re.compile(r"\.v?\d\w*")


@dataclass
class Options:
    """What to export, and where to."""

    source: str
    """whatever ``load_model`` takes"""
    out: str
    """the file or folder to write"""
    format: str | None = None
    """one of ``FORMATS``; None: what the name of ``out`` says"""
    num_heads: int | None = None
    """for weights that do not say it"""
    vae: str | None = None
    """folder of the AutoencoderKL that decodes the latents (diffusers)"""
    fold_time: bool = False
    """fit the time's first layer to the features of diffusers (diffusers)"""
    weights: str = "ema"
    """which weights of a run, as in ``sample.weights``; the published code's form has student and EMA"""
    push: str | None = None
    """USER/NAME on the Hugging Face hub that the folder is uploaded to"""


def format_of(options: Options) -> str:
    """The format to write.

    Raises:
        ValueError: the name of the output is that of another format, or an option is of another.
    """
    suffix = Path(options.out).suffix
    by_suffix = {".safetensors": "safetensors", ".pt": "published"}
    found = options.format or by_suffix.get(suffix)
    # anything else that looks like a suffix is a misspelt one, or of a format that is not known
    if found is None and (not suffix or VERSION.fullmatch(suffix)):
        found = "huggingface"
    require_that(
        found is not None,
        "expected out to end with .safetensors or .pt, or a folder (of any name with format "
        f"huggingface), got {options.out}",
    )
    require_that(
        found in FORMATS, f"expected a format of {', '.join(FORMATS)}, got {options.format}"
    )
    is_folder = not SUFFIXES[found]
    fits = suffix not in by_suffix if is_folder else suffix == SUFFIXES[found]
    expected = "a folder" if is_folder else f"a file that ends with {SUFFIXES[found]}"
    require_that(fits, f"format {found} writes {expected}, got out {options.out}")
    for name in ("vae", "fold_time"):
        require_that(
            not getattr(options, name) or found == "diffusers",
            f"{name} goes with format diffusers, got format {found}",
        )
    require_that(
        options.weights == EMA or found != "published",
        f"format published has student and EMA, got weights {options.weights}",
    )
    require_that(
        options.push is None or is_folder,
        f"push uploads a folder, of format huggingface or diffusers, got format {found}",
    )
    return found


def _check_folder(out: Path, allowed: set[str]) -> None:
    """ValueError for a folder that holds something else, a run for example."""
    if not out.is_dir():
        return
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    others = [name for name in found if name not in allowed]
    require_that(
        not others, f"out {out} holds other files: expected a new folder, found {in_short(others)}"
    )


def export(options: Options) -> Path:
    """Write weights in another format, and upload them if that is asked for.

    Returns:
        The file or checkpoint folder that was read.

    Raises:
        ValueError: the weights cannot be read, the format cannot hold them, ``out`` cannot be
            written, or the upload failed.
    """
    chosen = format_of(options)
    if options.push is not None:
        # before the weights are read: this takes no time
        huggingface.check_push(options.push)
    # an export of a run has neither student nor optimizer: its checkpoint has
    source = find_weights(options.source, STUDENT if chosen == "published" else options.weights)
    out = Path(options.out)
    if chosen in CONTENTS:
        _check_folder(out, CONTENTS[chosen])
    replaced = out / huggingface.MODEL_FILE if chosen == "huggingface" else out
    for file in files_of(source):
        refuse_input("out", replaced, {"checkpoint": file})
    try:
        if chosen == "published":
            write_published(source, out, options.num_heads)
        else:
            loaded = load_model(str(source), options.weights, options.num_heads)
            _write(loaded, chosen, options)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"out {options.out} cannot be written: {reason}") from None
    if options.push is not None:
        huggingface.push(out, options.push)
    return source


def _write(loaded: LoadedModel, chosen: str, options: Options) -> None:
    out = Path(options.out)
    if chosen == "safetensors":
        write_loaded(loaded, out)
    elif chosen == "huggingface":
        huggingface.write_folder(loaded, out, options.push)
    else:
        diffusers_folder.write_pipeline(loaded, out, options.vae, options.fold_time)


def write_published(source: Path, out: Path, num_heads: int | None = None) -> None:
    """Write a checkpoint of the published code: student, EMA and the optimizer state.

    Args:
        source: from ``find_weights``.
        out: the ``.pt`` to write.
        num_heads: see ``load_model``.

    Raises:
        ValueError: the source lacks one of them.
    """
    checkpoint = (
        published_of_checkpoint(source) if source.is_dir() else _published_again(source, num_heads)
    )
    with new_folder(out.parent), as_os_error(out):
        write_atomic(out, lambda path: torch.save(checkpoint, path))


def _published_again(source: Path, num_heads: int | None) -> dict:
    """What a file of the published code holds, checked and under the published names."""
    held = read_weights(str(source))
    absent = [key for key in ("model", "ema", "opt") if key not in held]
    require_that(
        not absent,
        f"a published checkpoint holds student, EMA and optimizer state, and {source} has no "
        f"{' and no '.join(absent)}: expected --out FILE.safetensors or a folder",
    )
    # raises for weights that do not fit together
    loaded = model_of(held, source, num_heads=num_heads)
    shapes = {name: p.shape for name, p in loaded.model.named_parameters()}
    states = match_optimizer(held["opt"], shapes)
    require_that(
        bool(states), f"the optimizer of {source} has no state: expected --out FILE.safetensors"
    )
    group = {**held["opt"]["param_groups"][0]}
    group.pop("param_names", None)
    kept = {key: held[key] for key in ("model", "ema", "args", "epoch", "steps") if key in held}
    return {**kept, "opt": numbered(states, group)}
