"""Perplexity: of held-out tokens, and of a corpus document by document with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.evaluation.corpus import Document
from megatron.evaluation.scoring import Window, score_windows
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating, overflow
from megatron.mpu import ALONE, Axis
from megatron.mpu.collectives import gather_objects
from megatron.ops.cross_entropy import token_losses

# Windows that are sorted by length and batched together.
_WINDOWS_AHEAD = 1024


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

    Raises: ValueError when there is nothing to predict, UserError when the loss is not finite.
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
        total = sum(token_losses(model(x.to(device)), y.to(device)).double().sum().item() for x, y in windows)
    if not math.isfinite(total):
        raise overflow(next(model.parameters()).dtype)
    result = {"loss": total / count, "perplexity": _exp(total / count), "num_tokens": float(count)}
    if num_bytes:
        result["bits_per_byte"] = total / math.log(2) / num_bytes
    return result


def sliding_windows(ids: list[int], seq_length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `seq_length` input tokens in which every id but the first is scored once.

    The first window scores up to seq_length ids; each further one moves on by `stride` ids (or to the end), scores
    these, and has the ids before them as context.
    """
    position = 1
    while position < len(ids):
        end = min(position + (seq_length if position == 1 else stride), len(ids))
        yield Window(ids[max(0, end - seq_length - 1) : end], end - position)
        position = end


def corpus_perplexity(
    model: LanguageModel,
    documents: Iterable[Document],
    prefix_id: int,
    seq_length: int,
    stride: int | None = None,
    batches: Batches | None = None,
    axis: Axis = ALONE,
    progress: bool = False,
) -> dict[str, float | None]:
    """Token, word and byte perplexity of documents, each on its own, with a sliding window.

    Args:
        prefix_id: stands before each document; the end-of-document token.
        seq_length: input tokens of a window.
        stride: ids by which the window moves on; default half of seq_length. At seq_length the windows do not overlap
            but for the last of a document, which is moved back.
        axis: processes that share the windows; all read the documents, and all get the result.
        progress: show a progress bar.

    Returns: loss (nats per token), token_perplexity, word_perplexity (None without words), byte_perplexity,
        bits_per_byte, num_documents, num_tokens, num_words, num_bytes.

    Raises: UserError for a stride above seq_length and for a corpus without a token.
    """
    stride = stride or max(1, seq_length // 2)
    check_stride(stride, seq_length)
    counts = {"num_documents": 0, "num_words": 0, "num_bytes": 0}
    windows = _corpus_windows(documents, counts, prefix_id, seq_length, stride)
    mine = islice(windows, axis.rank, None, axis.size)
    parts = gather_objects(_summed_loss(model, mine, batches or Batches(8), progress), axis)
    loss, num_tokens = (sum(column) for column in zip(*parts, strict=True))
    if not num_tokens:
        raise UserError("perplexity_data: there is no text in it; give a file with documents")
    return {**_perplexities(loss, num_tokens, counts["num_words"], counts["num_bytes"]), **counts}


def check_stride(stride: int, seq_length: int) -> None:
    """Raise a UserError for a stride that would leave tokens out."""
    if stride > seq_length:
        raise UserError(f"perplexity_stride: {stride} skips tokens, a window has {seq_length}; choose a smaller one")


def _corpus_windows(
    documents: Iterable[Document], counts: dict[str, int], prefix_id: int, seq_length: int, stride: int
) -> Iterator[Window]:
    """The windows of all documents, which are counted on the way."""
    for document in documents:
        counts["num_documents"] += 1
        counts["num_words"] += document.num_words
        counts["num_bytes"] += document.num_bytes
        yield from sliding_windows([prefix_id, *document.ids], seq_length, stride)


def _summed_loss(
    model: LanguageModel, windows: Iterator[Window], batches: Batches, progress: bool
) -> tuple[float, float]:
    """Loss summed over the scored tokens of all windows, and their number."""
    loss, num_tokens = 0.0, 0
    with evaluating(model), tqdm(desc="perplexity", unit="token", disable=not progress) as bar:
        while ahead := list(islice(windows, _WINDOWS_AHEAD)):
            scores = batches.run(ahead, lambda window: len(window.ids), partial(score_windows, model))
            scored = sum(window.scored for window in ahead)
            loss, num_tokens = loss - sum(score.log_likelihood for score in scores), num_tokens + scored
            bar.update(scored)
    return loss, num_tokens


def _perplexities(loss: float, num_tokens: float, num_words: int, num_bytes: int) -> dict[str, float | None]:
    """Of a summed loss in nats."""
    return {
        "loss": loss / num_tokens,
        "token_perplexity": _exp(loss / num_tokens),
        "word_perplexity": _exp(loss / num_words) if num_words else None,
        "byte_perplexity": _exp(loss / num_bytes) if num_bytes else None,
        "bits_per_byte": loss / num_bytes / math.log(2) if num_bytes else None,
        "num_tokens": int(num_tokens),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
