"""What a run has come to, and whether two runs have come to the same."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.manifest import MANIFEST
from sra_fast.checkpoint.shards import MASTER, MOMENTS, ema_kind
from sra_fast.checkpoint.steps import named_by_latest, step_folders, step_of

KINDS = (MASTER, *MOMENTS, ema_kind("main"))


@dataclass(frozen=True)
class State:
    """A checkpoint's content."""

    step: int
    counts: list[float]
    tensors: dict[str, dict[str, Tensor]]

    def difference(self, other: "State") -> str | None:
        """The first thing that is not equal bit for bit; None: everything is."""
        if (self.step, self.counts) != (other.step, other.counts):
            return f"step and counts {self.step} {self.counts}, not {other.step} {other.counts}"
        for kind, parameters in self.tensors.items():
            for name, values in parameters.items():
                if not torch.equal(values, other.tensors[kind][name]):
                    return f"{kind} of {name}"
        return None

    def distance(self, other: "State", kind: str) -> float:
        """The largest difference of any element."""
        pairs = [(values, other.tensors[kind][name]) for name, values in self.tensors[kind].items()]
        return max((a - b).abs().max().item() for a, b in pairs)


def read_state(checkpoint: Path) -> State:
    """The content of a step's folder; ValueError if it is damaged."""
    manifest, tensors = reading.read_kinds(checkpoint, KINDS)
    return State(manifest.step, manifest.counts, tensors)


def final_state(run: Path) -> State | None:
    """The content of the checkpoint that ``latest`` of a run names; None: there is none."""
    named = named_by_latest(run / reading.CHECKPOINTS)
    return None if named is None else read_state(named)


def committed(run: Path) -> list[int]:
    """Steps of a run that have a manifest, in order."""
    folders = step_folders(run / reading.CHECKPOINTS)
    return sorted(step_of(path) for path in folders if (path / MANIFEST).exists())


def named_step(run: Path) -> int | None:
    """The step that ``latest`` names."""
    named = named_by_latest(run / reading.CHECKPOINTS)
    return None if named is None else step_of(named)


def not_finite(run: Path) -> str | None:
    """The first value in any whole checkpoint of a run that is not finite, in words."""
    for step in step_folders(run / reading.CHECKPOINTS):
        try:
            tensors = read_state(step).tensors
        except ValueError:
            # not committed, or damaged by a case
            continue
        for kind, parameters in tensors.items():
            for name, values in parameters.items():
                if not values.isfinite().all():
                    return f"{step.name}: {kind} of {name}"
    return None
