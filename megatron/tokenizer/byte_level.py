"""CharLevelTokenizer: UTF-8 bytes as ids, no file needed."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from megatron.tokenizer.base import Tokenizer


class CharLevelTokenizer(Tokenizer):
    """Ids 0..255 are bytes in a vocabulary of 512; id 0 (the NUL byte) ends a document, as in GPT-NeoX."""

    name = "CharLevelTokenizer"
    vocab_size = 512
    eod_id = 0
    specials = MappingProxyType({0: "\0"})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        # 0xff occurs nowhere in UTF-8: an id that is no byte is shown as the replacement character.
        kept = bytes(token if token < 256 else 0xFF for token in ids if token != self.eod_id)
        return kept.decode("utf-8", errors="replace")
