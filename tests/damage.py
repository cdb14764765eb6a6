"""Damages of files, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable


def _flip_bit(content: bytearray, draw: random.Random) -> bytes:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _other_byte(content: bytearray, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    content[place] = (content[place] + draw.randrange(1, 256)) % 256
    return bytes(content)


def _cut(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def _longer(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content) + draw.randbytes(draw.randrange(1, 40))


def _zeros(content: bytearray, draw: random.Random) -> bytes:
    first = draw.randrange(len(content))
    last = min(len(content), first + draw.randrange(1, 64))
    return bytes(content[:first]) + bytes(last - first) + bytes(content[last:])


def _missing_piece(content: bytearray, draw: random.Random) -> bytes:
    first = draw.randrange(len(content))
    return bytes(content[:first] + content[first + draw.randrange(1, 16) :])


def _noise(content: bytearray, draw: random.Random) -> bytes:
    return draw.randbytes(len(content))


def _halves_exchanged(content: bytearray, draw: random.Random) -> bytes:
    middle = len(content) // 2
    return bytes(content[middle:] + content[:middle])


DAMAGES: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _flip_bit, _other_byte, _cut, _longer, _zeros, _missing_piece, _noise, _halves_exchanged,
)  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with one random damage, never equal to it. Single bits and bytes are drawn as often as all others."""
    while True:
        damage = draw.choice([*DAMAGES[:2] * 3, *DAMAGES])
        result = damage(bytearray(content), draw)
        if result != content:
            return result
