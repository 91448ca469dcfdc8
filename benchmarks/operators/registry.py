"""Every operator that is measured. Adding one takes one entry here, and nothing in any other file.

An entry has (``entry.Operator`` describes every field):
    1. a plain PyTorch form of the operator, written above the entry: the rival, eager and compiled;
    2. ``make``, its inputs, from ``inputs.py`` or a function here;
    3. ``ours``, the public call, and ``reference``, the operator's ``_ref``;
    4. ``bytes`` (or ``flops`` if arithmetic is the limit), the least that it needs;
    5. ``grads``, or ``written`` if it works in place: without them only a forward pass is measured.

Bytes count every input read once and every output written once, without partial sums, as the
docstrings in kernels/ do. So a percentage of the copy bandwidth refers to what the operator needs,
whichever implementation ran.

The order is that of a run and of the table in docs/benchmarks.md: most valuable first.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators import inputs
from benchmarks.operators.entry import EPS, Operator, attention_flops, product_flops, row_bytes
from benchmarks.operators.shapes import Shape, num_parameters, shapes_in_order
from sra_fast import ops
from sra_fast.ops._backend import use_triton
from sra_fast.ops.adaln import adaln_ref
from sra_fast.ops.adamw_ema import adamw_ema_ref_
from sra_fast.ops.align_distance import align_distance_ref
from sra_fast.ops.attention import attention_ref
from sra_fast.ops.concat_columns import concat_columns, concat_columns_ref
from sra_fast.ops.ema_update import ema_update_ref_
from sra_fast.ops.gated_residual import gated_residual_ref
from sra_fast.ops.gated_residual_adaln import gated_residual_adaln_ref
from sra_fast.ops.gated_residual_norm import gated_residual_norm_ref
from sra_fast.ops.gelu import gelu_bwd, gelu_bwd_ref
from sra_fast.ops.linear_gelu import linear_gelu_ref
from sra_fast.ops.linear_swiglu import linear_swiglu_ref
from sra_fast.ops.noise_pair import noise_pair_ref
from sra_fast.ops.qk_norm_rope import qk_norm_rope_ref
from sra_fast.ops.quantize_rows import quantize_rows, quantize_rows_ref
from sra_fast.ops.swiglu import run_swiglu, swiglu_ref

# larger than in training: a term that is missing then shows in fp32; the time does not depend on them
DECAY = 0.99
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

OPERATORS: dict[str, Operator] = {}


# the gated residual and the adaptive norm after it, in one pass


def plain_adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: Callable | None = None) -> Tensor:
    xhat = F.layer_norm(x, x.shape[-1:], eps=EPS) if norm is None else norm(x)
    return xhat * (1 + scale[:, None]) + shift[:, None]


def plain_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def plain_gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: Callable | None = None
) -> tuple[Tensor, Tensor]:
    x = plain_gated_residual(x, y, gate)
    return x, plain_adaln(x, shift, scale, norm)


OPERATORS["gated_residual_adaln"] = Operator(
    make=functools.partial(inputs.rows, arrays=2, vectors=3),
    ours=lambda *inputs: ops.gated_residual_adaln(*inputs, EPS),
    reference=lambda *inputs: gated_residual_adaln_ref(*inputs, EPS),
    eager=plain_gated_residual_adaln,
    # forward: x, y, the new stream, the normed rows; gate, shift, scale; mean and rstd
    bytes=row_bytes(forward=(4, 3), backward=(6, 5), per_token=8),
    grads=(0, 1, 2, 3, 4),
    with_norm=True,
)


# the optimizer's pass over flat buffers: clip, AdamW, rounded weights, EMA, the teacher's copy


@torch.no_grad()
def plain_adamw_ema(
    flat: list[Tensor], clip_scale: Tensor, split: list[list[Tensor]], steps: list[Tensor]
) -> None:
    """torch.optim's fused AdamW and foreach kernels, on lists of parameters."""
    params, grads, exp_avgs, exp_avg_sqs, weights, ema, copies = split
    beta1, beta2 = ADAMW["betas"]
    numbers = {name: ADAMW[name] for name in ("lr", "weight_decay", "eps")}
    # not in place: the gradients must be the same in the next repetition
    clipped = torch._foreach_mul(grads, clip_scale)
    torch._fused_adamw_(
        params,
        clipped,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        **numbers,
        beta1=beta1,
        beta2=beta2,
        amsgrad=False,
        maximize=False,
    )
    torch._foreach_copy_(weights, params)
    torch._foreach_lerp_(ema, params, 1 - DECAY)
    torch._foreach_copy_(copies, ema)


