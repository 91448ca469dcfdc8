"""Which tensors lie in each other's memory."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sra_fast.ops._memory import first_overlap, is_dense

BUFFER = torch.zeros(64)


def overlaps(written, read, pair):
    """Whether two tensors, given by their indices, have a common byte and one is written."""
    everything = [*written, *read]
    first, second = (
        set(range(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()))
        for x in (everything[i] for i in pair)
    )
    return bool(first & second) and min(pair) < len(written)


def test_as_a_comparison_of_all_pairs():
    """Random slices of one buffer in two dtypes, in random order, some of them empty."""
    rng = random.Random(0)
    half = BUFFER.view(torch.bfloat16)
    counts = [0, 0]
    for _ in range(2000):
        tensors = []
        for _ in range(rng.randrange(1, 7)):
            source = rng.choice((BUFFER, half))
            begin = rng.randrange(len(source))
            tensors.append(source[begin : begin + rng.choice((0, 1, 3, 10, 40))])
        cut = rng.randrange(len(tensors) + 1)
        written = tensors[:cut]
        read = tensors[cut:]
        pairs = [(i, j) for j in range(len(tensors)) for i in range(j)]
        expected = [pair for pair in pairs if overlaps(written, read, pair)]
        found = first_overlap(written, read)
        assert found in expected if expected else found is None
        counts[bool(expected)] += 1
    assert min(counts) > 200


def test_the_range_of_a_tensor_with_gaps_is_its_first_element():
    wide = BUFFER.view(8, 8)
    assert first_overlap([wide[:, :4], wide[:, 4:]], []) is None
    assert first_overlap([wide[:, :4], wide[:, :2]], []) == (0, 1)
    # within a dense one, also in another order
    assert first_overlap([wide[2:, 3:5], wide.t()], []) == (0, 1)
    assert first_overlap([wide.t()[:, 4:]], [wide[2:, 3:5]]) is None


def test_dense_tensors():
    x = torch.zeros(2, 3, 4)
    for dense in (x, x.permute(2, 0, 1), x[:1], x[1], x[:, :1, :].new_zeros(2, 1, 4), x[0, 0, 0]):
        assert is_dense(dense)
    for gaps in (x[:, :2], x[..., ::2], x[:1].expand(2, 3, 4), x.permute(2, 0, 1)[:2]):
        assert not is_dense(gaps)


@pytest.mark.parametrize("kind", ["meta", "fake", "vmap", "nothing"])
def test_tensors_without_memory_are_not_compared(kind):
    if kind == "meta":
        assert first_overlap([torch.zeros(3, device="meta")] * 2, []) is None
    elif kind == "fake":
        with FakeTensorMode():
            assert first_overlap([torch.zeros(3)] * 2, []) is None
    elif kind == "vmap":
        torch.vmap(lambda x: x * (1 if first_overlap([x, x], []) is None else None))(BUFFER)
    else:
        assert first_overlap([BUFFER[3:3]] * 2, [BUFFER]) is None
