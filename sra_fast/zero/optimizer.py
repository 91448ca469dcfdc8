"""The optimizer: torch's AdamW, or AdamW whose pass also updates the EMA and the teacher's copy."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.config.schema import Config
from sra_fast.models import DiffusionTransformer
from sra_fast.ops.adamw_ema import DeviceStep, Gradient

if TYPE_CHECKING:
    from sra_fast.zero.guard import UpdateGuard


class AdamWEMA(torch.optim.Optimizer):
    """AdamW, the EMA of the weights and its low-precision copy in one pass (``ops.adamw_ema_``).

    The state is that of ``torch.optim.AdamW``: either can continue the other's run. Where the state
    of a parameter has an ``"ema"``, that is updated too.

    Args:
        params: fp32 parameters or groups of them.
        lr, betas, eps, weight_decay: as in AdamW.
        ema_decay: of the EMA.

    Attributes:
        clip_scale: one number on the device that multiplies the gradients of the next step, or
            None.
        copies: ``{parameter: bf16 tensor or ops.fp8.Fp8Copy of its size}``, which receives the
            rounded EMA.
        guard: counts the steps and decides which are taken, on the device; None: every step is
            taken and counted on the host.
    """

    def __init__(
        self, params, *, lr: float, betas: tuple, eps: float, weight_decay: float, ema_decay: float
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self.ema_decay = ema_decay
        self.clip_scale: Tensor | None = None
        self.guard: UpdateGuard | None = None
        # the teacher's groups enter themselves here
        self.copies: dict = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)

    def update(self, p: Tensor, grad: Gradient, group: dict, weights: Tensor | None = None) -> None:
        """One step of one parameter.

        Args:
            p: fp32 master weights.
            grad: its gradient, any float dtype.
            group: the settings.
            weights: receives the new value, rounded to its dtype; None: nothing does.
        """
        state = self.state[p]
        # at the first step, as torch.optim.AdamW does
        if "exp_avg" not in state:
            state.update(new_state(p, on_device=False))
        # the kernel rounds to half precision; fp32 weights are copied afterwards
        half = weights is not None and weights.dtype != torch.float32
        # the kernel reads flat memory
        if isinstance(grad, Tensor):
            grad = grad.contiguous()
        ops.adamw_ema_(
            p.data,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._count(state, group),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip_scale=self.clip_scale,
            weights=weights if half else None,
            ema=state.get("ema"),
            ema_copy=self.copies.get(p),
            decay=self.ema_decay,
        )
        if weights is not None and not half:
            weights.copy_(p)

    def _count(self, state: dict, group: dict) -> int | DeviceStep:
        """The number of the step of one parameter."""
        if self.guard is not None:
            return self.guard.device_step(group["betas"])
        state["step"] += 1
        return int(state["step"])


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """The optimizer that holds the state of a DeepSpeed engine. ZeRO wraps it and calls its step;
    stage 0 in fp32 has no wrapper.
    """
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def new_state(p: Tensor, on_device: bool) -> dict[str, Tensor]:
    """AdamW's state before the first step.

    ``on_device``: torch's fused AdamW keeps the step count on the device, the others on the CPU.
    """
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(p.data),
        "exp_avg_sq": torch.zeros_like(p.data),
    }


def make_optimizer(
    cfg: Config, student: DiffusionTransformer, kinds: list[set[str]]
) -> torch.optim.Optimizer:
    """The configured optimizer.

    Args:
        cfg: configuration.
        student: whose parameters are trained.
        kinds: sets of parameter names. Each becomes a parameter group, the other parameters the
            last one. What the teacher keeps in one dtype is a set: its EMA is then one contiguous
            part per rank.
    """
    named = dict(student.named_parameters())
    others = set(named).difference(*kinds)
    # within a group the order is the model's: ZeRO flattens in it, and checkpoints depend on it
    groups = [[p for name, p in named.items() if name in names] for names in (*kinds, others)]
    groups = [{"params": group} for group in groups if group]
    optim = cfg.optim
    settings = {
        "lr": optim.lr,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.implementation == "torch":
        # its fused form leaves a step out on the device, also on a CPU (see ``GuardedStep``)
        return torch.optim.AdamW(groups, fused=True, **settings)
    return AdamWEMA(groups, ema_decay=cfg.train.ema_decay, **settings)


def clip_factor(norm: Tensor, limit: float) -> Tensor | None:
    """``min(1, limit / norm)`` on the device, None without a limit."""
    if not limit:
        return None
    # 1e-6 as in torch.nn.utils.clip_grad_norm_; a NaN stays a NaN, which the logger reports
    return (limit / (norm + 1e-6)).clamp(max=1.0).float()
