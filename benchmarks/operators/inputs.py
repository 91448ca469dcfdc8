"""Input tensors of the operators.

Every function takes a shape, the working dtype and ``randn(*size, dtype=...)`` (``timing.make_randn``).
It returns a tuple: the arguments of all functions of an entry in ``registry.py``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.shapes import Shape, num_parameters, parameter_shapes

# optimizer steps before the one that is timed
STEP = 10


def rows(
    shape: Shape, dtype: torch.dtype, randn: Callable, arrays: int, vectors: int
) -> tuple[Tensor, ...]:
    """``arrays`` tensors [B, T, D], then ``vectors`` tensors [B, D].

    The vectors are slices of one projection [B, 6 D], as in a block, so their rows are not contiguous.
    """
    T, D, _ = shape.sizes
    projection = randn(shape.batch, 6 * D, dtype=dtype)
    tokens = [randn(shape.batch, T, D, dtype=dtype) for _ in range(arrays)]
    return *tokens, *projection.chunk(6, 1)[:vectors]


def rows_per_token(
    shape: Shape, dtype: torch.dtype, randn: Callable, arrays: int, vectors: int
) -> tuple[Tensor, ...]:
    """``arrays`` tensors [B, T, D], then ``vectors`` slices of one projection [B, T, 6 D]."""
    T, D, _ = shape.sizes
    projection = randn(shape.batch, T, 6 * D, dtype=dtype)
    tokens = [randn(shape.batch, T, D, dtype=dtype) for _ in range(arrays)]
    return *tokens, *projection.chunk(6, 2)[:vectors]


def rows_and_tables(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Residual stream and branch [B, T, D], three slices of one projection [B, T, 6 D], and a row
    [D] of an fp32 table for each slice.
    """
    return *rows_per_token(shape, dtype, randn, 2, 3), *randn(3, shape.sizes[1]).unbind(0)


