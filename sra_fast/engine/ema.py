"""The sharded EMA of the weights, and the teacher that is refreshed from it (SRA, Sec. 3.2).

Each rank holds the fp32 EMA of its own part of the fp32 master weights, 4 bytes per parameter over the number of ranks
(stage 0: all of it), in the optimizer's state as ``"ema"``.  The teacher is blocks 1..n and the embedders in the training
precision, on every rank (ZeRO-3: partitioned like the weights).
"""
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast import ops
from sra_fast.engine.optimizer import AdamWEMA
from sra_fast.engine.shards import MasterShards
from sra_fast.models import Backbone


class ShardedEMA:
    """``ema <- decay * ema + (1 - decay) * master``, starting from the master.

    Args:
        shards: this rank's part of the masters.
        decay: of the average; one call of ``update`` per optimizer step.
        optimizer: updates the average itself if it is an ``AdamWEMA``.
    """

    def __init__(self, shards: MasterShards, decay: float, optimizer: torch.optim.Optimizer):
        self.shards, self.decay, self.in_optimizer = shards, decay, isinstance(optimizer, AdamWEMA)
        for state, owner in zip(shards.optimizer_states(), shards.owners):
            state["ema"] = owner.detach().clone()

    @property
    def flats(self) -> list[Tensor]:
        """The averages, laid out like ``shards.flats``."""
        return self.shards.state("ema")

    @torch.no_grad()
    def update(self) -> None:
        """The average after an optimizer step; nothing is left to do if the step has updated it."""
        if not self.in_optimizer:
            ops.ema_update_(self.flats, self.shards.flats, self.decay)

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """``{name: (first element, values)}`` of this rank: what a checkpoint stores; fits any number of ranks."""
        if self.shards.replicated and self.shards.rank:
            return {}
        flats = self.flats
        return {s.name: (s.start, s.of(flats)) for s in self.shards.segments}

    def full(self) -> dict[str, Tensor]:
        """``{name: fp32 tensor on the CPU}`` of the whole model; collective."""
        return self.shards.gather(self.flats)

    def load(self, full: dict[str, Tensor]) -> None:
        """Take this rank's part of ``{name: tensor}``."""
        self.shards.scatter(full, self.flats)


class ReplicatedTeacher:
    """Stages 0-2: every teacher parameter is a view of one flat buffer, refreshed by one all-gather of the EMA.

    The teacher's parameters are the optimizer's first group, so that each rank's part of that group is its part of the
    buffer, with nothing to unpack.  A bf16 buffer's part is written by the optimizer's own pass, if that is an ``AdamWEMA``;
    the all-gather runs beside the student's next forward.

    Args:
        teacher: the frozen ``Backbone``; its parameters are rebound to the buffer.
        ema: source of the weights.
        optimizer: of the run.
        dtype: of the buffer and of everything the teacher computes.
    """

    def __init__(self, teacher: Backbone, ema: ShardedEMA, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        shards, self.ema, self.pending = ema.shards, ema, None
        offsets, size = shards.teacher_layout
        world = 1 if shards.replicated else shards.world
        self.buffer = torch.zeros(world * size, dtype=dtype, device=shards.flats[0].device)
        self.part = self.buffer if world == 1 else torch.zeros(size, dtype=dtype, device=self.buffer.device)
        owners = shards.owners[: shards.teacher_flats]
        sizes = [owner.numel() for owner in owners]
        self.views = [view.view(o.shape) for view, o in zip(self.part[: sum(sizes)].split(sizes), owners)]
        self.in_optimizer = ema.in_optimizer and dtype != torch.float32
        if self.in_optimizer:
            optimizer.copies = dict(zip(owners, self.views))
        for name, p in teacher.named_parameters():
            p.data = self.buffer.narrow(0, offsets[name], p.numel()).view(p.shape)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Teacher weights <- EMA, on every rank the same."""
        torch._foreach_copy_([v.view(-1) for v in self.views], self.ema.flats[: len(self.views)])
        self._gather()
        self.wait()

    def after_step(self) -> None:
        """``refresh`` after an optimizer step, without waiting for it: ``wait`` comes before the teacher's forward."""
        if self.in_optimizer:
            self._gather()
        else:
            self.refresh()

    def _gather(self) -> None:
        if self.part is not self.buffer:
            self.pending = dist.all_gather_into_tensor(self.buffer, self.part, async_op=True)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


class PartitionedTeacher:
    """Stage 3: the teacher is partitioned by ZeRO; each rank writes its EMA into its partition and ZeRO's hooks gather it.

    Args:
        teacher: the frozen ``Backbone`` inside the engine's module.
        ema: source of the weights.
    """

    def __init__(self, teacher: Backbone, ema: ShardedEMA):
        parameters = dict(teacher.named_parameters())
        self.ema = ema
        self.segments = [s for s in ema.shards.segments if s.name in parameters]
        self.target = [parameters[s.name].ds_tensor.view(-1)[: s.numel] for s in self.segments]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Teacher weights <- EMA, each rank its own partition."""
        flats = self.ema.flats
        torch._foreach_copy_(self.target, [s.of(flats) for s in self.segments])

    after_step = refresh

    def wait(self) -> None:
        """Nothing is under way."""


def make_teacher(teacher: Backbone | None, ema: ShardedEMA, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
    """The refresher that fits the ZeRO stage, or None without a teacher."""
    if teacher is None:
        return None
    if ema.shards.teacher_layout is None:
        return PartitionedTeacher(teacher, ema)
    return ReplicatedTeacher(teacher, ema, optimizer, dtype)
