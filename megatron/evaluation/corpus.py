"""Documents of a text file or a .bin/.idx pair, as token ids with the words and bytes of their text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.data.text import SUFFIXES, read_documents, texts
from megatron.errors import UserError
from megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One document; the end-of-document token is not in it."""

    ids: list[int]
    num_words: int
    """Pieces of the text between white space."""
    num_bytes: int
    """Length of the text in UTF-8."""


def corpus_documents(
    path: str, tokenizer: Tokenizer, limit: int | None = None, key: str = "perplexity_data"
) -> Iterator[Document]:
    """The documents of `path`, in order, the first `limit` of them: the prefix of a .bin/.idx pair, or a text file.

    A .txt file is one document, of .jsonl every line's `text`. The text of a .bin file is what its ids decode to, with
    special tokens written out: they may have stood in the text.

    Args:
        key: that names the corpus, for messages.

    Raises: UserError when there is no such corpus, it is damaged, or the tokenizer is not the one it was made with.
    """
    if prefix := find_corpus(path, key):
        return islice(_indexed_documents(IndexedDataset(prefix), tokenizer, key), limit)
    found = (text for document in read_documents([path]) for text in texts(document, ["text"]))
    return islice((_document(tokenizer.encode(text), text) for text in found), limit)


def find_corpus(path: str, key: str = "perplexity_data") -> str | None:
    """The prefix of the .bin/.idx pair that `path` names; None for a text file. Raises UserError for neither."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    if os.path.isfile(f"{prefix}.idx"):
        return prefix
    if not path.endswith(SUFFIXES) or not os.path.isfile(path):
        raise UserError(
            f"{key}: {path} is neither the prefix of a .bin/.idx pair nor a text file ({', '.join(SUFFIXES)})"
        )
    return None


def _document(ids: list[int], text: str) -> Document:
    return Document(ids, len(text.split()), len(text.encode("utf-8", errors="replace")))


def _indexed_documents(dataset: IndexedDataset, tokenizer: Tokenizer, key: str) -> Iterator[Document]:
    ends = dataset.document_indices
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        parts = [dataset[i] for i in range(first, last)]
        ids = np.concatenate(parts).tolist() if parts else []
        if wrong := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
            raise UserError(
                f"{key}: {dataset.prefix} holds token id {max(wrong)}, the tokenizer has "
                f"{tokenizer.vocab_size} ids; use the tokenizer the data was made with"
            )
        if ids and ids[-1] == tokenizer.eod_id:
            ids.pop()
        yield _document(ids, tokenizer.decode_whole(ids))
