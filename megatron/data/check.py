"""A .bin/.idx pair read from end to end: what it holds, and whether it is what was written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megatron.data.checksum import checksum_path, compare, file_checksum, read_checksums, write_checksums
from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError
from megatron.files import find_regular_output

_BLOCK_TOKENS = 1 << 23


@dataclass(frozen=True)
class PairFacts:
    """What a pair holds. checksums: `hold`, `written`, or `not recorded`."""

    prefix: str
    num_documents: int
    num_tokens: int
    dtype: str
    lowest_id: int
    highest_id: int
    checksums: str

    def __str__(self) -> str:
        ids = f"ids {self.lowest_id} to {self.highest_id} in {self.dtype}" if self.num_tokens else "no ids"
        counts = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        return f"{self.prefix}: {counts}, {ids}; checksums {self.checksums}"


def check_pair(prefix: str, write: bool = False) -> PairFacts:
    """Read a whole pair and compare the checksums that are recorded of it.

    write: record checksums where there are none. Raises UserError for a pair that is damaged.
    """
    read_checksums(prefix)  # opening the pair would only warn of a file that holds none
    corpus = IndexedDataset(prefix)
    digest, lowest, highest = _read(corpus)
    if lowest < 0:
        raise UserError(f"{corpus.bin_path}: holds the negative id {lowest}; prepare the data again")
    checksums = "hold" if compare(prefix, ".bin", lambda: digest) else "not recorded"
    if write and checksums == "not recorded":
        path = find_regular_output(checksum_path(prefix), "--write")
        write_checksums(path, prefix, {".bin": digest, ".idx": file_checksum(corpus.idx_path)})
        checksums = "written"
    documents = len(corpus.document_indices) - 1
    return PairFacts(prefix, documents, corpus.num_tokens, str(corpus.dtype), lowest, highest, checksums)


def _read(corpus: IndexedDataset) -> tuple[str, int, int]:
    """(sha256 of .bin, lowest id, highest id)."""
    digest, lowest, highest = hashlib.sha256(), 0, 0
    for first in range(0, corpus.num_tokens, _BLOCK_TOKENS):
        block = corpus.tokens[first : first + _BLOCK_TOKENS]
        digest.update(block.data)
        lowest = min(lowest, int(block.min())) if first else int(block.min())
        highest = max(highest, int(block.max()))
    return digest.hexdigest(), lowest, highest
