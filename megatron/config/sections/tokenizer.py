"""Section `tokenizer`: the tokenizer and its files."""

from __future__ import annotations

from typing import Literal

from megatron.config.sections.base import Section

TokenizerType = Literal["HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer", "TiktokenTokenizer", "CharLevelTokenizer"]


class TokenizerConfig(Section):
    """The tokenizer."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    """HFTokenizer: a tokenizer.json; GPT2BPETokenizer: vocab.json and merges.txt; SPMTokenizer: a sentencepiece model;
    TiktokenTokenizer: a ranks file or the name of an encoding; CharLevelTokenizer: bytes."""
    vocab_file: str | None = None
    """tokenizer.json, vocab.json of GPT-2, a sentencepiece .model, or a .tiktoken file or the name of an encoding."""
    merge_file: str | None = None
    """merges.txt of GPT-2."""
