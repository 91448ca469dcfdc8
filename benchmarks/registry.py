"""What is measured: every operator with its inputs, its rivals, and the fewest bytes that it can move.

Bytes are those of the docstrings in kernels/ with every input read once and every output written once: no partial sums,
and one program per image.  A percentage of the copy bandwidth is therefore one of what the operator needs, whichever
implementation ran.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))

import inputs  # noqa: E402
import rivals  # noqa: E402
from inputs import TINY, Shape, num_parameters, parameter_shapes, random  # noqa: E402, F401

from sra_fast import ops  # noqa: E402
from sra_fast.ops.adaln import adaln_ref  # noqa: E402
from sra_fast.ops.adamw_ema import adamw_ema_ref_  # noqa: E402
from sra_fast.ops.align_distance import align_distance_ref  # noqa: E402
from sra_fast.ops.attention import attention_ref  # noqa: E402
from sra_fast.ops.ema_update import ema_update_ref_  # noqa: E402
from sra_fast.ops.gated_residual import gated_residual_ref  # noqa: E402
from sra_fast.ops.gated_residual_adaln import gated_residual_adaln_ref  # noqa: E402
from sra_fast.ops.linear_gelu import linear_gelu_ref  # noqa: E402
from sra_fast.ops.noise_pair import noise_pair_ref  # noqa: E402
from sra_fast.ops.quantize_rows import quantize_rows, quantize_rows_ref  # noqa: E402

MODELS = ("SiT-XL/2", "SiT-B/2", "SiT-L/2")
# most valuable first; a run that stops early has these
RESOLUTION_BATCH = ((256, 32), (256, 256), (512, 32), (256, 64), (512, 64), (512, 256))


def _adamw(function: Callable, flat: list[Tensor], clip_scale: Tensor) -> None:
    names = ("weights", "ema", "ema_copy")
    outputs = dict(zip(names, flat[4:], strict=True)) | {
        "clip_scale": clip_scale,
        "decay": rivals.DECAY,
    }
    function(*flat[:4], rivals.STEP, **rivals.ADAMW, **outputs)


@dataclass(frozen=True)
class Entry:
    """One operator.

    Attributes:
        make: inputs for a shape, a dtype and a source of random numbers.
        ours: the call under test; all functions take the inputs.
        reference: the definition; on fp32 inputs it is the oracle.
        eager: plain PyTorch, also what is compiled unless ``to_compile`` says otherwise.
        bytes: fewest bytes of the forward and of the backward pass for a shape and a size of an element; None: the
            operator is bound by arithmetic.
        elements: what bytes per element refer to.
        grads: which inputs get a gradient; none: there is no backward pass.
        written: which inputs the call changes; none: it returns its results.
        with_norm: ``eager`` also takes an installed package's LayerNorm.
        compiles: whether the compiled rival runs unless asked for: hundreds of tensors take minutes to compile.
        dtype: the one dtype there is, where the working dtype plays no role.
    """

    make: Callable
    ours: Callable
    reference: Callable
    eager: Callable
    bytes: Callable[[Shape, int], tuple[float, float]] | None
    elements: Callable[[Shape], int] = lambda shape: shape.elements
    grads: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    to_compile: Callable | None = None
    with_norm: bool = False
    compiles: bool = True
    flops: Callable[[Shape], tuple[float, float]] | None = None
    dtype: torch.dtype | None = None

    @property
    def per_model(self) -> bool:
        return bool(self.written)


def _moves(
    forward: int, vectors: int, backward: int, vectors_backward: int, per_token: int = 0
) -> Callable:
    """Arrays [B, T, D] and vectors [B, D] read or written by each pass, and fp32 bytes per token of each."""

    def count(shape: Shape, s: int) -> tuple[float, float]:
        (T, D, _), B = shape.sizes, shape.batch
        passes = ((forward, vectors), (backward, vectors_backward))
        return tuple(s * B * D * (T * arrays + rows) + per_token * B * T for arrays, rows in passes)

    return count


def attention_flops(shape: Shape) -> tuple[float, float]:
    """Two products forward, five backward (flash attention recomputes one)."""
    forward = 4 * shape.elements * shape.sizes[0]
    return forward, 2.5 * forward


def product_flops(forward: int, backward: int) -> Callable:
    """Of products with so many D x D matrices in all."""
    return lambda shape: tuple(2 * n * shape.elements * shape.sizes[1] for n in (forward, backward))


def _half_block(
    mlp: bool,
    backend: str | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *layers: Tensor,
):
    options = {"eps": rivals.EPS, "residual": (y, gate), "backend": backend}
    if mlp:
        return ops.adaln_mlp(x, shift, scale, *layers, **options)
    x, heads = ops.adaln_linear(x, shift, scale, *layers, parts=3, **options)
    return x, *heads


def _half_block_entry(mlp: bool) -> "Entry":
    return Entry(
        make=functools.partial(inputs.half_block, mlp=mlp),
        ours=functools.partial(_half_block, mlp, None),
        reference=functools.partial(_half_block, mlp, "torch"),
        eager=rivals.adaln_mlp if mlp else rivals.adaln_linear,
        bytes=None,
        flops=product_flops(8, 16) if mlp else product_flops(3, 6),
        grads=tuple(range(9 if mlp else 7)),
    )


def _latent_elements(shape: Shape) -> int:
    return 4 * shape.batch * (shape.resolution // 8) ** 2


# most valuable first
ENTRIES: dict[str, Entry] = {
    "gated_residual_adaln": Entry(
        make=functools.partial(inputs.rows, arrays=2, vectors=3),
        ours=lambda *inputs: ops.gated_residual_adaln(*inputs, rivals.EPS),
        reference=lambda *inputs: gated_residual_adaln_ref(*inputs, rivals.EPS),
        eager=rivals.gated_residual_adaln,
        bytes=_moves(4, 3, 6, 5, per_token=8),
        grads=(0, 1, 2, 3, 4),
        with_norm=True,
    ),
    "adamw_ema_": Entry(
        make=inputs.flat,
        ours=lambda flat, clip_scale, *_: _adamw(ops.adamw_ema_, flat, clip_scale),
        reference=lambda flat, clip_scale, *_: _adamw(adamw_ema_ref_, flat, clip_scale),
        eager=rivals.adamw_ema,
        bytes=lambda shape, s: (40 * num_parameters(shape), 0),
        elements=num_parameters,
        written=(0,),
        to_compile=rivals.adamw_ema_flat,
    ),
    "adaln_mlp": _half_block_entry(mlp=True),
    "adaln_linear": _half_block_entry(mlp=False),
    "ema_update_": Entry(
        make=inputs.lists,
        ours=lambda ema, params, copies, _: ops.ema_update_(ema, params, rivals.DECAY, copies),
        reference=lambda ema, params, copies, _: ema_update_ref_(ema, params, rivals.DECAY, copies),
        eager=rivals.ema_update,
        bytes=lambda shape, s: ((10 + s) * num_parameters(shape), 0),
        elements=num_parameters,
        written=(0, 2),
        compiles=False,
    ),
    "adaln": Entry(
        make=functools.partial(inputs.rows, arrays=1, vectors=2),
        ours=lambda *inputs: ops.adaln(*inputs, rivals.EPS),
        reference=lambda *inputs: adaln_ref(*inputs, rivals.EPS),
        eager=rivals.adaln,
        bytes=_moves(2, 2, 3, 3, per_token=8),
        grads=(0, 1, 2),
        with_norm=True,
    ),
    "align_distance": Entry(
        make=functools.partial(inputs.rows, arrays=2, vectors=0),
        ours=lambda pred, target: ops.align_distance(pred, target, "smooth_l1"),
        reference=lambda pred, target: align_distance_ref(pred, target, "smooth_l1"),
        eager=rivals.align_distance,
        bytes=_moves(3, 0, 2, 0, per_token=4),
        grads=(0,),
    ),
    "gated_residual": Entry(
        make=functools.partial(inputs.rows, arrays=2, vectors=1),
        ours=lambda *inputs: ops.gated_residual(*inputs),
        reference=gated_residual_ref,
        eager=rivals.gated_residual,
        bytes=_moves(3, 1, 3, 2),
        grads=(0, 1, 2),
    ),
    "quantize_rows": Entry(
        make=inputs.hidden,
        ours=lambda x: quantize_rows(x, gelu=True),
        reference=lambda x: quantize_rows_ref(x, gelu=True),
        eager=rivals.quantize_rows,
        bytes=lambda shape, s: ((s + 1) * 4 * shape.elements + 4 * shape.batch * shape.sizes[0], 0),
        elements=lambda shape: 4 * shape.elements,
    ),
    "linear_gelu": Entry(
        make=inputs.linear,
        ours=lambda *inputs: ops.linear_gelu(*inputs),
        reference=linear_gelu_ref,
        eager=linear_gelu_ref,
        bytes=None,
        flops=product_flops(4, 0),
        elements=lambda shape: 4 * shape.elements,
    ),
    "noise_pair": Entry(
        make=inputs.noise,
        ours=lambda *inputs: ops.noise_pair(*inputs),
        reference=noise_pair_ref,
        eager=rivals.noise_pair,
        bytes=lambda shape, s: (20 * _latent_elements(shape) + 8 * shape.batch, 0),
        elements=_latent_elements,
        dtype=torch.float32,
    ),
    "attention": Entry(
        make=inputs.qkv,
        ours=lambda qkv: ops.attention(*qkv.unbind(2)),
        reference=lambda qkv: attention_ref(*qkv.unbind(2)),
        eager=rivals.attention,
        bytes=None,
        flops=attention_flops,
        grads=(0,),
    ),
}


def cases(names, models, resolutions, batches) -> list[tuple[str, Shape]]:
    """Operators and shapes, most valuable first; None takes everything, numbers outside the list come last."""
    models = models or MODELS
    grid = [
        (r, b) for r, b in RESOLUTION_BATCH if r in (resolutions or (r,)) and b in (batches or (b,))
    ]
    grid += [
        (r, b) for r in resolutions or () for b in batches or () if (r, b) not in RESOLUTION_BATCH
    ]
    chosen = [name for name in ENTRIES if name in (names or ENTRIES)]
    # a model is worth two places in the list of sizes
    ranked = sorted((i + 2 * m, m, i) for m in range(len(models)) for i in range(len(grid)))
    ordered = [
        (name, Shape(models[m]) if ENTRIES[name].per_model else Shape(models[m], *grid[i]))
        for _, m, i in ranked
        for name in chosen
    ]
    return list(dict.fromkeys(ordered))
