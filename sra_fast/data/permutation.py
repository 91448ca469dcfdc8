"""A pseudo-random permutation that is computed element by element, so it takes no memory whatever its length."""

from math import isqrt

import numpy as np

from sra_fast.diffusion.draws import block_seed

ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the uint64 result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A bijection of ``range(length)``: a Feistel network on pairs with cycle walking.

    A position is a pair (left, right) of Z_a x Z_b, where a and b are about the square root of
    ``length``. Each round adds a keyed hash of one half to the other. A result in [length, a b) is
    sent through the rounds again; at most one position in sqrt(length) is. Black and Rogaway,
    "Ciphers with arbitrary finite domains" (2002).

    Args:
        length: at least 1.
        key: integers. Each key gives another permutation.
    """

    def __init__(self, length: int, *key: int):
        self.length = length
        self.a = isqrt(length - 1) + 1
        self.b = -(-length // self.a)
        self.keys = [np.uint64(block_seed(*key, i)) for i in range(ROUNDS)]

    def __call__(self, positions) -> np.ndarray:
        """Where ``positions [N]`` are mapped to: int64 ``[N]``, each in [0, length)."""
        x = self._rounds(np.asarray(positions, np.uint64))
        # cycle walking: a b may exceed the length
        while (outside := x >= self.length).any():
            x[outside] = self._rounds(x[outside])
        return x.astype(np.int64)

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        a = np.uint64(self.a)
        b = np.uint64(self.b)
        left, right = np.divmod(x, b)
        # the halves take turns, so every round can be undone
        for i, key in enumerate(self.keys):
            if i % 2:
                right = (right + _mix(left ^ key) % b) % b
            else:
                left = (left + _mix(right ^ key) % a) % a
        return left * b + right
