"""Numbers of a run: read back from the device with a lag, written to ``stats.jsonl`` and handed to
the run's loggers.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config.schema import Config
from sra_fast.training.flops import step_flops
from sra_fast.training.loggers import LoggedRun, RunLogger
from sra_fast.training.rows import STATS, line_of, read_rows
from sra_fast.training.step_values import StepValues, Table, means, to_host
from sra_fast.utils.cuda_graph import hidden_bytes
from sra_fast.utils.files import write_atomic
from sra_fast.utils.registry import LOGGERS

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


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of an optimizer step that was taken.

    Attributes:
        step: number of optimizer steps taken so far.
        epoch: of its images.
        lr: learning rate, a number or an fp64 tensor ``[]`` on the device.
        weights: lambda of every target by its section; 0 where it was not computed.
    """

    step: int
    epoch: int = 0
    lr: float | Tensor = 0.0
    weights: dict[str, float] = field(default_factory=dict)


class _Mark:
    """A point in the work that is given to a device; on a CPU, in time."""

    def __init__(self, device: torch.device):
        self.event = None
        self.seconds = 0.0
        if device.type == "cuda":
            # the device's own clock: the host may be many launches ahead of it
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.seconds = time.perf_counter()

    def has_passed(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def seconds_since(self, earlier: "_Mark") -> float:
        """Seconds from an earlier mark to this one; both have passed."""
        if self.event is None:
            return self.seconds - earlier.seconds
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class _Speed:
    """``steps`` steps between two marks, of ``flops`` FLOPs per image."""

    begin: _Mark
    end: _Mark
    steps: int
    flops: float


@dataclass
class _Row:
    """A row on its way to the host: ``means``, named by ``names``, and the tensors in ``known`` are
    there once ``end`` has passed. ``speed``: None if it has only the first step of a process.
    """

    names: list[str]
    means: Tensor
    tables: list[Table]
    known: dict
    end: _Mark
    speed: _Speed | None


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
        # per image: of a plain step, and what each target adds to a step
        self.flops, self.target_flops = step_flops(cfg)
        self.peak = peak_flops(device, cfg.train.precision, cfg.train.tf32)
        if device.type == "cuda":
            # the peak of training, not of what was built before
            torch.cuda.reset_peak_memory_stats(device)
        # since the last row
        self.values = StepValues(device)
        self.facts: list[StepFacts] = []
        # steps since the clock was started, and the number of the first step of this process, which
        # compiles and captures
        self.timed = 0
        self.first = start + 1
        self.clock = _Mark(device)
        self.watch: Callable[[list[Table]], None] = lambda tables: None
        self.waiting: deque[_Row] = deque()
        self.rows: list[dict] = []
        self.file = None
        self.loggers: list[RunLogger] = []
        if folder is not None:
            self._open(folder, cfg, start)

    def _open(self, folder: Path, cfg: Config, start: int) -> None:
        path = folder / STATS
        # a run may have been further than its last checkpoint: it takes these steps again
        kept = [row for row in read_rows(path) if row["step"] <= start]
        text = "".join(line_of(row) for row in kept)
        write_atomic(path, lambda p: p.write_text(text))
        # open for the whole run
        self.file = open(path, "a")  # noqa: SIM115
        run = LoggedRun(folder, cfg, start, kept)
        # dict: a name that is given twice is one logger
        self.loggers = [LOGGERS[name](run) for name in dict.fromkeys(cfg.train.loggers)]

    def add(self, values: dict[str, Tensor | float], step: int = 0, micro_step: int = 0) -> None:
        """Add scalars ``[]`` of one micro-step of a 0-based optimizer step."""
        self.values.add(values, step, micro_step)

    def step(self, facts: StepFacts) -> dict | None:
        """End of an optimizer step.

        Returns:
            The newest row that has arrived, if one did.
        """
        self.facts.append(facts)
        if facts.step == self.first:
            # what is compiled, captured and allocated once is no step's time
            self.restart_clock()
        else:
            self.timed += 1
        if facts.step % self.every == 0 or facts.step == 1:
            self._send()
        return self._receive(wait=False)

    def _send(self) -> None:
        """Start to copy the means of the steps since the last row to the host."""
        tables = self.values.take()
        names, averages = means(tables, self.world)
        # the copies are queued here, the host reads them later
        averages = to_host(averages)
        for table in tables:
            table.values = to_host(table.values)
        last = self.facts[-1]
        known = {"step": last.step, "epoch": last.epoch}
        known["lr"] = to_host(last.lr) if isinstance(last.lr, Tensor) else last.lr
        # a run without alignment has the column, too
        sections = {"align": None, **last.weights}
        for section in sections:
            # a mean, as the losses are: with align.every it is zero in most steps
            weights = [facts.weights.get(section, 0.0) for facts in self.facts]
            known[f"{section}_weight"] = math.fsum(weights) / len(weights)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) + hidden_bytes()
            known["peak_memory_gib"] = peak / 2**30
        # passed when the copies have arrived
        end = _Mark(self.device)
        speed = _Speed(self.clock, end, self.timed, self._row_flops()) if self.timed else None
        self.waiting.append(_Row(names, averages, tables, known, end, speed))
        self.facts = []
        self.timed = 0
        self.clock = end

    def _row_flops(self) -> float:
        """FLOPs per image, as a mean over the steps since the last row."""
        added = sum(
            self.target_flops[section]
            for facts in self.facts
            for section, weight in facts.weights.items()
            if weight > 0
        )
        return float(self.flops + added / len(self.facts))

    def _receive(self, wait: bool) -> dict | None:
        """Write the rows that have arrived (``wait``: all of them), and return the newest."""
        row = None
        while self.waiting and (wait or self._has_arrived()):
            sent = self.waiting.popleft()
            sent.end.wait()
            known = {
                name: value.item() if isinstance(value, Tensor) else value
                for name, value in sent.known.items()
            }
            if sent.speed is not None:
                known |= self._speed(sent.speed)
            row = {**known, **dict(zip(sent.names, sent.means.tolist(), strict=True))}
            self._write(row)
            self.watch(sent.tables)
        return row

    def _has_arrived(self) -> bool:
        if self.device.type == "cuda":
            return self.waiting[0].end.has_passed()
        # the row waits for the next one, so that tests see the lag of a GPU
        return len(self.waiting) > 1

    def _speed(self, speed: _Speed) -> dict[str, float]:
        seconds = speed.end.seconds_since(speed.begin) / speed.steps
        rate = self.images / seconds
        found = {
            "images_per_s": rate,
            "ms_per_step": 1e3 * seconds,
            "timed_steps": speed.steps,
        }
        # model FLOPs utilisation: FLOPs of the model over what all GPUs could have computed
        if self.peak:
            found["mfu"] = rate * speed.flops / (self.peak * self.world)
        return found

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        if self.file:
            self.file.write(line_of(row))
            self.file.flush()
        for logger in self.loggers:
            logger.row(row)

    def flush(self) -> None:
        """Write everything up to the last step, waiting for the device: before a checkpoint."""
        # the steps since the last row, fewer than log_every
        if self.facts:
            self._send()
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
        """Leave the time since the last row (a checkpoint, samples) out of the rates."""
        self.timed = 0
        self.clock = _Mark(self.device)

    def close(self) -> list[dict]:
        """Close the files; returns all rows of this process's part of the run."""
        if self.file:
            self.file.close()
        for logger in self.loggers:
            logger.close()
        return self.rows
