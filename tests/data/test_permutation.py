"""The order of the images: a bijection that looks random, is fixed for good and needs no memory."""

import tracemalloc

import numpy as np
import pytest

from sra_fast.data.order import ShuffledBatches
from sra_fast.data.permutation import Permutation


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 100, 1437, 65536, 65537, 1281167])
def test_bijection(length):
    order = Permutation(length, 0, 0)(np.arange(length))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(length))


def test_any_cut_gives_the_same_order():
    order = Permutation(1000, 3, 1)
    whole = order(np.arange(1000))
    pieces = [order(np.arange(i, i + 40)) for i in range(0, 1000, 40)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(Permutation(1000, 3, 2)(np.arange(1000)), whole), "another epoch"
    assert not np.array_equal(Permutation(1000, 4, 1)(np.arange(1000)), whole), "another seed"


def test_order_is_fixed_for_good():
    """A resumed run must see the same order, whatever versions were installed meanwhile."""
    assert Permutation(1281167, 0, 7, -1)([0, 1, 1281166]).tolist() == [762786, 1112903, 183550]


def deviation(counts, expected) -> float:
    """Chi-square of counts with equal expectation, in standard deviations from its mean."""
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def test_looks_random():
    """An image's place does not depend on where it is stored, on its neighbours there, or on the
    last epoch.
    """
    n = 1281167
    bins = 32
    first, second = (Permutation(n, 0, epoch)(np.arange(n)) for epoch in (0, 1))
    pairs = {
        "stored": (np.arange(n), first),
        "neighbour": (first[:-1], first[1:]),
        "epoch": (first, second),
    }
    for name, (a, b) in pairs.items():
        counts = np.histogram2d(a, b, bins)[0]
        assert abs(deviation(counts, len(a) / bins**2)) < 5, name
    # over many keys each image is at each place equally often
    counts = np.zeros((50, 50))
    for key in range(4000):
        counts[np.arange(50), Permutation(50, key)(np.arange(50))] += 1
    assert abs(deviation(counts, 4000 / 50)) < 5


def test_memory_does_not_grow_with_the_data_set():
    tracemalloc.start()
    batch = next(iter(ShuffledBatches(10**12, 0, 32, 1, 3, 8, 10**6, 10**7)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(batch)) == 32
    assert all(0 <= i < 10**12 for i in batch)
    assert peak < 100_000, f"{peak} bytes"
