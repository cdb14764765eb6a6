"""The lm-eval adapter against direct computations with the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval_tasks.adapter import TokenFormerLM
from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.inference.generate import generate

PAIRS = [
    ("The ferry leaves", " the harbor at noon."),
    ("", "Rain had fallen all week"),
    ("She read the letter twice, folded it, and ", "put it away"),
    ("a", " b"),
    ("Every winter the old mill pond freezes, and the children skate on it until supper. " * 3, "When the lamp"),
]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def direct(lm: TokenFormerLM, ids: list[int], count: int) -> tuple[float, bool]:
    """Log-likelihood of the last `count` of `ids`, each from at most max_length tokens before it, alone in a batch."""
    ids = ids[-(lm.max_length + 1) :]
    with torch.no_grad():
        log_probabilities = lm.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-count:]
    target = torch.tensor(ids[-count:])
    greedy = bool((log_probabilities.argmax(-1) == target).all())
    return log_probabilities.gather(-1, target[:, None]).sum().item(), greedy


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_loglikelihood_equals_direct_computation(lm: TokenFormerLM, batch_size: int) -> None:
    lm.batches = Batches(batch_size)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        whole = lm.tok_encode(context + continuation) if context else [lm.eot_token_id, *lm.tok_encode(continuation)]
        count = len(whole) - (len(lm.tok_encode(context.rstrip())) or 1)
        expected = direct(lm, whole, count)
        assert score == pytest.approx(expected[0], rel=1e-9)
        assert greedy == expected[1]


def test_padded_vocabulary_takes_part_in_the_softmax(lm: TokenFormerLM) -> None:
    assert lm.model.config.padded_vocab_size == 384 > lm.text_tokenizer.vocab_size
    all_ids = [((("a", ""), [5], [token])) for token in range(lm.text_tokenizer.vocab_size)]
    total = sum(torch.tensor(score).exp().item() for score, _ in lm._loglikelihood_tokens(all_ids))
    assert 0.0 < total < 0.999


def test_greedy_continuation_is_recognised(lm: TokenFormerLM) -> None:
    context = lm.tok_encode("The road")
    ids = list(context)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(lm.model(torch.tensor([ids]))[0, -1].argmax()))
    wrong = [*ids[len(context) : -1], (ids[-1] + 1) % 384]
    rows = [(("", ""), context, ids[len(context) :]), (("", ""), context, wrong)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows)] == [True, False]


def test_continuation_longer_than_the_context_is_refused(lm: TokenFormerLM) -> None:
    with pytest.raises(UserError, match="a continuation of 49 tokens does not fit the context length of 48"):
        lm._loglikelihood_tokens([(("", ""), [1], [2] * 49)])
    ((score, _),) = lm._loglikelihood_tokens([(("", ""), [9, 1], [2] * 48)])
    assert score == pytest.approx(direct(lm, [1] + [2] * 48, 48)[0], rel=1e-9)


@pytest.mark.parametrize("repeats", [0, 1, 6])
def test_rolling_predicts_each_token_once(lm: TokenFormerLM, repeats: int) -> None:
    text = "Rain had fallen all week, so the road was deep in mud. " * repeats
    ids = [lm.eot_token_id, *lm.tok_encode(text)]
    expected = 0.0
    for start in range(1, len(ids), lm.max_length):
        # The last window is moved back, so that its context is full.
        end = min(start + lm.max_length, len(ids))
        expected += direct(lm, ids[:end], end - start)[0]
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-9)


def test_generate_until_is_generation_with_stop_strings(lm: TokenFormerLM) -> None:
    greedy = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The ferry", "Rain had fallen", "a", "word " * 100]
    kwargs: list[dict[str, Any]] = [greedy, {**greedy, "until": "q"}, greedy, greedy]
    arguments = list(zip(contexts, kwargs, strict=True))
    found = lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    for context, options, text in zip(contexts, kwargs, found, strict=True):
        ids = lm.tok_encode(context)[-(48 - 12) :]
        (completion,) = generate(lm.model, lm.text_tokenizer, [ids], maximum_tokens=12, stop=list(options["until"]))
        assert text == completion.text


def test_model_runs_in_bfloat16_with_scores_in_fp32(lm: TokenFormerLM) -> None:
    expected = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    lm.model.bfloat16()
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (score, _), (reference, _) in zip(found, expected, strict=True):
        assert score == pytest.approx(reference, rel=0.1)
