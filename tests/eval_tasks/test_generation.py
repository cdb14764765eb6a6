"""Generation requests mean here what they mean to lm-eval's own models; nothing of them is dropped in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from eval_tasks.adapter import TokenFormerLM
from eval_tasks.generation import generation_options
from megatron.errors import UserError
from megatron.inference.generate import generate
from megatron.log import get_logger

PLAIN: dict[str, Any] = {
    "maximum_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "stop": [], "seed": 1234,
}  # fmt: skip


def texts(lm: TokenFormerLM, contexts: list[str], **kwargs: Any) -> list[str]:
    requests = [Instance("generate_until", {}, (context, kwargs), i) for i, context in enumerate(contexts)]  # type: ignore
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {}),
        ({"until": "x"}, {"stop": ["x"]}),
        ({"until": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"until": [""]}, {}),
        ({"until": ["", "x"]}, {"stop": ["x"]}),
        ({"until": ""}, {}),
        ({"until": None}, {}),
        ({"until": ["x"], "stop": "y"}, {"stop": ["x", "y"]}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0}, {}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": None, "top_k": None}, {}),
        ({"do_sample": True, "temperature": 1, "top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_k": -1, "top_p": 1}, {"top_p": 1.0}),
        ({"min_p": 0.1, "repetition_penalty": 1.3}, {"min_p": 0.1, "repetition_penalty": 1.3}),
        ({"max_gen_toks": 7}, {"maximum_tokens": 7}),
        ({"max_new_tokens": 7}, {"maximum_tokens": 7}),
        ({"max_tokens": 7}, {"maximum_tokens": 7}),
        ({"max_completion_tokens": 7}, {"maximum_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 8, "max_gen_toks": 9}, {"maximum_tokens": 9}),
        ({"seed": 5}, {"seed": 5}),
        ({"num_beams": 1, "use_cache": True, "num_return_sequences": 1}, {}),
    ],
)
def test_lm_evals_normalisation_decides(kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation_options(kwargs, 256) == {**PLAIN, **expected}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "num_beams: 4 is not supported"),
        ({"no_such": 1}, "no_such: 1 is not supported.*known: do_sample"),
        ({"max_gen_toks": 0}, "maximum_tokens, num_samples: must be at least 1"),
        ({"max_tokens": "many"}, "many"),
        ({"do_sample": True, "temperature": -1}, "temperature, top_k: must not be negative"),
        ({"temperature": "hot"}, "hot"),
        ({"top_p": 1.5}, "top_p, min_p: must be between 0 and 1"),
        ({"min_p": -0.1}, "top_p, min_p: must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be above 0"),
        ({"until": [5]}, "until: expected text or a list of texts"),
        ({"top_k": [1]}, "top_k"),
    ],
)
def test_what_is_not_there_is_one_line_before_any_text(kwargs: dict[str, Any], message: str, lm: TokenFormerLM) -> None:
    with pytest.raises(UserError, match=message) as error:
        generation_options(kwargs, 256)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        texts(lm, ["a"], **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.7},
        {"do_sample": True, "temperature": 0.8, "min_p": 0.3, "seed": 2},
        {"temperature": 0.8, "seed": 2},
        {"do_sample": True, "temperature": 0, "until": ["", "e"]},
    ],
)
def test_texts_are_those_of_generate(lm: TokenFormerLM, kwargs: dict[str, Any]) -> None:
    contexts = ["The ferry", "Rain had fallen"]
    found = texts(lm, contexts, **kwargs, max_completion_tokens=9)
    prompts = [lm.tok_encode(context) for context in contexts]
    options = {key: value for key, value in kwargs.items() if key not in ("do_sample", "until")}
    stop = [string for string in kwargs.get("until", []) if string]
    expected = generate(lm.model, lm.text_tokenizer, prompts, maximum_tokens=9, stop=stop, **options)
    assert found == [completion.text for completion in expected]


@pytest.mark.parametrize("most", [25, 40, 48, 49, 1000])
@pytest.mark.parametrize("words", [3, 30, 100])
def test_more_tokens_than_half_of_the_context_follow_the_rule_of_generate(
    lm: TokenFormerLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int, words: int
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    context = "the " * words
    (completion,) = generate(lm.model, lm.text_tokenizer, [context], maximum_tokens=most, seq_length=48)
    with caplog.at_level(logging.WARNING):
        assert texts(lm, ["a", context], max_gen_toks=most)[1] == completion.text
    if completion.message:
        (line,) = set(caplog.messages)
        assert line.startswith(("1 of 2 texts: ", "2 of 2 texts: ")) and "seq_length" in line
    if len(lm.tok_encode(context)) >= 48:
        assert "prompt cut to its last" in caplog.messages[0] and "to its last 1 of" not in caplog.messages[0]


def test_a_prompt_makes_room_for_what_is_asked_for_and_a_word_says_so(
    lm: TokenFormerLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    context = "the pond " * 9
    while len(ids := lm.tok_encode(context)) < 40:
        context += "the pond "
    assert len(ids) < 48
    with caplog.at_level(logging.WARNING):
        (found,) = texts(lm, [context], max_gen_toks=12)
    (expected,) = generate(lm.model, lm.text_tokenizer, [ids[-36:]], maximum_tokens=12)
    assert found == expected.text
    assert set(caplog.messages) == {f"1 of 1 texts: prompt cut to its last 36 of {len(ids)} tokens (seq_length 48)"}


def test_messages_come_from_every_rank(
    lm: TokenFormerLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dealt(items: Any, length: Any, compute: Any, axis: Any) -> list[Any]:
        return [compute([item])[0] for item in items]

    monkeypatch.setattr(get_logger(), "propagate", True)
    monkeypatch.setattr("eval_tasks.adapter.shared", dealt)
    texts(lm, ["the " * 80] * 3, max_gen_toks=100)
    assert caplog.messages[0].startswith("3 of 3 texts: prompt cut to its last 24 of")


def test_a_chat_template_is_refused_in_one_line(lm: TokenFormerLM) -> None:
    assert lm.chat_template(False) == ""
    for call in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template([{"role": "user", "content": "a"}])):
        with pytest.raises(UserError, match="apply_chat_template: prompts are plain text here"):
            call()
