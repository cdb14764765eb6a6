"""Training a byte-level BPE tokenizer.json (`tokenizers`) or a sentencepiece model from a stream of texts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.errors import UserError
from megatron.files import write_output
from megatron.tokenizer.base import END_OF_TEXT, well_formed
from megatron.tokenizer.files import optional_package

MINIMUM_BPE_VOCABULARY = 257
"""The 256 bytes and `<|endoftext|>`."""

_SENTENCE_LENGTH = 1024  # characters; sentencepiece skips sentences of more than 4192 bytes
_SENTENCES = 2_000_000  # what sentencepiece keeps in memory, a uniform sample of a longer stream


def train_tokenizer(texts: Iterable[str], vocabulary: int, path: str | Path) -> Tokenizer:
    """Learn `vocabulary` entries from `texts`, write them to `path` (a tokenizer.json), and return the tokenizer.

    Entry 0 is the special token `<|endoftext|>`; the 256 bytes are always among the entries, so every text is encoded.
    Raises UserError for a vocabulary too small to hold these.
    """
    if vocabulary < MINIMUM_BPE_VOCABULARY:
        raise UserError(
            f"--vocab-size: {vocabulary} is too small; a byte-level BPE has {MINIMUM_BPE_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(well_formed, texts), trainer)
    write_output(path, tokenizer.to_str(pretty=True), "--output")
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocabulary: int, path: str | Path) -> None:
    """Learn exactly `vocabulary` BPE pieces from `texts` and write them to `path` (a sentencepiece .model).

    Text is kept as it is (no normalisation, no added space) and unseen characters become bytes. Piece 0 is the unknown
    one, piece 1 the control symbol `<|endoftext|>`. Raises UserError if the texts do not yield that many pieces.
    """
    package = optional_package("sentencepiece", "SPMTokenizer")
    package.set_random_generator_seed(0)
    model, failures = io.BytesIO(), list[BaseException]()
    try:
        package.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, failures), model_writer=model, model_type="bpe", vocab_size=vocabulary,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, control_symbols=[END_OF_TEXT],
            input_sentence_size=_SENTENCES, shuffle_input_sentence=True, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:  # "INTERNAL: source file(line) [condition] reason"
        if not failures:
            reason = str(error).rpartition("] ")[2] or "too little text"
            raise UserError(f"--vocab-size: sentencepiece cannot learn {vocabulary} pieces: {reason}") from error
    if failures:
        raise failures[0]
    write_output(path, model.getvalue(), "--output")


def _sentences(texts: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """Pieces of the texts; what reading them raises goes to `failures`, since sentencepiece would lose its type."""
    try:
        for text in map(well_formed, texts):
            for start in range(0, len(text), _SENTENCE_LENGTH):
                yield text[start : start + _SENTENCE_LENGTH]
    except (Exception, KeyboardInterrupt) as error:
        failures.append(error)
