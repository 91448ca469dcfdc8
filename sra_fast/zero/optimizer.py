"""The optimizer: torch's AdamW, or AdamW whose pass over the weights also updates the EMA and the teacher's copy of it."""

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.config.schema import Config
from sra_fast.models import SiT
from sra_fast.ops.adamw_ema import Gradient


class AdamWEMA(torch.optim.Optimizer):
    """AdamW, the EMA of the weights and its low-precision copy in one pass over the memory (``ops.adamw_ema_``).

    The state is that of ``torch.optim.AdamW``, either can continue the other's run, and ``"ema"``, where one was put there.

    Args:
        params: fp32 parameters or groups of them.
        lr, betas, eps, weight_decay: as in AdamW.
        ema_decay: of the EMA.

    Attributes:
        clip_scale: one number on the device that multiplies the gradients of the next step, or None.
        copies: ``{parameter: bf16 tensor or ops.fp8.Fp8Copy of its size}``, which receives the rounded EMA.
    """

    def __init__(
        self, params, *, lr: float, betas: tuple, eps: float, weight_decay: float, ema_decay: float
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.ema_decay, self.clip_scale, self.copies = ema_decay, None, {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)

    def update(self, p: Tensor, grad: Gradient, group: dict, weights: Tensor | None = None) -> None:
        """One step of ``p`` with ``grad`` (any float dtype); ``weights`` receives the result in its own dtype."""
        state = self.state[p]
        if "exp_avg" not in state:
            state.update(new_state(p, on_device=False))
        state["step"] += 1
        low = weights is not None and weights.dtype != torch.float32
        grad = grad.contiguous() if isinstance(grad, Tensor) else grad
        ops.adamw_ema_(
            p.data,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip_scale=self.clip_scale,
            weights=weights if low else None,
            ema=state.get("ema"),
            ema_copy=self.copies.get(p),
            decay=self.ema_decay,
        )
        if weights is not None and not low:
            weights.copy_(p)


def new_state(p: Tensor, on_device: bool) -> dict[str, Tensor]:
    """AdamW's state before the first step, with the step count where AdamW's variants keep it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(p.data),
        "exp_avg_sq": torch.zeros_like(p.data),
    }


def make_optimizer(
    cfg: Config, student: SiT, kinds: list[set[str]], cuda: bool
) -> torch.optim.Optimizer:
    """The configured optimizer; its first groups are the parameters named in ``kinds``, the last one holds the others.

    What the teacher keeps in one dtype is a group, so that its EMA is one contiguous part per rank.
    """
    groups = [[] for _ in (*kinds, "others")]
    for name, p in student.named_parameters():
        groups[next((i for i, names in enumerate(kinds) if name in names), len(kinds))].append(p)
    groups, o = [{"params": group} for group in groups if group], cfg.optim
    settings = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    if o.implementation == "torch":
        return torch.optim.AdamW(groups, fused=cuda, **settings)
    return AdamWEMA(groups, ema_decay=cfg.train.ema_decay, **settings)


def clip_factor(norm: Tensor, limit: float) -> Tensor | None:
    """``min(1, limit / norm)`` on the device, None without a limit."""
    return (limit / (norm + 1e-6)).clamp(max=1.0).float() if limit else None


def clip_before_step(engine, limit: float) -> None:
    """Scale the gradients by min(1, limit / norm) on the device, as a hook of the optimizer that DeepSpeed steps."""
    wrapper = engine.optimizer

    def hook(optimizer, args, kwargs):
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if optimizer is wrapper:  # stage 0 in fp32: no DeepSpeed optimizer has computed the norm
            wrapper.grad_norm = torch.nn.utils.get_total_norm(gradients)
        scale = clip_factor(
            wrapper.grad_norm if optimizer is wrapper else wrapper._global_grad_norm, limit
        )
        if isinstance(optimizer, AdamWEMA):
            optimizer.clip_scale = scale
        elif limit:
            torch._foreach_mul_(gradients, scale)

    getattr(wrapper, "optimizer", wrapper).register_step_pre_hook(hook)
