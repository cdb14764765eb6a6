"""What is scored of a context and a continuation: the continuation alone, whatever the tokens at their border."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval_tasks.adapter import TokenFormerLM
from eval_tasks.requests import encode_pair
from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.evaluation.scoring import Window, score_windows
from megatron.tokenizer import CharLevelTokenizer, HFTokenizer

EOD = "<|endoftext|>"


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]


def scores(lm: TokenFormerLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests(pairs), disable_tqdm=True)


def log_likelihood(lm: TokenFormerLM, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        rows = lm.model(torch.tensor([context + continuation]))[0].log_softmax(-1)
    return sum(rows[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def spanning(tokenizer: HFTokenizer) -> list[tuple[str, str]]:
    """Contexts and continuations that meet inside of a token, of two letters and of more."""
    found = []
    for word in ("the", " harbor", " winter", "over"):
        for cut in range(1 + word.startswith(" "), len(word)):
            whole, before = tokenizer.encode("We saw" + word), tokenizer.encode("We saw" + word[:cut])
            if whole[: len(before)] != before:
                found.append(("We saw" + word[:cut], word[cut:]))
    assert len(found) > 3
    return found


def test_texts_that_share_a_token_are_scored_separately_with_one_warning(
    lm: TokenFormerLM, tokenizer: HFTokenizer, package_log: pytest.LogCaptureFixture
) -> None:
    pairs = [*spanning(tokenizer), ("We saw", " the ferry")]
    with package_log.at_level(logging.WARNING):
        found = scores(lm, pairs) and scores(lm, pairs)
    (message,) = package_log.messages
    assert message.startswith(f"{len(pairs) - 1} of {len(pairs)} requests have a token that spans context")
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context), tokenizer.encode(continuation)
        assert score == pytest.approx(log_likelihood(lm, *ids), rel=1e-9) and score < -0.1


@pytest.mark.parametrize("context", ["", " ", "\n", " \n\t  "])
def test_a_context_without_words_is_the_end_of_document_token(lm: TokenFormerLM, context: str) -> None:
    expected = log_likelihood(lm, [lm.eot_token_id], lm.tok_encode(context + "the ferry"))
    others = [("Rain had fallen all week and the mud", " was deep"), ("The old mill", " pond")]
    for pairs in ([(context, "the ferry")], [*others, (context, "the ferry")], [(context, "the ferry")] * 3):
        assert scores(lm, pairs)[-1][0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("context", "continuation", "scored"),
    [("", EOD, EOD), (" ", EOD, f" {EOD}"), ("The ferry", EOD, EOD), ("", f"{EOD}The", "The"), ("a", f"{EOD}b", None)],
)
def test_an_end_of_document_token_is_scored_like_any_other(
    lm: TokenFormerLM, context: str, continuation: str, scored: str | None
) -> None:
    before = lm.tok_encode(context.rstrip()) or [lm.eot_token_id]
    expected = log_likelihood(lm, before, lm.tok_encode(scored or continuation))
    ((score, _),) = scores(lm, [(context, continuation)])
    assert score == pytest.approx(expected, rel=1e-9) and score < -0.1


@pytest.mark.parametrize("context", ["", "  ", "The ferry leaves", "The ferry "])
def test_an_empty_continuation_is_refused(lm: TokenFormerLM, context: str) -> None:
    with pytest.raises(UserError, match="an empty continuation cannot be scored") as error:
        scores(lm, [("a", " b"), (context, "")])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="an empty continuation cannot be scored"):
        lm._loglikelihood_tokens([((context, ""), [5], [])])


def test_scores_are_the_same_alone_and_in_company(lm: TokenFormerLM, tokenizer: HFTokenizer) -> None:
    pairs = [*spanning(tokenizer), ("", "the"), ("  ", "the"), ("", EOD), ("The mill", EOD), ("a " * 60, "the pond")]
    alone = [scores(lm, [pair])[0] for pair in pairs]
    sizes: tuple[Any, ...] = (1, 2, 3, len(pairs), "auto")
    for size, order in itertools.product(sizes, (1, -1)):
        lm.batches = Batches(size)
        for found, expected in zip(scores(lm, pairs[::order]), alone[::order], strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-12) and found[1] == expected[1]


def test_bytes_need_no_splitting() -> None:
    tokenizer = CharLevelTokenizer()
    assert encode_pair(tokenizer, "a ", "b") == ([97], [32, 98], False)
    assert encode_pair(tokenizer, "caf\u00e9", "\0") == (list("caf\u00e9".encode()), [0], False)


@pytest.mark.parametrize("window", [Window([5, 6], 2), Window([5, 6], 0), Window([5], 1)])
def test_a_window_without_context_or_without_a_target_is_never_scored(lm: TokenFormerLM, window: Window) -> None:
    with pytest.raises(AssertionError):
        score_windows(lm.model, [Window([1, 2, 3], 1), window])
