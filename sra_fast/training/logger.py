"""Numbers of a run: read back from the device with a lag, written to ``stats.jsonl`` and handed to
the run's loggers.
"""

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config.schema import Config
from sra_fast.training.flops import training_flops
from sra_fast.training.loggers import LoggedRun, RunLogger
from sra_fast.training.step_values import StepValues, Table, means, to_host
from sra_fast.utils.cuda_graph import hidden_bytes
from sra_fast.utils.files import write_atomic
from sra_fast.utils.registry import LOGGERS

# every run has this file; the other loggers are ``train.loggers``
STATS = "stats.jsonl"

# dense matrix rate in FLOP/s by whole words of the GPU's name: bf16 and TF32 (NVIDIA data sheets);
# the first match counts
PEAK = {
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 495e12),
    "H200": (989e12, 495e12),
    "GH200": (989e12, 495e12),
    "B200": (2250e12, 1125e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "A10": (125e12, 62.5e12),
    "L4": (121e12, 60e12),
    "RTX 4090": (165e12, 82.6e12),
}


def peak_flops(device: torch.device, precision: str, tf32: bool = False) -> float | None:
    """Peak rate of the GPU's matrix units, or None: a CPU, a GPU that is not in the table, or plain
    fp32.
    """
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    # a slice of a GPU, and a card of another rate
    if re.search(r"\b(MIG|NVL)\b", name):
        return None
    for key, (bf16, tf32_rate) in PEAK.items():
        if re.search(rf"\b{key}\b", name):
            return bf16 if precision == "bf16" else tf32_rate
    return None


def read_rows(path: Path) -> list[dict]:
    """The rows of a ``stats.jsonl`` up to the first that is none: a crash may cut the last one short."""
    rows = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                break
        except (ValueError, LookupError, TypeError):
            break
        rows.append({name: math.nan if item is None else item for name, item in row.items()})
    return rows


def _line(row: dict) -> str:
    """A row as JSON, which has no NaN: null stands for what is not finite."""
    finite = {
        name: None if isinstance(item, float) and not math.isfinite(item) else item
        for name, item in row.items()
    }
    return json.dumps(finite) + "\n"


