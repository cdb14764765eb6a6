"""SPMTokenizer, on the optional `sentencepiece` package."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed
from megatron.tokenizer.files import existing, optional_package


class SPMTokenizer(Tokenizer):
    """A sentencepiece .model; the piece `<|endoftext|>` ends a document, or the model's own end of sentence."""

    name = "SPMTokenizer"

    def __init__(self, vocab_file: str | None) -> None:
        path = existing("vocab_file", vocab_file, self.name, "a sentencepiece .model")
        package = optional_package("sentencepiece", self.name)
        try:
            self._model = package.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: a piece that is not UTF-8
            raise UserError(f"vocab_file: {path} is not a valid sentencepiece model ({error})") from error
        self.vocab_size = self._model.vocab_size()
        self.eod_id = self._end_of_document(path)
        controls = [i for i in range(self.vocab_size) if i == self.eod_id or self._model.is_control(i)]
        self.specials = {i: self._model.id_to_piece(i) for i in controls}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(well_formed(text), add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([token for token in ids if token != self.eod_id and token < self.vocab_size])

    def _end_of_document(self, path: str) -> int:
        found = self._model.piece_to_id(END_OF_TEXT)  # the unknown piece's id if there is none
        if self._model.id_to_piece(found) == END_OF_TEXT:
            return found
        if self._model.eos_id() < 0:
            raise UserError(
                f"vocab_file: {path} has neither a {END_OF_TEXT} piece nor an end of sentence, one of which ends a "
                "document; train it with one of them"
            )
        return self._model.eos_id()