def rows_of_groups(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Residual stream and branch [B, T, D], three slices of one projection [B, 2, 6 D], and the
    group of each token [B, T]: a quarter of them, in the order of a random number, is the first.
    """
    B = shape.batch
    T, D, _ = shape.sizes
    arrays = [randn(B, T, D, dtype=dtype) for _ in range(2)]
    vectors = randn(B, 2, 6 * D, dtype=dtype).chunk(6, dim=2)[2:5]
    order = randn(B, T).argsort(1)
    group = torch.ones(B, T, dtype=torch.int32, device=order.device)
    group.scatter_(1, order[:, : T // 4], 0)
    return *arrays, *vectors, group


def rows_and_weight(
    shape: Shape, dtype: torch.dtype, randn: Callable
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual stream and branch [B, T, D], gate [B, D], weight [D] of the branch's norm."""
    return *rows(shape, dtype, randn, 2, 1), randn(shape.sizes[1], dtype=dtype)


def noise(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Latents and noise [B, 4, side, side], times of student and teacher [B], all in fp32."""
    side = shape.resolution // 8
    t = randn(shape.batch).sigmoid()
    x0 = randn(shape.batch, 4, side, side)
    noise = randn(shape.batch, 4, side, side)
    return x0, noise, t, 0.8 * t


def hidden(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor]:
    """Hidden activations of an MLP [B, T, 4 D]."""
    T, D, _ = shape.sizes
    return (randn(shape.batch, T, 4 * D, dtype=dtype),)


def hidden_pair(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, Tensor]:
    """A gradient and hidden activations of an MLP, both [B T, 4 D]."""
    T, D, _ = shape.sizes
    size = (shape.batch * T, 4 * D)
    return randn(*size, dtype=dtype), randn(*size, dtype=dtype)


def hidden_halves(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor]:
    """Both halves of SwiGLU's input in a row [B T, 8 D]: a hidden layer of 4 D, as for GELU."""
    T, D, _ = shape.sizes
    return (randn(shape.batch * T, 8 * D, dtype=dtype),)


def linear_halves(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Tokens [B, T, D] and both first layers of an MLP with SwiGLU, as one matrix."""
    return *rows(shape, dtype, randn, 1, 0), *layer(shape, dtype, randn, 8)


def three_matrices(
    shape: Shape, dtype: torch.dtype, randn: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each [B T, D]."""
    T, D, _ = shape.sizes
    size = (shape.batch * T, D)
    return randn(*size, dtype=dtype), randn(*size, dtype=dtype), randn(*size, dtype=dtype)


def layer(
    shape: Shape, dtype: torch.dtype, randn: Callable, outputs: int, inputs: int = 1
) -> tuple[Tensor, Tensor]:
    """Weight [outputs D, inputs D], scaled to keep the variance, and bias [outputs D] of a linear layer."""
    D = shape.sizes[1]
    weight = randn(outputs * D, inputs * D, dtype=dtype) / (inputs * D) ** 0.5
    return weight, randn(outputs * D, dtype=dtype)


def linear(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Tokens [B, T, D] and the first layer of an MLP."""
    return *rows(shape, dtype, randn, 1, 0), *layer(shape, dtype, randn, 4)


def half_block(shape: Shape, dtype: torch.dtype, randn: Callable, mlp: bool) -> tuple[Tensor, ...]:
    """Residual stream and branch output [B, T, D], gate, shift and scale [B, D], then weights and biases.

    The layers are both of an MLP, or the projection to queries, keys and values.
    """
    sizes = [(4, 1), (1, 4)] if mlp else [(3, 1)]
    tokens_and_vectors = rows(shape, dtype, randn, 2, 3)
    layers = [t for outputs, inputs in sizes for t in layer(shape, dtype, randn, outputs, inputs)]
    return *tokens_and_vectors, *layers


def qkv(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor]:
    """Queries, keys and values as the projection writes them: [B, T, 3, heads, head dimension]."""
    T, D, heads = shape.sizes
    return (randn(shape.batch, T, 3, heads, D // heads, dtype=dtype),)


def qk_norm_rope(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Queries and keys [B, T, heads, head dimension], views of a projection that also has values;
    cosines and sines [T, head dimension / 2] in fp32; both norms' weights.
    """
    T, D, heads = shape.sizes
    d = D // heads
    q, k, _ = randn(shape.batch, T, 3, heads, d, dtype=dtype).unbind(2)
    angle = randn(T, d // 2)
    return q, k, angle.cos(), angle.sin(), randn(d, dtype=dtype), randn(d, dtype=dtype)


def parameter_lists(
    shape: Shape, dtype: torch.dtype, randn: Callable
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """A model's EMA (fp32), parameters (working dtype), copies of the EMA (half precision) and scratch (fp32).

    Only the plain PyTorch form needs the scratch.
    """
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    sizes = parameter_shapes(shape.model)
    ema = [randn(s) for s in sizes]
    params = [randn(s, dtype=dtype) for s in sizes]
    copies = [torch.zeros_like(e, dtype=half) for e in ema]
    scratch = [torch.empty_like(e) for e in ema]
    return ema, params, copies, scratch


def flat_buffers(
    shape: Shape, dtype: torch.dtype, randn: Callable
) -> tuple[list[Tensor], Tensor, list[list[Tensor]], list[Tensor]]:
    """What an optimizer step reads and writes.

    Returns:
        flat: seven buffers of one element per parameter: parameter, gradient, both moments (fp32), rounded
            weights (half), EMA (fp32) and its copy (half).
        clip_scale: the factor that clips the gradient, a number.
        split: the same memory as lists of parameters, for torch.optim's kernels.
        steps: the step counter of every parameter, for torch.optim's kernels.
    """
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    N = num_parameters(shape)
    param = randn(N)
    grad = randn(N)
    exp_avg = randn(N)
    # a second moment is not negative
    exp_avg_sq = randn(N).square_()
    ema = randn(N)
    weights = torch.zeros_like(param, dtype=half)
    ema_copy = torch.zeros_like(param, dtype=half)
    flat = [param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy]

    sizes = parameter_shapes(shape.model)
    split = []
    for buffer in flat:
        pieces = buffer.split([s.numel() for s in sizes])
        split.append([piece.view(s) for piece, s in zip(pieces, sizes, strict=True)])
    clip_scale = torch.full((), 0.5, device=param.device)
    # torch._fused_adamw_ does not advance the counters itself
    steps = [torch.full((), float(STEP), device=param.device) for _ in sizes]
    return flat, clip_scale, split, steps
