"""Numbers of a run: read back from the device with a lag, written to JSONL and TensorBoard, shown on a progress bar."""

import json
import math
import re
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.config.schema import Config
from sra_fast.utils.cuda_graph import hidden_bytes
from sra_fast.utils.files import write_atomic

# dense matrix rate in FLOP/s by whole words of the GPU's name: bf16 and TF32 (NVIDIA data sheets); the first match counts
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
    """Peak rate of the GPU's matrix units, or None: a CPU, a GPU that is not in the table, or plain fp32."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (
            rates[precision != "bf16"]
            for key, rates in PEAK.items()
            if re.search(rf"\b{key}\b", name)
        ),
        None,
    )


# of a network and its alignment, by what they say of themselves: counting SiT-XL/2's takes a core a second
_training_flops: dict[str, tuple[float, float]] = {}


def training_flops(cfg: Config) -> tuple[float, float]:
    """FLOPs per image of ``(plain step, aligned step)``: 3 forwards of the student, then head and teacher too, as often as they run."""
    key = repr((cfg.model, cfg.align))
    if key not in _training_flops:
        _training_flops[key] = _count_training_flops(cfg)
    return _training_flops[key]


def _count_training_flops(cfg: Config) -> tuple[float, float]:
    with torch.device("meta"):
        student, batch = cfg.model.build(), 1
        x = torch.zeros(batch, cfg.model.in_channels, cfg.model.input_size, cfg.model.input_size)
        t, y = torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        student.eval()(x, t, y)
    if cfg.align.target == "none":
        return 3 * plain.get_total_flops(), 3 * plain.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as aligned:
        student(x, t, y, align_depth=cfg.align.student_layer)
    with torch.no_grad(), FlopCounterMode(display=False) as teacher:
        student.features(x, t, y, cfg.align.teacher_layer)
    extra = 3 * (aligned.get_total_flops() - plain.get_total_flops()) + teacher.get_total_flops()
    return (
        3 * plain.get_total_flops(),
        3 * plain.get_total_flops() + extra * cfg.align.fraction / cfg.align.every,
    )


def read_rows(path: Path) -> list[dict]:
    """The rows of a ``stats.jsonl``; a last line that was cut short by a crash is ignored."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Means over ``every`` steps, averaged over the processes, written one reading behind the step that made them.

    Nothing here waits for the device: sums stay on it, a row is copied to pinned memory and read once its event has
    passed.

    Args:
        folder: run folder, or None on ranks that do not write.
        cfg: configuration.
        device: of this process.
        world: number of processes.
        start: steps already taken; rows of an interrupted run beyond them are dropped.
    """

    def __init__(
        self, folder: Path | None, cfg: Config, device: torch.device, world: int, start: int = 0
    ):
        self.every, self.device, self.world, self.images = (
            cfg.train.log_every,
            device,
            world,
            cfg.train.global_batch,
        )
        self.flops = training_flops(cfg)
        self.peak = peak_flops(device, cfg.train.precision, cfg.train.tf32)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of training, not of what was built before
        self.sums, self.count, self.waiting, self.rows = {}, 0, deque(), []
        self.clock = time.perf_counter()
        self.file = self.board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "stats.jsonl"
            kept = [row for row in read_rows(path) if row["step"] <= start]
            write_atomic(
                path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in kept))
            )
            self.file = open(path, "a")  # noqa: SIM115, stays open for the whole run
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def add(self, values: dict[str, Tensor]) -> None:
        """One micro-step's 0-d tensors; they are summed on the device."""
        for name, value in values.items():
            value = value.float() if torch.is_tensor(value) else torch.tensor(float(value))
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, n + 1)

    def step(self, step: int, extra: dict[str, float]) -> dict | None:
        """End of optimizer step ``step`` (1-based).  Returns the newest row that has arrived, if one did."""
        self.count += 1
        if step % self.every == 0 or step == 1:
            self._send(step, extra)
        return self._receive(wait=False)

    def _send(self, step: int, extra: dict[str, float]) -> None:
        names = sorted(self.sums)
        means = torch.stack([(self.sums[n][0] / self.sums[n][1]).to(self.device) for n in names])
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        now, event = time.perf_counter(), None
        if self.device.type == "cuda":
            means = torch.empty(means.shape, pin_memory=True).copy_(means, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            extra = {
                **extra,
                "peak_memory_gib": (torch.cuda.max_memory_allocated(self.device) + hidden_bytes())
                / 2**30,
            }
        rate = self.count * self.images / (now - self.clock)
        extra = {
            "step": step,
            **extra,
            "images_per_s": rate,
            "ms_per_step": 1e3 * (now - self.clock) / self.count,
        }
        if self.peak:
            extra["mfu"] = rate * self.flops["align" in self.sums] / (self.peak * self.world)
        self.waiting.append((names, means, event, extra))
        self.sums, self.count, self.clock = {}, 0, now

    def _receive(self, wait: bool) -> dict | None:
        row = None
        # on a CPU there is no event: the row waits for the next one, the lag is the same in tests as on a GPU
        while self.waiting and (
            wait or (self.waiting[0][2].query() if self.waiting[0][2] else len(self.waiting) > 1)
        ):
            names, means, event, extra = self.waiting.popleft()
            if event:
                event.synchronize()
            row = {**extra, **dict(zip(names, means.tolist(), strict=True))}
            self._write(row)
        return row

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(row.get(name, 0.0))]
        if bad:
            raise FloatingPointError(
                f"{' and '.join(bad)} not finite in the {self.every} steps up to {row['step']}; "
                "go on from the last checkpoint with a smaller optim.lr or align.weight"
            )

    def flush(self, step: int, extra: dict[str, float]) -> None:
        """Write everything up to ``step``, waiting for the device: before a checkpoint, not in between."""
        if self.count:
            self._send(step, extra)
        self._receive(wait=True)

    def restart_clock(self) -> None:
        """Leave the time since ``flush`` (a checkpoint) out of the rates."""
        self.clock = time.perf_counter()

    def close(self) -> list[dict]:
        """Close the files; returns all rows of this process's part of the run."""
        if self.file:
            self.file.close()
            self.board.close()
        return self.rows
