"""Updates that are not finite are left out, and the host need not know which.

One gradient that is not a number would make every weight, both moments and the EMA NaN. The norm of
the whole gradient, which each rank has on its device, shows it. An update that is left out changes
nothing, bit for bit, and is not counted: neither in the bias correction nor in the warm-up.
"""

import math

import torch
from torch import Tensor

from sra_fast.ops.adamw_ema import DeviceStep
from sra_fast.zero.master_weights import MasterWeights
from sra_fast.zero.optimizer import AdamWEMA


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf and value == int(value)


def warm_up(update: float | Tensor, steps: int) -> float | Tensor:
    """Factor of the learning rate at a 1-based update: linear up to ``steps``, then 1."""
    if not steps:
        return 1.0
    if isinstance(update, Tensor):
        return update.clamp(min=1, max=steps) / steps
    return min(max(update, 1), steps) / steps


class UpdateGuard:
    """Takes an update if the norm of the whole gradient is finite, also squared in fp32; decides and
    counts on the device.

    Every rank decides alike, because the norm is the same on all.

    Args:
        masters: of the engine, whose optimizer counts its updates here from now on.
        optimizer: of the run. An ``AdamWEMA`` asks the guard at each step. torch's AdamW has counts
            of its own, which must be told (``GuardedStep`` does).
        warmup_steps: of the learning rate; 0 for none.

    Attributes:
        taken: 0-d bool on the device: whether the last update was taken; true before the first. A
            new tensor at each step: who keeps one keeps the answer of that step.
        counts: ``[3]`` fp64 on the device: updates taken, which is the count behind the bias
            correction; updates left out; updates left out since the last that was taken.
    """

    def __init__(
        self, masters: MasterWeights, optimizer: torch.optim.Optimizer, warmup_steps: int = 0
    ):
        device = masters.flats[0].device
        self.masters = masters
        self.warmup_steps = warmup_steps
        self.in_optimizer = isinstance(optimizer, AdamWEMA)
        if isinstance(optimizer, AdamWEMA):
            optimizer.guard = self
        vector = lambda *values: torch.tensor(values, dtype=torch.float64, device=device)
        self.taken = torch.ones((), dtype=torch.bool, device=device)
        self.counts = vector(0, 0, 0)
        # the next counts: the counts times the first, plus the second; or plus this
        self._if_taken = (vector(1, 1, 0), vector(1, 0, 0))
        self._if_not = vector(0, 1, 1)
        # of the loop; None: no one has said
        self._step: int | None = None
        # of the warm-up, once for a step
        self._factor: Tensor | None = None
        self._steps: dict[tuple[float, float], DeviceStep] = {}
        self.load([0.0, 0.0, 0.0])

    @torch.no_grad()
    def load(self, counts: list[float]) -> None:
        """Continue from ``counts``, also in the optimizer's state.

        To be called again when the optimizer's state has been replaced.

        Raises:
            ValueError: ``counts`` are not three whole numbers from 0.
        """
        whole = len(counts) == 3 and all(_is_count(count) for count in counts)
        if not whole or counts[2] > counts[1]:
            raise ValueError(
                "expected the numbers of updates taken, left out, and left out in a row, whole and "
                f"from 0, got {counts}"
            )
        self.counts.copy_(torch.tensor(counts, dtype=torch.float64))
        self.taken = torch.ones_like(self.taken)
        for state in self.masters.optimizer_states():
            if self.in_optimizer:
                # a view: the optimizer's state has the count without a copy or a read
                state["step"] = self.counts[0]
            else:
                state["step"].fill_(counts[0])

    def begin(self, step: int) -> None:
        """Say which step of the loop comes: its 0-based number, as the learning rate's warm-up counts
        it.
        """
        self._step = step
        self._factor = None

    @torch.no_grad()
    def decide(self, norm: Tensor | float) -> Tensor:
        """Decide on the next update, and count it.

        Args:
            norm: of the whole gradient, the same on every rank. It stays on its device.

        Returns:
            ``taken``.
        """
        if not isinstance(norm, Tensor):
            norm = torch.full_like(self.counts[0], norm)
        # some of DeepSpeed's norms are finite where a square, which the second moment adds up, is
        # not; and no NaN is less than infinity
        self.taken = (norm.detach().float().square() < math.inf).reshape(())
        keep, add = self._if_taken
        if_taken = torch.addcmul(add, self.counts, keep)
        torch.where(self.taken, if_taken, self.counts + self._if_not, out=self.counts)
        self._steps = {}
        self._factor = None
        return self.taken

    @torch.no_grad()
    def lr_factor(self) -> Tensor | None:
        """What the learning rate of the next update is to be multiplied by, 0-d fp64; None: by 1.

        The host warms up by steps of the loop. This makes it updates that were taken; 1 exactly if
        none was left out.
        """
        if not self.warmup_steps or self._step is None:
            return None
        if self._factor is None:
            done = self._step + 1
            counted = warm_up(done - self.counts[1], self.warmup_steps)
            self._factor = counted / warm_up(done, self.warmup_steps)
        return self._factor

    def device_step(self, betas: tuple[float, float]) -> DeviceStep:
        """The update that was decided on, as ``ops.adamw_ema_`` takes it; made once for all
        parameters.
        """
        betas = (betas[0], betas[1])
        if betas not in self._steps:
            self._steps[betas] = DeviceStep.of(self.counts[0], betas, self.taken, self.lr_factor())
        return self._steps[betas]

    def ema_decay(self, decay: float) -> Tensor:
        """``decay``, 0-d fp64 on the device; 1 if the last update was not taken."""
        kept = torch.ones_like(self.counts[0])
        return torch.where(self.taken, kept * decay, kept)

    def power_decay(self, gamma: float) -> Tensor:
        """``(1 - 1 / t)^(gamma + 1)`` after the ``t``-th update that was taken, 0-d fp64 on the device
        (EDM2, arXiv 2312.02696, appendix); 1 if the last update was not taken.
        """
        # no update has been taken yet: the power is that of 0, and is not used
        t = self.counts[0].clamp(min=1)
        return torch.where(self.taken, (1 - 1 / t) ** (gamma + 1), torch.ones_like(t))
