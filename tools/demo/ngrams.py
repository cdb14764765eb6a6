"""Unigram and bigram models of token ids: what a language model has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]
DISCOUNT = 0.75


def unigram_loss(train: Tokens, held_out: Tokens, vocabulary: int) -> float:
    """Nats per token of add-one smoothed token frequencies; the first held-out token is not scored."""
    return float(-np.log(_unigram(train, vocabulary)[held_out[1:]]).mean())


def bigram_loss(train: Tokens, held_out: Tokens, vocabulary: int) -> float:
    """Nats per token of a bigram model with absolute discounting that backs off to the unigram model."""
    unigram = _unigram(train, vocabulary)
    pairs, counts = np.unique(_pairs(train, vocabulary), return_counts=True)
    context_total = np.bincount(train[:-1], minlength=vocabulary)
    context_types = np.bincount(pairs // vocabulary, minlength=vocabulary)
    wanted = _pairs(held_out, vocabulary)
    position = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[position] == wanted, counts[position], 0)
    previous, current = held_out[:-1], held_out[1:]
    total = np.maximum(context_total[previous], 1)
    backoff = np.where(context_total[previous] > 0, DISCOUNT * context_types[previous] / total, 1.0)
    probability = np.maximum(count - DISCOUNT, 0) / total + backoff * unigram[current]
    return float(-np.log(probability).mean())


def _unigram(tokens: Tokens, vocabulary: int) -> npt.NDArray[np.float64]:
    counts = np.bincount(tokens, minlength=vocabulary) + 1.0
    return counts / counts.sum()


def _pairs(tokens: Tokens, vocabulary: int) -> npt.NDArray[np.int64]:
    return tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]
