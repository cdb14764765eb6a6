"""Streaming and sessions."""

from __future__ import annotations

import pytest

from megatron.inference.decoding import Decoder
from megatron.inference.generate import generate, start_texts
from megatron.inference.interactive import Session, stream
from megatron.inference.sampling import Sampling
from megatron.model.forward_only import evaluating
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_model

PIECES = ["x", "\u00fc", "\u20ac", "\U0001f600", "y"]


class Script(Decoder):
    """A decoder that says the bytes of a given text."""

    def __init__(self, said: bytes, seq_length: int = 48) -> None:
        super().__init__(make_model(), CharLevelTokenizer(), seq_length)
        object.__setattr__(self, "said", said)

    def _take(self, texts, chosen, seconds):  # type: ignore[no-untyped-def]
        for text in texts:
            token = (self.said + b"\0" * 99)[len(text.tokens)]  # type: ignore[attr-defined]
            self._append(text, token, None)


def pieces(said: bytes, **settings: object) -> list[str]:
    decoder = Script(said)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    (text,) = start_texts(decoder, ["a"], [sampling], 0)
    return list(stream(decoder, text))


def test_only_whole_characters_appear_as_soon_as_they_are_whole() -> None:
    assert pieces("".join(PIECES).encode()) == PIECES


def test_bytes_that_never_become_a_character_are_shown_at_last() -> None:
    assert pieces(b"a\xe2\x82b") == ["a", "\ufffdb"]
    assert pieces(b"a\xe2") == ["a", "\ufffd"]


def test_nothing_of_a_stop_string_appears() -> None:
    assert pieces(b"one EN two END three", stop=("END",)) == [*"one ", "EN ", *"two "]
    assert pieces(b"aab", stop=("aac", "b")) == ["aa"]
    assert "".join(pieces(b"aab", stop=("aac",))) == "aab"


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 40}])
def test_streamed_text_is_the_text_of_generate(settings: dict[str, float]) -> None:
    model, tokenizer = make_model(), CharLevelTokenizer()
    session = Session(Decoder(model, tokenizer, 48), Sampling(maximum_tokens=12, **settings), 5)  # type: ignore[arg-type]
    with evaluating(model):
        said = "".join(session.answer("Union"))
    assert said == generate(model, tokenizer, ["Union"], maximum_tokens=12, seed=5, **settings)[0].text  # type: ignore


def test_context_carries_on_until_a_reset() -> None:
    model, tokenizer = make_model(), CharLevelTokenizer()
    session = Session(Decoder(model, tokenizer, 48), Sampling(maximum_tokens=6), 0)
    alone = "".join(session.answer("one"))
    before = tokenizer.encode("one") + [*session.history[3:]]
    behind = "".join(session.answer("two"))
    (expected,) = generate(model, tokenizer, [before + tokenizer.encode("\ntwo")], maximum_tokens=6)
    assert behind == expected.text
    session.reset()
    assert "".join(session.answer("one")) == alone


def test_a_session_longer_than_the_context_drops_its_beginning_and_says_so() -> None:
    model, tokenizer = make_model(), CharLevelTokenizer()
    session = Session(Decoder(model, tokenizer, 48, stop_at_eod=False), Sampling(maximum_tokens=10), 0)
    answers = ["".join(session.answer("0123456789")) for _ in range(4)]
    assert "prompt cut" not in answers[0] + answers[1]
    assert "[prompt cut to its last 38 of " in answers[2] + answers[3]
    assert len(session.history) <= 48


def test_a_stop_string_is_not_in_the_history() -> None:
    session = Session(Script(b"oneEND"), Sampling(stop=("END",)))
    assert "".join(session.answer("a")) == "one"
    assert bytes(session.history) == b"aone"


def test_an_interrupted_answer_stays_in_the_history() -> None:
    session = Session(Script(b"abcdef"), Sampling())
    answer = session.answer("p")
    assert next(answer) + next(answer) == "ab"
    answer.close()  # type: ignore[attr-defined]
    assert bytes(session.history) == b"pab"
