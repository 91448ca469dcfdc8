"""What operators are measured on: sizes of models, and tensors of these sizes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import rivals
import torch
from torch import Tensor

from sra_fast.models import create_model, preset

TINY = "tiny"


@dataclass(frozen=True)
class Shape:
    """A model at a resolution and a batch; resolution and batch are None where only the parameters count."""

    model: str
    resolution: int | None = None
    batch: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, width and heads: patches of 2 in a latent of an eighth of the image's side."""
        size = {"hidden_size": 64, "num_heads": 4} if self.model == TINY else preset(self.model)[1]
        return (self.resolution // 16) ** 2, size["hidden_size"], size["num_heads"]

    @property
    def elements(self) -> int:
        """B T D"""
        return self.batch * self.sizes[0] * self.sizes[1]


@functools.cache
def parameter_shapes(model: str) -> tuple[torch.Size, ...]:
    if model == TINY:
        return tuple(torch.Size(s) for s in ((64, 48), (64,), (24, 8, 2), (1000,)))
    with torch.device("meta"):
        return tuple(p.shape for p in create_model(model).parameters())


def num_parameters(shape: Shape) -> int:
    return sum(s.numel() for s in parameter_shapes(shape.model))


def random(seed: int, device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *size, dtype=torch.float32: torch.randn(
        *size, generator=generator, device=device
    ).to(dtype)


def rows(
    shape: Shape, dtype: torch.dtype, randn: Callable, arrays: int, vectors: int
) -> tuple[Tensor, ...]:
    """Arrays [B, T, D] and vectors [B, D], the latter slices of one [B, 6 D] projection as a block has them."""
    (T, D, _), B = shape.sizes, shape.batch
    projection = randn(B, 6 * D, dtype=dtype)
    return *(randn(B, T, D, dtype=dtype) for _ in range(arrays)), *projection.chunk(6, 1)[:vectors]


def noise(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    side = shape.resolution // 8
    t = randn(shape.batch).sigmoid()
    return *(randn(shape.batch, 4, side, side) for _ in range(2)), t, t * 0.8


def hidden(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor]:
    T, D, _ = shape.sizes
    return (randn(shape.batch, T, 4 * D, dtype=dtype),)


def layer(
    shape: Shape, dtype: torch.dtype, randn: Callable, outputs: int, inputs: int = 1
) -> tuple[Tensor, ...]:
    """Weight and bias of a linear layer that keeps the variance; its sizes are multiples of the width."""
    D = shape.sizes[1]
    return randn(outputs * D, inputs * D, dtype=dtype) / (inputs * D) ** 0.5, randn(
        outputs * D, dtype=dtype
    )


def linear(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor, ...]:
    """Tokens, and the first layer of an MLP."""
    return *rows(shape, dtype, randn, 1, 0), *layer(shape, dtype, randn, 4)


def half_block(shape: Shape, dtype: torch.dtype, randn: Callable, mlp: bool) -> tuple[Tensor, ...]:
    """Residual stream, what is added to it, three vectors of modulation, and qkv's layer or those of an MLP."""
    layers = [(4, 1), (1, 4)] if mlp else [(3, 1)]
    return *rows(shape, dtype, randn, 2, 3), *(
        t for sizes in layers for t in layer(shape, dtype, randn, *sizes)
    )


def qkv(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[Tensor]:
    T, D, heads = shape.sizes
    return (randn(shape.batch, T, 3, heads, D // heads, dtype=dtype),)


def lists(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple[list[Tensor], ...]:
    """EMA in fp32, parameters and copies in the working dtype (bf16 where that is fp32), and a rival's scratch."""
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    ema = [randn(s) for s in parameter_shapes(shape.model)]
    params = [randn(s, dtype=dtype) for s in parameter_shapes(shape.model)]
    return (
        ema,
        params,
        [torch.zeros_like(e, dtype=half) for e in ema],
        [torch.empty_like(e) for e in ema],
    )


def flat(shape: Shape, dtype: torch.dtype, randn: Callable) -> tuple:
    """Flat buffers, the clip factor, the same buffers as lists of parameters, and the rival's step counters."""
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    shapes, N = parameter_shapes(shape.model), num_parameters(shape)
    param, grad, exp_avg, exp_avg_sq, ema = (
        randn(N),
        randn(N),
        randn(N),
        randn(N).square_(),
        randn(N),
    )
    weights, copy = (torch.zeros_like(param, dtype=half) for _ in range(2))
    flat = [param, grad, exp_avg, exp_avg_sq, weights, ema, copy]
    split = [
        [v.view(s) for v, s in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)]
        for x in flat
    ]
    # the fused AdamW of PyTorch does not count by itself
    steps = [torch.full((), float(rivals.STEP), device=param.device) for _ in shapes]
    return flat, torch.full((), 0.5, device=param.device), split, steps
