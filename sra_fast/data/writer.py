"""Writing VAE moments, packed or in the published layout, by any number of processes that may be killed and restarted.

The images are cut into parts of ``shard_size``. Process r of n makes the parts r, r + n, ... When a
part is complete, its record is written. When all records are there, the first process to see that
writes the file that makes the folder a data set. Processes share nothing but the folder.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.data.latents import INDEX, LABELS, RECIPE, STORAGE, file_entry, shard_name
from sra_fast.utils.files import write_atomic, write_first, write_json

# batches read before they are needed, beyond one per thread
AHEAD = 2


def save_npy(path: Path, array: np.ndarray) -> None:
    """``numpy.save`` under exactly this name: given a path, numpy would add a suffix."""
    with open(path, "wb") as f:
        np.save(f, array)


def remove_temporary_files(*folders: Path) -> None:
    """Remove what killed processes have left. Call it only when no process writes there any more."""
    for folder in folders:
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)


@dataclass
class Layout:
    """How parts are written.

    Attributes:
        out: folder of the data set.
        recipe: see ``PackingJob``.
        labels: int64 ``[N]``.
        folder: where in ``out`` the moments go.
    """

    out: Path
    recipe: dict
    labels: Tensor
    folder = "."

    def complete(self, record: dict) -> bool:
        """Whether the files that a part's record describes are still there."""
        return True


class PackedLayout(Layout):
    """``index.json``, ``labels.npy`` and ``shards/*.npy`` (see ``latents.py``)."""

    folder = "shards"

    def write(self, part: int, first: int, count: int, batches: Iterable[Tensor]) -> dict:
        """Write one part as a shard.

        Args:
            part: number of the shard.
            first: number of the part's first image.
            count: images in the part.
            batches: moments ``[B, 2C, H, W]``, ``count`` in all.

        Returns:
            The shard's entry in the index.

        Raises:
            ValueError: a value is not finite in the stored dtype.
        """
        dtype = getattr(torch, self.recipe["dtype"])
        storage = np.dtype(STORAGE[self.recipe["dtype"]])
        shape = (count, *self.recipe["shape"])
        header = {"descr": storage.str, "fortran_order": False, "shape": shape}

        def write(temporary: Path) -> None:
            # batch by batch: a shard is never in memory as a whole
            with open(temporary, "wb") as f:
                np.lib.format.write_array_header_1_0(f, header)
                for batch in batches:
                    stored = batch.to(dtype).contiguous()
                    if not stored.isfinite().all():
                        last = first + count - 1
                        raise ValueError(
                            f"moments of images {first} .. {last} are not finite in {dtype}"
                        )
                    f.write(stored.view(torch.uint8).numpy())

        write_atomic(self.out / shard_name(part), write)
        return file_entry(self.out, shard_name(part))

    def complete(self, record: dict) -> bool:
        path = self.out / record["file"]
        return path.exists() and path.stat().st_size == record["bytes"]

    def finish(self, records: list[dict]) -> None:
        """Write the labels, then the index, which makes the folder a data set."""
        remove_temporary_files(self.out / "shards", self.out / "parts")
        write_atomic(self.out / LABELS, lambda p: save_npy(p, self.labels.numpy()))
        index = {**self.recipe, "labels": file_entry(self.out, LABELS), "shards": records}
        write_json(self.out / INDEX, index)


