"""Perplexity against a direct computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.indexed import IndexedDatasetBuilder
from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.evaluation.corpus import corpus_documents
from megatron.evaluation.perplexity import corpus_perplexity, perplexity, sliding_windows
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_model
from tests.tokenizer.special_tokens import train as train_tokenizer

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


TEXTS = ["Rain had fallen all week, so the road was deep in mud, and nobody came. " * 2, "", "Short \u00fcber."]


@pytest.mark.parametrize("stride", [1, 3, 7, 10])
def test_sliding_windows_score_each_token_once_with_the_context_before_it(stride: int) -> None:
    ids = list(range(100, 134))
    windows = list(sliding_windows(ids, 10, stride))
    assert [token for window in windows for token in window.ids[-window.scored :]] == ids[1:]
    assert windows[0] == (ids[:11], 10)
    assert all(window.num_inputs == 10 and window.scored <= stride for window in windows[1:])
    assert list(sliding_windows([5], 10, stride)) == []


def write_corpus(folder: Path, kind: str) -> str:
    """TEXTS as .jsonl or as a .bin/.idx pair; its name."""
    if kind == "text":
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
        (folder / "held.jsonl").write_text("".join(lines), encoding="utf-8")
        return str(folder / "held.jsonl")
    tokenizer = CharLevelTokenizer()
    with IndexedDatasetBuilder(folder / "held", np.uint16) as builder:
        for text in TEXTS:
            builder.add_document([*tokenizer.encode(text), tokenizer.eod_id])
        builder.finalize()
    return str(folder / "held")


@pytest.mark.parametrize("kind", ["text", "bin"])
@pytest.mark.parametrize("stride", [None, 5, 48])
def test_corpus_perplexity_counts_tokens_words_and_bytes_of_each_document(
    tmp_path: Path, kind: str, stride: int | None
) -> None:
    model, tokenizer, total = make_model(), CharLevelTokenizer(), 0.0
    for text in TEXTS:
        ids = [tokenizer.eod_id, *tokenizer.encode(text)]
        for window in sliding_windows(ids, 48, stride or 24):
            with torch.no_grad():
                log_probabilities = model(torch.tensor([window.ids[:-1]]))[0].log_softmax(-1)[-window.scored :]
            total -= log_probabilities.gather(-1, torch.tensor(window.ids[-window.scored :])[:, None]).sum().item()
    documents = corpus_documents(write_corpus(tmp_path, kind), tokenizer)
    found = corpus_perplexity(model, documents, tokenizer.eod_id, 48, stride, Batches("auto"))
    num_bytes, num_words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
    expected = {
        "loss": total / num_bytes, "token_perplexity": math.exp(total / num_bytes),
        "word_perplexity": math.exp(total / num_words), "byte_perplexity": math.exp(total / num_bytes),
        "bits_per_byte": total / num_bytes / math.log(2), "num_documents": 3, "num_tokens": num_bytes,
        "num_words": num_words, "num_bytes": num_bytes,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-9)


SPECIAL_TEXTS = ["the<|endoftext|> united states", "<|endoftext|>", "of<|im_end|> the<|im_end|>", "<|im_end|>", "state"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "characters"])
def test_a_text_and_its_bin_file_have_the_same_perplexity(tmp_path: Path, kind: str) -> None:
    """Special tokens that stood in the text are part of it."""
    characters = kind == "characters"
    tokenizer = CharLevelTokenizer() if characters else train_tokenizer(tmp_path / "tokenizer.json", kind)
    texts = [*SPECIAL_TEXTS, "\0a\0"] if kind != "metaspace" else SPECIAL_TEXTS
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "held.jsonl").write_text("".join(lines), encoding="utf-8")
    with IndexedDatasetBuilder(tmp_path / "held", np.uint16) as builder:
        for text in texts:
            builder.add_document([*tokenizer.encode(text), tokenizer.eod_id])
        builder.finalize()
    model = make_model()
    found = [
        corpus_perplexity(model, corpus_documents(str(tmp_path / name), tokenizer), tokenizer.eod_id, 48)
        for name in ("held.jsonl", "held.bin")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0]["num_bytes"] == sum(len(text.encode()) for text in texts)


def test_what_has_no_perplexity_is_named(tmp_path: Path) -> None:
    model, tokenizer = make_model(), CharLevelTokenizer()
    with pytest.raises(UserError, match="perplexity_stride: 49 skips tokens, a window has 48"):
        corpus_perplexity(model, [], 0, 48, 49)
    with pytest.raises(UserError, match="perplexity_data: there is no text in it"):
        corpus_perplexity(model, [], 0, 48)
    with pytest.raises(UserError, match="nowhere is neither the prefix of a .bin/.idx pair nor a text file"):
        corpus_documents("nowhere", tokenizer)
    with IndexedDatasetBuilder(tmp_path / "other", np.uint16) as builder:
        builder.add_document([3, 60000])
        builder.finalize()
    with pytest.raises(UserError, match="holds token id 60000, the tokenizer has"):
        list(corpus_documents(str(tmp_path / "other.bin"), tokenizer))
