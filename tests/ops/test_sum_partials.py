"""Sums of partial gradients."""

import pytest
import torch
from sra_fast.kernels._rows import sum_partials

# [M, P, K, D]
SHAPES = [
    # one split; fewer images than lie side by side, as many, and one more
    (1, 1, 1, 5), (3, 1, 3, 128), (8, 7, 2, 384), (9, 3, 4, 72),
    # rows of an image for two warps, for four, for all, and for two iterations
    (5, 12, 4, 1152), (3, 19, 2, 200), (2, 43, 3, 130), (2, 70, 2, 256),
    # a total over more rows than one iteration takes, and over one image
    (130, 5, 2, 36), (1, 142, 1, 4608),
    # two modulations
    (3, 6, 6, 72), (2, 3, 5, 72),
]  # fmt: skip


def partial_sums(*shape, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def sums_of(part, has_total, dtype=torch.float32):
    """Every output; NaN until it is written."""
    M, _, K, D = part.shape
    outputs = [
        torch.full((M, D), float("nan"), dtype=dtype, device=part.device)
        for _ in range(K - has_total)
    ]
    total = torch.full((D,), float("nan"), dtype=dtype, device=part.device) if has_total else None
    sum_partials(part, *outputs, total=total)
    return outputs + [total] * has_total


# five sums beside a total at most
CASES = [
    (shape, has_total)
    for shape in SHAPES
    for has_total in (False, True)
    if shape[2] - has_total <= 5
]


@pytest.mark.parametrize("shape, has_total", CASES, ids=str)
def test_sums(shape, has_total, device):
    part = partial_sums(*shape, device=device)
    exact = part.double().sum(1)
    expected = [*exact[:, : shape[2] - has_total].unbind(1), *[exact[:, -1].sum(0)] * has_total]
    # a few roundings of numbers as large as the sum of magnitudes
    rounding = 4e-7 * part.abs().sum((0, 1)).max().item()
    for got, want in zip(sums_of(part, has_total), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=rounding)


def test_sums_are_rounded_once(device):
    part = partial_sums(4, 9, 3, 72, device=device)
    for full, half in zip(sums_of(part, True), sums_of(part, True, torch.float16), strict=True):
        assert torch.equal(full.half(), half)


@pytest.mark.parametrize("P", [3, 12, 43])
def test_an_image_has_the_same_bits_among_any_others(P, device):
    """The order of additions depends only on P."""
    part = partial_sums(9, P, 2, 200, device=device)
    together = sums_of(part, False)
    for m in (0, 4, 8):
        alone = sums_of(part[m : m + 1].contiguous(), False)
        assert all(torch.equal(a[m], b[0]) for a, b in zip(together, alone, strict=True))
