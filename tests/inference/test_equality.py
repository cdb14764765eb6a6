"""Cached generation is uncached generation, token for token, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch

from megatron.inference.decoding import Decoder, Text
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_model

pytestmark = pytest.mark.long

COUNT, ALONE, CONTEXT = 200, 40, 96


def prompts(seed: int = 0) -> list[list[int]]:
    """Token ids, 1 to 80 of them."""
    generator = random.Random(seed)
    return [[generator.randrange(1, 256) for _ in range(generator.randrange(1, 81))] for _ in range(COUNT)]


def decoded(model: LanguageModel, groups: list[list[int]], recompute: bool) -> list[Text]:
    """All prompts completed in the given batches."""
    decoder = Decoder(model, CharLevelTokenizer(), CONTEXT, recompute)
    lengths = random.Random(1)
    samplings = [Sampling(maximum_tokens=lengths.choice([4, 8, 16])) for _ in range(COUNT)]
    texts = [decoder.start(prompt, sampling) for prompt, sampling in zip(prompts(), samplings, strict=True)]
    with evaluating(model):
        for group in groups:
            decoder.complete([texts[i] for i in group])
    return texts


def compositions() -> list[list[list[int]]]:
    """Some prompts alone, the 200 shuffled into batches of random size, and all in one batch."""
    generator = random.Random(2)
    order = generator.sample(range(COUNT), COUNT)
    groups, start = [], 0
    while start < COUNT:
        size = generator.randrange(1, 40)
        groups.append(order[start : start + size])
        start += size
    return [[[i] for i in order[:ALONE]], groups, [order]]


def gap(model: LanguageModel, tokens: list[int], vocabulary: int) -> float:
    """How much the best next token's logit is above the second's."""
    with torch.no_grad():
        best = model(torch.tensor([tokens]))[0, -1, :vocabulary].topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("kind", ["tokenformer", "transformer"])
def test_200_prompts_in_fp64_are_equal_token_for_token(kind: str) -> None:
    model = make_model(kind, seq_length=CONTEXT)
    expected = [text.tokens for text in decoded(model, compositions()[1], recompute=True)]
    assert len({tuple(tokens) for tokens in expected}) > COUNT // 4, "the model must not always say the same"
    for groups in compositions():
        found, members = decoded(model, groups, recompute=False), [i for group in groups for i in group]
        assert [found[i].tokens for i in members] == [expected[i] for i in members]


def test_200_prompts_in_fp32_are_equal_but_for_near_ties() -> None:
    model, vocabulary = make_model(dtype=torch.float32, seq_length=CONTEXT), CharLevelTokenizer.vocab_size
    expected = decoded(model, compositions()[1], recompute=True)
    for groups in compositions():
        texts = decoded(model, groups, recompute=False)
        for found, text in ((texts[i], expected[i]) for group in groups for i in group):
            same = next((i for i, (a, b) in enumerate(zip(found.tokens, text.tokens, strict=False)) if a != b), None)
            if same is not None:
                assert gap(model, text.prompt + text.tokens[:same], vocabulary) <= 1e-4
            else:
                assert len(found.tokens) == len(text.tokens)
