"""Samples that begin anywhere: segments of a corpus, each drawn by itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.indexed import IndexedDataset
from megatron.data.samples import Documents, Origin, count_tokens, document_numbers
from megatron.errors import UserError


class RandomSegments(Dataset[npt.NDArray[np.int64]]):
    """Samples of `seq_length` + 1 tokens of documents one after the other; each begins at a token drawn uniformly.

    Which one depends on the seed and the sample's number alone: no order is built or saved, a longer run begins with
    the samples of a shorter one, and loader processes and ranks make no difference. Some tokens are read twice before
    others are read at all, as in the paper's section 4.1.

    Args:
        num_samples: how many there are.
        documents: default all.
        part: number of this set in a blend, whose sets draw apart.

    Raises: UserError when the documents hold fewer tokens than a sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        seed: int,
        num_samples: int,
        documents: Documents | None = None,
        part: int = 0,
    ) -> None:
        self.indexed, self.seq_length, self._seed, self._part = indexed, seq_length, seed, part
        self._num_samples = num_samples
        documents = (0, len(indexed)) if documents is None else documents
        tokens = count_tokens(indexed, documents)
        if tokens <= seq_length:
            raise UserError(
                f"{indexed.bin_path}: {tokens} tokens are no segment of seq_length {seq_length} and the token behind "
                "it; use a larger corpus, or sample_order: documents"
            )
        self._documents = document_numbers(documents)
        self._ends = np.cumsum(indexed.sizes[self._documents], dtype=np.int64)
        self._starts = tokens - seq_length

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Sample `index`: int64 [seq_length + 1]."""
        return np.concatenate([self.indexed.get(*part) for part in self._parts(index)], dtype=np.int64)

    def origins(self, index: int) -> list[Origin]:
        """What sample `index` is made of, in order."""
        return [Origin(set=self.indexed.prefix, index=i, offset=start, length=n) for i, start, n in self._parts(index)]

    def _parts(self, index: int) -> list[tuple[int, int, int]]:
        """(sequence of the corpus, offset in it, tokens) of each part of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        draw = int(np.random.Philox(key=[self._seed, index], counter=[0, 0, self._part, 3]).random_raw())
        begin = draw * self._starts >> 64
        end, parts = begin + self.seq_length + 1, []
        place = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(self._ends[place]))
            if stop > begin:
                document = int(self._documents[place])
                first = int(self._ends[place]) - int(self.indexed.sizes[document])
                parts.append((document, begin - first, stop - begin))
            begin, place = stop, place + 1
        return parts
