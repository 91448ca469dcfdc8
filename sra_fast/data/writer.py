"""Writing VAE moments, packed or in the reference's layout, by any number of processes that may be killed and restarted.

The images are cut into parts of ``shard_size``.  Process r of n makes parts r, r + n, ...; a part's record is written
when the part is complete, the file that makes the folder a data set when all records are there, by whichever process
sees that first.  Processes share nothing but the folder.
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

from sra_fast.data.latents import INDEX, JOB, LABELS, STORAGE, file_entry, shard_name
from sra_fast.utils.files import write_atomic, write_first, write_json

AHEAD = 2  # batches that are ready before they are needed


def save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as f:  # an open file: numpy would add a suffix to the name
        np.save(f, array)


def sweep(*folders: Path) -> None:
    """Remove what killed processes have left, when nobody writes there any more."""
    for file in (file for folder in folders for file in folder.glob(".*.tmp")):
        file.unlink(missing_ok=True)


@dataclass
class Layout:
    """How parts are written.

    Attributes:
        out: folder of the data set.
        job: what it is made of and with.
        labels: int64 ``[N]``.
    """

    out: Path
    job: dict
    labels: Tensor
    folder = "."

    def complete(self, record: dict) -> bool:
        """Whether what a record tells of is still there."""
        return True


class Packed(Layout):
    """``index.json``, ``labels.npy`` and ``shards/*.npy`` (see ``latents.py``)."""

    folder = "shards"

    def write(self, part: int, first: int, count: int, batches: Iterable[Tensor]) -> dict:
        """Moments ``[B, 2C, H, W]``, ``count`` in all, as one shard; returns its entry in the index.

        Raises:
            ValueError: a value is not finite in the stored dtype.
        """
        dtype, storage = getattr(torch, self.job["dtype"]), np.dtype(STORAGE[self.job["dtype"]])
        header = {
            "descr": storage.str,
            "fortran_order": False,
            "shape": (count, *self.job["shape"]),
        }

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as f:
                np.lib.format.write_array_header_1_0(f, header)
                for batch in batches:
                    batch = batch.to(dtype).contiguous()
                    if not batch.isfinite().all():
                        raise ValueError(
                            f"moments of images {first} .. {first + count - 1} are not finite in {dtype}"
                        )
                    f.write(batch.view(torch.uint8).numpy())

        write_atomic(self.out / shard_name(part), write)
        return file_entry(self.out, shard_name(part))

    def complete(self, record: dict) -> bool:
        path = self.out / record["file"]
        return path.exists() and path.stat().st_size == record["bytes"]

    def finish(self, records: list[dict]) -> None:
        sweep(self.out / "shards", self.out / "parts")
        write_atomic(self.out / LABELS, lambda p: save_npy(p, self.labels.numpy()))
        write_json(
            self.out / INDEX,
            {**self.job, "labels": file_entry(self.out, LABELS), "shards": records},
        )


class Reference(Layout):
    """The reference's: ``vae-sd/00000/img-mean-std-00000000.npy`` (fp32 ``[2C, H, W]``) and ``vae-sd/dataset.json``."""

    folder = "vae-sd"

    @staticmethod
    def name(image: int) -> str:
        return f"{image // 1000:05d}/img-mean-std-{image:08d}.npy"

    def write(self, part: int, first: int, count: int, batches: Iterable[Tensor]) -> dict:
        """Moments ``[B, 2C, H, W]`` as ``count`` files; ValueError: a value is not finite."""
        images = (moments for batch in batches for moments in batch.float().numpy())
        for image, moments in enumerate(images, first):
            if not np.isfinite(moments).all():
                raise ValueError(f"moments of image {image} are not finite")
            path = self.out / self.folder / self.name(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_npy(path, moments)
        os.sync()  # once for all: they count only when the part's record says so, and dataset.json comes last
        return {"first": first, "count": count}

    def finish(self, records: list[dict]) -> None:
        root = self.out / self.folder
        sweep(self.out / "parts")
        labels = [[self.name(i), y] for i, y in enumerate(self.labels.tolist())]
        text = json.dumps({"labels": labels, "vae": self.job["vae"]})
        write_atomic(root / "dataset.json", lambda p: p.write_text(text))


LAYOUTS = {"packed": Packed, "reference": Reference}


@dataclass
class Plan:
    """A checked job.

    Attributes:
        source: a data set: ``__len__``, ``labels``, ``__getitems__`` (thread-safe).
        encode: what makes moments ``[B, 2C, H, W]`` of its batches.
        job: what the moments are made of and with, the same for a restart: written to ``preprocess.json`` at the start.
        out: folder of the data set.
        batch: images per call of ``encode``.
        threads: that read ahead.
        rank, world: this process and their number.
    """

    source: object
    encode: Callable[[Tensor], Tensor]
    job: dict
    out: Path
    batch: int
    threads: int
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.layout = LAYOUTS[self.job["layout"]](self.out, self.job, self.source.labels)
        self.num_parts = -(-len(self.source) // self.job["shard_size"])

    def span(self, part: int) -> range:
        """The images of a part."""
        size = self.job["shard_size"]
        return range(part * size, min((part + 1) * size, len(self.source)))

    def record(self, part: int) -> dict | None:
        """What is known of a complete part."""
        file = self.out / f"parts/{part:05d}.json"
        record = json.loads(file.read_text()) if file.exists() else None
        return record if record and self.layout.complete(record) else None

    def begin(self) -> None:
        """Make the folder, or go on in it; ValueError if it was begun with something else, or holds another's files."""
        (self.out / "parts").mkdir(parents=True, exist_ok=True)
        folder, file = self.out / self.layout.folder, self.out / JOB
        folder.mkdir(exist_ok=True)
        foreign = next(
            folder.iterdir(), None
        )  # looked for first: another process may be at it already
        if not file.exists():
            if foreign:
                raise ValueError(
                    f"{foreign} was not made by this command, it would be lost: choose another out"
                )
            write_first(file, self.job)
        begun = json.loads(file.read_text())
        for key, value in self.job.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{self.out} was begun with {key} {begun.get(key)}, this run has {value}: choose another out"
                )


def read_ahead(read: Callable, items: Iterable, threads: int) -> Iterator:
    """``read(item)`` of every item in order, by ``threads`` threads that stay ``AHEAD`` items ahead."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > threads + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def execute(plan: Plan) -> bool:
    """Make this process's parts; True if it then completed the data set.

    Raises:
        ValueError: an image or a batch of moments is unusable, or the disk is full.
    """
    try:
        plan.begin()
        parts = [
            part
            for part in range(plan.rank, plan.num_parts, plan.world)
            if plan.record(part) is None
        ]
        spans = [plan.span(part) for part in parts]
        chunks = [
            [*span[i : i + plan.batch]] for span in spans for i in range(0, len(span), plan.batch)
        ]
        batches = read_ahead(plan.source.__getitems__, chunks, plan.threads)
        title = f"process 1 of {plan.world}"  # the others have as much to do
        with tqdm(
            total=sum(map(len, spans)),
            desc=title,
            unit="image",
            disable=plan.rank > 0,
            dynamic_ncols=True,
        ) as bar:
            for part, span in zip(parts, spans, strict=True):
                record = plan.layout.write(
                    part, span[0], len(span), _moments(plan, batches, len(span), bar)
                )
                write_json(plan.out / f"parts/{part:05d}.json", record)
        records = [plan.record(part) for part in range(plan.num_parts)]
        if None in records or (plan.rank and not parts):
            return False
        plan.layout.finish(records)
        return True
    except OSError as error:
        raise ValueError(f"cannot write {plan.out}: {error.strerror or error}") from None


def _moments(plan: Plan, batches: Iterator, count: int, bar) -> Iterator[Tensor]:
    """The next ``count`` images as moments."""
    while count:
        images, labels = next(batches)
        yield plan.encode(images)
        count -= len(images)
        bar.update(len(images))
