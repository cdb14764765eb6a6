"""Perplexity against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron.inference.perplexity import perplexity
from tests.inference.helpers import make_model

TOKENS = np.random.RandomState(0).randint(0, 512, 101).astype(np.uint16)


def direct_loss(seq_length: int) -> float:
    model, ids = make_model(), torch.from_numpy(TOKENS.astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 100, seq_length):
            window = ids[start : start + seq_length + 1]
            log_probabilities = model(window[None, :-1])[0].log_softmax(-1)
            total -= log_probabilities.gather(-1, window[1:, None]).sum().item()
    return total


@pytest.mark.parametrize("seq_length", [7, 20, 48, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_token_but_the_first_counts_once(seq_length: int, batch_size: int) -> None:
    total = direct_loss(seq_length)
    result = perplexity(make_model(), TOKENS, seq_length, batch_size, num_bytes=321)
    assert result["loss"] == pytest.approx(total / 100, rel=1e-9)
    assert result["perplexity"] == pytest.approx(math.exp(total / 100), rel=1e-9)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / 321, rel=1e-9)
    assert result["num_tokens"] == 100


def test_text_shorter_than_a_window_and_torch_ids_work() -> None:
    short = torch.from_numpy(TOKENS[:10].astype(np.int64))
    result = perplexity(make_model(), short, 48)
    assert result == perplexity(make_model(), TOKENS[:10], 48)
    assert "bits_per_byte" not in result


def test_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="1 ids in windows of 8 leave nothing to predict"):
        perplexity(make_model(), TOKENS[:1], 8)
