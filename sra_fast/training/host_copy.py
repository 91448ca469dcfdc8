"""A copy of a run's state in host memory, taken between two steps, which a thread then writes."""

import numpy as np
import torch
from torch import Tensor

from sra_fast.checkpoint.manifest import MAIN
from sra_fast.checkpoint.shards import MASTER, MOMENTS, ema_kind, piece_key
from sra_fast.training.trainer import Trainer

# elements that are looked at at once
CHUNK = 1 << 20


def flats_by_kind(trainer: Trainer) -> dict[str, list[Tensor]]:
    """What a checkpoint keeps of this rank: kind -> live flat tensors, laid out like the masters'."""
    masters = trainer.masters
    return {
        MASTER: masters.flats,
        **{key: masters.state(key) for key in MOMENTS},
        ema_kind(MAIN): trainer.ema.flats,
        **{ema_kind(name): average.flats for name, average in trainer.averages.items()},
    }


class HostCopy:
    """This rank's share of a checkpoint, in host memory that is used again for the next one.

    On a GPU the memory is pinned, and the copies are queued on the current stream: the host does
    not wait, and what later steps write comes after the copies.

    Args:
        trainer: whose state it is.

    Attributes:
        scales: what the fp8 weights of the teacher were multiplied by; None: there are none.
        counts: ``UpdateGuard.counts``.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.cuda = trainer.device.type == "cuda"
        self.segments = trainer.masters.stored()
        # the part of every flat that this rank stores
        self.spans: dict[int, tuple[int, int]] = {}
        for segment in self.segments:
            begin, end = self.spans.get(segment.flat, (segment.offset, 0))
            end = max(end, segment.offset + segment.numel)
            self.spans[segment.flat] = (min(begin, segment.offset), end)
        # (kind, number of the flat) -> its copy
        self.copies: dict[tuple[str, int], Tensor] = {}
        self.ranges: Tensor | None = None
        self.scales: Tensor | None = None
        self.counts = self._host_memory((3,), torch.float64)
        self.event: torch.cuda.Event | None = None

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.cuda)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the state as the work that is queued so far leaves it."""
        limits = []
        for kind, flats in flats_by_kind(self.trainer).items():
            for flat, (begin, end) in self.spans.items():
                source = flats[flat][begin:end]
                if (kind, flat) not in self.copies:
                    self.copies[kind, flat] = self._host_memory((end - begin,))
                self.copies[kind, flat].copy_(source, non_blocking=self.cuda)
                if self.cuda:
                    limits.append(torch.stack(torch.aminmax(source)))
        self.counts.copy_(self.trainer.guard.counts, non_blocking=self.cuda)
        teacher = self.trainer.teacher
        scales = None if teacher is None else teacher.scales()
        if scales is not None:
            if self.scales is None:
                self.scales = self._host_memory(tuple(scales.shape))
            self.scales.copy_(scales, non_blocking=self.cuda)
        if self.cuda:
            # the device looks for what is not finite much faster than the host
            self.ranges = self._host_memory((2 * len(limits),))
            if limits:
                self.ranges.copy_(torch.cat(limits), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> None:
        """The copies are complete after this."""
        if self.event is not None:
            self.event.synchronize()

    def pieces(self) -> dict[str, Tensor]:
        """Key -> values of everything that this rank stores, as ``write_pieces`` takes it."""
        kinds = dict.fromkeys(kind for kind, _ in self.copies)
        return {
            piece_key(kind, segment.name, segment.start): self._piece(kind, segment)
            for kind in kinds
            for segment in self.segments
        }

    def _piece(self, kind: str, segment) -> Tensor:
        offset = segment.offset - self.spans[segment.flat][0]
        return self.copies[kind, segment.flat].narrow(0, offset, segment.numel)

    def not_finite(self) -> str | None:
        """The first piece that holds a NaN or an infinity, in words; None: all are finite.

        Call ``wait`` before.
        """
        if self.ranges is not None and bool(self.ranges.isfinite().all()):
            return None
        # padding between the pieces may hold anything: only the pieces count
        for key, values in self.pieces().items():
            array = values.numpy()
            for begin in range(0, len(array), CHUNK):
                if not np.isfinite(array[begin : begin + CHUNK]).all():
                    kind, name, _ = key.split("/")
                    return f"{kind} of {name}"
        return None