class PublishedLayout(Layout):
    """The published code's layout.

    ``vae-sd/00000/img-mean-std-00000000.npy``, ... are fp32 ``[2C, H, W]``; ``vae-sd/dataset.json`` has the labels.
    """

    folder = "vae-sd"

    @staticmethod
    def name(image: int) -> str:
        """File name of an image's moments, a folder for every thousand."""
        return f"{image // 1000:05d}/img-mean-std-{image:08d}.npy"

    def write(self, part: int, first: int, count: int, batches: Iterable[Tensor]) -> dict:
        """Write one part as ``count`` files; see ``PackedLayout.write``. ValueError: a value is not finite."""
        images = (moments for batch in batches for moments in batch.float().numpy())
        for image, moments in enumerate(images, first):
            if not np.isfinite(moments).all():
                raise ValueError(f"moments of image {image} are not finite")
            path = self.out / self.folder / self.name(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_npy(path, moments)
        # one sync for all files: they count once the part's record says so, and dataset.json is last
        os.sync()
        return {"first": first, "count": count}

    def finish(self, records: list[dict]) -> None:
        """Write ``dataset.json``, which makes the folder a data set."""
        remove_temporary_files(self.out / "parts")
        labels = [[self.name(i), y] for i, y in enumerate(self.labels.tolist())]
        text = json.dumps({"labels": labels, "vae": self.recipe["vae"]})
        write_atomic(self.out / self.folder / "dataset.json", lambda p: p.write_text(text))


LAYOUTS = {"packed": PackedLayout, "published": PublishedLayout}


@dataclass
class PackingJob:
    """A checked job: which moments go where.

    Attributes:
        source: a data set with ``__len__``, ``labels`` and ``__getitems__`` (thread-safe).
        encode: turns one of its batches into moments ``[B, 2C, H, W]``.
        recipe: what the moments are made from and how. It is written to ``preprocess.json`` at the
            start, and a restart must have the same.
        out: folder of the data set.
        batch: images per call of ``encode``.
        threads: how many threads read ahead.
        rank, world: this process and the number of processes.
    """

    source: object
    encode: Callable[[Tensor], Tensor]
    recipe: dict
    out: Path
    batch: int
    threads: int
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        layout = LAYOUTS[self.recipe["layout"]]
        self.layout = layout(self.out, self.recipe, self.source.labels)
        self.num_parts = -(-len(self.source) // self.recipe["shard_size"])

    def span(self, part: int) -> range:
        """The images of a part."""
        size = self.recipe["shard_size"]
        return range(part * size, min((part + 1) * size, len(self.source)))

    def record(self, part: int) -> dict | None:
        """The record of a complete part; None if the part has to be made."""
        file = self.out / f"parts/{part:05d}.json"
        if not file.exists():
            return None
        record = json.loads(file.read_text())
        return record if self.layout.complete(record) else None

    def open_folder(self) -> None:
        """Make the folder, or resume in it.

        Raises:
            ValueError: the folder was begun with another recipe, or holds files that this command
                did not make.
        """
        (self.out / "parts").mkdir(parents=True, exist_ok=True)
        folder = self.out / self.layout.folder
        folder.mkdir(exist_ok=True)
        file = self.out / RECIPE
        # look for files before the recipe: another process of this job may write both at this moment
        foreign = next(folder.iterdir(), None)
        if not file.exists():
            if foreign:
                raise ValueError(
                    f"{foreign} was not made by this command, it would be lost: choose another out"
                )
            write_first(file, self.recipe)
        # another process or an earlier run may have written it: all must agree
        begun = json.loads(file.read_text())
        for key, value in self.recipe.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{self.out} was begun with {key} {begun.get(key)}, this run has {value}: "
                    "choose another out"
                )


def read_ahead(read: Callable, items: Iterable, threads: int) -> Iterator:
    """``read(item)`` of every item in order. ``threads`` threads stay ``AHEAD`` items ahead."""
    # threads and no processes: decoding and reading release the interpreter lock
    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > threads + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def run_job(job: PackingJob) -> bool:
    """Make this process's parts.

    Returns:
        Whether this process completed the data set.

    Raises:
        ValueError: an image or a batch of moments cannot be used, or the folder cannot be written.
    """
    try:
        return _run_job(job)
    except OSError as error:
        raise ValueError(f"cannot write {job.out}: {error.strerror or error}") from None


def _run_job(job: PackingJob) -> bool:
    job.open_folder()
    # a restart makes only what is missing
    own_parts = range(job.rank, job.num_parts, job.world)
    parts = [part for part in own_parts if job.record(part) is None]

    # one stream of batches for all parts: reading ahead does not stop where a part ends
    spans = [job.span(part) for part in parts]
    chunks = [[*span[i : i + job.batch]] for span in spans for i in range(0, len(span), job.batch)]
    batches = read_ahead(job.source.__getitems__, chunks, job.threads)

    # process 0 shows its own share: the others have as much to do
    bar = tqdm(
        total=sum(map(len, spans)),
        desc=f"process 1 of {job.world}",
        unit="image",
        disable=job.rank > 0,
        dynamic_ncols=True,
    )
    with bar:
        for part, span in zip(parts, spans, strict=True):
            moments = _moments(job, batches, len(span), bar)
            record = job.layout.write(part, span[0], len(span), moments)
            write_json(job.out / f"parts/{part:05d}.json", record)

    records = [job.record(part) for part in range(job.num_parts)]
    # a process that had nothing to do leaves the end to one that had, or to process 0
    if None in records or (job.rank and not parts):
        return False
    job.layout.finish(records)
    return True


def _moments(job: PackingJob, batches: Iterator, count: int, bar) -> Iterator[Tensor]:
    """The next ``count`` images as moments, batch by batch."""
    while count:
        images, _ = next(batches)
        yield job.encode(images)
        count -= len(images)
        bar.update(len(images))
