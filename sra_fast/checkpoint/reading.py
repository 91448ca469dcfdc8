"""Read a run's checkpoints without a trainer and without DeepSpeed."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from sra_fast.checkpoint.manifest import (
    STEP_FOLDER,
    DamagedCheckpoint,
    Manifest,
    hash_fault,
    read_manifest,
    step_name,
)
from sra_fast.checkpoint.shards import Shards
from sra_fast.checkpoint.steps import candidates, cheap_fault, choose, is_begun
from sra_fast.utils.messages import warn

# the names in a run's folder
CONFIG = "config.yaml"
EXPORT = "ema.safetensors"
PUBLISHED = "published.pt"
# facts about the training data
FACTS = "data.json"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
# of evaluate.py, where --out names it
SCORES = "scores.json"
# of the evaluation at a run's end
PICTURE = "samples.png"


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parents[1]


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder has ever had a checkpoint, whole or not."""
    return is_begun(run / CHECKPOINTS)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole by its manifest and its files' sizes.

    A line says what was passed over.

    Returns:
        Its folder; None: the run has had no checkpoint.

    Raises:
        ValueError: it has some, and none is whole.
    """
    choice = choose(run / CHECKPOINTS)
    if choice is None:
        return None
    for remark in choice.remarks:
        warn("%s", remark)
    return choice.path


def digest_at(run: Path, step: int) -> str | None:
    """``Manifest.digest`` of a step's checkpoint of a run; None if there is none that is readable."""
    try:
        return read_manifest(run / CHECKPOINTS / step_name(step)).digest
    except DamagedCheckpoint:
        return None


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint; ValueError that names the folder if it cannot be read."""
    try:
        return read_manifest(path)
    except DamagedCheckpoint as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None


def read_kinds(path: Path, kinds: Iterable[str]) -> tuple[Manifest, dict[str, dict[str, Tensor]]]:
    """Some of the kinds of tensors that a checkpoint holds, in whole; not collective.

    Returns:
        The manifest, and ``{kind: {parameter: flat fp32 tensor}}``.

    Raises:
        ValueError: a file is not what was saved, or is missing. It names the one before that is
            whole.
    """
    fault = whole_fault(path)
    if fault is not None:
        raise ValueError(f"checkpoint {path} is damaged: {fault}{_instead(path)}")
    manifest = manifest_of(path)
    shards = Shards(path, manifest.files)
    return manifest, {kind: shards.whole(kind) for kind in kinds}


def whole_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; every byte of it is read."""
    fault = cheap_fault(path)
    if fault is not None:
        return fault
    manifest = read_manifest(path)
    return hash_fault(path, manifest, sorted(manifest.files))


def _instead(damaged: Path) -> str:
    """The newest whole checkpoint before a damaged one, for the end of a message; nothing for a copy
    under another name, which none is known to come before.
    """
    if not STEP_FOLDER.fullmatch(damaged.name):
        return ""
    for path in candidates(damaged.parent, damaged).paths[1:]:
        if whole_fault(path) is None:
            return f"; the newest whole one before it is {path}"
    return "; none before it is whole"
