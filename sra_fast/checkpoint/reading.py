"""Read a run's checkpoints without a trainer and without DeepSpeed."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from sra_fast.checkpoint import version_0_1
from sra_fast.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    hash_fault,
    read_manifest,
    size_fault,
)
from sra_fast.checkpoint.shards import Shards
from sra_fast.checkpoint.steps import choose, is_begun
from sra_fast.checkpoint.values import warn

CONFIG = "config.yaml"
EXPORT = "ema.safetensors"
# facts about the training data
FACTS = "data.json"
CHECKPOINTS = "checkpoints"


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parents[1]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, of this version or of 0.1."""
    return (path / MANIFEST).exists() or version_0_1.is_checkpoint(path)


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder has ever had a checkpoint, whole or not."""
    folder = run / CHECKPOINTS
    return is_begun(folder) or version_0_1.newest(folder) is not None


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole by its manifest and its files' sizes.

    A line says what was passed over.

    Returns:
        Its folder; None: the run has had no checkpoint.

    Raises:
        ValueError: it has some, and none is whole.
    """
    folder = run / CHECKPOINTS
    old = version_0_1.newest(folder)
    if old is not None and not any(folder.glob(f"step_*/{MANIFEST}")):
        return old
    choice = choose(folder)
    if choice is None:
        return None
    for remark in choice.remarks:
        warn("%s", remark)
    return choice.path


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint; ValueError that names the folder if it cannot be read."""
    try:
        return read_manifest(path)
    except DamagedCheckpoint as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None


def step_of(path: Path) -> int:
    """How many optimizer steps a checkpoint has taken; ValueError if it cannot be read."""
    if version_0_1.is_checkpoint(path):
        return version_0_1.step_of(path)
    return manifest_of(path).step


def read_kinds(path: Path, kinds: Iterable[str]) -> tuple[Manifest, dict[str, dict[str, Tensor]]]:
    """Some of the kinds of tensors that a checkpoint holds, in whole; not collective.

    Returns:
        The manifest, and ``{kind: {parameter: flat fp32 tensor}}``.

    Raises:
        ValueError: a file is not what was saved, or is missing.
    """
    manifest = manifest_of(path)
    fault = size_fault(path, manifest) or hash_fault(path, manifest, sorted(manifest.files))
    if fault is not None:
        raise ValueError(f"checkpoint {path} is damaged: {fault}")
    shards = Shards(path, manifest.files)
    return manifest, {kind: shards.whole(kind) for kind in kinds}
