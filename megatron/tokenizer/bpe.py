"""HFTokenizer and GPT2BPETokenizer, both on the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.errors import UserError
from megatron.files import read_text
from megatron.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed
from megatron.tokenizer.files import existing


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, batches start no threads: whoever has several cores gives each of them a process."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _LibraryTokenizer(Tokenizer):
    def __init__(self, backend: tokenizers.Tokenizer, vocab_file: str) -> None:
        self._backend = backend
        # Many tokenizer.json files cut or pad to a model's length; documents stay whole here.
        backend.no_truncation()
        backend.no_padding()
        eod_id = backend.token_to_id(END_OF_TEXT)
        if eod_id is None:
            raise UserError(
                f"vocab_file: {vocab_file} has no {END_OF_TEXT} token, which ends a document; "
                "choose a tokenizer that has it or add it to the file"
            )
        self.eod_id = eod_id
        added = backend.get_added_tokens_decoder()
        self.specials = {eod_id: END_OF_TEXT} | {i: token.content for i, token in added.items() if token.special}
        # Ids may have gaps, and the embedding needs a row for the highest one.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(well_formed(text), add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        with _one_thread():
            # Does not keep where in the text a token is from, which takes a fifth of the time.
            found = self._backend.encode_batch_fast([*map(well_formed, texts)], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([token for token in ids if token != self.eod_id], skip_special_tokens=True)


class HFTokenizer(_LibraryTokenizer):
    """A tokenizer.json of the `tokenizers` library, for example that of GPT-NeoX-20B and Pythia."""

    name = "HFTokenizer"

    def __init__(self, vocab_file: str | None) -> None:
        path = existing("vocab_file", vocab_file, self.name, "a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path, "vocab_file", "give a tokenizer.json"))
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"vocab_file: {path} is not a valid tokenizer.json ({error})") from error
        super().__init__(backend, path)


class GPT2BPETokenizer(_LibraryTokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt."""

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str | None, merge_file: str | None) -> None:
        vocab = existing("vocab_file", vocab_file, self.name, "GPT-2's vocab.json")
        merges = existing("merge_file", merge_file, self.name, "GPT-2's merges.txt")
        try:
            model = models.BPE(vocab=_vocabulary(vocab), merges=_merges(merges))
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"vocab_file, merge_file: {vocab} and {merges} are no valid GPT-2 pair ({error})"
            ) from error
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        super().__init__(backend, vocab)


def _vocabulary(path: str) -> dict[str, int]:
    """{token: id} of a vocab.json."""
    found: dict[str, int] = json.loads(read_text(path, "vocab_file", "give GPT-2's vocab.json"))
    return found


def _merges(path: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, whose first line may be its version."""
    lines = read_text(path, "merge_file", "give GPT-2's merges.txt").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return [(left, right) for left, right in pairs]
