"""One graph for sizes and numbers that change: fullgraph compiles with symbolic arguments."""

import pytest
import torch
from conftest import DEVICE

from sra_fast import ops

D = 16


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def noised(x, noise, t):
    return ops.noise_pair(x, noise, t, t / 2, backend="triton")


def rotated(q, angles):
    return ops.qk_norm_rope(q, q, angles.cos(), angles.sin(), backend="triton")


def positions(q):
    return torch.arange(q.shape[1], device=q.device)[:, None] / 10


def masked(q):
    mask = torch.ones(q.shape[0], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return ops.attention(q, q, q, mask=mask)


SIZES = {
    "noise_pair": (noised, lambda B, T: (randn(B, 4, T, T), randn(B, 4, T, T), randn(B))),
    # tables made inside, with numbers of columns that are no symbols
    "qk_norm_rope": (
        lambda q: rotated(q, positions(q).expand(-1, 8)),
        lambda B, T: (randn(B, T, 3, D),),
    ),
    "qk_norm_rope, d columns": (
        lambda q: rotated(q, positions(q).expand(-1, 16)),
        lambda B, T: (randn(B, T, 3, D),),
    ),
    "qk_norm_rope, images": (
        lambda q: rotated(q, positions(q).expand(q.shape[0], -1, 8)),
        lambda B, T: (randn(B, T, 3, D),),
    ),
    "attention": (masked, lambda B, T: (randn(B, T, 2, D),)),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_change(name, dynamic):
    torch.manual_seed(0)
    torch.compiler.reset()
    function, make = SIZES[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, T in ((2, 8), (3, 12), (4, 20)):
        inputs = make(B, T)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


def scaled(number, x):
    return ops.noise_pair(x, x, x[:, 0, 0], x[:, 0, 0], scale=number, backend="triton")


def with_eps(number, x):
    return ops.adaln(x, x[:, 0], x[:, 1], eps=number, backend="triton")


def with_beta(number, x):
    return ops.align_distance(x, x.flip(0), "smooth_l1", beta=number, backend="triton")


def updated(name):
    def function(number, x):
        param, *state = (x.clone() for _ in range(3))
        options = {"lr": 1e-3, name: number}
        ops.adamw_ema_(param, x, *state, 1, **options, backend="triton")
        return param

    return function


NUMBERS = {
    "scale": scaled,
    "eps": with_eps,
    "beta": with_beta,
    "lr": updated("lr"),
    "weight_decay": updated("weight_decay"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_changes(name):
    """From its second value on the compiler has a symbol for it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    function = NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = randn(2, 4, D).abs()
    for number in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(number, x), function(number, x))
