"""Small tokenizers with two special tokens."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.tokenizer import HFTokenizer

EOD, TURN = "<|endoftext|>", "<|im_end|>"
CORPUS = ["the people of the united states and the congress of the states, caf\u00e9 \U0001f600 " * 20]


def train(path: Path, kind: str) -> HFTokenizer:
    """A BPE of bytes, or of words that bring their space along, with two special tokens."""
    tokenizer, alphabet = tokenizers.Tokenizer(models.BPE()), list[str]()
    if kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[EOD, TURN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(path))
    return HFTokenizer(str(path))
