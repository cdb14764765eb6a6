"""Tokenizers, one small class a kind, built from the config by build_tokenizer()."""

from __future__ import annotations

from typing import get_args

from megatron.config.sections.tokenizer import TokenizerConfig, TokenizerType
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.bpe import GPT2BPETokenizer, HFTokenizer
from megatron.tokenizer.byte_level import CharLevelTokenizer
from megatron.tokenizer.sentencepiece import SPMTokenizer
from megatron.tokenizer.tiktoken import TiktokenTokenizer

TOKENIZER_TYPES: tuple[str, ...] = get_args(TokenizerType)

__all__ = [
    "TOKENIZER_TYPES",
    "CharLevelTokenizer",
    "GPT2BPETokenizer",
    "HFTokenizer",
    "SPMTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "tokenizer_of_flags",
]


def tokenizer_of_flags(flag: str, kind: str, vocab_file: str | None, merge_file: str | None) -> TokenizerConfig:
    """The tokenizer that a command line names, `kind` with `flag`. Raises UserError for a kind that is not there."""
    if kind in TOKENIZER_TYPES:
        return TokenizerConfig.model_validate(
            {"tokenizer_type": kind, "vocab_file": vocab_file, "merge_file": merge_file}
        )
    if kind == "HFGPT2Tokenizer":
        raise UserError(f"{flag}: {kind} is GPT2BPETokenizer here; give it with GPT-2's vocab.json and merges.txt")
    raise UserError(f"{flag}: unknown tokenizer '{kind}'; known are {', '.join(TOKENIZER_TYPES)}")


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
