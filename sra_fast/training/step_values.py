"""Scalars of single steps: collected on the device, one row of numbers for each micro-step."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# of these a row of the log shows how many there were, of all others the mean
COUNTED = ("skipped",)


@dataclass
class Table:
    """Scalars that were added together.

    Attributes:
        names: of the columns.
        at: (0-based optimizer step, micro-step) of every row.
        values: fp32 ``[rows, columns]``.
    """

    names: tuple[str, ...]
    at: list[tuple[int, int]]
    values: Tensor


@dataclass
class StepValues:
    """The scalars since the last ``take``. Nothing here waits for the device.

    Attributes:
        device: of this process.
    """

    device: torch.device
    _rows: dict[tuple[str, ...], tuple[list, list]] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor | float], step: int = 0, micro_step: int = 0) -> None:
        """Add scalars ``[]`` of one micro-step."""
        at, rows = self._rows.setdefault(tuple(values), ([], []))
        at.append((step, micro_step))
        # a copy in one launch: the next replay of a CUDA graph overwrites its outputs
        rows.append(torch.stack([self._scalar(value) for value in values.values()]))

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.float()
        # DeepSpeed gives some norms as numbers, in some steps: a fill waits for nothing
        return torch.full((), value, dtype=torch.float32, device=self.device)

    def total(self, name: str) -> Tensor:
        """Sum of the values of a name, on their device."""
        columns = [
            torch.stack(rows)[:, names.index(name)]
            for names, (_, rows) in self._rows.items()
            if name in names
        ]
        return torch.cat(columns).sum()

    def take(self) -> list[Table]:
        """What was added since the last call, one table for each set of names."""
        taken = [
            Table(names, at, torch.stack(rows)) for names, (at, rows) in sorted(self._rows.items())
        ]
        self._rows = {}
        return taken


def means(tables: list[Table], world: int) -> tuple[list[str], Tensor]:
    """Mean of every name over the steps and the processes, of the finite values; collective.

    NaN where no value is finite. The names in ``COUNTED`` are summed over the steps.

    Returns:
        Names in order, and fp32 ``[names]`` on the device.
    """
    # name -> (sum, number of summands)
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    for table in tables:
        finite = table.values.isfinite()
        sums = table.values.where(finite, 0.0).sum(0)
        counts = finite.sum(0).float()
        for name, total, count in zip(table.names, sums, counts, strict=True):
            if name in totals:
                total = total + totals[name][0]
                count = count + totals[name][1]
            totals[name] = total, count
    # sorted, so that every process reduces the same value in the same place
    names = sorted(totals)
    both = torch.stack([torch.stack(totals[name]) for name in names])
    for i, name in enumerate(names):
        if name in COUNTED:
            both[i, 1] = 1.0
    if world > 1:
        dist.all_reduce(both)
    return names, both[:, 0] / both[:, 1]


def to_host(values: Tensor) -> Tensor:
    """The same values on the host; on a GPU in pinned memory, there once the stream is so far."""
    if values.device.type != "cuda":
        return values
    return torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
