"""TiktokenTokenizer, on the optional `tiktoken` package."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import read_text
from megatron.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed
from megatron.tokenizer.files import existing, optional_package


@dataclass(frozen=True)
class Definition:
    """What a ranks file leaves out: the pattern that cuts a text into words, and the special tokens."""

    pattern: str
    special_tokens: Mapping[str, int]


_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# By the name of the ranks file without its suffix, equal to tiktoken's own encodings of these names.
DEFINITIONS = {
    "gpt2": Definition(_GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "r50k_base": Definition(_GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "p50k_base": Definition(_GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "cl100k_base": Definition(
        _CL100K_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Definition(_O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding from a local ranks file (lines of base64 and rank), or by its name.

    A file named like one of DEFINITIONS is that encoding; any other one has cl100k_base's pattern and, after its
    highest rank, the token `<|endoftext|>`. Special tokens written in a text are encoded as plain text.
    """

    name = "TiktokenTokenizer"

    def __init__(self, vocab_file: str | None) -> None:
        package = optional_package("tiktoken", self.name)
        if vocab_file and vocab_file in package.list_encoding_names() and not Path(vocab_file).is_file():
            self._encoding = _by_name(package, vocab_file)
        else:
            content = "a ranks file (.tiktoken) or the name of an encoding"
            self._encoding = _from_file(package, existing("vocab_file", vocab_file, self.name, content))
        self.vocab_size = self._encoding.n_vocab
        self.eod_id = self._encoding.eot_token
        specials = self._encoding.special_tokens_set
        self.specials = {self._encoding.encode_single_token(token): token for token in specials}

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(well_formed(text))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if token in self.specials:
            return b""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap between the ids
            return b""


def _by_name(package: Any, name: str) -> Any:
    try:
        return package.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"vocab_file: the ranks of '{name}' could not be downloaded ({type(error).__name__}); fetch "
            f"{name}.tiktoken on a machine with network and give its path, or set TIKTOKEN_CACHE_DIR to a filled cache"
        ) from error


def _from_file(package: Any, path: str) -> Any:
    ranks = _read_ranks(path)
    following = {END_OF_TEXT: max(ranks.values()) + 1}
    known = DEFINITIONS.get(Path(path).stem, Definition(_CL100K_PATTERN, following))
    if taken := set(known.special_tokens.values()) & set(ranks.values()):
        raise UserError(f"vocab_file: {path} gives a token the id {min(taken)} of a special token; rename the file")
    return package.Encoding(
        Path(path).stem, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=dict(known.special_tokens)
    )


def _read_ranks(path: str) -> dict[bytes, int]:
    lines = read_text(path, "vocab_file", "give a ranks file of lines 'base64 rank'").split("\n")
    try:
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise UserError(f"vocab_file: {path} is not a ranks file of lines 'base64 rank' ({error})") from error
    if len(set(ranks.values())) < len(pairs) or not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(f"vocab_file: {path} repeats a token or rank, or lacks one of the 256 bytes")
    return ranks
