"""The optimizer steps that are not fused: DeepSpeed's own and torch's, clipped and guarded.

Some of DeepSpeed's steps read the norm on the host (stage 3, stages 1 and 2 in fp32, stage 0 in
bf16, fp32 accumulation at stage 1) and return early if it is not finite. The others, and torch's,
go on: there the optimizer itself leaves the update out, on the device.
"""

import math

import torch
from torch import Tensor

from sra_fast.zero.guard import UpdateGuard
from sra_fast.zero.optimizer import AdamWEMA, clip_factor, inner_optimizer


class GuardedStep:
    """Calls the ``step`` of the engine's optimizer, and decides before the first parameter changes.

    Args:
        engine: DeepSpeed's, whose optimizer's ``step`` becomes this object.
        limit: of the gradient norm, scaled by min(1, limit / norm) on the device; 0: none, or
            DeepSpeed clips.
        guard: of the run.
    """

    def __init__(self, engine, limit: float, guard: UpdateGuard):
        self.wrapper = engine.optimizer
        self.optimizer = inner_optimizer(engine)
        self.limit = limit
        self.guard = guard
        self.original = self.wrapper.step
        self.decided = False
        self.scale: Tensor | None = None
        self.optimizer.register_step_pre_hook(self._before)
        # an attribute of the instance hides the method of the class
        self.wrapper.step = self

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        self.decided = False
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = self.guard.lr_factor()
        if factor is not None and not isinstance(self.optimizer, AdamWEMA):
            # torch's CUDA kernel reads fp32
            dtype = torch.float32 if factor.is_cuda else torch.float64
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = (factor * rate).to(dtype)
        try:
            self.original()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        if not self.decided:
            # DeepSpeed has read a norm that is not finite, and cleared the gradients
            self.guard.decide(math.inf)
        if hasattr(self.wrapper, "overflow"):
            # the step counts as applied, as where nobody has looked
            self.wrapper.overflow = False

    def _before(self, optimizer, args, kwargs) -> None:
        """Before the optimizer's step, which DeepSpeed calls once for each of its groups."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not self.decided:
            self._decide(gradients)
        if self.scale is not None and not isinstance(optimizer, AdamWEMA):
            torch._foreach_mul_(gradients, self.scale)

    def _decide(self, gradients: list[Tensor]) -> None:
        """Once in a step; ``gradients``: those of the first group."""
        if self.optimizer is self.wrapper:
            # stage 0 in fp32, one group: no optimizer of DeepSpeed has computed the norm
            norm = torch.nn.utils.get_total_norm(gradients)
            self.wrapper.grad_norm = norm
        else:
            norm = self.wrapper._global_grad_norm
        self.decided = True
        taken = self.guard.decide(norm)
        self.scale = clip_factor(norm, self.limit) if self.limit else None
        if isinstance(self.optimizer, AdamWEMA):
            # its pass multiplies while it reads: no second pass over the gradients
            self.optimizer.clip_scale = self.scale
        else:
            # as GradScaler tells it: torch's fused AdamW then changes nothing and does not count
            self.optimizer.found_inf = (~taken).float()
