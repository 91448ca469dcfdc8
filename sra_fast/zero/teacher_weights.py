"""Parts of the EMA in the teacher's precision on every rank: each rank writes its part, one all-gather fills the rest."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sra_fast.ops.fp8 import Fp8Copy, power_of_two_multiplier
from sra_fast.ops.quantize_rows import E4M3
from sra_fast.zero.master_weights import Group, MasterShards


class Replica:
    """A parameter group of the EMA in ``dtype``, whole on every rank.

    Args:
        shards: of the masters.
        group: one of ``shards.groups``.
        dtype: of the copy.

    Attributes:
        buffer: the whole group, 1-d.
        copies: ``{owner of the masters: this rank's part of the copy}``, in the form in which ``ops.adamw_ema_`` writes it.
    """

    def __init__(self, shards: MasterShards, group: Group, dtype: torch.dtype):
        device, self.group = shards.flats[0].device, group
        self.sharded = shards.world > 1 and not shards.replicated
        self.buffer = torch.zeros(
            (shards.world if self.sharded else 1) * group.size, dtype=dtype, device=device
        )
        self.part = (
            torch.zeros(group.size, dtype=dtype, device=device) if self.sharded else self.buffer
        )
        owners = [shards.owners[i] for i in group.flats]
        sizes = [owner.numel() for owner in owners]
        views = self.part[: sum(sizes)].split(sizes)
        self.copies = {
            owner: view.view(owner.shape) for owner, view in zip(owners, views, strict=True)
        }

    def bind(self, parameters: dict[str, nn.Parameter]) -> None:
        """Make the parameters of these names views of the buffer."""
        for name, offset in self.group.offsets.items():
            p = parameters[name]
            p.data = self.buffer.narrow(0, offset, p.numel()).view(p.shape)

    def store(self, flats: list[Tensor]) -> None:
        """This rank's part <- EMA, whose ``flats`` are laid out like those of ``MasterShards``."""
        torch._foreach_copy_(
            [copy.view(-1) for copy in self.copies.values()], [flats[i] for i in self.group.flats]
        )

    def gather(self) -> list[dist.Work]:
        """Start to fill the buffer from every rank's part."""
        as_bytes = lambda t: t.view(torch.uint8)  # NCCL and Gloo agree on bytes
        return (
            [dist.all_gather_into_tensor(as_bytes(self.buffer), as_bytes(self.part), async_op=True)]
            if self.sharded
            else []
        )

    def arrived(self) -> None:
        """What ``gather`` started is done."""


class Fp8Replica(Replica):
    """Weights of linear layers in e4m3: each times a power of two, chosen from the largest magnitude one step ago.

    The pass that writes the copy cannot know the largest magnitude of what it writes, so it measures for the next one.  The EMA
    moves slowly, and there is room for 3.5 times the old magnitude; beyond it values saturate for one step.  Values and scales
    belong together from ``arrived`` to the next optimizer step, which may write the buffer itself.

    Args:
        shards: of the masters.
        group: one of ``shards.groups``: the layers' weights and nothing else.
        layers: ``{name of the weight: layer}``; gets ``weight_scale``, a view that follows the copy.
    """

    def __init__(self, shards: MasterShards, group: Group, layers: dict[str, nn.Linear]):
        super().__init__(shards, group, E4M3)
        device, offsets = self.buffer.device, list(group.offsets.values())
        self.multiplier, self.in_use, self.amax = (
            torch.ones(len(offsets), device=device) for _ in range(3)
        )
        ends, begin = (
            [*offsets[1:], len(self.buffer)],
            shards.rank * group.size if self.sharded else 0,
        )
        for owner, values in self.copies.items():
            bounds = [min(max(end - begin, 0), values.numel()) for end in ends]
            self.copies[owner] = Fp8Copy.of(values, self.multiplier, self.amax, bounds)
            begin += values.numel()
        rows = torch.tensor([layers[name].out_features for name in group.offsets])
        self.row_segment = torch.arange(len(rows)).repeat_interleave(rows).to(device)
        self.scales = torch.ones(len(self.row_segment), 1, device=device)
        for name, scale in zip(group.offsets, self.scales.split(rows.tolist()), strict=True):
            layers[name].weight_scale = scale

    def store(self, flats: list[Tensor], multiplier: Tensor | None = None) -> None:
        """As ``Replica.store``, with the ``multiplier [S]`` given or, by default, those that fit best; measures for the next step."""
        self.amax.zero_()
        for copy, i in zip(self.copies.values(), self.group.flats, strict=True):
            copy.measure_(flats[i])
        self._reduce_amax()
        self.multiplier.copy_(
            power_of_two_multiplier(self.amax) if multiplier is None else multiplier
        )
        for copy, i in zip(self.copies.values(), self.group.flats, strict=True):
            copy.store_(flats[i])

    def _reduce_amax(self, async_op: bool = False) -> dist.Work | None:
        return (
            dist.all_reduce(self.amax, dist.ReduceOp.MAX, async_op=async_op)
            if self.sharded
            else None
        )

    def gather(self) -> list[dist.Work]:
        self.in_use.copy_(self.multiplier)
        self.scales.copy_(self.in_use.reciprocal()[self.row_segment, None])
        return [*super().gather(), *filter(None, [self._reduce_amax(async_op=True)])]

    def arrived(self) -> None:
        self.multiplier.copy_(power_of_two_multiplier(self.amax))
        self.amax.zero_()

    def skip(self) -> None:
        """After an optimizer step that no gather follows: the next one's scales are chosen all the same."""
        self._reduce_amax()
        self.arrived()
