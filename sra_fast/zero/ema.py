"""The sharded averages of the weights, and the teacher that is refreshed from one (SRA, Sec. 3.2).

Each rank holds the fp32 EMA of its own part of the fp32 master weights: 4 bytes per parameter over
the number of ranks (stage 0: all of it). It lies in the optimizer's state as ``"ema"``.

Further averages (``ShardedAverage``) are for evaluation only. They have their own rules, and the
teacher does not see them.

The teacher is blocks 1 to n and the embedders, in the training precision or partly in fp8. Stages
0 to 2 hold it whole on every rank, stage 3 partitions it like the weights.
"""

import torch
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.config.schema import Average
from sra_fast.models import Backbone
from sra_fast.utils.power_profile import exponent
from sra_fast.zero.guard import UpdateGuard
from sra_fast.zero.master_weights import MasterWeights
from sra_fast.zero.optimizer import AdamWEMA
from sra_fast.zero.teacher_weights import Fp8TeacherGroup, TeacherGroup


class ShardedEMA:
    """``ema <- decay * ema + (1 - decay) * master``, starting from the master.

    Args:
        masters: this rank's part of the master weights.
        decay: of the average; ``update`` is called once per optimizer step.
        optimizer: of the run. An ``AdamWEMA`` updates the average itself.
        guard: of the run. A step that is not taken does not move the average.
    """

    def __init__(
        self,
        masters: MasterWeights,
        decay: float,
        optimizer: torch.optim.Optimizer,
        guard: UpdateGuard,
    ):
        self.masters = masters
        self.guard = guard
        self.decay = decay
        self.in_optimizer = isinstance(optimizer, AdamWEMA)
        for state, owner in zip(masters.optimizer_states(), masters.owners, strict=True):
            state["ema"] = owner.detach().clone()

    @property
    def flats(self) -> list[Tensor]:
        """The averages, laid out like ``masters.flats``."""
        return self.masters.state("ema")

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step, unless the step has done it."""
        if not self.in_optimizer:
            decay = self.guard.ema_decay(self.decay)
            ops.ema_update_(self.flats, self.masters.flats, decay)

    def full(self) -> dict[str, Tensor]:
        """``{name: fp32 tensor on the CPU}`` of the whole model; collective."""
        return self.masters.gather(self.flats)

    def load(self, full: dict[str, Tensor]) -> None:
        """Take this rank's part of ``{name: tensor}``."""
        self.masters.scatter(full, self.flats)


class ShardedAverage:
    """An average of the master weights beside the EMA, which only evaluation reads.

    Either ``average <- decay * average + (1 - decay) * master``, or EDM2's power function (arXiv
    2312.02696), whose decay after the ``t``-th update is ``(1 - 1 / t)^(gamma + 1)``. Each takes one
    pass of its own after the optimizer's: 12 bytes per parameter, where the optimizer's pass would
    read the master anyway and take 8.

    Args:
        masters: this rank's part of the master weights.
        rule: ``decay``, or ``sigma_rel``.
        guard: of the run. A step that is not taken does not move the average, and is not counted.

    Attributes:
        flats: the averages, laid out like ``masters.flats``; 4 bytes per parameter over the ranks
            (stage 0: on each).
        since: the number of updates that had been taken when it began. The weights of that moment
            stand for all before.
    """

    def __init__(self, masters: MasterWeights, rule: Average, guard: UpdateGuard):
        self.masters = masters
        self.guard = guard
        self.rule = rule
        self.gamma = 0.0 if rule.sigma_rel is None else exponent(rule.sigma_rel)
        self.flats = [flat.detach().clone() for flat in masters.flats]
        self.since = 0.0

    @property
    def facts(self) -> dict[str, float]:
        """What checkpoints and snapshots say of it: its rule, and ``since``."""
        return {**self.rule.given, "since": self.since}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step; the host does not know whether it was taken."""
        if self.rule.decay is not None:
            decay = self.guard.ema_decay(self.rule.decay)
        else:
            decay = self.guard.power_decay(self.gamma)
        ops.ema_update_(self.flats, self.masters.flats, decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are; waits for the device."""
        torch._foreach_copy_(self.flats, self.masters.flats)
        self.since = float(self.guard.counts[0])

    def full(self) -> dict[str, Tensor]:
        """``{name: fp32 tensor on the CPU}`` of the whole model; collective."""
        return self.masters.gather(self.flats)


