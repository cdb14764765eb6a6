"""Perplexity of held-out tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megatron.inference.generate import evaluating
from megatron.model import LanguageModel
from megatron.ops.cross_entropy import token_losses


def perplexity(
    model: LanguageModel,
    tokens: np.ndarray | Tensor,
    seq_length: int,
    batch_size: int = 8,
    num_bytes: int | None = None,
) -> dict[str, float]:
    """Loss of a text cut into windows that do not overlap; every token but the first is predicted once.

    A token's context begins with its window, so it is 1 to seq_length tokens long. The padded vocabulary takes part in
    the softmax. The last window may be shorter.

    Args:
        tokens: ids [n], n >= 2.
        seq_length: tokens predicted in a window.
        batch_size: windows evaluated together.
        num_bytes: length of the text in UTF-8 bytes.

    Returns: loss (nats per token), perplexity (exp of it), num_tokens (predicted ones), and bits_per_byte when
        num_bytes is given.

    Raises: ValueError when there is nothing to predict.
    """
    ids = tokens.long() if isinstance(tokens, Tensor) else torch.from_numpy(np.asarray(tokens).astype(np.int64))
    count = len(ids) - 1
    if count < 1 or seq_length < 1:
        raise ValueError(f"tokens: {len(ids)} ids in windows of {seq_length} leave nothing to predict")
    whole = count // seq_length * seq_length
    inputs, labels = ids[:whole].view(-1, seq_length), ids[1 : whole + 1].view(-1, seq_length)
    windows = list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True)) if whole else []
    if whole < count:
        windows.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    device = next(model.parameters()).device
    with evaluating(model):
        total = sum(_loss_sum(model, x.to(device), y.to(device)) for x, y in windows)
    result = {"loss": total / count, "perplexity": math.exp(total / count), "num_tokens": float(count)}
    if num_bytes:
        result["bits_per_byte"] = total / math.log(2) / num_bytes
    return result


def _loss_sum(model: LanguageModel, inputs: Tensor, labels: Tensor) -> float:
    return token_losses(model(inputs), labels).double().sum().item()
