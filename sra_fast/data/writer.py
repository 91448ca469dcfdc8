"""Writing moments or pixels by any number of processes that may be killed and restarted.

The images are cut into parts of ``shard_size``. Process r of n makes the parts r, r + n, ... When a
part is complete, its record is written. When all records are there, the first process to see that
writes the file that makes the folder a data set. Processes share nothing but the folder.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.data.batch import Batch, Report
from sra_fast.data.latents import check_moments
from sra_fast.data.packed import INDEX, LABELS, RECIPE, STORAGE, file_entry, shard_name
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
class Part:
    """One part on its way to the disk.

    Attributes:
        number: of the part.
        first: number of its first image.
        count: its images; fewer are written if some cannot be read.
        batches: what to write, ``[B, C, H, W]`` each, with the numbers of the images.
    """

    number: int
    first: int
    count: int
    batches: Iterable[tuple[Tensor, list[int]]]

    def record(self, written: list[int]) -> dict:
        """Which images it holds; ``written``: their numbers."""
        missing = sorted(set(range(self.first, self.first + self.count)) - set(written))
        return {"first": self.first, "count": self.count, "missing": missing}


class Statistics:
    """Mean and deviation per channel of what is written, in float64.

    Of moments they are those of the latents that would be drawn: the variance of the means and the
    mean of the variances.

    Args:
        channels: of a row: 2C for moments.
        moments: whether rows are means and standard deviations.
    """

    def __init__(self, channels: int, moments: bool):
        self.moments = moments
        self.count = 0
        self.sum = torch.zeros(channels // 2 if moments else channels, dtype=torch.float64)
        self.square = self.sum.clone()

    def update(self, rows: Tensor) -> None:
        """Add rows ``[B, channels, H, W]``."""
        rows = rows.double()
        values = rows
        square = rows.square()
        if self.moments:
            values, std = rows.chunk(2, dim=1)
            square = values.square() + std.square()
        self.count += values[:, 0].numel()
        self.sum += values.sum((0, 2, 3))
        self.square += square.sum((0, 2, 3))

    def as_json(self) -> dict:
        return {"count": self.count, "sum": self.sum.tolist(), "square": self.square.tolist()}

    @staticmethod
    def combine(parts: list[dict]) -> dict | None:
        """``{"mean": [..], "std": [..]}`` over the parts, in their order; None without a value."""
        count = sum(part["count"] for part in parts)
        if not count:
            return None
        mean = np.sum([part["sum"] for part in parts], axis=0) / count
        square = np.sum([part["square"] for part in parts], axis=0) / count
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return {"mean": mean.tolist(), "std": std.tolist()}


@dataclass
class Layout:
    """How parts are written.

    Attributes:
        out: folder of the data set.
        recipe: see ``PackingJob``.
        labels: int64 ``[N]``, of all images of the source.
        folder: where in ``out`` the moments go.
    """

    out: Path
    recipe: dict
    labels: Tensor
    folder = "."

    @property
    def moments(self) -> bool:
        """Whether moments are written, and no pixels."""
        return self.recipe.get("kind", "moments") == "moments"

    def complete(self, record: dict) -> bool:
        """Whether the files that a part's record describes are still there."""
        return True


class PackedLayout(Layout):
    """``index.json``, ``labels.npy`` and ``shards/*.npy`` (see ``packed.py``)."""

    folder = "shards"

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
        statistics = Statistics(row_shape[0], self.moments)
        last = part.first + part.count - 1
        images = f"moments of images {part.first} .. {last}"
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
                    if not stored.isfinite().all():
                        raise ValueError(f"{images} are not finite in {dtype}")
                    if self.moments:
                        check_moments(batch, images)
                    statistics.update(batch)
                    f.write(stored.view(torch.uint8).numpy())
                    written.extend(numbers)
                if len(written) < part.count:
                    # numpy pads a header to 64 bytes, with room for its first number
                    f.seek(0)
                    write_header(f, len(written))

        write_atomic(self.out / shard_name(part.number), write)
        entry = {**file_entry(self.out, shard_name(part.number)), "images": len(written)}
        return {"shard": entry, **part.record(written), "statistics": statistics.as_json()}

    def complete(self, record: dict) -> bool:
        entry = record["shard"]
        path = self.out / entry["file"]
        return path.exists() and path.stat().st_size == entry["bytes"]

    def finish(self, records: list[dict], summary: dict) -> None:
        """Write the labels, then the index, which makes the folder a data set."""
        remove_temporary_files(self.out / "shards", self.out / "parts")
        labels = self.labels[all_numbers(records)].numpy()
        write_atomic(self.out / LABELS, lambda p: save_npy(p, labels))
        index = {
            **self.recipe,
            **summary,
            "num_images": len(labels),
            "labels": file_entry(self.out, LABELS),
            "shards": [record["shard"] for record in records],
        }
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
        write_atomic(
            self.out / self.folder / "dataset.json", lambda p: p.write_text(json.dumps(content))
        )


