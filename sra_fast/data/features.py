"""Features of a vision model, stored beside a packed data set: one row per image, in its order.

They are shards like the data set's own (see ``packed.py``), in ``<path>/features/NAME``: rows are
``[T, D]`` in a floating dtype, the labels are the data set's. The index says which data set they
belong to.
"""

from pathlib import Path

import torch
from torch import Tensor

from sra_fast.data.packed import INDEX, RECIPE, Shards
from sra_fast.utils.checks import require_that

# folder of all features of a data set
FEATURES_FOLDER = "features"


def check_name(name: str, option: str) -> None:
    """ValueError unless features can have this name, which is that of a folder."""
    require_that(
        bool(name) and Path(name).name == name and not name.startswith("."),
        f"{option} must be the name of a folder, got {name!r}",
    )


class StoredFeatures:
    """The features of one model for every image of a packed data set. Pickles like ``Shards``.

    Args:
        path: folder of the data set.
        name: of the features: they are in ``<path>/features/<name>``.
        data: fingerprint of the data set.
        verify: see ``Shards``.

    Attributes:
        name: as given.
        tokens, width: T and D of a row ``[T, D]``.
        dtype: of what is stored.
        fingerprint: SHA-256 of the hashes of labels and shards.
        facts: what a resumed run must have the same of: ``name``, ``fingerprint``, and ``model``,
            the identity of the model.

    Raises:
        ValueError: they are not there, not finished, cut short, or of another data set. ``read``
            raises it for a shard that was altered.
    """

    def __init__(self, path: Path, name: str, data: str, verify: bool = False):
        check_name(name, "data.features")
        self.root = Path(path) / FEATURES_FOLDER / name
        begun = (self.root / INDEX).exists() or (self.root / RECIPE).exists()
        require_that(
            begun,
            f"data.features {name}: {path} has none of this name, but {_names(path)} "
            "(preprocess.py --features makes them)",
        )
        self.shards = Shards(self.root, "features", verify)
        require_that(
            self.shards.index.get("data_sha256") == data,
            f"{self.root} holds features of other images than {path}: make them again",
        )
        self.name = name
        self.tokens, self.width = self.shards.row_shape
        self.dtype: torch.dtype = self.shards.dtype
        self.fingerprint = self.shards.fingerprint
        self.facts = {
            "name": name,
            "fingerprint": self.fingerprint,
            "model": self.shards.index["model"],
        }

    def read(self, indices: list[int]) -> Tensor:
        """``[B, T, D]`` in the stored dtype, in the order of ``indices``."""
        return self.shards.read(indices)


def _names(path: Path) -> str:
    """The names of the features that a data set has."""
    folder = Path(path) / FEATURES_FOLDER
    names = sorted(index.parent.name for index in folder.glob(f"*/{INDEX}"))
    return ", ".join(names) or "no features at all"
