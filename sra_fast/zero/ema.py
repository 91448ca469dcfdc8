"""The sharded EMA of the weights, and the teacher that is refreshed from it (SRA, Sec. 3.2).

Each rank holds the fp32 EMA of its own part of the fp32 master weights, 4 bytes per parameter over the number of ranks
(stage 0: all of it), in the optimizer's state as ``"ema"``.  The teacher is blocks 1..n and the embedders in the training
precision or in part in fp8, on every rank (ZeRO-3: partitioned like the weights).
"""

import torch
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.models import Backbone
from sra_fast.zero.master_weights import MasterShards
from sra_fast.zero.optimizer import AdamWEMA
from sra_fast.zero.teacher_weights import Fp8Replica, Replica


class ShardedEMA:
    """``ema <- decay * ema + (1 - decay) * master``, starting from the master.

    Args:
        shards: this rank's part of the masters.
        decay: of the average; one call of ``update`` per optimizer step.
        optimizer: updates the average itself if it is an ``AdamWEMA``.
    """

    def __init__(self, shards: MasterShards, decay: float, optimizer: torch.optim.Optimizer):
        self.shards, self.decay, self.in_optimizer = shards, decay, isinstance(optimizer, AdamWEMA)
        for state, owner in zip(shards.optimizer_states(), shards.owners, strict=True):
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
    """Stages 0-2: every teacher parameter is a view of a replica, refreshed by one all-gather of the EMA.

    Where the replicas are low precision and the optimizer is an ``AdamWEMA``, its own pass writes them; the all-gather runs
    beside the student's next forward.

    Args:
        teacher: the frozen ``Backbone``; its parameters are rebound to the replicas.
        ema: source of the weights.
        optimizer: of the run.
        dtype: of everything the teacher computes, and of its parameters, except for
        fp8: ``{name of a weight: its layer}``, which are kept in e4m3.
    """

    def __init__(
        self,
        teacher: Backbone,
        ema: ShardedEMA,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        fp8: dict[str, nn.Linear],
    ):
        parameters, shards, self.ema, self.pending = (
            dict(teacher.named_parameters()),
            ema.shards,
            ema,
            [],
        )
        groups = [group for group in shards.groups if group.offsets.keys() <= parameters.keys()]
        self.replicas = [
            Fp8Replica(shards, g, fp8)
            if g.offsets.keys() <= fp8.keys()
            else Replica(shards, g, dtype)
            for g in groups
        ]
        self.in_optimizer = ema.in_optimizer and dtype != torch.float32
        for replica in self.replicas:
            replica.bind(parameters)
            if self.in_optimizer:
                optimizer.copies.update(replica.copies)
        self.refresh()

    @torch.no_grad()
    def refresh(self, state: list[float] | None = None) -> None:
        """Teacher weights <- EMA, on every rank the same; ``state``: of the run that is gone on with."""
        for replica in self.replicas:
            given = (
                {"multiplier": torch.tensor(state)}
                if state and isinstance(replica, Fp8Replica)
                else {}
            )
            replica.store(self.ema.flats, **given)
        self._gather()
        self.wait()

    @property
    def _fp8(self) -> list[Fp8Replica]:
        return [replica for replica in self.replicas if isinstance(replica, Fp8Replica)]

    @torch.no_grad()
    def after_step(self, teacher_runs: bool) -> None:
        """``refresh`` after an optimizer step, without waiting for it: ``wait`` comes before the teacher's forward, if it runs."""
        if not self.in_optimizer:
            if teacher_runs:
                self.refresh()
        elif teacher_runs:
            self._gather()
        else:
            for replica in self._fp8:
                replica.skip()

    @torch.no_grad()
    def _gather(self) -> None:
        self.pending = [(replica, replica.gather()) for replica in self.replicas]

    @torch.no_grad()
    def wait(self) -> None:
        """The teacher's weights are complete after this, on the current stream."""
        for replica, handles in self.pending:
            for handle in handles:
                handle.wait()
            replica.arrived()
        self.pending = []

    def state(self) -> list[float] | None:
        """What ``refresh`` needs besides the EMA to make the same weights in a resumed run: a number for each in e4m3."""
        self.wait()
        return next((replica.in_use.tolist() for replica in self._fp8), None)


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
    def refresh(self, state: None = None) -> None:
        """Teacher weights <- EMA, each rank its own partition."""
        flats = self.ema.flats
        torch._foreach_copy_(self.target, [s.of(flats) for s in self.segments])

    def after_step(self, teacher_runs: bool) -> None:
        """``refresh`` after an optimizer step, if the teacher runs in the next."""
        if teacher_runs:
            self.refresh()

    def wait(self) -> None:
        """Nothing is under way."""

    def state(self) -> None:
        """The EMA is all there is."""
