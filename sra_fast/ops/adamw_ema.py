"""The whole optimizer step of SRA training over flat buffers: clip, AdamW, bf16 weights, EMA, bf16
teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import adamw_ema as kernels
from sra_fast.ops._adamw_arguments import (
    DeviceStep,
    Gradient,
    check_numbers,
    check_tensor_arguments,
    dtype_of,
)
from sra_fast.ops._backend import use_triton
from sra_fast.ops._dtensors import is_dtensor, local_shards
from sra_fast.ops._register import register
from sra_fast.ops.fp8 import Fp8Copy


def _assemble(grad: Gradient, param: Tensor) -> Tensor:
    """The gradient in one piece, zero where no piece holds it."""
    if isinstance(grad, Tensor):
        return grad
    whole = grad[0][1].new_zeros(param.shape)
    for begin, piece in grad:
        whole.view(-1)[begin : begin + piece.numel()].copy_(piece.reshape(-1))
    return whole


@torch.no_grad()
def adamw_ema_ref_(
    param: Tensor,
    grad: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | DeviceStep,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_scale: Tensor | None = None,
    weights: Tensor | None = None,
    ema: Tensor | None = None,
    ema_copy: Tensor | Fp8Copy | None = None,
    decay: float = 0.9999,
) -> None:
    """The definition, in the dtype of ``param``: AdamW in torch's order, then the EMA.

    AdamW is Alg. 2 of arXiv 1711.05101.
    """
    if isinstance(step, DeviceStep):
        written = _written(param, exp_avg, exp_avg_sq, weights, ema, ema_copy)
        before = [x.clone() for x in written]
    beta1, beta2 = betas
    shrink, step_size, root_bias2 = _scalars(step, lr, betas, weight_decay)
    grad = _assemble(grad, param).to(param.dtype)
    if clip_scale is not None:
        grad = grad * clip_scale.to(param.dtype)
    # decoupled weight decay, then the two moments
    param.mul_(shrink)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # the second moment's root first, then the bias correction, as torch orders them
    denominator = (exp_avg_sq.sqrt() / root_bias2).add_(eps)
    if isinstance(step_size, Tensor):
        # ``value`` would be read on the host
        param.addcdiv_(exp_avg * -step_size, denominator)
    else:
        param.addcdiv_(exp_avg, denominator, value=-step_size)
    if weights is not None:
        weights.copy_(param)
    if ema is not None:
        ema.lerp_(param, 1 - decay)
    if ema_copy is not None:
        assert ema is not None
        if isinstance(ema_copy, Fp8Copy):
            ema_copy.measure_(ema)
            ema_copy.store_(ema)
        else:
            ema_copy.copy_(ema)
    if isinstance(step, DeviceStep):
        # whatever has been computed: an update that is not taken changes nothing
        taken = step.numbers[3] != 0
        for x, old in zip(written, before, strict=True):
            x.copy_(torch.where(taken, x, old))


def _scalars(
    step: int | DeviceStep, lr: float, betas: tuple[float, float], weight_decay: float
) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """What multiplies the parameter, the step size, and the root of the second bias; 0-d fp64
    tensors where the step is on the device.
    """
    if isinstance(step, DeviceStep):
        inv_bias1, inv_root_bias2, factor, _ = step.numbers.unbind()
        return 1 - factor * (lr * weight_decay), factor * lr * inv_bias1, 1 / inv_root_bias2
    beta1, beta2 = betas
    return 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5


def _written(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    ema_copy: Tensor | Fp8Copy | None,
) -> list[Tensor]:
    """Everything that an update writes."""
    copies: tuple[Tensor | None, ...] = (None,)
    if isinstance(ema_copy, Fp8Copy):
        # e4m3 has few operations: bytes are selected
        copies = (ema_copy.values.view(torch.uint8), ema_copy.amax)
    elif ema_copy is not None:
        copies = (ema_copy,)
    given = (param, exp_avg, exp_avg_sq, weights, ema, *copies)
    return [x for x in given if x is not None]


def _run(param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy, multiplier, amax, *rest) -> None:
    begins = rest[-2]
    kernels.adamw_ema_(
        param,
        grad[0] if begins is None else grad,
        exp_avg,
        exp_avg_sq,
        weights,
        ema,
        ema_copy,
        multiplier,
        amax,
        *rest,
    )
    # autograd must see the change: a graph that saved the old value would otherwise be wrong
    # silently
    written = (param, exp_avg, exp_avg_sq, weights, ema, ema_copy, amax)
    torch.autograd.graph.increment_version([x for x in written if x is not None])


_op = register(
    "adamw_ema_(Tensor(a!) param, Tensor[] grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? weights, Tensor(e!)? ema, Tensor(f!)? ema_copy, Tensor? multiplier, Tensor(g!)? amax,"
    " Tensor? ends, Tensor? clip_scale, int step, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, float decay, int[]? begins, Tensor? numbers) -> ()",
    _run,
    lambda *args: None,
)


def _align(grad: Gradient) -> tuple[list[Tensor], list[int] | None]:
    """What the kernel reads: one vector and None, or pieces and their first elements.

    Pieces must begin and end at multiples of 16 bytes. The others are copied, with zeros around
    them.
    """
    if isinstance(grad, Tensor):
        return [grad.view(-1)], None
    vector = kernels.ALIGNMENT // grad[0][1].element_size()
    pieces = []
    begins = []
    for begin, piece in grad:
        # elements to add on each side to reach multiples of 16 bytes
        before = begin % vector
        after = -(begin + piece.numel()) % vector
        if before or after:
            piece = F.pad(piece.reshape(-1), (before, after))
        elif piece.data_ptr() % kernels.ALIGNMENT:
            piece = piece.clone()
        pieces.append(piece)
        begins.append(begin - before)
    return pieces, begins


@torch.no_grad()
def adamw_ema_(
    param: Tensor,
    grad: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | DeviceStep,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_scale: Tensor | None = None,
    weights: Tensor | None = None,
    ema: Tensor | None = None,
    ema_copy: Tensor | Fp8Copy | None = None,
    decay: float = 0.9999,
    backend: str | None = None,
) -> None:
    """One optimizer step in place: the update of ``torch.optim.AdamW``, then of the EMA, in one
    pass.

    ``param``, ``exp_avg``, ``exp_avg_sq`` and ``step`` are the state of ``torch.optim.AdamW``:
    either can continue the other's run. With an fp32 gradient, weights, EMA and copy it moves 40
    bytes per element. The host reads nothing back.

    No buffer may share memory with another; a gradient in pieces is not compared with the others.

    Of DTensors, as FSDP2 makes them, each rank updates its own shards. All buffers and the gradient
    must have one mesh and the same placements, none partial; the gradient comes in one piece, and
    ``clip_scale`` is a plain tensor.

    A CUDA graph can capture a call with a gradient in pieces after the same call, with pieces at
    the same addresses, has run outside of one, with at most 7 other calls in between. Pieces must
    then be such as are read in place. The tables, 24 bytes per piece and 4 per 1024 elements, are
    kept until the process ends.

    Args:
        param: ``[N]`` fp32 master weights, contiguous; also a slice of a flat buffer. fp64 goes to
            the reference.
        grad: ``[N]`` gradient, fp32/bf16/fp16. Or ``[(first element, tensor of any shape), ...]``:
            contiguous pieces in ascending order, with zeros between them. Pieces that begin and
            end at multiples of 16 bytes are read in place, the others are copied.
        exp_avg: ``[N]`` first moment, fp32.
        exp_avg_sq: ``[N]`` second moment, fp32.
        step: number of this update, from 1. Or a ``DeviceStep``, which also says on the device
            whether the update is taken; if not, every buffer stays as it is, bit for bit, whatever
            the gradient.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; the parameter shrinks by ``lr * weight_decay``.
        clip_scale: one number on the device that multiplies the gradient: ``min(1, max_norm /
            norm)``, and ``1 / loss_scale`` where there is one; or None.
        weights: ``[N]`` bf16 or fp16, receives the rounded parameters; or None.
        ema: ``[N]`` fp32, moves towards the new parameters; or None.
        ema_copy: ``[N]`` bf16 or fp16, or an ``Fp8Copy``, receives the rounded EMA; needs ``ema``;
            or None.
        decay: fraction of the old EMA that is kept, in [0, 1].
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit, or a number outside its
            range; buffers share memory; or DTensors are not sharded alike.
        RuntimeError: a CUDA graph captures a call whose pieces are not remembered.
    """
    buffers = {
        "param": param,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "weights": weights,
        "ema": ema,
        "ema_copy": ema_copy,
    }
    buffers = {name: x for name, x in buffers.items() if x is not None}
    if any(map(is_dtensor, buffers.values())):
        shards = local_shards("adamw_ema_", buffers)
        adamw_ema_(
            **dict(zip(buffers, shards, strict=True)),
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            clip_scale=clip_scale,
            decay=decay,
            backend=backend,
        )
        # a DTensor counts its changes apart from its shard's
        del buffers["grad"]
        torch.autograd.graph.increment_version(list(buffers.values()))
        return

    # check everything first: the update is in place and cannot be undone
    check_tensor_arguments(
        param, grad, exp_avg, exp_avg_sq, step, clip_scale, weights, ema, ema_copy
    )
    check_numbers(step, lr, betas, eps, weight_decay, decay)

    wide = torch.float64 in (param.dtype, dtype_of(grad))
    if not use_triton("adamw_ema_", param, backend) or param.numel() == 0 or wide:
        adamw_ema_ref_(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            clip_scale=clip_scale,
            weights=weights,
            ema=ema,
            ema_copy=ema_copy,
            decay=decay,
        )
        return

    # the kernel takes flat buffers; an e4m3 copy brings the tables of its segments
    values = ema_copy
    multiplier = None
    amax = None
    ends = None
    if isinstance(ema_copy, Fp8Copy):
        values, multiplier, amax, ends, _ = ema_copy
    numbers = step.numbers if isinstance(step, DeviceStep) else None
    pieces, begins = _align(grad)
    flatten = lambda x: None if x is None else x.view(-1)
    _op(
        flatten(param),
        pieces,
        flatten(exp_avg),
        flatten(exp_avg_sq),
        flatten(weights),
        flatten(ema),
        flatten(values),
        multiplier,
        amax,
        ends,
        clip_scale,
        0 if isinstance(step, DeviceStep) else step,
        lr,
        *betas,
        eps,
        weight_decay,
        decay,
        begins,
        numbers,
    )