def all_numbers(records: list[dict]) -> list[int]:
    """The numbers of all images that were written."""
    numbers = []
    for record in records:
        missing = set(record["missing"])
        span = range(record["first"], record["first"] + record["count"])
        numbers += [number for number in span if number not in missing]
    return numbers


LAYOUTS = {"packed": PackedLayout, "published": PublishedLayout}


@dataclass
class Finished:
    """A complete data set.

    Attributes:
        images: how many were written.
        statistics: ``{"mean": [C], "std": [C]}`` per channel: of the latents, before any scale, or
            of the pixels.
        report: what was done to the images.
    """

    images: int
    statistics: dict
    report: Report


@dataclass
class PackingJob:
    """A checked job: which images go where.

    Attributes:
        source: has ``__len__``, ``labels`` and ``read`` (thread-safe): an ``ImageSource``, or a
            ``TrainingData``.
        encode: turns its images into what is stored, ``[B, 2C, H, W]`` or pixels.
        recipe: what is made from what, and how. It is written to ``preprocess.json`` at the start,
            and a restart must have the same.
        out: folder of the data set.
        extra: what the index says besides, and what a restart may have otherwise.
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
    extra: dict = field(default_factory=dict)

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


def run_job(job: PackingJob) -> Finished | None:
    """Make this process's parts.

    Returns:
        What was made of all images, for the process that completed the data set; None for others.

    Raises:
        ValueError: an image or a batch of moments cannot be used, or the folder cannot be written.
    """
    try:
        return _run_job(job)
    except OSError as error:
        raise ValueError(f"cannot write {job.out}: {error.strerror or error}") from None


def _run_job(job: PackingJob) -> Finished | None:
    job.open_folder()
    # a restart makes only what is missing
    own_parts = range(job.rank, job.num_parts, job.world)
    parts = [part for part in own_parts if job.record(part) is None]

    # one stream of batches for all parts: reading ahead does not stop where a part ends
    spans = [job.span(part) for part in parts]
    chunks = [[*span[i : i + job.batch]] for span in spans for i in range(0, len(span), job.batch)]
    batches = read_ahead(job.source.read, chunks, job.threads)

    # process 0 shows its own share: the others have as much to do
    bar = tqdm(
        total=sum(map(len, spans)),
        desc=f"process 1 of {job.world}",
        unit="image",
        disable=job.rank > 0,
        dynamic_ncols=True,
    )
    with bar:
        for number, span in zip(parts, spans, strict=True):
            report = Report()
            rows = _rows(job, batches, len(span), bar, report)
            record = job.layout.write(Part(number, span[0], len(span), rows))
            record["report"] = report.as_json()
            write_json(job.out / f"parts/{number:05d}.json", record)

    records = [job.record(number) for number in range(job.num_parts)]
    # a process that had nothing to do leaves the end to one that had, or to process 0
    if None in records or (job.rank and not parts):
        return None
    report = Report()
    for record in records:
        report.add(Report.from_json(record["report"]))
    images = len(all_numbers(records))
    if not images:
        raise ValueError(f"no image could be read, the first is {report.skipped[0]}")
    statistics = Statistics.combine([record["statistics"] for record in records])
    job.layout.finish(records, {**job.extra, "channels": statistics, "report": report.as_json()})
    return Finished(images, statistics, report)


def _rows(
    job: PackingJob, batches: Iterator[Batch], count: int, bar, report: Report
) -> Iterator[tuple[Tensor, list[int]]]:
    """The next ``count`` images as they are stored, batch by batch, with their numbers; adds to
    ``report``.
    """
    while count:
        batch = next(batches)
        report.add(batch.report)
        if batch.numbers:
            yield job.encode(batch.images), batch.numbers
        count -= batch.asked
        bar.update(batch.asked)
