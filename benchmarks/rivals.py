"""The operators in plain PyTorch, in the dtype of the inputs, and the LayerNorms of packages that may be installed."""

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
# larger than in training, so that a term which is missing shows in fp32; the time does not depend on them
DECAY = 0.99
STEP = 10
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: Callable | None = None) -> Tensor:
    xhat = F.layer_norm(x, x.shape[-1:], eps=EPS) if norm is None else norm(x)
    return modulate(xhat, shift, scale)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: Callable | None = None
) -> tuple[Tensor, Tensor]:
    x = gated_residual(x, y, gate)
    return x, adaln(x, shift, scale, norm)


def adaln_linear(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys and values."""
    x, h = gated_residual_adaln(x, y, gate, shift, scale)
    return x, *F.linear(h, weight, bias).chunk(3, dim=2)


def adaln_mlp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> tuple[Tensor, Tensor]:
    x, h = gated_residual_adaln(x, y, gate, shift, scale)
    return x, F.linear(F.gelu(F.linear(h, w1, b1), approximate="tanh"), w2, b2)


def noise_pair(
    x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    t, t_teacher = (s.view(-1, 1, 1, 1) for s in (t, t_teacher))
    return (1 - t) * x0 + t * noise, (1 - t_teacher) * x0 + t_teacher * noise, noise - x0


def align_distance(pred: Tensor, target: Tensor) -> Tensor:
    # autocast computes losses in fp32, so a training loop does too
    return F.smooth_l1_loss(pred.float(), target.float(), beta=0.05, reduction="none").mean((1, 2))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    v = F.gelu(x, approximate="tanh")
    scale = v.abs().amax(-1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (v / scale).to(torch.float8_e4m3fn), scale


def attention(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


@torch.no_grad()
def ema_update(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor], scratch: list[Tensor]
) -> None:
    # _foreach_lerp_ takes one dtype: the parameters are widened first
    torch._foreach_copy_(scratch, params)
    torch._foreach_lerp_(ema, scratch, 1 - DECAY)
    torch._foreach_copy_(copies, ema)


@torch.no_grad()
def adamw_ema(
    flat: list[Tensor], clip_scale: Tensor, split: list[list[Tensor]], steps: list[Tensor]
) -> None:
    """Clip, the fused AdamW of torch.optim, the bf16 weights, the EMA and its copy over the list of parameters."""
    params, grads, exp_avgs, exp_avg_sqs, weights, ema, copies = split
    beta1, beta2 = ADAMW["betas"]
    numbers = {name: ADAMW[name] for name in ("lr", "weight_decay", "eps")}
    # the product goes to the optimizer alone: the gradients must be the same in the next repetition
    clipped = torch._foreach_mul(grads, clip_scale)
    torch._fused_adamw_(
        params, clipped, exp_avgs, exp_avg_sqs, [], steps, **numbers, beta1=beta1, beta2=beta2, amsgrad=False,
        maximize=False,
    )  # fmt: skip
    torch._foreach_copy_(weights, params)
    torch._foreach_lerp_(ema, params, 1 - DECAY)
    torch._foreach_copy_(copies, ema)


@torch.no_grad()
def adamw_ema_flat(
    flat: list[Tensor], clip_scale: Tensor, split: list[list[Tensor]], steps: list[Tensor]
) -> None:
    """The same over flat buffers, which a compiler can fuse into one pass."""
    param, grad, exp_avg, exp_avg_sq, weights, ema, copy = flat
    (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
    grad = grad * clip_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**STEP) ** 0.5 + ADAMW["eps"]
    param.mul_(1 - lr * ADAMW["weight_decay"]).addcdiv_(
        exp_avg, denominator, value=-lr / (1 - beta1**STEP)
    )
    weights.copy_(param)
    ema.lerp_(param, 1 - DECAY)
    copy.copy_(ema)


@functools.cache
def _constant(value: float, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((D,), value, dtype=dtype, device=device)


def _apex_norm() -> Callable:
    # PyPI's package of this name is another project and has no such module
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm
    return lambda x: norm(x, x.shape[-1:], EPS)


def _liger_norm() -> Callable:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    # its norm always has an affine part, so it gets the neutral one
    affine = lambda x: [_constant(value, x.shape[-1], x.dtype, x.device) for value in (1.0, 0.0)]
    return lambda x: function.apply(x, *affine(x), EPS)


def _quack_norm() -> Callable:
    norm = importlib.import_module("quack.layernorm").layernorm
    weight = lambda x: _constant(1.0, x.shape[-1], torch.float32, x.device)
    return lambda x: norm(x.flatten(0, 1), weight(x), eps=EPS).view(x.shape)


_NORMS = {"apex": _apex_norm, "liger": _liger_norm, "quack": _quack_norm}


def installed_norms() -> dict[str, Callable]:
    """LayerNorm of every package that is installed; the modulation around it stays PyTorch's."""
    found = {}
    for name, load in _NORMS.items():
        try:
            found[name] = load()
        except Exception as error:  # a build for another torch fails in many ways; no rival then
            if not isinstance(error, ModuleNotFoundError):
                print(f"{name} is installed but cannot be used: {str(error).partition(chr(10))[0]}")
    return found
