"""Writing moments, pixels, features or text by any number of processes that may be killed and restarted.

The images are cut into parts of ``shard_size``. Process r of n makes the parts r, r + n, ... When a
part is complete, its record is written. When all records are there, the first process to see that
writes the file that makes the folder a data set. Processes share nothing but the folder. A run into
a finished folder compares what is there with what was written, and makes what was altered again.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sra_fast.data.batch import Batch, Report
from sra_fast.data.layouts import LAYOUTS, Part, all_numbers
from sra_fast.data.ownership import PARTS, Ownership
from sra_fast.data.sources import ImageSource
from sra_fast.data.statistics import Statistics
from sra_fast.utils.files import write_json

log = logging.getLogger("sra_fast")

# images of a part whose files are looked at again: other files may have come under the same names
LOOKED_AT = 8
# batches read before they are needed, beyond one per thread
AHEAD = 2


@dataclass
class Finished:
    """A complete data set.

    Attributes:
        images: how many were written.
        statistics: ``{"mean": [C], "std": [C]}`` per channel: of the latents, before any scale, of
            the pixels, or of the features.
        report: what was done to the images.
    """

    images: int
    statistics: dict
    report: Report


@dataclass
class PackingJob:
    """A checked job: which images go where.

    Attributes:
        source: has ``__len__``, ``labels`` and ``read`` (thread-safe): an ``ImageSource``, a
            ``TrainingData``, or the captions of one.
        encode: turns its images into what is stored, ``[B, 2C, H, W]``, pixels or features.
        recipe: what is made from what, and how. It is written to ``preprocess.json`` at the start,
            and a restart must have the same once a part is finished.
        out: folder of the data set.
        extra: what the index says besides, and what a restart may have otherwise.
        batch: images per call of ``encode``.
        threads: how many threads read ahead.
        rank, world: this process and the number of processes.
        at_end: from the numbers of the images that were written to what the index says besides and
            only the end can tell. A ValueError of it leaves the data set unfinished.
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
    at_end: Callable[[list[int]], dict] = lambda numbers: {}
    # whether the images were compared with those of the finished parts: the folder is opened twice
    compared: bool = field(default=False, init=False)

    def __post_init__(self):
        layout = LAYOUTS[self.recipe["layout"]]
        self.layout = layout(self.out, self.recipe, self.source.labels)
        self.ownership = Ownership(self.out, self.recipe, self.rank)
        self.num_parts = -(-len(self.source) // self.recipe["shard_size"])

    def span(self, part: int) -> range:
        """The images of a part."""
        size = self.recipe["shard_size"]
        return range(part * size, min((part + 1) * size, len(self.source)))

    def place(self, part: int) -> Path:
        """The file of a part's record."""
        return self.out / PARTS / f"{part:05d}.json"

    def record(self, part: int) -> dict | None:
        """The record of a complete part; None if the part has to be made."""
        file = self.place(part)
        if not file.exists():
            return None
        record = json.loads(file.read_text())
        return record if self.layout.complete(record) else None

    def open_folder(self) -> None:
        """Make the folder, or resume in it.

        Raises:
            ValueError: see ``Ownership.claim``; or the images have changed since.
        """
        self.ownership.claim()
        if not self.compared:
            own_parts = range(self.rank, self.num_parts, self.world)
            refuse_changed(self.source, self.out, filter(None, map(self.record, own_parts)))
            self.compared = True

    def unfinished(self) -> list[int]:
        """The parts that this process has to make; of a finished data set also those that are no
        longer what was written.
        """
        own_parts = range(self.rank, self.num_parts, self.world)
        records = {part: self.record(part) for part in own_parts}
        missing = [part for part in own_parts if records[part] is None]
        if not (self.out / self.layout.last).exists():
            # what was interrupted is resumed at once
            return missing
        there = [part for part in own_parts if records[part] is not None]
        with ThreadPoolExecutor(self.threads) as pool:
            intact = tqdm(
                pool.map(self.layout.intact, (records[part] for part in there)),
                total=len(there),
                desc="compared with the index",
                unit="part",
                disable=self.rank > 0,
                # a line for what takes long
                delay=1,
            )
            altered = [part for part, same in zip(there, intact, strict=True) if not same]
        for part in altered:
            log.warning("part %d of %s was altered and is made again", part, self.out)
        return sorted([*missing, *altered])


def _marks(source: object, record: dict) -> list[tuple[int, int]]:
    """``(number, checksum)`` of some images of a part, if the source has them in files."""
    written = all_numbers([record])
    chosen = written[:: -(-len(written) // LOOKED_AT)] if written else []
    marks = source.marks(chosen) if isinstance(source, ImageSource) else None
    return [] if marks is None else [*zip(chosen, marks, strict=True)]


def refuse_changed(source: object, folder: Path, records: Iterable[dict]) -> None:
    """ValueError if finished parts of a data set were made of other files than there are now.

    Args:
        source: of the images.
        folder: of the data set, for the message.
        records: of finished parts. Those of earlier versions say nothing of the files.
    """
    if not isinstance(source, ImageSource):
        return
    for record in records:
        held = dict(record.get("marks", []))
        now = source.marks([*held])
        for number, mark in zip(held, now or held.values(), strict=True):
            if mark != held[number]:
                name = f"{source.place}/{source.names[number // source.copies]}"
                raise ValueError(
                    f"{name} has changed since {folder} was made of it: choose another out"
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


def run_jobs(jobs: list[PackingJob]) -> Iterator[tuple[PackingJob, Finished | None]]:
    """Run jobs that belong together, one after the other; see ``run_job``.

    All folders are opened first: if one is refused, nothing has been written to the others.
    """
    try:
        # a folder in another one comes after it
        for job in sorted(jobs, key=lambda job: len(job.out.parts)):
            try:
                job.open_folder()
            except OSError as error:
                raise ValueError(f"cannot write {job.out}: {error.strerror or error}") from None
        for job in jobs:
            yield job, run_job(job)
    finally:
        for job in jobs:
            job.ownership.release()


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
    finally:
        job.ownership.release()


def _run_job(job: PackingJob) -> Finished | None:
    job.open_folder()
    # a restart makes only what is missing
    parts = job.unfinished()

    # one stream of batches for all parts: reading ahead does not stop where a part ends
    spans = [job.span(part) for part in parts]
    chunks = [[*span[i : i + job.batch]] for span in spans for i in range(0, len(span), job.batch)]
    batches = read_ahead(job.source.read, chunks, job.threads)

    # process 0 shows its own share: the others have as much to do
    bar = tqdm(
        total=sum(map(len, spans)),
        desc=f"process 1 of {job.world}",
        unit="caption" if job.layout.kind == "text" else "image",
        disable=job.rank > 0,
        dynamic_ncols=True,
    )
    with bar:
        for number, span in zip(parts, spans, strict=True):
            report = Report()
            rows = _rows(job, batches, len(span), bar, report)
            record = job.layout.write(Part(number, span[0], len(span), rows))
            record["report"] = report.as_json()
            if marks := _marks(job.source, record):
                record["marks"] = marks
            # where locks are not seen, another launch may have taken the folder meanwhile
            job.ownership.check()
            write_json(job.place(number), record)

    records = [job.record(number) for number in range(job.num_parts)]
    # a process that had nothing to do leaves the end to one that had, or to process 0
    if None in records or (job.rank and not parts):
        return None
    report = Report()
    for record in records:
        report.add(Report.from_json(record["report"]))
    numbers = all_numbers(records)
    if not numbers:
        # captions do not say why
        first = f", the first is {report.skipped[0]}" if report.skipped else ""
        raise ValueError(f"no image could be read{first}")
    statistics = Statistics.combine([record["statistics"] for record in records])
    summary = {**job.extra, **job.at_end(numbers)}
    job.layout.finish(records, {**summary, "channels": statistics, "report": report.as_json()})
    return Finished(len(numbers), statistics, report)


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
