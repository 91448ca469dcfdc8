"""The sharded EMA of the weights, and the teacher that is refreshed from it (SRA, Sec. 3.2).

Each rank holds the fp32 EMA of its own part of the fp32 master weights, 4 bytes per parameter over the number of ranks.
The teacher is blocks 1..n and the embedders in the training precision, on every rank (ZeRO-3: partitioned like the
weights).
"""
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast import ops
from sra_fast.engine.shards import MasterShards
from sra_fast.models import Backbone


class ShardedEMA:
    """``ema <- decay * ema + (1 - decay) * master``, starting from the master.

    Args:
        shards: this rank's part of the masters.
        decay: of the average; one call of ``update`` per optimizer step.
    """

    def __init__(self, shards: MasterShards, decay: float):
        self.shards, self.decay = shards, decay
        self.flats = [flat.clone() for flat in shards.flats]

    @torch.no_grad()
    def update(self) -> None:
        ops.ema_update_(self.flats, self.shards.flats, self.decay)

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """``{name: (first element, values)}`` of this rank: what a checkpoint stores; fits any number of ranks."""
        return {s.name: (s.start, s.of(self.flats)) for s in self.shards.segments}

    def full(self) -> dict[str, Tensor]:
        """``{name: fp32 tensor on the CPU}`` of the whole model; collective."""
        return self.shards.gather(self.flats)

    def load(self, full: dict[str, Tensor]) -> None:
        """Take this rank's part of ``{name: tensor}``."""
        self.shards.scatter(full, self.flats)


class ReplicatedTeacher:
    """Stages 0-2: every teacher parameter is a view of one flat buffer, refreshed by one all-gather of the EMA.

    The teacher's parameters are the optimizer's first group, so that each rank's part of that group is its part of the
    buffer, with nothing to unpack.

    Args:
        teacher: the frozen ``Backbone``; its parameters are rebound to the buffer.
        ema: source of the weights.
        dtype: of the buffer and of everything the teacher computes.
    """

    def __init__(self, teacher: Backbone, ema: ShardedEMA, dtype: torch.dtype):
        offsets, part = ema.shards.teacher_layout
        world, rank = ema.shards.world, ema.shards.rank
        device = ema.flats[0].device
        self.buffer = torch.zeros(world * part, dtype=dtype, device=device)
        self.part = self.buffer if world == 1 else torch.zeros(part, dtype=dtype, device=device)
        self.ema = ema.flats[: ema.shards.teacher_flats]
        sizes = [flat.numel() for flat in self.ema]
        self.views = list(self.part[: sum(sizes)].split(sizes))
        for name, p in teacher.named_parameters():
            p.data = self.buffer.narrow(0, offsets[name], p.numel()).view(p.shape)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Teacher weights <- EMA, on every rank the same."""
        torch._foreach_copy_(self.views, self.ema)
        if self.part is not self.buffer:
            dist.all_gather_into_tensor(self.buffer, self.part)


class PartitionedTeacher:
    """Stage 3: the teacher is partitioned by ZeRO; each rank writes its EMA into its partition and ZeRO's hooks gather it.

    Args:
        teacher: the frozen ``Backbone`` inside the engine's module.
        ema: source of the weights.
    """

    def __init__(self, teacher: Backbone, ema: ShardedEMA):
        parameters = dict(teacher.named_parameters())
        segments = [s for s in ema.shards.segments if s.name in parameters]
        self.source = [s.of(ema.flats) for s in segments]
        self.target = [parameters[s.name].ds_tensor.view(-1)[: s.numel] for s in segments]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Teacher weights <- EMA, each rank its own partition."""
        torch._foreach_copy_(self.target, self.source)


def make_teacher(teacher: Backbone | None, ema: ShardedEMA, dtype: torch.dtype):
    """The refresher that fits the ZeRO stage, or None without a teacher."""
    if teacher is None:
        return None
    if ema.shards.teacher_layout is None:
        return PartitionedTeacher(teacher, ema)
    return ReplicatedTeacher(teacher, ema, dtype)
