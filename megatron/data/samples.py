"""Fixed-length samples cut from a corpus, in GPT-NeoX's order.

Documents are repeated num_epochs times and shuffled together; their concatenation is cut into samples of
seq_length + 1 tokens that overlap by one; the samples are shuffled with the same generator. Since num_epochs
follows from the run's length, a longer run would order its data anew. So the order is a list of epoch blocks:
block 0 is exactly that order, and an extension appends block j, shuffled by itself with seed + j.

An order of more than WHOLE_ORDER_SAMPLES samples would take minutes and gigabytes at every start. Such a run has blocks
of a few epochs, each built when it is reached, as many as it needs.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.index_cache import cached_arrays, corpus_identity
from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError

CACHE_MIN_SAMPLES = 1_000_000
"""Blocks with fewer samples are built in memory; that takes well under a second."""

WHOLE_ORDER_SAMPLES = 1 << 28
"""Runs of up to so many samples have GPT-NeoX's order, built as a whole at the start."""

_LATER_SAMPLES = 1 << 19
_BLOCKS_KEPT = 2

_NAMES = ("doc_idx", "sample_idx", "shuffle_idx")

Documents = tuple[int, int] | npt.NDArray[np.integer]
"""Sequences of a corpus: (first, end), or their numbers."""


class Origin(TypedDict):
    """Tokens of a corpus that a sample has."""

    set: str
    """Prefix of the .bin/.idx pair."""
    index: int
    """Number of the sequence in it; prepare_data.py makes one of a document."""
    offset: int
    """First token of the sequence that the sample has."""
    length: int
    """How many it has."""


@dataclass(frozen=True)
class _Block:
    """Sample k of the block is cut between sample_idx rows r and r + 1, r = shuffle_idx[k]."""

    doc_idx: npt.NDArray[np.integer]  # [epochs * documents]: sequence numbers in the corpus
    sample_idx: npt.NDArray[np.integer]  # [samples + 1, 2]: position in doc_idx, token offset there
    shuffle_idx: npt.NDArray[np.integer]  # [samples]


