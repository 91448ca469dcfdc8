"""How rows lie on the disk: packed in shards, or a file per image as the published code has them."""

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.latents import check_moments
from sra_fast.data.packed import INDEX, LABELS, STORAGE, file_entry, shard_name
from sra_fast.data.statistics import Statistics
from sra_fast.utils.files import sha256, write_atomic, write_json
from sra_fast.utils.outputs import save_npy


def remove_temporary_files(*folders: Path) -> None:
    """Remove what killed processes have left. Call it only when no process writes there any more."""
    for folder in folders:
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)


@dataclass
class Part:
    """One part on its way to the disk.

    Attributes:
        number: of the part.
        first: number of its first image.
        count: its images; fewer are written if some cannot be read.
        batches: what to write, ``[B, C, H, W]`` each (features: ``[B, T, D]``, text: ``[B, R]``),
            with the numbers of the images (text: of the captions).
    """

    number: int
    first: int
    count: int
    batches: Iterable[tuple[Tensor, list[int]]]

    def record(self, written: list[int]) -> dict:
        """Which images it holds; ``written``: their numbers."""
        missing = sorted(set(range(self.first, self.first + self.count)) - set(written))
        return {"first": self.first, "count": self.count, "missing": missing}


@dataclass
class Layout:
    """How parts are written.

    Attributes:
        out: folder of the data set.
        recipe: see ``PackingJob``.
        labels: int64 ``[N]``, of all images of the source.
        folder: where in ``out`` the rows go.
        last: the file in ``out`` that makes it a data set, which is written last.
    """

    out: Path
    recipe: dict
    labels: Tensor
    folder = "."
    last = ""

    @property
    def kind(self) -> str:
        """``moments``, ``pixels``, ``features`` or ``text``."""
        return self.recipe.get("kind", "moments")

    @property
    def moments(self) -> bool:
        """Whether moments are written."""
        return self.kind == "moments"

    def complete(self, record: dict) -> bool:
        """Whether the files that a part's record describes are still there."""
        return True

    def intact(self, record: dict) -> bool:
        """Whether these files are still what was written, as far as that is known."""
        return True


class PackedLayout(Layout):
    """``index.json``, ``labels.npy`` and ``shards/*.npy`` (see ``packed.py``)."""

    folder = "shards"
    last = INDEX

    def write(self, part: Part) -> dict:
        """Write a part as a shard.

        Returns:
            The part's record: the shard's entry in the index, which images it holds, and statistics.

        Raises:
            ValueError: a value is not finite in the stored dtype, or a standard deviation negative.
        """
        dtype = getattr(torch, self.recipe["dtype"])
        storage = np.dtype(STORAGE[self.recipe["dtype"]])
        row_shape = tuple(self.recipe["shape"])
        statistics = Statistics(self._num_channels(), self.moments)
        last = part.first + part.count - 1
        of = "captions" if self.kind == "text" else "images"
        images = f"{self.kind} of {of} {part.first} .. {last}"
        written: list[int] = []

        def write_header(f, rows: int) -> None:
            header = {"descr": storage.str, "fortran_order": False, "shape": (rows, *row_shape)}
            np.lib.format.write_array_header_1_0(f, header)

        def write(temporary: Path) -> None:
            # batch by batch: a shard is never in memory as a whole
            with open(temporary, "wb") as f:
                write_header(f, part.count)
                for batch, numbers in part.batches:
                    stored = batch.to(dtype).contiguous()
                    # a NaN is both; isfinite of every number takes 30 times as long (CPU)
                    if not torch.stack(stored.aminmax()).isfinite().all():
                        raise ValueError(f"{images} are not finite in {dtype}")
                    if self.moments:
                        check_moments(batch, images)
                    statistics.update(self._channels_first(batch))
                    f.write(stored.view(torch.uint8).numpy())
                    written.extend(numbers)
                if len(written) < part.count:
                    # numpy pads a header to 64 bytes, with room for its first number
                    f.seek(0)
                    write_header(f, len(written))

        write_atomic(self.out / shard_name(part.number), write)
        entry = {**file_entry(self.out, shard_name(part.number)), "images": len(written)}
        return {"shard": entry, **part.record(written), "statistics": statistics.as_json()}

    def _num_channels(self) -> int:
        if self.kind == "text":
            return self.recipe["width"]
        # features [T, D] have their channels last
        return self.recipe["shape"][1 if self.kind == "features" else 0]

    def _channels_first(self, rows: Tensor) -> Tensor:
        """Rows ``[B, channels, ...]`` of a batch; of text its tokens."""
        if self.kind == "text":
            tokens, width = self.recipe["tokens"], self.recipe["width"]
            rows = rows[:, : tokens * width].unflatten(1, (tokens, width))
        return rows.movedim(2, 1) if self.kind in ("features", "text") else rows

    def complete(self, record: dict) -> bool:
        entry = record["shard"]
        path = self.out / entry["file"]
        return path.exists() and path.stat().st_size == entry["bytes"]

    def intact(self, record: dict) -> bool:
        entry = record["shard"]
        return sha256(self.out / entry["file"]) == entry["sha256"]

    def finish(self, records: list[dict], summary: dict) -> None:
        """Write the labels, then the index, which makes the folder a data set."""
        remove_temporary_files(self.out / "shards", self.out / "parts")
        labels = self.labels[all_numbers(records)].numpy()
        if self.kind == "text":
            # numbers of images, which move up where one was left out
            labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
        write_atomic(self.out / LABELS, lambda p: save_npy(p, labels))
        index = {
            **self.recipe,
            **summary,
            "num_images": len(labels),
            "labels": file_entry(self.out, LABELS),
            "shards": [record["shard"] for record in records],
        }
        # numbers in the source: of what else is made of these images, the same must be missing
        if missing := [number for record in records for number in record["missing"]]:
            index["missing"] = missing
        write_json(self.out / INDEX, index)


