"""The optimizer: torch's AdamW, or AdamW whose pass over the weights also updates the EMA and the teacher's copy of it."""
import deepspeed.comm as dist
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from sra_fast import ops
from sra_fast.engine.config import Config
from sra_fast.models import SiT


class AdamWEMA(torch.optim.Optimizer):
    """AdamW, the EMA of the weights and its low-precision copy in one pass over the memory (``ops.adamw_ema_``).

    The state is that of ``torch.optim.AdamW``, either can continue the other's run, and ``"ema"``, where one was put there.

    Args:
        params: fp32 parameters or groups of them.
        lr, betas, eps, weight_decay: as in AdamW.
        ema_decay: of the EMA.

    Attributes:
        clip_scale: one number on the device that multiplies the gradients of the next step, or None.
        copies: ``{parameter: bf16 tensor of its size}``, which receives the rounded EMA.
    """

    def __init__(self, params, *, lr: float, betas: tuple, eps: float, weight_decay: float, ema_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.ema_decay, self.clip_scale, self.copies = ema_decay, None, {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)

    def update(self, p: Tensor, grad: Tensor, group: dict, weights: Tensor | None = None) -> None:
        """One step of ``p`` with ``grad`` (any float dtype); ``weights`` receives the result in its own dtype."""
        state = self.state[p]
        if "exp_avg" not in state:
            state.update(new_state(p, on_device=False))
        state["step"] += 1
        low = weights is not None and weights.dtype != torch.float32
        ops.adamw_ema_(
            p.data, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], int(state["step"]), lr=group["lr"],
            betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], clip_scale=self.clip_scale,
            weights=weights if low else None, ema=state.get("ema"), ema_copy=self.copies.get(p), decay=self.ema_decay,
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


def make_optimizer(cfg: Config, student: SiT, teacher_names: set[str], cuda: bool) -> torch.optim.Optimizer:
    """The configured optimizer with the teacher's parameters as the first group: their EMA is one contiguous part per rank."""
    groups = [[], []]
    for name, p in student.named_parameters():
        groups[name not in teacher_names].append(p)
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
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if optimizer is wrapper:  # stage 0 in fp32: no DeepSpeed optimizer has computed the norm
            wrapper.grad_norm = torch.nn.utils.get_total_norm(gradients)
        scale = clip_factor(wrapper.grad_norm if optimizer is wrapper else wrapper._global_grad_norm, limit)
        if isinstance(optimizer, AdamWEMA):
            optimizer.clip_scale = scale
        elif limit:
            torch._foreach_mul_(gradients, scale)

    getattr(wrapper, "optimizer", wrapper).register_step_pre_hook(hook)


class OnePassStep:
    """Takes the place of ``step`` of DeepSpeed's ZeRO-1/2 optimizer: flatten, norm, one pass per group, all-gather.

    DeepSpeed's own converts every gradient to fp32 twice (for the norm and for the optimizer), scales it in a pass of its
    own, and rounds the weights in another: about 102 bytes per parameter, EMA included, against 46 here.

    Args:
        engine: stage 1 or 2, with an ``AdamWEMA``.
        limit: of the global gradient norm, 0 for none.

    Raises:
        RuntimeError: this version of DeepSpeed keeps its gradients elsewhere.
    """

    NEEDS = ("averaged_gradients", "all_grad_tensors", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups",
             "bit16_groups", "real_dp_process_group", "nccl_start_alignment_factor", "allgather_bucket_size",
             "free_grad_in_param_list", "_release_preflattened_grad_buffers", "flatten", "micro_step_id", "overflow", "_lazy_init_hp_params_optimizer_state")

    def __init__(self, engine, limit: float):
        self.zero, self.limit = engine.optimizer, limit
        missing = [name for name in self.NEEDS if not hasattr(self.zero, name)]
        if missing:
            raise RuntimeError(
                f"optim.implementation fused needs DeepSpeed 0.19's ZeRO optimizer, this one lacks {missing}: set it to torch"
            )
        self.zero.step = self

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        zero.micro_step_id, zero.overflow = -1, False  # -1: no micro-step yet
        gradients = [self._flat_gradient(i) for i in range(len(zero.bit16_groups))]
        zero._global_grad_norm = self._norm(gradients)
        adamw = zero.optimizer
        adamw.clip_scale = clip_factor(zero._global_grad_norm, self.limit)
        for i, group in enumerate(adamw.param_groups):
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            master, weights = zero.single_partition_of_fp32_groups[i], zero.parallel_partitioned_bit16_groups[i][rank]
            adamw.update(master, gradients[i], group, weights)
            gradients[i] = None
        zero._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat, partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group, start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _flat_gradient(self, i: int) -> Tensor:
        """This rank's part of group i's gradient, 1-d; the parameters' own gradients are freed."""
        zero = self.zero
        gradients = zero.averaged_gradients[i]
        flat = getattr(gradients, "flat_partition", None)  # there already where fp32 accumulates bf16 gradients
        flat = zero.flatten(gradients) if flat is None else flat.view(-1)
        expected = zero.single_partition_of_fp32_groups[i].numel()
        if flat.numel() != expected:
            raise RuntimeError(f"DeepSpeed left {flat.numel()} gradients for a partition of {expected}: unsupported version?")
        zero._release_preflattened_grad_buffers(i)
        zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None
        zero.free_grad_in_param_list(zero.bit16_groups[i])
        return flat

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the whole gradient, fp32, on the device; NaN stays NaN."""
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        squared = norms.square().sum()
        dist.all_reduce(squared, group=self.zero.dp_process_group)
        return squared.sqrt()
