"""Where ZeRO keeps this rank's fp32 master weights: what the sharded EMA, checkpoints and exports are built on.

Tested with DeepSpeed 0.19; the layout is read from the live tensors' addresses, not recomputed, and verified at start.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.zero.optimizer import new_state


@dataclass(frozen=True)
class Segment:
    """``numel`` elements of parameter ``name`` from element ``start`` lie in flat ``flat`` from element ``offset``."""

    name: str
    start: int
    flat: int
    offset: int
    numel: int

    def of(self, flats: list[Tensor]) -> Tensor:
        return flats[self.flat].narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Group:
    """A parameter group, flattened: parameter ``name`` starts at element ``offsets[name]``; every rank holds ``size`` elements.

    ``flats`` says which of ``MasterWeights.flats`` are this rank's elements, in order.
    """

    offsets: dict[str, int]
    size: int
    flats: range


class MasterWeights:
    """This rank's part of the fp32 master weights.

    Attributes:
        flats: live 1-d fp32 tensors, updated in place by ``engine.step()``.
        segments: which part of which parameter lies where in ``flats``.
        owners: the tensor behind each of ``flats``, a key of the optimizer's state.
        replicated: stage 0: every rank holds everything.
        shapes: shape of every trained parameter, in the model's order.
        groups: stages 0-2: the layout of every parameter group; empty at stage 3.
    """

    def __init__(self, engine, parameters: dict[str, torch.nn.Parameter]):
        self.engine = engine
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names = {id(p): name for name, p in parameters.items()}
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self.flats, self.segments, self.owners, self.replicated = [], [], [], False
        self.groups: list[Group] = []
        stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
        if stage == 3:
            self._from_stage3(optimizer)
        elif hasattr(optimizer, "bit16_groups_flat"):
            self._from_flat_groups(
                optimizer.bit16_groups,
                optimizer.bit16_groups_flat,
                optimizer.single_partition_of_fp32_groups,
            )
        elif hasattr(optimizer, "bf16_groups_flat"):
            self._from_flat_groups(
                optimizer.bf16_groups,
                optimizer.bf16_groups_flat,
                optimizer.fp32_groups_flat_partition,
            )
        else:
            self._from_replicated(optimizer)

    def _add(self, owner: Tensor) -> int:
        """A new flat: all of ``owner``, a key of the optimizer's state."""
        self.owners.append(owner)
        self.flats.append(owner.detach().view(-1))
        return len(self.flats) - 1

    def _from_stage3(self, optimizer) -> None:
        for params, low, master in zip(
            optimizer.fp16_groups,
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=False,
        ):
            flat = self._add(master)
            for p in params:
                start, size = self.rank * p.ds_tensor.ds_numel, p.ds_tensor.ds_numel
                numel = min(
                    size, max(0, p.ds_numel - start)
                )  # the last ranks' parts may be padding
                if numel:
                    offset = (p.ds_tensor.data_ptr() - low.data_ptr()) // low.element_size()
                    self.segments.append(Segment(self.names[id(p)], start, flat, offset, numel))

    def _from_flat_groups(self, groups, lows: list[Tensor], masters: list[Tensor]) -> None:
        for params, low, master in zip(groups, lows, masters, strict=True):
            offsets = {
                self.names[id(p)]: (p.data_ptr() - low.data_ptr()) // low.element_size()
                for p in params
            }
            flat, part = self._add(master), master.numel()
            for name, offset in offsets.items():
                self._cut(name, offset, part, flat)
            self.groups.append(Group(offsets, part, range(flat, flat + 1)))

    def _from_replicated(self, optimizer) -> None:
        """Stage 0 has whole masters on every rank, and so a whole EMA."""
        self.replicated = True
        masters = getattr(optimizer, "fp32_groups", None) or [
            g["params"] for g in optimizer.param_groups
        ]
        params = getattr(optimizer, "fp16_groups", None) or masters
        for group, group_masters in zip(params, masters, strict=True):
            offsets, total, first = {}, 0, len(self.flats)
            for p, master in zip(group, group_masters, strict=True):
                name = self.names[id(p)]
                offsets[name] = total
                total += p.numel()
                self.segments.append(Segment(name, 0, self._add(master), 0, p.numel()))
            self.groups.append(Group(offsets, total, range(first, len(self.flats))))

    def _cut(self, name: str, offset: int, part: int, flat: int) -> None:
        """Record what this rank's ``part`` of a flattened group, ``flat``, holds of the parameter at ``offset``."""
        low, high = self.rank * part, (self.rank + 1) * part
        first, last = (
            max(offset, low) - offset,
            min(offset + self.shapes[name].numel(), high) - offset,
        )
        if last > first:
            self.segments.append(Segment(name, first, flat, offset + first - low, last - first))

    def state(self, key: str) -> list[Tensor]:
        """``exp_avg``, ``exp_avg_sq`` or ``ema`` of the optimizer's state, laid out like ``flats``."""
        return [state[key].view(-1) for state in self.optimizer_states()]

    def optimizer_states(self) -> list[dict]:
        """The optimizer's state of the tensor behind each of ``flats``, made as AdamW makes it if there is none yet."""
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for owner in self.owners:
            if "exp_avg" not in optimizer.state[owner]:
                optimizer.state[owner].update(new_state(owner, on_device=fused))
        return [optimizer.state[owner] for owner in self.owners]

    @torch.no_grad()
    def scatter(self, full: dict[str, Tensor], flats: list[Tensor]) -> None:
        """Copy this rank's part of ``full`` (name -> whole tensor) into ``flats``."""
        for s in self.segments:
            s.of(flats).copy_(full[s.name].reshape(-1).narrow(0, s.start, s.numel))

    @torch.no_grad()
    def gather(self, flats: list[Tensor], bucket: int = 1 << 26) -> dict[str, Tensor]:
        """Whole tensors (name -> fp32 on the CPU) from every rank's ``flats``; collective, the result is on every rank."""
        if self.replicated:
            return {
                s.name: s.of(flats).view(self.shapes[s.name]).cpu().clone() for s in self.segments
            }
        full, names, mine = {}, list(self.shapes), {}
        for s in self.segments:
            mine.setdefault(s.name, []).append(s)
        while names:
            batch, size = [], 0
            while names and (not batch or size + self.shapes[names[0]].numel() <= bucket):
                batch.append((names[0], size))
                size += self.shapes[names.pop(0)].numel()
            buffer = torch.zeros(size, dtype=torch.float32, device=flats[0].device)
            for name, at in batch:
                for s in mine.get(name, ()):
                    buffer.narrow(0, at + s.start, s.numel).copy_(s.of(flats))
            dist.all_reduce(buffer)  # every element is non-zero on one rank only: exact
            for name, at in batch:
                shape = self.shapes[name]
                full[name] = buffer.narrow(0, at, shape.numel()).view(shape).cpu().clone()
        return full

    @torch.no_grad()
    def verify(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """RuntimeError unless every master, rounded to the parameter's dtype, is the parameter: guards the layout."""
        for s in self.segments:
            p = parameters[s.name]
            low = (
                p.ds_tensor.view(-1)[: s.numel]
                if hasattr(p, "ds_tensor")
                else p.view(-1)[s.start : s.start + s.numel]
            )
            if not torch.equal(s.of(self.flats).to(low.dtype), low):
                raise RuntimeError(
                    f"DeepSpeed's master weights of {s.name} do not belong to it: unsupported version?"
                )