class PublishedLayout(Layout):
    """The published code's layout.

    ``vae-sd/00000/img-mean-std-00000000.npy``, ... are fp32 ``[2C, H, W]``; ``vae-sd/dataset.json`` has the labels.
    """

    folder = "vae-sd"
    last = "vae-sd/dataset.json"

    @staticmethod
    def name(image: int) -> str:
        """File name of an image's moments, a folder for every thousand."""
        return f"{image // 1000:05d}/img-mean-std-{image:08d}.npy"

    def write(self, part: Part) -> dict:
        """Write a part as a file per image; see ``PackedLayout.write``."""
        statistics = Statistics(self.recipe["shape"][0], self.moments)
        written = []
        for batch, numbers in part.batches:
            statistics.update(batch)
            for image, moments in zip(numbers, batch.float(), strict=True):
                if not moments.isfinite().all():
                    raise ValueError(f"moments of image {image} are not finite")
                check_moments(moments, f"moments of image {image}")
                path = self.out / self.folder / self.name(image)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_npy(path, moments.numpy())
                written.append(image)
        # one sync for all files: they count once the part's record says so, and dataset.json is last
        os.sync()
        return {**part.record(written), "statistics": statistics.as_json()}

    def finish(self, records: list[dict], summary: dict) -> None:
        """Write ``dataset.json``, which makes the folder a data set."""
        remove_temporary_files(self.out / "parts")
        numbers = all_numbers(records)
        labels = self.labels[numbers].tolist()
        content = {
            "labels": [[self.name(i), y] for i, y in zip(numbers, labels, strict=True)],
            "vae": self.recipe["vae"],
            **summary,
        }
        write_atomic(self.out / self.last, lambda p: p.write_text(json.dumps(content)))

    def intact(self, record: dict) -> bool:
        # this layout has no checksums: only a file that is missing or cut short can be noticed
        with io.BytesIO() as file:
            np.save(file, np.zeros(self.recipe["shape"], np.float32))
            size = file.tell()
        paths = [self.out / self.folder / self.name(image) for image in all_numbers([record])]
        return all(path.exists() and path.stat().st_size == size for path in paths)


def all_numbers(records: list[dict]) -> list[int]:
    """The numbers of all images that were written."""
    numbers = []
    for record in records:
        missing = set(record["missing"])
        span = range(record["first"], record["first"] + record["count"])
        numbers += [number for number in span if number not in missing]
    return numbers


LAYOUTS = {"packed": PackedLayout, "published": PublishedLayout}
