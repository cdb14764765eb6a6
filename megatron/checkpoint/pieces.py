"""Parts of tensors: boxes, which have a range in every dimension of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(where it begins, how large it is), each a number for every dimension."""

_MAX_TURNS, _MAX_COMPARED = 64, 64

# A stream of whole tensors, by name.
TensorStream = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor to be saved, or all of it, from whichever rank has it."""

    kind: str
    """Kind of the tensor: model, optimizer, or another."""
    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where in the whole tensor the part begins, in each dimension."""
    tensor: Tensor
    """The part. Parts of a tensor do not overlap."""

    @property
    def key(self) -> str:
        """Its name in a file."""
        return key_of(self.name, self.shape, self.offset, tuple(self.tensor.shape))


def key_of(name: str, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> str:
    """The name in a file of a part of a tensor of `shape`: of the whole its name, else `name[0:4,2:6]`."""
    if tuple(size) == tuple(shape):
        return name
    return f"{name}[{','.join(f'{start}:{start + length}' for start, length in zip(offset, size, strict=True))}]"


def whole_pieces(tensors: Mapping[str, TensorStream]) -> Iterator[Piece]:
    """Whole tensors, by kind, as a piece each."""
    for kind, stream in tensors.items():
        for name, tensor in stream:
            shape = tuple(tensor.shape)
            yield Piece(kind, name, shape, (0,) * len(shape), tensor)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a contiguous tensor of `shape`, as boxes in the order of its memory.

    A range of a matrix is at most three: the rest of a row, whole rows, and the beginning of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row_size = math.prod(shape[1:])
    row, within = divmod(start, row_size)
    if within:
        end = min(stop, start - within + row_size)
        yield from _in_row(row, flat_boxes(shape[1:], within, within + end - start))
        row, start = row + 1, end
    if rows := (stop - start) // row_size:
        yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        row, start = row + rows, start + rows * row_size
    if start < stop:
        yield from _in_row(row, flat_boxes(shape[1:], 0, stop - start))


def _in_row(row: int, boxes: Iterable[Box]) -> Iterator[Box]:
    for offset, size in boxes:
        yield (row, *offset), (1, *size)


def common_box(first: Box, second: Box) -> Box | None:
    """Where two boxes overlap; None where they do not."""
    offset = tuple(max(a, b) for a, b in zip(first[0], second[0], strict=True))
    ends = (min(a + m, b + n) for a, m, b, n in zip(*first, *second, strict=True))
    size = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return (offset, size) if all(length > 0 for length in size) else None


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """A box as indices into a tensor that begins at `origin`; default 0."""
    origin = origin or (0,) * len(box[0])
    starts = [start - zero for start, zero in zip(box[0], origin, strict=True)]
    return tuple(slice(start, start + length) for start, length in zip(starts, box[1], strict=True))


def coverage_fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with parts that are to be the whole of a tensor of `shape`, each of its values once."""
    for offset, size in boxes:
        if any(start + length > whole for start, length, whole in zip(offset, size, shape, strict=True)):
            return "has a part outside of it"
    covered, whole = sum(math.prod(size) for _, size in boxes), math.prod(shape)
    if covered != whole:
        return f"has {covered:,} of its {whole:,} values only" if covered < whole else "has values twice"
    return _overlap_fault([box for box in boxes if math.prod(box[1])])


def _overlap_fault(boxes: list[Box]) -> str | None:
    """Do boxes overlap? They are cut apart, dimension by dimension, which takes few turns for parts that ranks have."""
    groups, turns = [boxes], _MAX_TURNS * len(boxes)
    while groups:
        group = groups.pop()
        turns -= len(group)
        if len(group) < 2:
            continue
        cuts = (_cut_apart(group, dim) for dim in range(len(group[0][0])))
        if apart := next((found for found in cuts if len(found) > 1), None):
            groups += apart
        elif any(common_box(*pair) for pair in combinations(group[:_MAX_COMPARED], 2)):
            return "has values twice"
        elif len(group) > _MAX_COMPARED:
            turns = -1
        if turns < 0:
            return "has too many parts across each other"
    return None


def _cut_apart(boxes: Sequence[Box], dim: int) -> list[list[Box]]:
    """Boxes in groups that have nothing of one dimension in common with each other."""
    groups: list[list[Box]] = []
    end = 0
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        if not groups or box[0][dim] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box[0][dim] + box[1][dim])
    return groups
