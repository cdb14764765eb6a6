"""Tokenizers, one small class a kind, built from the config by build_tokenizer()."""

from __future__ import annotations

from megatron.config.schema import TokenizerConfig
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.bpe import GPT2BPETokenizer, HFTokenizer
from megatron.tokenizer.byte_level import CharLevelTokenizer
from megatron.tokenizer.sentencepiece import SPMTokenizer
from megatron.tokenizer.tiktoken import TiktokenTokenizer

__all__ = [
    "CharLevelTokenizer",
    "GPT2BPETokenizer",
    "HFTokenizer",
    "SPMTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "build_tokenizer",
]


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names; raises UserError when one of its files is missing or invalid,
    or its package is not installed."""
    if config.tokenizer_type == "HFTokenizer":
        return HFTokenizer(config.vocab_file)
    if config.tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(config.vocab_file, config.merge_file)
    if config.tokenizer_type == "SPMTokenizer":
        return SPMTokenizer(config.vocab_file)
    if config.tokenizer_type == "TiktokenTokenizer":
        return TiktokenTokenizer(config.vocab_file)
    return CharLevelTokenizer()