class GPTDataset(Dataset[npt.NDArray[np.int64]]):
    """Samples of `seq_length` + 1 tokens from documents of a corpus, by default all.

    epoch_blocks, later_block: blocks of an earlier part of the run, and the epochs of each block after them (0: no
        such blocks). One is appended if they hold fewer than `num_samples` samples; where these are more than
        WHOLE_ORDER_SAMPLES, all later ones follow. The attributes of these names are what a later run must be given.
    cache_dir: folder of the order's files for large corpora; default: beside the data.
    Raises UserError when the documents hold too few tokens for a sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        seed: int,
        num_samples: int,
        documents: Documents | None = None,
        epoch_blocks: Sequence[int] = (),
        cache_dir: str | Path | None = None,
        cache_min_samples: int | None = None,
        later_block: int = 0,
    ) -> None:
        self.indexed, self.seq_length, self.seed = indexed, seq_length, seed
        self.documents: Documents = (0, len(indexed)) if documents is None else documents
        self._folder = Path(cache_dir) if cache_dir else Path(indexed.prefix).parent
        self._cache_min_samples = CACHE_MIN_SAMPLES if cache_min_samples is None else cache_min_samples
        self.tokens_per_epoch = tokens = count_tokens(indexed, self.documents)
        self.epoch_blocks, self.later_block = plan_blocks(epoch_blocks, later_block, tokens, seq_length, num_samples)
        counts = [count_samples(epochs, tokens, seq_length) for epochs in self.epoch_blocks]
        self._ends = list(itertools.accumulate(counts))
        self._later_count = count_samples(self.later_block, tokens, seq_length) if self.later_block else 0
        self._num_later = max(0, -(-(num_samples - self._ends[-1]) // self._later_count)) if self.later_block else 0
        self._blocks: dict[int, _Block] = {}
        if not self.later_block:
            self._blocks = {number: self._build(number) for number in range(len(self.epoch_blocks))}

    def _block(self, number: int) -> _Block:
        """Block `number`. Of a run with later ones the last two are kept: it goes from each to the next."""
        if number not in self._blocks:
            while len(self._blocks) >= _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = self._build(number)
        return self._blocks[number]

    def store_order(self) -> int:
        """Write the files of all blocks that are kept in files and that the samples reach; how many these are."""
        first = [end - start for start, end in itertools.pairwise([0, *self._ends])]
        counts = first + [self._later_count] * self._num_later
        large = [number for number, count in enumerate(counts) if count >= self._cache_min_samples]
        for number in large:
            self._block(number)
        return len(large)

    def _build(self, number: int) -> _Block:
        num_epochs = self.epoch_blocks[number] if number < len(self.epoch_blocks) else self.later_block
        count = count_samples(num_epochs, self.tokens_per_epoch, self.seq_length)
        seed = (self.seed + number) % 2**32

        def build() -> tuple[npt.NDArray[np.integer], ...]:
            try:
                return build_order(self.indexed.sizes, self.documents, num_epochs, self.seq_length, seed)
            except (MemoryError, OverflowError, ValueError):  # numpy's words for sizes beyond any memory
                raise UserError(
                    f"{self.indexed.bin_path}: the order of {count:,} samples ({num_epochs} epochs) does not fit in "
                    "memory; lower train_iters, or join short documents"
                ) from None

        if count < self._cache_min_samples:
            return _Block(*build())
        identity = corpus_identity(self.indexed)
        order = f"{identity}/{_named(self.documents)}/{self.seq_length}/{seed}/{num_epochs}"
        return _Block(*cached_arrays(self._folder, Path(self.indexed.prefix).name, order, _NAMES, build))

    def _locate(self, index: int) -> tuple[int, int]:
        """(block, sample number in it) of sample `index`."""
        end = self._ends[-1]
        if index >= end:
            number, place = divmod(index - end, self._later_count)
            return len(self._ends) + number, place
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def __len__(self) -> int:
        return self._ends[-1] + self._num_later * self._later_count

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Sample `index`: int64 [seq_length + 1]; the last token of one sample is the first of its neighbour."""
        return np.concatenate([self.indexed.get(*part) for part in self._parts(index)], dtype=np.int64)

    def origins(self, index: int) -> list[Origin]:
        """What sample `index` is made of, in order."""
        corpus = self.indexed.prefix
        return [Origin(set=corpus, index=i, offset=start, length=n) for i, start, n in self._parts(index) if n]

    def _parts(self, index: int) -> list[tuple[int, int, int]]:
        """(sequence of the corpus, offset in it, tokens) of each part of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, place = self._locate(index)
        block = self._block(number)
        row = int(block.shuffle_idx[place])
        (first, start), (last, end) = block.sample_idx[row].tolist(), block.sample_idx[row + 1].tolist()
        documents = [int(document) for document in block.doc_idx[first : last + 1]]
        starts = [start, *(0 for _ in documents[1:])]
        ends = [*(int(self.indexed.sizes[document]) for document in documents[:-1]), end + 1]
        return [(document, a, b - a) for document, a, b in zip(documents, starts, ends, strict=True)]

    @property
    def doc_idx(self) -> npt.NDArray[np.integer]:
        """Sequence numbers in the order of reading, all of epoch_blocks one after the other."""
        return self._joined([block.doc_idx for block in self._first_blocks()])

    @property
    def sample_idx(self) -> npt.NDArray[np.integer]:
        """[rows, 2]: position in doc_idx and token offset; each block has one row more than samples."""
        parts, shift = [], 0
        for block in self._first_blocks():
            parts.append(block.sample_idx + np.array([shift, 0], block.sample_idx.dtype) if shift else block.sample_idx)
            shift += len(block.doc_idx)
        return self._joined(parts)

    @property
    def shuffle_idx(self) -> npt.NDArray[np.integer]:
        """Row of sample_idx at which sample i begins; it ends at the next row."""
        parts, shift = [], 0
        for block in self._first_blocks():
            parts.append(block.shuffle_idx + block.shuffle_idx.dtype.type(shift) if shift else block.shuffle_idx)
            shift += len(block.sample_idx)
        return self._joined(parts)

    def _first_blocks(self) -> list[_Block]:
        return [self._block(number) for number in range(len(self.epoch_blocks))]

    @staticmethod
    def _joined(parts: list[npt.NDArray[np.integer]]) -> npt.NDArray[np.integer]:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def count_tokens(indexed: IndexedDataset, documents: Documents) -> int:
    """Tokens of documents. Raises UserError for too few to make a sample."""
    is_range = isinstance(documents, tuple)
    sizes = indexed.sizes[slice(*documents)] if is_range else indexed.sizes[documents]
    tokens = int(sizes.sum(dtype=np.int64))
    if tokens < 2:
        what = f"documents {documents[0]} to {documents[1]}" if is_range else f"{len(documents)} documents"
        raise UserError(
            f"{indexed.bin_path}: {what} hold {tokens} tokens, too few for a sample; use a larger corpus or another "
            "split"
        )
    return tokens


def document_numbers(documents: Documents) -> npt.NDArray[np.integer]:
    """The numbers of documents, int32 [documents]."""
    return np.arange(*documents, dtype=np.int32) if isinstance(documents, tuple) else documents.astype(np.int32)


def _named(documents: Documents) -> str:
    if isinstance(documents, tuple):
        return str(documents)
    return hashlib.sha256(document_numbers(documents).tobytes()).hexdigest()


def count_samples(num_epochs: int, tokens_per_epoch: int, seq_length: int) -> int:
    """Samples in `num_epochs` epochs; the very last token is only ever a label."""
    return (num_epochs * tokens_per_epoch - 1) // seq_length


def plan_blocks(
    epoch_blocks: Sequence[int], later_block: int, tokens_per_epoch: int, seq_length: int, num_samples: int
) -> tuple[list[int], int]:
    """The blocks of an order of `num_samples` samples that begins with `epoch_blocks`, and the epochs of later ones."""
    if not later_block and num_samples <= WHOLE_ORDER_SAMPLES:
        return extend_epoch_blocks(epoch_blocks, tokens_per_epoch, seq_length, num_samples), 0
    one_sample = _epochs_for(1, tokens_per_epoch, seq_length)
    # Where an epoch has more samples than _LATER_SAMPLES, a block is one epoch.
    wanted = later_block or max(1, _LATER_SAMPLES * seq_length // tokens_per_epoch)
    return list(epoch_blocks) or [max(wanted, one_sample)], max(wanted, one_sample)


def _epochs_for(num_samples: int, tokens_per_epoch: int, seq_length: int) -> int:
    """The smallest e with (e * tokens - 1) // seq_length >= samples."""
    return -(-(num_samples * seq_length + 1) // tokens_per_epoch)


def extend_epoch_blocks(
    epoch_blocks: Sequence[int], tokens_per_epoch: int, seq_length: int, num_samples: int
) -> list[int]:
    """The blocks, plus one of as few epochs as suffice if they hold fewer than `num_samples` (at least 1) samples."""
    missing = max(1, num_samples) - sum(count_samples(block, tokens_per_epoch, seq_length) for block in epoch_blocks)
    if missing <= 0:
        return list(epoch_blocks)
    return [*epoch_blocks, _epochs_for(missing, tokens_per_epoch, seq_length)]


def build_order(
    sizes: npt.NDArray[np.int32], documents: Documents, num_epochs: int, seq_length: int, seed: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """(doc_idx, sample_idx, shuffle_idx) of one block, equal to GPT-NeoX's for the same arguments.

    Shapes as in GPTDataset. The order of the two shuffles matters: they share one generator.
    """
    generator = np.random.RandomState(seed)
    doc_idx = np.tile(document_numbers(documents), num_epochs)
    generator.shuffle(doc_idx)
    sample_idx = _cut(sizes[doc_idx], seq_length)
    num_samples = len(sample_idx) - 1
    small = num_samples < np.iinfo(np.uint32).max - 1
    shuffle_idx: npt.NDArray[np.integer] = np.arange(num_samples, dtype=np.uint32 if small else np.int64)
    generator.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def _cut(lengths: npt.NDArray[np.int32], seq_length: int) -> npt.NDArray[np.integer]:
    """Position and offset of every seq_length-th token in documents of these lengths: [samples + 1, 2]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    num_samples = count_samples(1, int(ends[-1]), seq_length)
    cuts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, cuts, side="right")
    offsets = cuts - (ends[positions] - lengths[positions])
    positions[0] = offsets[0] = 0  # an empty first document is where the official index begins
    fits = max(len(lengths), 2 * (num_samples + 1)) < np.iinfo(np.int32).max
    return np.stack([positions, offsets], axis=1).astype(np.int32 if fits else np.int64)


def split_shares(split: str) -> list[float]:
    """The shares of training, validation and test: up to three, "949,50,1" or "949/50/1"; the others are 0.

    Raises: UserError when it is not of that form.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")][:3]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"split: '{split}' is not a list of up to three shares; write it like \"949,50,1\"")
    return shares + [0.0] * (3 - len(shares))


def split_documents(split: str, num_documents: int) -> list[tuple[int, int]]:
    """Ranges (first, end) of the training, validation and test documents, rounded as GPT-NeoX does.

    split: see `split_shares`. Raises UserError when it is not of that form.
    """
    shares = split_shares(split)
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * float(num_documents)))
    # All bounds but the first move together so that the last one is exact; none may leave the corpus.
    surplus = bounds[-1] - num_documents
    bounds = [0] + [min(max(bound - surplus, 0), num_documents) for bound in bounds[1:]]
    return [(bounds[i], bounds[i + 1]) for i in range(3)]
