"""Where ZeRO keeps this rank's fp32 master weights.

The sharded EMA, checkpoints and exports are built on this. The layout is read from the addresses of
the live tensors, not recomputed, and verified at start. Tested with DeepSpeed 0.19.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from sra_fast.zero.deepspeed_names import check_names
from sra_fast.zero.optimizer import inner_optimizer, new_state


@dataclass(frozen=True)
class Segment:
    """A part of a parameter in one of this rank's flat tensors.

    ``numel`` elements of parameter ``name``, from element ``start`` on, lie in flat number ``flat``
    from element ``offset`` on.
    """

    name: str
    start: int
    flat: int
    offset: int
    numel: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """The segment's elements, a view."""
        return flats[self.flat].narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Group:
    """The layout of one flattened parameter group.

    Parameter ``name`` starts at element ``offsets[name]``. Every rank holds ``size`` elements:
    those of ``MasterWeights.flats`` that ``flats`` names, in order.
    """

    offsets: dict[str, int]
    size: int
    flats: range


class MasterWeights:
    """This rank's part of the fp32 master weights.

    Attributes:
        flats: live 1-d fp32 tensors, updated in place by ``engine.step()``.
        segments: which part of which parameter lies where in ``flats``.
        owners: for each of ``flats`` the tensor it is a view of, a key of the optimizer's state.
        replicated: stage 0: every rank holds everything.
        shapes: shape of every trained parameter, in the model's order.
        groups: stages 0 to 2: the layout of every parameter group; empty at stage 3.

    Raises:
        RuntimeError: this version of DeepSpeed has other names.
    """

    def __init__(self, engine, parameters: dict[str, torch.nn.Parameter]):
        self.engine = engine
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        # DeepSpeed's lists hold the parameters without names: find them by identity
        self.names = {id(p): name for name, p in parameters.items()}
        # in stage 3 a parameter is empty while it is partitioned, and ds_shape keeps its shape
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self.flats: list[Tensor] = []
        self.segments: list[Segment] = []
        self.owners: list[Tensor] = []
        self.groups: list[Group] = []
        self.replicated = False
        optimizer = engine.optimizer
        stage = engine.zero_optimization_stage()
        check_names(optimizer, stage)
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
        """Add a flat, all of ``owner``, and return its number."""
        self.owners.append(owner)
        self.flats.append(owner.detach().view(-1))
        return len(self.flats) - 1

    def _from_stage3(self, optimizer) -> None:
        # a sub-group is one flat tensor: this rank's part of each of its parameters, one after
        # another
        for params, weights, master in zip(
            optimizer.fp16_groups,
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        ):
            flat = self._add(master)
            for p in params:
                partition = p.ds_tensor
                # all ranks hold equally many elements of every parameter
                start = self.rank * partition.ds_numel
                # the last ranks' parts may be padding
                numel = min(partition.ds_numel, max(0, p.ds_numel - start))
                if numel:
                    offset = elements_between(weights, partition)
                    self.segments.append(Segment(self.names[id(p)], start, flat, offset, numel))

    def _from_flat_groups(self, groups, flat_weights: list[Tensor], masters: list[Tensor]) -> None:
        """Stages 1 and 2: each rank holds an equal part of every flattened group."""
        for params, weights, master in zip(groups, flat_weights, masters, strict=True):
            offsets = {self.names[id(p)]: elements_between(weights, p) for p in params}
            flat = self._add(master)
            size = master.numel()
            for name, offset in offsets.items():
                self._add_segment(name, offset, size, flat)
            self.groups.append(Group(offsets, size, range(flat, flat + 1)))

    def _from_replicated(self, optimizer) -> None:
        """Stage 0: whole masters on every rank, and so a whole EMA."""
        self.replicated = True
        masters = getattr(optimizer, "fp32_groups", None)
        if masters is None:
            # fp32 training: the parameters are their own masters
            masters = [group["params"] for group in optimizer.param_groups]
        params = getattr(optimizer, "fp16_groups", None) or masters
        for group, group_masters in zip(params, masters, strict=True):
            offsets = {}
            size = 0
            first = len(self.flats)
            for p, master in zip(group, group_masters, strict=True):
                name = self.names[id(p)]
                offsets[name] = size
                size += p.numel()
                self.segments.append(Segment(name, 0, self._add(master), 0, p.numel()))
            self.groups.append(Group(offsets, size, range(first, len(self.flats))))

    def _add_segment(self, name: str, offset: int, size: int, flat: int) -> None:
        """Record what this rank holds of the parameter that begins at element ``offset`` of a
        group.

        This rank's part of the group is ``size`` elements, in flat number ``flat``.
        """
        begin = self.rank * size
        end = begin + size
        # what the parameter and this rank's part have in common, in elements of the parameter
        first = max(offset, begin) - offset
        last = min(offset + self.shapes[name].numel(), end) - offset
        if last > first:
            self.segments.append(Segment(name, first, flat, offset + first - begin, last - first))

    def stored(self) -> list[Segment]:
        """The segments that this rank writes into a checkpoint: every element on one rank only."""
        if not self.replicated:
            return self.segments
        # every rank holds everything: each writes an equal share
        total = sum(segment.numel for segment in self.segments)
        begin = total * self.rank // self.world
        end = total * (self.rank + 1) // self.world
        shares = []
        position = 0
        for segment in self.segments:
            first = max(begin - position, 0)
            last = min(end - position, segment.numel)
            if first < last:
                start = segment.start + first
                offset = segment.offset + first
                shares.append(Segment(segment.name, start, segment.flat, offset, last - first))
            position += segment.numel
        return shares

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the masters into the weights that the student computes with; collective."""
        zero = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            pairs = zip(
                zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
            )
            for weights, master in pairs:
                weights.copy_(master)
        elif hasattr(zero, "bit16_groups_flat"):
            for i, master in enumerate(zero.single_partition_of_fp32_groups):
                rank = dist.get_rank(group=zero.real_dp_process_group[i])
                zero.parallel_partitioned_bit16_groups[i][rank].copy_(master)
            gather_weights(zero)
        elif hasattr(zero, "bf16_groups_flat"):
            zero.update_lp_params()
        else:
            # in fp32 the parameters are their own masters
            groups = zip(
                getattr(zero, "fp16_groups", ()), getattr(zero, "fp32_groups", ()), strict=True
            )
            for params, masters in groups:
                for p, master in zip(params, masters, strict=True):
                    p.data.copy_(master)

    def state(self, key: str) -> list[Tensor]:
        """``exp_avg``, ``exp_avg_sq`` or ``ema`` of the optimizer's state, laid out like
        ``flats``.
        """
        return [state[key].view(-1) for state in self.optimizer_states()]

    def optimizer_states(self) -> list[dict]:
        """The optimizer's state of each of ``owners``; made as AdamW makes it if there is none
        yet.
        """
        optimizer = inner_optimizer(self.engine)
        # torch's fused AdamW keeps its step count on the device
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for owner in self.owners:
            if "exp_avg" not in optimizer.state[owner]:
                optimizer.state[owner].update(new_state(owner, on_device=fused))
        return [optimizer.state[owner] for owner in self.owners]

    @torch.no_grad()
    def scatter(self, full: dict[str, Tensor], flats: list[Tensor]) -> None:
        """Copy this rank's part of ``full`` (name -> whole tensor) into ``flats``."""
        for segment in self.segments:
            whole = full[segment.name].reshape(-1)
            segment.of(flats).copy_(whole.narrow(0, segment.start, segment.numel))

    @torch.no_grad()
    def gather(self, flats: list[Tensor], bucket: int = 1 << 26) -> dict[str, Tensor]:
        """Whole tensors (name -> fp32 on the CPU) from every rank's ``flats``.

        Collective; the result is on every rank. ``bucket``: elements that are gathered at once.
        """
        if self.replicated:
            return {
                s.name: s.of(flats).view(self.shapes[s.name]).cpu().clone() for s in self.segments
            }
        full = {}
        # in buckets: the device need not hold a second copy of the model in fp32
        for names in self._buckets(bucket):
            full |= self._gather_bucket(names, flats)
        return full

    def _buckets(self, bucket: int) -> Iterator[list[str]]:
        """The parameters in groups of at most ``bucket`` elements, at least one in each."""
        names = []
        size = 0
        for name, shape in self.shapes.items():
            if names and size + shape.numel() > bucket:
                yield names
                names = []
                size = 0
            names.append(name)
            size += shape.numel()
        if names:
            yield names

    def _gather_bucket(self, names: list[str], flats: list[Tensor]) -> dict[str, Tensor]:
        sizes = [self.shapes[name].numel() for name in names]
        buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=flats[0].device)
        wholes = dict(zip(names, buffer.split(sizes), strict=True))
        for segment in self.segments:
            if segment.name in wholes:
                part = wholes[segment.name].narrow(0, segment.start, segment.numel)
                part.copy_(segment.of(flats))
        # every element is non-zero on one rank only, so the sum is exact
        dist.all_reduce(buffer)
        return {name: whole.view(self.shapes[name]).cpu().clone() for name, whole in wholes.items()}

    @torch.no_grad()
    def verify(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Check that every master, rounded to the parameter's dtype, is the parameter.

        Raises:
            RuntimeError: the layout is not the one this class has read.
        """
        for segment in self.segments:
            p = parameters[segment.name]
            if hasattr(p, "ds_tensor"):
                # the partition of stage 3, without its padding
                weights = p.ds_tensor.view(-1)[: segment.numel]
            else:
                weights = p.view(-1)[segment.start : segment.start + segment.numel]
            if not torch.equal(segment.of(self.flats).to(weights.dtype), weights):
                raise RuntimeError(
                    f"expected DeepSpeed's master weights of {segment.name}, they are those of "
                    "another parameter: unsupported version?"
                )


def gather_weights(zero) -> None:
    """Stages 1 and 2: each rank has written its part of the weights; get the others'.

    Args:
        zero: DeepSpeed's optimizer.
    """
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )


def elements_between(flat: Tensor, part: Tensor) -> int:
    """How many elements ``part`` begins after the begin of ``flat``, which it is a view into."""
    return (part.data_ptr() - flat.data_ptr()) // flat.element_size()
