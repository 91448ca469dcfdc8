"""Patterns whose arguments are results of other patterns, or their own, or change in place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sra_fast import integrations

B, T, D = 2, 4, 16


def compare(model, *inputs, **options):
    """Run a model with and without the operators; what was rewritten."""
    torch._dynamo.reset()
    ours = copy.deepcopy(model)
    integrations.compile(ours, then="eager", **options)
    given = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(ours(*given), expected, atol=1e-5, rtol=1e-5)
    return dict(integrations.report(ours).rewrites)


class Sandwich(nn.Module):
    """The shift of the norm is the norm's own input."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.linear = nn.Linear(D, D)

    def forward(self, x, scale):
        x = x + self.linear(x)
        return self.norm(x) * (1 + scale) + x.to(scale.dtype)


@pytest.mark.parametrize("tokens", [1, T])
def test_the_sum_is_the_shift_of_its_norm(tokens):
    assert compare(Sandwich(), torch.randn(B, tokens, D), torch.randn(B, tokens, D))


class Conditioned(nn.Module):
    """A table is added to vectors that come out of another pattern."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.linear = nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(D))

    def forward(self, x, condition, gate):
        condition = condition + gate * self.linear(condition)
        return self.norm(x) * (1 + (self.table + condition))


def test_vectors_that_another_pattern_makes():
    inputs = torch.randn(B, T, D), torch.randn(B, T, D), torch.randn(B, 1, D)
    assert compare(Conditioned(), *inputs) == {"adaln": 1, "gated_residual": 1}


def times_two(y, table, statistics, b):
    y.__imul__(2)
    return b


def numpy_times_two(y, table, statistics, b):
    array = y.numpy()
    array *= 2
    return b


def numpy_set(y, table, statistics, b):
    y.numpy()[0] = 3
    return b


def shortened_row(y, table, statistics, b):
    return b + F.embedding(torch.tensor([1], device=b.device), table, max_norm=0.1)


def moved_statistics(y, table, statistics, b):
    mean = F.batch_norm(y.flatten(0, 1), statistics, torch.ones(D), training=True).mean()
    return b + mean


class Changing(nn.Module):
    """Something changes between the sum and its norm."""

    def __init__(self, change, gate):
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.linear = nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(3, D))
        self.register_buffer("statistics", torch.randn(D))
        self.change = change
        self.gate = gate

    def forward(self, x, a, b):
        y = self.linear(x)
        gates = {"y": a, "table": self.table[1], "statistics": self.statistics}
        z = x + gates[self.gate] * y
        b = self.change(y, self.table, self.statistics, b)
        return self.norm(z) * (1 + a) + b, y


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (times_two, "y"),
        (numpy_times_two, "y"),
        (numpy_set, "y"),
        (shortened_row, "table"),
        (moved_statistics, "statistics"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_changes_in_place_of_every_name(change, gate):
    compare(Changing(change, gate), torch.randn(B, T, D), *torch.randn(2, B, 1, D))
