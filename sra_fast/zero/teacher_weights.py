"""Parameter groups of the teacher, whole on every rank, in the teacher's precision.

Each rank writes its part of the EMA; one all-gather fills in the rest.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sra_fast.ops.fp8 import Fp8Copy, power_of_two_multiplier
from sra_fast.ops.quantize_rows import E4M3
from sra_fast.zero.master_weights import Group, MasterWeights


class TeacherGroup:
    """One parameter group of the teacher in ``dtype``.

    Args:
        masters: this rank's part of the master weights.
        group: one of ``masters.groups``.
        dtype: of the weights.

    Attributes:
        buffer: the whole group, 1-d.
        copies: ``{owner of the masters: this rank's part of the buffer}``, in the form in which
            ``ops.adamw_ema_`` writes it.
    """

    def __init__(self, masters: MasterWeights, group: Group, dtype: torch.dtype):
        device = masters.flats[0].device
        self.group = group
        self.sharded = masters.world > 1 and not masters.replicated
        # laid out like ZeRO's flat group: the parts of all ranks, one after another
        ranks = masters.world if self.sharded else 1
        self.buffer = torch.zeros(ranks * group.size, dtype=dtype, device=device)
        self.part = self.buffer
        if self.sharded:
            self.part = torch.zeros(group.size, dtype=dtype, device=device)
        # one owner for each parameter in stage 0, one for the whole part in the other stages
        owners = [masters.owners[i] for i in group.flats]
        sizes = [owner.numel() for owner in owners]
        views = self.part[: sum(sizes)].split(sizes)
        self.copies = {
            owner: view.view(owner.shape) for owner, view in zip(owners, views, strict=True)
        }

    def bind(self, parameters: dict[str, nn.Parameter]) -> None:
        """Make the parameters of these names views of the buffer."""
        for name, offset in self.group.offsets.items():
            p = parameters[name]
            # the teacher reads the buffer itself, so an all-gather needs no copy afterwards
            p.data = self.buffer.narrow(0, offset, p.numel()).view(p.shape)

    def store(self, flats: list[Tensor]) -> None:
        """Copy the EMA into this rank's part. Its ``flats`` are laid out like the masters'."""
        parts = [copy.view(-1) for copy in self.copies.values()]
        torch._foreach_copy_(parts, [flats[i] for i in self.group.flats])

    def gather(self, taken: Tensor | None = None) -> list[dist.Work]:
        """Start to fill the buffer from every rank's part.

        ``taken``: 0-d bool on the device: whether the last optimizer step has written this rank's
        part; None: it has, or ``store`` has.
        """
        if not self.sharded:
            return []
        # NCCL and Gloo agree on bytes
        buffer = self.buffer.view(torch.uint8)
        part = self.part.view(torch.uint8)
        return [dist.all_gather_into_tensor(buffer, part, async_op=True)]

    def gathered(self) -> None:
        """Called when what ``gather`` started has finished."""


class Fp8TeacherGroup(TeacherGroup):
    """Weights of linear layers in e4m3: each is multiplied by a power of two and rounded.

    The power of two is chosen from the largest magnitude one step earlier, because the pass that
    writes the weights cannot know the largest magnitude of what it writes. It measures it for the
    next step. The EMA moves slowly, and there is room for 3.5 times the earlier magnitude; beyond
    that, values saturate for one step.

    Values and scales belong together from ``gathered`` to the next optimizer step, which may write
    the buffer itself.

    Args:
        masters: this rank's part of the master weights.
        group: one of ``masters.groups``: the layers' weights and nothing else.
        layers: ``{name of the weight: layer}``. Their ``weight_scale`` becomes a view that follows
            the weights.

    Attributes:
        multiplier: ``[S]`` fp32, of the S weights: what the next pass multiplies by.
        held: ``[S]``, what this rank's part was multiplied by when it was last written.
        in_use: ``[S]``, what the gathered weights were multiplied by.
        amax: ``[S]``, the largest magnitudes that the last pass has met.
    """

    def __init__(self, masters: MasterWeights, group: Group, layers: dict[str, nn.Module]):
        super().__init__(masters, group, E4M3)
        device = self.buffer.device
        offsets = list(group.offsets.values())
        self.multiplier = torch.ones(len(offsets), device=device)
        self.held = torch.ones_like(self.multiplier)
        self.in_use = torch.ones_like(self.multiplier)
        self.amax = torch.ones_like(self.multiplier)
        # whether the pass that is being followed has written anything; None: it has
        self.taken: Tensor | None = None

        # where each weight ends in this rank's part of the buffer, seen from each owner
        ends = [*offsets[1:], len(self.buffer)]
        begin = masters.rank * group.size if self.sharded else 0
        for owner, values in self.copies.items():
            bounds = [min(max(end - begin, 0), values.numel()) for end in ends]
            self.copies[owner] = Fp8Copy.of(values, self.multiplier, self.amax, bounds)
            begin += values.numel()

        # the scale of each row of each layer
        rows = torch.tensor([layers[name].out_features for name in group.offsets])
        self.weight_of_row = torch.arange(len(rows)).repeat_interleave(rows).to(device)
        self.scales = torch.ones(len(self.weight_of_row), 1, device=device)
        for name, scale in zip(group.offsets, self.scales.split(rows.tolist()), strict=True):
            layers[name].weight_scale = scale

    def store(self, flats: list[Tensor], multiplier: Tensor | None = None) -> None:
        """Copy the EMA, rounded to e4m3, and measure for the next step.

        ``multiplier [S]``: default: those that fit the EMA best.
        """
        # two passes over the EMA: measure, then round with the multipliers that follow
        self.amax.zero_()
        sources = [flats[i] for i in self.group.flats]
        for copy, source in zip(self.copies.values(), sources, strict=True):
            copy.measure_(source)
        self._reduce_amax()
        if multiplier is None:
            multiplier = power_of_two_multiplier(self.amax)
        self.multiplier.copy_(multiplier)
        for copy, source in zip(self.copies.values(), sources, strict=True):
            copy.store_(source)

    def _reduce_amax(self, async_op: bool = False) -> dist.Work | None:
        """Maximum over the ranks."""
        if not self.sharded:
            return None
        return dist.all_reduce(self.amax, dist.ReduceOp.MAX, async_op=async_op)

    def gather(self, taken: Tensor | None = None) -> list[dist.Work]:
        self._follow(taken)
        # the scales of the products undo the multipliers
        self.in_use.copy_(self.held)
        self.scales.copy_(self.in_use.reciprocal()[self.weight_of_row, None])
        handles = super().gather(taken)
        amax = self._reduce_amax(async_op=True)
        return handles if amax is None else [*handles, amax]

    def _follow(self, taken: Tensor | None) -> None:
        """The pass before has written with the multipliers that it was given, if it was taken."""
        self.taken = taken
        self.held.copy_(self._if_taken(self.multiplier, self.held))

    def _if_taken(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.taken is None else torch.where(self.taken, new, old)

    def gathered(self) -> None:
        # from what the last pass has measured, for the next one; a pass that was not taken has
        # measured nothing
        chosen = power_of_two_multiplier(self.amax)
        self.multiplier.copy_(self._if_taken(chosen, self.multiplier))
        self.amax.zero_()

    def skip(self, taken: Tensor | None = None) -> None:
        """Called after an optimizer step that no gather follows: choose the next scales all the
        same.
        """
        self._follow(taken)
        self._reduce_amax()
        self.gathered()
