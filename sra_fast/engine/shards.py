"""Where ZeRO keeps this rank's fp32 master weights: what the sharded EMA, checkpoints and exports are built on.

Tested with DeepSpeed 0.19; the layout is read from the live tensors' addresses, not recomputed, and verified at start.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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


class MasterShards:
    """This rank's part of the fp32 master weights.

    Attributes:
        flats: live 1-d fp32 tensors, updated in place by ``engine.step()``.
        segments: which part of which parameter lies where in ``flats``.
        shapes: shape of every trained parameter, in the model's order.
        teacher_layout: stages 0-2: ``({name: offset}, elements per rank)`` of the first parameter group, flattened;
            None at stage 3.
        teacher_flats: how many of ``flats`` belong to that group.
    """

    def __init__(self, engine, parameters: dict[str, torch.nn.Parameter]):
        self.engine = engine
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names = {id(p): name for name, p in parameters.items()}
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self.flats, self.segments, self._owners = [], [], []
        self.teacher_layout, self.teacher_flats = None, 0
        stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
        if stage == 3:
            self._from_stage3(optimizer)
        elif hasattr(optimizer, "bit16_groups_flat"):
            self._from_flat_groups(optimizer.bit16_groups, optimizer.bit16_groups_flat,
                                   optimizer.single_partition_of_fp32_groups)
        elif hasattr(optimizer, "bf16_groups_flat"):
            self._from_flat_groups(optimizer.bf16_groups, optimizer.bf16_groups_flat,
                                   optimizer.fp32_groups_flat_partition)
        else:
            self._from_replicated(optimizer)

    def _add(self, owner: Tensor, first: int, numel: int) -> int:
        """A new flat: elements ``first .. first + numel`` of ``owner``, a key of the optimizer's state."""
        self._owners.append((owner, first))
        self.flats.append(owner.detach().view(-1).narrow(0, first, numel))
        return len(self.flats) - 1

    def _from_stage3(self, optimizer) -> None:
        for params, low, master in zip(
            optimizer.fp16_groups, optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
        ):
            flat = self._add(master, 0, master.numel())
            for p in params:
                start, size = self.rank * p.ds_tensor.ds_numel, p.ds_tensor.ds_numel
                numel = min(size, max(0, p.ds_numel - start))  # the last ranks' parts may be padding
                if numel:
                    offset = (p.ds_tensor.data_ptr() - low.data_ptr()) // low.element_size()
                    self.segments.append(Segment(self.names[id(p)], start, flat, offset, numel))

    def _from_flat_groups(self, groups, lows: list[Tensor], masters: list[Tensor]) -> None:
        for g, (params, low, master) in enumerate(zip(groups, lows, masters)):
            offsets = {self.names[id(p)]: (p.data_ptr() - low.data_ptr()) // low.element_size() for p in params}
            flat = self._add(master, 0, master.numel())
            part = master.numel()
            for name, offset in offsets.items():
                self._cut(name, offset, part, lambda first, numel: (flat, offset + first - self.rank * part))
            if g == 0:
                self.teacher_layout, self.teacher_flats = (offsets, part), 1

    def _from_replicated(self, optimizer) -> None:
        """Stage 0 has whole masters everywhere: each rank still takes only its share of the EMA."""
        masters = getattr(optimizer, "fp32_groups", None) or [g["params"] for g in optimizer.param_groups]
        params = getattr(optimizer, "fp16_groups", None) or masters
        for g, (group, group_masters) in enumerate(zip(params, masters)):
            offsets, total = {}, 0
            for p in group:
                offsets[self.names[id(p)]] = total
                total += p.numel()
            part = -(-total // self.world)
            for p, master in zip(group, group_masters):
                name = self.names[id(p)]
                self._cut(name, offsets[name], part, lambda first, numel: (self._add(master, first, numel), 0))
            if g == 0:
                self.teacher_layout, self.teacher_flats = (offsets, part), len(self.flats)

    def _cut(self, name: str, offset: int, part: int, place) -> None:
        """Record what this rank's ``part`` of a flattened group holds of the parameter at ``offset``."""
        low, high = self.rank * part, (self.rank + 1) * part
        first, last = max(offset, low) - offset, min(offset + self.shapes[name].numel(), high) - offset
        if last > first:
            flat, position = place(first, last - first)
            self.segments.append(Segment(name, first, flat, position, last - first))

    def state(self, key: str) -> list[Tensor]:
        """AdamW's ``exp_avg`` or ``exp_avg_sq``, laid out like ``flats``; zeros if no step was taken yet."""
        pairs = zip(self.optimizer_states(), self._owners, self.flats)
        return [state[key].view(-1).narrow(0, first, flat.numel()) for state, (_, first), flat in pairs]

    def optimizer_states(self) -> list[dict]:
        """AdamW's state of the tensor behind each of ``flats``, made as AdamW makes it if there is none yet."""
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for owner, _ in self._owners:
            if not optimizer.state[owner]:
                fused = any(group.get("fused") for group in optimizer.param_groups)
                optimizer.state[owner] = {
                    "step": torch.zeros((), dtype=torch.float32, device=owner.device if fused else "cpu"),
                    "exp_avg": torch.zeros_like(owner.data),
                    "exp_avg_sq": torch.zeros_like(owner.data),
                }
        return [optimizer.state[owner] for owner, _ in self._owners]

    @torch.no_grad()
    def scatter(self, full: dict[str, Tensor], flats: list[Tensor]) -> None:
        """Copy this rank's part of ``full`` (name -> whole tensor) into ``flats``."""
        for s in self.segments:
            s.of(flats).copy_(full[s.name].reshape(-1).narrow(0, s.start, s.numel))

    @torch.no_grad()
    def gather(self, flats: list[Tensor], bucket: int = 1 << 26) -> dict[str, Tensor]:
        """Whole tensors (name -> fp32 on the CPU) from every rank's ``flats``; collective, the result is on every rank."""
        full, names = {}, list(self.shapes)
        mine = {}
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
            low = p.ds_tensor.view(-1)[: s.numel] if hasattr(p, "ds_tensor") else p.view(-1)[s.start : s.start + s.numel]
            if not torch.equal(s.of(self.flats).to(low.dtype), low):
                raise RuntimeError(f"DeepSpeed's master weights of {s.name} do not belong to it: unsupported version?")