@torch.no_grad()
def plain_adamw_ema_flat(
    flat: list[Tensor], clip_scale: Tensor, split: list[list[Tensor]], steps: list[Tensor]
) -> None:
    """The same on flat buffers, which a compiler can fuse into one pass."""
    param, grad, exp_avg, exp_avg_sq, weights, ema, copy = flat
    beta1, beta2 = ADAMW["betas"]
    lr = ADAMW["lr"]
    grad = grad * clip_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**inputs.STEP) ** 0.5 + ADAMW["eps"]
    step_size = lr / (1 - beta1**inputs.STEP)
    param.mul_(1 - lr * ADAMW["weight_decay"]).addcdiv_(exp_avg, denominator, value=-step_size)
    weights.copy_(param)
    ema.lerp_(param, 1 - DECAY)
    copy.copy_(ema)


def _adamw_ema(function: Callable, flat: list[Tensor], clip_scale: Tensor) -> None:
    """Call the operator, or its definition, on the inputs."""
    param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy = flat
    function(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        inputs.STEP,
        **ADAMW,
        weights=weights,
        ema=ema,
        ema_copy=ema_copy,
        clip_scale=clip_scale,
        decay=DECAY,
    )


OPERATORS["adamw_ema_"] = Operator(
    make=inputs.flat_buffers,
    ours=lambda flat, clip_scale, *_: _adamw_ema(ops.adamw_ema_, flat, clip_scale),
    reference=lambda flat, clip_scale, *_: _adamw_ema(adamw_ema_ref_, flat, clip_scale),
    eager=plain_adamw_ema,
    to_compile=plain_adamw_ema_flat,
    # four fp32 buffers read and written, the gradient read, two half-precision buffers written
    bytes=lambda shape, element_size: (40 * num_parameters(shape), 0),
    elements=num_parameters,
    written=(0,),
)


# half a block: the pass above and the products after it


