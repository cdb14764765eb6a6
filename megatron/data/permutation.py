"""Random orders that take no memory, however many items they have."""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_WORD = (1 << 64) - 1


class Permutation:
    """A random order of the numbers below `size`: calling it with a place gives the number there, in microseconds.

    A Feistel network over the next even power of two, walked until it is below `size` again (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002). The order depends on size, seed and epoch only.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 2])
        self._keys = [int(key) for key in bits.random_raw(_ROUNDS)]

    def __call__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(f"place {place} of {self._size}")
        number = self._shuffled(place)
        while number >= self._size:
            number = self._shuffled(number)
        return number

    def _shuffled(self, number: int) -> int:
        left, right = number >> self._half, number & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scattered(right, key) & self._mask)
        return left << self._half | right


def _scattered(value: int, key: int) -> int:
    """64 bits that look random: the finalizer of splitmix64."""
    mixed = (value * 0x9E3779B97F4A7C15 + key) & _WORD
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
    return mixed ^ mixed >> 31
