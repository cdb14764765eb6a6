"""What every tokenizer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

END_OF_TEXT = "<|endoftext|>"


def well_formed(text: str) -> str:
    """`text` with a question mark for every lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Tokenizer(ABC):
    """Text to token ids and back.

    name: the tokenizer_type of the config. vocab_size: ids are below it. eod_id: the end-of-document id, which
    preprocessing appends to documents and decode() leaves out.
    """

    name: str
    vocab_size: int
    eod_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-document id or any other added one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; what is not valid UTF-8 becomes the replacement character."""
