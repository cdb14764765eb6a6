"""Generation: the same text with and without cache, alone and in any batch; its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.inference.decoding import Decoder
from megatron.inference.generate import Completion, generate
from megatron.inference.next_logits import Cached
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_model

PROMPTS = ["The state of the Union", "a", "", "My fellow citizens,", "We", "liberty and"]


def texts(completions: list[Completion]) -> list[Completion]:
    """Without the times."""
    return [replace(completion, duration_seconds=0.0) for completion in completions]


class RecordingTokenizer(CharLevelTokenizer):
    """Remembers the ids of every text."""

    def __init__(self) -> None:
        self.decoded: list[list[int]] = []

    def decode_after(self, context: Any, ids: Any) -> str:
        self.decoded.append(list(ids))
        return super().decode_after(context, ids)


def force(model: LanguageModel, token: int, logit: float = 1e4) -> None:
    """Make the model predict `token` everywhere."""
    real = model.logits

    def forced(x: torch.Tensor) -> torch.Tensor:
        output = real(x).clone()
        output[..., token] = logit
        return output

    model.logits = forced  # type: ignore[method-assign]


@pytest.mark.long
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7, "num_samples": 2}]
)
def test_cache_and_batch_composition_leave_texts_unchanged(
    model: LanguageModel, tokenizer: CharLevelTokenizer, sampling: dict[str, Any]
) -> None:
    expected = texts(generate(model, tokenizer, PROMPTS, maximum_tokens=20, recompute=True, batch_size=1, **sampling))
    assert len({completion.text for completion in expected}) > 3, "the random models must not all say the same"
    for batch_size in (1, 2, 4, 16):
        for recompute in (False, True):
            options = {"maximum_tokens": 20, "batch_size": batch_size, "recompute": recompute, **sampling}
            assert texts(generate(model, tokenizer, PROMPTS, **options)) == expected


def test_long_prompts_are_computed_in_parts(tokenizer: CharLevelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    whole = texts(generate(model, tokenizer, PROMPTS, maximum_tokens=8))
    monkeypatch.setattr("megatron.inference.next_logits.PREFILL_TOKENS", 5)
    assert texts(generate(model, tokenizer, PROMPTS, maximum_tokens=8)) == whole


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("keeps_all", [False, True])
def test_texts_are_the_same_when_a_step_begins_before_the_last_one_is_known(
    tokenizer: CharLevelTokenizer, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], keeps_all: bool
) -> None:
    model = make_model(seq_length=40)
    options: dict[str, Any] = {"maximum_tokens": 25, "batch_size": 4, **sampling}
    options["stop"] = [generate(model, tokenizer, PROMPTS, **options)[0].text[4:6]]
    expected = texts(generate(model, tokenizer, PROMPTS, **options))
    assert any(completion.finished for completion in expected), "a text must end by itself, which no step foresees"
    monkeypatch.setattr("megatron.inference.next_logits.Cached.ahead", 1)
    if keeps_all:  # rows of texts that have ended go on in the batch
        monkeypatch.setattr("megatron.inference.next_logits.Cached.can_select", lambda *_: False)
    begun, known = list[int](), list[int]()
    real_next, real_take = Cached.next, Decoder._take

    def begin(*args: Any) -> Any:
        begun.append(len(known))
        return real_next(*args)

    def take(*args: Any) -> None:
        known.append(len(begun))
        real_take(*args)

    monkeypatch.setattr(Cached, "next", begin)
    monkeypatch.setattr(Decoder, "_take", take)
    assert texts(generate(model, tokenizer, PROMPTS[:1], **options)) == expected[:1]
    assert known[:2] == [1, 2], "the second step has begun when the tokens of the first are looked at"
    assert texts(generate(model, tokenizer, PROMPTS, **options)) == expected


def test_greedy_text_is_the_argmax_of_the_model(model: LanguageModel, tokenizer: CharLevelTokenizer) -> None:
    ids = tokenizer.encode("Union")
    generated: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            logits = model(torch.tensor([ids + generated]))[0, -1, : tokenizer.vocab_size]
            generated.append(int(logits.argmax()))
    (completion,) = generate(model, tokenizer, ["Union"], maximum_tokens=6, stop_at_eod=False)
    assert completion.text == tokenizer.decode(generated)
    assert (completion.context, completion.length, completion.message) == ("Union", 6, None)
    assert completion.duration_seconds > 0


def test_seed_decides_the_samples(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()

    def sampled(seed: int | None) -> list[str]:
        options = {"temperature": 1.0, "maximum_tokens": 12, "num_samples": 3, "seed": seed}
        return [completion.text for completion in generate(model, tokenizer, ["We", "a"], **options)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(None) != sampled(None)
    assert len(set(sampled(1))) == 6


def test_prompts_of_one_batch_keep_their_own_settings(model: LanguageModel, tokenizer: CharLevelTokenizer) -> None:
    settings = [
        Sampling(maximum_tokens=9),
        Sampling(maximum_tokens=5, temperature=1.0, top_k=5, seed=3, num_samples=2),
        Sampling(maximum_tokens=20, temperature=1.5, min_p=0.1, seed=4, stop=("a", "e")),
        Sampling(maximum_tokens=12, repetition_penalty=3.0),
        Sampling(maximum_tokens=7, temperature=0.7, top_p=0.8, seed=3, num_samples=3),
    ]
    prompts = PROMPTS[: len(settings)]
    alone = [
        text
        for prompt, setting in zip(prompts, settings, strict=True)
        for text in texts(generate(model, tokenizer, [prompt], settings=[setting]))
    ]
    assert [text.context for text in alone].count(prompts[4]) == 3
    for batch_size in (1, 3, 8):
        assert texts(generate(model, tokenizer, prompts, settings=settings, batch_size=batch_size)) == alone
    own = [replace(setting, seed=None) for setting in settings[1:2]]
    assert texts(generate(model, tokenizer, prompts[1:2], settings=own, seed=3)) == alone[1:3]


def test_logprobs_are_those_of_the_model_before_any_setting(
    model: LanguageModel, tokenizer: CharLevelTokenizer
) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "repetition_penalty": 1.5, "seed": 1, "num_samples": 2}
    found = generate(model, tokenizer, ["Union", "a"], maximum_tokens=6, logprobs=True, stop_at_eod=False, **options)
    without = generate(model, tokenizer, ["Union", "a"], maximum_tokens=6, stop_at_eod=False, **options)
    assert texts([replace(completion, logprobs=None) for completion in found]) == texts(without)
    recorded = RecordingTokenizer()
    generate(model, recorded, ["Union"], maximum_tokens=6, stop_at_eod=False, **options)
    for completion, ids in zip(found, recorded.decoded, strict=False):
        prompt = tokenizer.encode("Union")
        with torch.no_grad():
            scores = model(torch.tensor([prompt + ids]))[0].log_softmax(dim=-1)
        expected = [scores[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-9)
        assert completion.length == len(expected) == 6


def test_a_text_of_no_tokens_has_no_logprobs(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()
    force(model, tokenizer.eod_id)
    (completion,) = generate(model, tokenizer, ["a"], logprobs=True)
    assert completion.logprobs == []


def test_repetition_penalty_counts_the_prompt(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()
    force(model, ord("x"), logit=100.0)
    assert generate(model, tokenizer, ["a"], maximum_tokens=3)[0].text == "xxx"
    assert "x" not in generate(model, tokenizer, ["x"], maximum_tokens=3, repetition_penalty=1e4)[0].text
    assert generate(model, tokenizer, ["a"], maximum_tokens=3, repetition_penalty=1e4)[0].text.count("x") == 1


def test_completions_come_prompt_by_prompt(tokenizer: CharLevelTokenizer) -> None:
    completions = generate(make_model(), tokenizer, ["a", "longer"], num_samples=2, maximum_tokens=2)
    assert [completion.context for completion in completions] == ["a", "a", "longer", "longer"]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("recompute", [False, True])
def test_padded_vocabulary_is_never_sampled(temperature: float, recompute: bool) -> None:
    tokenizer, model = RecordingTokenizer(), make_model()
    force(model, 600)
    options = {"temperature": temperature, "recompute": recompute, "seed": 0, "maximum_tokens": 30}
    generate(model, tokenizer, ["a", "b", "c"], **options)
    assert max(max(ids) for ids in tokenizer.decoded) < tokenizer.vocab_size


def test_end_of_document_ends_a_text(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()
    force(model, tokenizer.eod_id)
    (completion,) = generate(model, tokenizer, ["a"])
    assert (completion.text, completion.length, completion.finished) == ("", 0, True)
    (completion,) = generate(model, tokenizer, ["a"], stop_at_eod=False, maximum_tokens=5)
    assert (completion.length, completion.finished) == (5, False)


def test_stop_string_ends_a_text_and_is_cut_off(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()
    force(model, ord("x"))
    (completion,) = generate(model, tokenizer, ["a"], stop=["xxxx", "xxx"], maximum_tokens=9)
    assert (completion.text, completion.length, completion.finished) == ("", 3, True)
    (completion,) = generate(model, tokenizer, ["a"], stop=["y"], maximum_tokens=9)
    assert (completion.text, completion.finished) == ("x" * 9, False)


def test_empty_prompt_starts_from_the_end_of_document_token(tokenizer: CharLevelTokenizer) -> None:
    model = make_model()
    empty, eod = generate(model, tokenizer, ["", [tokenizer.eod_id]], maximum_tokens=8)
    assert empty.text == eod.text
    assert empty.context == ""


@pytest.mark.parametrize("recompute", [False, True])
def test_text_stops_at_the_context_length(tokenizer: CharLevelTokenizer, recompute: bool) -> None:
    model = make_model()
    force(model, ord("x"))
    (completion,) = generate(model, tokenizer, ["a" * 40], maximum_tokens=20, recompute=recompute)
    assert completion.text == "x" * 8
    assert completion.message == "stopped at the context length of 48 tokens (seq_length)"
    (completion,) = generate(model, tokenizer, ["a" * 40], maximum_tokens=8, recompute=recompute)
    assert completion.message is None


@pytest.mark.parametrize(("maximum_tokens", "kept"), [(8, 40), (30, 24), (100, 24)])
def test_prompt_that_does_not_fit_keeps_its_last_tokens(
    tokenizer: CharLevelTokenizer, maximum_tokens: int, kept: int
) -> None:
    model = make_model()
    prompt = "".join(chr(97 + i % 26) for i in range(60))
    (long,) = generate(model, tokenizer, [prompt], maximum_tokens=maximum_tokens)
    (short,) = generate(model, tokenizer, [prompt[-kept:]], maximum_tokens=maximum_tokens)
    assert long.context == prompt
    assert long.text == short.text
    assert long.message is not None
    assert long.message.startswith(f"prompt cut to its last {kept} of 60 tokens (seq_length 48)")


def test_the_model_keeps_its_mode_and_gradients_stay_possible(tokenizer: CharLevelTokenizer) -> None:
    model = make_model(dtype=torch.float32).train()
    generate(model, tokenizer, ["a"], maximum_tokens=2)
    assert model.training
    model(torch.tensor([[1, 2]])).sum().backward()


def test_bfloat16_model_generates(tokenizer: CharLevelTokenizer) -> None:
    completions = generate(make_model(dtype=torch.bfloat16), tokenizer, PROMPTS, maximum_tokens=4, stop_at_eod=False)
    assert [completion.length for completion in completions] == [4] * len(PROMPTS)


@pytest.mark.parametrize("name", ["maximum_tokens", "num_samples", "batch_size"])
def test_counts_below_one_are_refused(tokenizer: CharLevelTokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*at least 1"):
        generate(make_model(), tokenizer, ["a"], **{name: 0})