class TrainLogger:
    """Means over ``train.log_every`` steps and over the processes, written with a lag of one row.

    Nothing here waits for the device. Values stay on it; a row is copied to pinned memory and read
    once its event has passed. Steps whose value is not finite are left out of a mean.

    Args:
        folder: run folder, or None on ranks that do not write.
        cfg: configuration; ``train.loggers`` names the places that rows go to besides
            ``stats.jsonl``.
        device: of this process.
        world: number of processes.
        start: steps already taken. Rows of an interrupted run beyond them are dropped.

    Attributes:
        rows: what this process has logged.
        watch: called with the values of every single step of this process when a row arrives.
        loggers: the open ``RunLogger`` objects; none on ranks that do not write.
    """

    def __init__(
        self, folder: Path | None, cfg: Config, device: torch.device, world: int, start: int = 0
    ):
        self.every = cfg.train.log_every
        self.device = device
        self.world = world
        self.images = cfg.train.global_batch
        self.flops = training_flops(cfg)
        self.peak = peak_flops(device, cfg.train.precision, cfg.train.tf32)
        if device.type == "cuda":
            # the peak of training, not of what was built before
            torch.cuda.reset_peak_memory_stats(device)
        # since the last row
        self.values = StepValues(device)
        self.count = 0
        self.watch: Callable[[list[Table]], None] = lambda tables: None
        self.waiting: deque[_Row] = deque()
        self.rows: list[dict] = []
        self.clock = time.perf_counter()
        self.file = None
        self.loggers: list[RunLogger] = []
        if folder is not None:
            self._open(folder, cfg, start)

    def _open(self, folder: Path, cfg: Config, start: int) -> None:
        path = folder / STATS
        # a run may have been further than its last checkpoint: it takes these steps again
        kept = [row for row in read_rows(path) if row["step"] <= start]
        text = "".join(_line(row) for row in kept)
        write_atomic(path, lambda p: p.write_text(text))
        # open for the whole run
        self.file = open(path, "a")  # noqa: SIM115
        run = LoggedRun(folder, cfg, start, kept)
        # dict: a name that is given twice is one logger
        self.loggers = [LOGGERS[name](run) for name in dict.fromkeys(cfg.train.loggers)]

    def add(self, values: dict[str, Tensor | float], step: int = 0, micro_step: int = 0) -> None:
        """Add scalars ``[]`` of one micro-step of a 0-based optimizer step."""
        self.values.add(values, step, micro_step)

    def step(self, step: int, known: dict[str, float | Tensor]) -> dict | None:
        """End of optimizer step ``step`` (1-based).

        ``known``: of the last step: numbers, or fp64 tensors ``[]`` on the device.

        Returns:
            The newest row that has arrived, if one did.
        """
        self.count += 1
        if step % self.every == 0 or step == 1:
            self._send(step, known)
        return self._receive(wait=False)

    def _send(self, step: int, known: dict[str, float | Tensor]) -> None:
        """Start to copy the means of the steps since the last row to the host."""
        tables = self.values.take()
        names, averages = means(tables, self.world)
        # the copies are queued here, the host reads them later
        averages = to_host(averages)
        known = {
            name: to_host(value) if isinstance(value, Tensor) else value
            for name, value in known.items()
        }
        for table in tables:
            table.values = to_host(table.values)
        # the host may be some launches ahead of the device: over log_every steps that evens out
        now = time.perf_counter()
        seconds = now - self.clock
        rate = self.count * self.images / seconds
        known = {"step": step, **known}
        event = None
        if self.device.type == "cuda":
            # says when the copies have arrived
            event = torch.cuda.Event()
            event.record()
            peak = torch.cuda.max_memory_allocated(self.device) + hidden_bytes()
            known["peak_memory_gib"] = peak / 2**30
        known["images_per_s"] = rate
        known["ms_per_step"] = 1e3 * seconds / self.count
        # model FLOPs utilisation: FLOPs of the model over what all GPUs could have computed
        if self.peak:
            flops = self.flops["align" in names]
            known["mfu"] = rate * flops / (self.peak * self.world)
        self.waiting.append(_Row(names, averages, tables, event, known))
        self.count = 0
        self.clock = now

    def _receive(self, wait: bool) -> dict | None:
        """Write the rows that have arrived (``wait``: all of them), and return the newest."""
        row = None
        while self.waiting and (wait or self._has_arrived()):
            sent = self.waiting.popleft()
            if sent.event:
                sent.event.synchronize()
            known = {
                name: value.item() if isinstance(value, Tensor) else value
                for name, value in sent.known.items()
            }
            row = {**known, **dict(zip(sent.names, sent.means.tolist(), strict=True))}
            self._write(row)
            self.watch(sent.tables)
        return row

    def _has_arrived(self) -> bool:
        event = self.waiting[0].event
        if event:
            return event.query()
        # on a CPU there is no event. The row waits for the next one, so that tests see the same lag
        return len(self.waiting) > 1

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        if self.file:
            self.file.write(_line(row))
            self.file.flush()
        for logger in self.loggers:
            logger.row(row)

    def flush(self, step: int, known: dict[str, float | Tensor]) -> None:
        """Write everything up to ``step``, waiting for the device: before a checkpoint."""
        # the steps since the last row, fewer than log_every
        if self.count:
            self._send(step, known)
        self._receive(wait=True)

    def show(
        self, name: str, step: int, picture: Path | None, scores: dict[str, float] | None = None
    ) -> None:
        """Hand a picture, if there is one, and scores with their ``step``, to the loggers."""
        for logger in self.loggers:
            if picture is not None:
                logger.picture(name, step, picture)
            if scores:
                logger.scores(scores)

    def restart_clock(self) -> None:
        """Leave the time since ``flush`` (a checkpoint) out of the rates."""
        self.clock = time.perf_counter()

    def close(self) -> list[dict]:
        """Close the files; returns all rows of this process's part of the run."""
        if self.file:
            self.file.close()
        for logger in self.loggers:
            logger.close()
        return self.rows


@dataclass
class _Row:
    """A row on its way to the host: ``means``, named by ``names``, and the tensors in ``known`` are
    there after ``event``.
    """

    names: list[str]
    means: Tensor
    tables: list[Table]
    event: torch.cuda.Event | None
    known: dict