def plain_adaln_mlp(
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
    x, h = plain_gated_residual_adaln(x, y, gate, shift, scale)
    return x, F.linear(F.gelu(F.linear(h, w1, b1), approximate="tanh"), w2, b2)


def plain_adaln_linear(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """The new stream, queries, keys and values."""
    x, h = plain_gated_residual_adaln(x, y, gate, shift, scale)
    return x, *F.linear(h, weight, bias).chunk(3, dim=2)


def _adaln_mlp(
    backend: str | None, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *layers
) -> tuple[Tensor, Tensor]:
    return ops.adaln_mlp(x, shift, scale, *layers, eps=EPS, residual=(y, gate), backend=backend)


def _adaln_linear(
    backend: str | None, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *layer
) -> tuple[Tensor, ...]:
    x, heads = ops.adaln_linear(
        x, shift, scale, *layer, parts=3, eps=EPS, residual=(y, gate), backend=backend
    )
    return x, *heads


OPERATORS["adaln_mlp"] = Operator(
    make=functools.partial(inputs.half_block, mlp=True),
    ours=functools.partial(_adaln_mlp, None),
    reference=functools.partial(_adaln_mlp, "torch"),
    eager=plain_adaln_mlp,
    flops=product_flops(forward=8, backward=16),
    grads=tuple(range(9)),
)

OPERATORS["adaln_linear"] = Operator(
    make=functools.partial(inputs.half_block, mlp=False),
    ours=functools.partial(_adaln_linear, None),
    reference=functools.partial(_adaln_linear, "torch"),
    eager=plain_adaln_linear,
    flops=product_flops(forward=3, backward=6),
    grads=tuple(range(7)),
)


# the EMA over a list of parameters


@torch.no_grad()
def plain_ema_update(
    ema: list[Tensor], params: list[Tensor], copies: list[Tensor], scratch: list[Tensor]
) -> None:
    # _foreach_lerp_ takes one dtype, so the parameters are widened first
    torch._foreach_copy_(scratch, params)
    torch._foreach_lerp_(ema, scratch, 1 - DECAY)
    torch._foreach_copy_(copies, ema)


OPERATORS["ema_update_"] = Operator(
    make=inputs.parameter_lists,
    ours=lambda ema, params, copies, _: ops.ema_update_(ema, params, DECAY, copies),
    reference=lambda ema, params, copies, _: ema_update_ref_(ema, params, DECAY, copies),
    eager=plain_ema_update,
    # the EMA read and written in fp32, its copy written in half precision, the parameter read
    bytes=lambda shape, element_size: ((8 + 2 + element_size) * num_parameters(shape), 0),
    elements=num_parameters,
    written=(0, 2),
    compiles=False,
)


# parts of the half-block

OPERATORS["adaln"] = Operator(
    make=functools.partial(inputs.rows, arrays=1, vectors=2),
    ours=lambda *inputs: ops.adaln(*inputs, EPS),
    reference=lambda *inputs: adaln_ref(*inputs, EPS),
    eager=plain_adaln,
    bytes=row_bytes(forward=(2, 2), backward=(3, 3), per_token=8),
    grads=(0, 1, 2),
    with_norm=True,
)


def plain_align_distance(pred: Tensor, target: Tensor) -> Tensor:
    # autocast computes losses in fp32, so a training loop does as well
    distance = F.smooth_l1_loss(pred.float(), target.float(), beta=0.05, reduction="none")
    return distance.mean((1, 2))


OPERATORS["align_distance"] = Operator(
    make=functools.partial(inputs.rows, arrays=2, vectors=0),
    ours=lambda pred, target: ops.align_distance(pred, target, "smooth_l1"),
    reference=lambda pred, target: align_distance_ref(pred, target, "smooth_l1"),
    eager=plain_align_distance,
    # forward writes the gradient too
    bytes=row_bytes(forward=(3, 0), backward=(2, 0), per_token=4),
    grads=(0,),
)

OPERATORS["gated_residual"] = Operator(
    make=functools.partial(inputs.rows, arrays=2, vectors=1),
    # looked up at every call, so that a test can replace it
    ours=lambda *inputs: ops.gated_residual(*inputs),
    reference=gated_residual_ref,
    eager=plain_gated_residual,
    bytes=row_bytes(forward=(3, 1), backward=(3, 2)),
    grads=(0, 1, 2),
)


# the sandwich norm: the branch is normed before it is added


def plain_gated_residual_norm(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return x + gate[:, None] * F.rms_norm(y, y.shape[-1:], weight, eps=EPS)


def _gated_residual_norm(
    function: Callable, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor
) -> Tensor:
    """Call the operator, or its definition, on the inputs."""
    return function(x, y, gate, EPS, norm_weight=weight)


OPERATORS["gated_residual_norm"] = Operator(
    make=inputs.rows_and_weight,
    ours=lambda *inputs: _gated_residual_norm(ops.gated_residual_norm, *inputs),
    reference=functools.partial(_gated_residual_norm, gated_residual_norm_ref),
    eager=plain_gated_residual_norm,
    bytes=row_bytes(forward=(3, 1), backward=(3, 2), per_token=4),
    grads=(0, 1, 2, 3),
)


# one vector per token


def plain_adaln_per_token(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def plain_gated_residual_adaln_per_token(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = x + gate * y
    return x, plain_adaln_per_token(x, shift, scale)


OPERATORS["gated_residual_adaln_per_token"] = Operator(
    make=functools.partial(inputs.rows_per_token, arrays=2, vectors=3),
    ours=lambda *inputs: ops.gated_residual_adaln(*inputs, EPS),
    reference=lambda *inputs: gated_residual_adaln_ref(*inputs, EPS),
    eager=plain_gated_residual_adaln_per_token,
    bytes=row_bytes(forward=(7, 0), backward=(10, 0), per_token=8),
    grads=(0, 1, 2, 3, 4),
)

OPERATORS["adaln_per_token"] = Operator(
    make=functools.partial(inputs.rows_per_token, arrays=1, vectors=2),
    ours=lambda *inputs: ops.adaln(*inputs, EPS),
    reference=lambda *inputs: adaln_ref(*inputs, EPS),
    eager=plain_adaln_per_token,
    bytes=row_bytes(forward=(4, 0), backward=(5, 0), per_token=8),
    grads=(0, 1, 2),
)


# vectors per token that a table is added to, in fp32 as in Wan 2.2


def plain_gated_residual_adaln_table(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate_table: Tensor,
    shift_table: Tensor,
    scale_table: Tensor,
) -> tuple[Tensor, Tensor]:
    gate = gate_table + gate.float()
    shift = shift_table + shift.float()
    scale = scale_table + scale.float()
    x = (x.float() + y * gate).type_as(x)
    return x, plain_adaln_per_token(x.float(), shift, scale).type_as(x)


def _gated_residual_adaln_table(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Call the operator, or its definition, on the inputs."""
    x, y, *vectors = inputs
    return function(x, y, *zip(vectors[:3], vectors[3:], strict=True), EPS)


OPERATORS["gated_residual_adaln_table"] = Operator(
    make=inputs.rows_and_tables,
    ours=lambda *inputs: _gated_residual_adaln_table(ops.gated_residual_adaln, *inputs),
    reference=functools.partial(_gated_residual_adaln_table, gated_residual_adaln_ref),
    eager=plain_gated_residual_adaln_table,
    # the tables are three rows for all tokens
    bytes=row_bytes(forward=(7, 0), backward=(10, 0), per_token=8),
    grads=(0, 1, 2, 3, 4, 5, 6, 7),
)


# two vectors per image, and the group of each token, as where an image has two noise levels


def plain_gated_residual_adaln_groups(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, group: Tensor
) -> tuple[Tensor, Tensor]:
    index = group.long()[..., None].expand_as(x)
    gate, shift, scale = (vectors.gather(1, index) for vectors in (gate, shift, scale))
    return plain_gated_residual_adaln_per_token(x, y, gate, shift, scale)


def _gated_residual_adaln_groups(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Call the operator, or its definition, on the inputs."""
    *rows, group = inputs
    return function(*rows, EPS, group=group)


OPERATORS["gated_residual_adaln_groups"] = Operator(
    make=inputs.rows_of_groups,
    ours=lambda *inputs: _gated_residual_adaln_groups(ops.gated_residual_adaln, *inputs),
    reference=functools.partial(_gated_residual_adaln_groups, gated_residual_adaln_ref),
    eager=plain_gated_residual_adaln_groups,
    # two vectors in place of each one; mean, rstd and the group of a token
    bytes=row_bytes(forward=(4, 6), backward=(6, 10), per_token=12),
    grads=(0, 1, 2, 3, 4),
)


# one norm with two modulations, for two attentions of one block


def plain_gated_residual_adaln_two(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, shift2: Tensor, scale2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = plain_gated_residual(x, y, gate)
    xhat = F.layer_norm(x, x.shape[-1:], eps=EPS)
    h = xhat * (1 + scale[:, None]) + shift[:, None]
    return x, h, xhat * (1 + scale2[:, None]) + shift2[:, None]


def _gated_residual_adaln_two(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator, or its definition, on the inputs."""
    *first, shift2, scale2 = inputs
    return function(*first, EPS, second=(shift2, scale2))


OPERATORS["gated_residual_adaln_two"] = Operator(
    make=functools.partial(inputs.rows, arrays=2, vectors=5),
    ours=lambda *inputs: _gated_residual_adaln_two(ops.gated_residual_adaln, *inputs),
    reference=functools.partial(_gated_residual_adaln_two, gated_residual_adaln_ref),
    eager=plain_gated_residual_adaln_two,
    bytes=row_bytes(forward=(5, 5), backward=(7, 8), per_token=8),
    grads=(0, 1, 2, 3, 4, 5, 6),
)


# passes inside the backward of a half-block


def plain_gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    return dx, dx.sum(0)


def _gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    backward = gelu_bwd if use_triton("gelu_bwd", x, None) else gelu_bwd_ref
    dx, dbias, _ = backward(dy, x, False)
    return dx, dbias


def _gelu_bytes(shape: Shape, element_size: int) -> tuple[int, int]:
    """Both inputs read, the gradient and that of the bias written."""
    D = shape.sizes[1]
    return element_size * (3 * 4 * shape.elements + 4 * D), 0


OPERATORS["gelu"] = Operator(
    make=inputs.hidden_pair,
    ours=_gelu_backward,
    reference=lambda dy, x: gelu_bwd_ref(dy, x, False)[:2],
    eager=plain_gelu_backward,
    bytes=_gelu_bytes,
    elements=lambda shape: 4 * shape.elements,
)


def plain_swiglu(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def _swiglu_bytes(shape: Shape, element_size: int) -> tuple[int, int]:
    """Forward: halves, hidden layer. Backward: its gradient, halves read, halves written."""
    hidden = 4 * shape.elements * element_size
    return 3 * hidden, 5 * hidden


OPERATORS["swiglu"] = Operator(
    make=inputs.hidden_halves,
    ours=lambda x: run_swiglu("swiglu", x, None),
    reference=swiglu_ref,
    eager=plain_swiglu,
    bytes=_swiglu_bytes,
    elements=lambda shape: 4 * shape.elements,
    grads=(0,),
)


def plain_concat_columns(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.cat([q, k, v], dim=1)
    return out, out.sum(0)


def _concat_columns(*parts: Tensor) -> tuple[Tensor, Tensor]:
    concatenate = (
        concat_columns if use_triton("concat_columns", parts[0], None) else concat_columns_ref
    )
    return concatenate(list(parts))


def _concat_bytes(shape: Shape, element_size: int) -> tuple[int, int]:
    """Every element read and written once, and the sums of the columns written."""
    D = shape.sizes[1]
    return element_size * 3 * (2 * shape.elements + D), 0


OPERATORS["concat_columns"] = Operator(
    make=inputs.three_matrices,
    ours=_concat_columns,
    reference=lambda *parts: concat_columns_ref(list(parts)),
    eager=plain_concat_columns,
    bytes=_concat_bytes,
    elements=lambda shape: 3 * shape.elements,
)


# operators of the teacher, which has no backward pass


def plain_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    v = F.gelu(x, approximate="tanh")
    scale = v.abs().amax(-1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (v / scale).to(torch.float8_e4m3fn), scale


def _quantize_bytes(shape: Shape, element_size: int) -> tuple[int, int]:
    """Hidden activations read, e4m3 values and one fp32 scale per token written."""
    T = shape.sizes[0]
    return (element_size + 1) * 4 * shape.elements + 4 * shape.batch * T, 0


OPERATORS["quantize_rows"] = Operator(
    make=inputs.hidden,
    ours=lambda x: quantize_rows(x, gelu=True),
    reference=lambda x: quantize_rows_ref(x, gelu=True),
    eager=plain_quantize_rows,
    bytes=_quantize_bytes,
    elements=lambda shape: 4 * shape.elements,
)

OPERATORS["linear_gelu"] = Operator(
    make=inputs.linear,
    ours=lambda *inputs: ops.linear_gelu(*inputs),
    reference=linear_gelu_ref,
    eager=linear_gelu_ref,
    flops=product_flops(forward=4, backward=0),
    elements=lambda shape: 4 * shape.elements,
)


def plain_linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_swiglu(F.linear(x, weight, bias))


OPERATORS["linear_swiglu"] = Operator(
    make=inputs.linear_halves,
    ours=lambda *inputs: ops.linear_swiglu(*inputs),
    reference=linear_swiglu_ref,
    eager=plain_linear_swiglu,
    flops=product_flops(forward=8, backward=16),
    elements=lambda shape: 4 * shape.elements,
    grads=(0, 1, 2),
)


# the noisy inputs of student and teacher, and the velocity


def plain_noise_pair(
    x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    t = t.view(-1, 1, 1, 1)
    t_teacher = t_teacher.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise, (1 - t_teacher) * x0 + t_teacher * noise, noise - x0


OPERATORS["noise_pair"] = Operator(
    make=inputs.noise,
    ours=lambda *inputs: ops.noise_pair(*inputs),
    reference=noise_pair_ref,
    eager=plain_noise_pair,
    # two fp32 inputs, three fp32 outputs, two times per image
    bytes=lambda shape, element_size: (20 * shape.latent_elements + 8 * shape.batch, 0),
    elements=lambda shape: shape.latent_elements,
    dtype=torch.float32,
)


# the norm of queries and keys and their rotation, before attention


def plain_qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs of neighbours, with tables for all heads, as in Flux and LightningDiT."""
    cos, sin = (t.repeat_interleave(2, dim=-1)[:, None] for t in (cos, sin))

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], weight, EPS)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _qk_norm_rope(
    function: Callable,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    return function(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=EPS, style="interleaved"
    )


def _qk_norm_rope_bytes(shape: Shape, element_size: int) -> tuple[int, int]:
    """Queries and keys read and written; both tables; the weights, and their gradients."""
    T, D, heads = shape.sizes
    d = D // heads
    tables = 8 * T * d // 2
    forward = element_size * (4 * shape.elements + 2 * d) + tables
    return forward, element_size * (6 * shape.elements + 4 * d) + tables


OPERATORS["qk_norm_rope"] = Operator(
    make=inputs.qk_norm_rope,
    ours=functools.partial(_qk_norm_rope, lambda *args, **kw: ops.qk_norm_rope(*args, **kw)),
    reference=functools.partial(_qk_norm_rope, qk_norm_rope_ref),
    eager=plain_qk_norm_rope,
    bytes=_qk_norm_rope_bytes,
    elements=lambda shape: 2 * shape.elements,
    grads=(0, 1, 4, 5),
)


# attention


def plain_attention(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


OPERATORS["attention"] = Operator(
    make=inputs.qkv,
    ours=lambda qkv: ops.attention(*qkv.unbind(2)),
    reference=lambda qkv: attention_ref(*qkv.unbind(2)),
    eager=plain_attention,
    flops=attention_flops,
    grads=(0,),
)


# attention inside a quarter of the tokens and inside the other three; without segments, a mask


def _quarter(T: int) -> tuple[int, int]:
    return T // 4, T - T // 4


def plain_attention_segments(qkv: Tensor) -> Tensor:
    T = qkv.shape[1]
    first = torch.arange(T, device=qkv.device) < _quarter(T)[0]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = first[:, None] == first
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _attention_segments(function: Callable, qkv: Tensor) -> Tensor:
    """Call the operator, or its definition, on the inputs."""
    return function(*qkv.unbind(2), segments=_quarter(qkv.shape[1]))


def _segments_flops(shape: Shape) -> tuple[float, float]:
    T = shape.sizes[0]
    share = sum(length**2 for length in _quarter(T)) / T**2
    forward, backward = attention_flops(shape)
    return share * forward, share * backward


OPERATORS["attention_segments"] = Operator(
    make=inputs.qkv,
    ours=functools.partial(_attention_segments, ops.attention),
    reference=functools.partial(_attention_segments, attention_ref),
    eager=plain_attention_segments,
    flops=_segments_flops,
    grads=(0,),
)


def cases(
    names: list[str] | None = None,
    models: list[str] | None = None,
    resolutions: list[int] | None = None,
    batches: list[int] | None = None,
) -> list[tuple[str, Shape]]:
    """Operators and shapes to measure, most valuable first. None stands for all."""
    chosen = [name for name in OPERATORS if names is None or name in names]
    found = []
    for shape in shapes_in_order(models, resolutions, batches):
        for name in chosen:
            found.append((name, Shape(shape.model) if OPERATORS[name].per_model else shape))
    # an operator on a model's parameters comes once per model
    return list(dict.fromkeys(found))
