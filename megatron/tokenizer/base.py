"""What every tokenizer offers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

END_OF_TEXT = "<|endoftext|>"


def well_formed(text: str) -> str:
    """`text` with a question mark for every lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


# Tokens before a continuation that its decoding depends on: four of them may be the bytes of one character.
_TAIL = 16


class Tokenizer(ABC):
    """Text to token ids and back.

    name: the tokenizer_type of the config. vocab_size: ids are below it. eod_id: the end-of-document id, which
    preprocessing appends to documents and decode() leaves out. specials: the texts of all ids that decode() leaves out.
    """

    name: str
    vocab_size: int
    eod_id: int
    specials: Mapping[int, str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-document id or any other added one."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in this thread."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; what is not valid UTF-8 becomes the replacement character."""

    def decode_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to the text of `context`.

        Many tokenizers have the space before a word in the word's token, and leave it off at the start of a text only.
        """
        tail = list(context[-_TAIL:])
        before, whole = self.decode(tail), self.decode([*tail, *ids])
        # Bytes that do not yet make a character are shown as another one.
        return whole[len(os.path.commonprefix([before, whole])) :]

    def decode_whole(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """The text of `ids` behind `context`, the special tokens among them written out."""
        pieces, start = [], 0
        for place, token in enumerate(ids):
            if token in self.specials:
                pieces += [self._run(context, ids, start, place), self.specials[token]]
                start = place + 1
        return "".join([*pieces, self._run(context, ids, start, len(ids))])

    def _run(self, context: Sequence[int], ids: Sequence[int], start: int, end: int) -> str:
        """The text of ids[start:end] behind all before them."""
        before = [*context[-_TAIL:], *ids[max(0, start - _TAIL) : start]]
        return self.decode_after(before, ids[start:end])