class ReplicatedTeacher:
    """Stages 0 to 2: the whole teacher on every rank, refreshed by one all-gather of the EMA.

    With low-precision weights and an ``AdamWEMA``, the optimizer's own pass writes this rank's part
    of them. The all-gather then overlaps with the student's next forward, unless that is part of a
    CUDA graph.

    Args:
        teacher: the frozen ``Backbone``. Its parameters become views of the gathered buffers.
        ema: source of the weights.
        optimizer: of the run.
        dtype: of the teacher's computation and of its parameters, but for those in ``fp8``.
        fp8: ``{name of a weight: its layer}``, the weights in e4m3.
    """

    def __init__(
        self,
        teacher: Backbone,
        ema: ShardedEMA,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        fp8: dict[str, nn.Module],
    ):
        self.ema = ema
        self.in_optimizer = ema.in_optimizer and dtype != torch.float32
        # all-gathers that have been started
        self.pending = []
        self.groups: list[TeacherGroup] = []
        parameters = dict(teacher.named_parameters())
        masters = ema.masters
        for layout in masters.groups:
            # groups of the optimizer that the teacher has none of
            if not layout.offsets.keys() <= parameters.keys():
                continue
            if layout.offsets.keys() <= fp8.keys():
                group = Fp8TeacherGroup(masters, layout, fp8)
            else:
                group = TeacherGroup(masters, layout, dtype)
            group.bind(parameters)
            if self.in_optimizer:
                optimizer.copies.update(group.copies)
            self.groups.append(group)
        self.refresh()

    @property
    def _fp8_groups(self) -> list[Fp8TeacherGroup]:
        return [group for group in self.groups if isinstance(group, Fp8TeacherGroup)]

    @torch.no_grad()
    def refresh(self, state: list[float] | None = None) -> None:
        """Copy the EMA into the teacher, on every rank.

        ``state``: ``scales()`` of the run that is resumed.
        """
        # what is under way reads and writes what is copied to here
        self.wait()
        flats = self.ema.flats
        for group in self.groups:
            if state and isinstance(group, Fp8TeacherGroup):
                group.store(flats, multiplier=torch.tensor(state))
            else:
                group.store(flats)
        self._start_gather()
        self.wait()

    @torch.no_grad()
    def after_step(self, teacher_runs: bool) -> None:
        """Start to refresh after an optimizer step, if the next step runs the teacher.

        ``wait`` has to be called before the teacher's forward.
        """
        if not self.in_optimizer:
            if teacher_runs:
                self.refresh()
        elif teacher_runs:
            # the optimizer's pass has already written this rank's part
            self._start_gather(self.ema.guard.taken)
        else:
            for group in self._fp8_groups:
                group.skip(self.ema.guard.taken)

    @torch.no_grad()
    def _start_gather(self, taken: Tensor | None = None) -> None:
        self.pending = [(group, group.gather(taken)) for group in self.groups]

    @torch.no_grad()
    def wait(self) -> None:
        """The teacher's weights are complete after this, on the current stream."""
        for group, handles in self.pending:
            for handle in handles:
                # the current stream waits, the host does not
                handle.wait()
            group.gathered()
        self.pending = []

    def fp8_weights(self) -> list[str]:
        """Names of the weights in e4m3, in the order of their scales."""
        return [name for group in self._fp8_groups for name in group.group.offsets]

    def scales(self) -> Tensor | None:
        """What ``refresh`` needs besides the EMA to restore the same weights: one number for each
        of ``fp8_weights``, on the device.
        """
        self.wait()
        for group in self._fp8_groups:
            return group.held
        return None


class PartitionedTeacher:
    """Stage 3: ZeRO partitions the teacher; each rank writes its part of the EMA into its
    partition.

    ZeRO's hooks gather the partitions when the teacher runs.

    Args:
        teacher: the frozen ``Backbone`` inside the engine's module.
        ema: source of the weights.
    """

    def __init__(self, teacher: Backbone, ema: ShardedEMA):
        parameters = dict(teacher.named_parameters())
        self.ema = ema
        self.segments = [s for s in ema.masters.segments if s.name in parameters]
        # views of ZeRO's partitions
        self.target = [parameters[s.name].ds_tensor.view(-1)[: s.numel] for s in self.segments]
        self.refresh()

    @torch.no_grad()
    def refresh(self, state: None = None) -> None:
        """Copy the EMA into the teacher, each rank its own partition."""
        flats = self.ema.flats
        torch._foreach_copy_(self.target, [segment.of(flats) for segment in self.segments])

    def after_step(self, teacher_runs: bool) -> None:
        """Refresh after an optimizer step, if the next step runs the teacher."""
        if teacher_runs:
            self.refresh()

    def wait(self) -> None:
        """Nothing runs in the background."""

    def fp8_weights(self) -> list[str]:
        """This stage has none."""
        return []

    def scales(self) -> None:
        """The EMA is enough to restore the teacher."""
