"""Where a text ends and what is shown of it: stop strings that are special tokens, and the space before a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import generate, start_texts
from megatron.inference.interactive import Session, stream
from megatron.inference.sampling import Sampling
from megatron.tokenizer import HFTokenizer
from tests.random_models import make_model
from tests.tokenizer.special_tokens import CORPUS, EOD, TURN, train


@pytest.fixture(params=["bytes", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> HFTokenizer:
    return train(tmp_path / "tokenizer.json", request.param)


class Script(Decoder):
    """A decoder that generates given tokens."""

    def __init__(self, tokenizer: HFTokenizer, said: Sequence[int], stop_at_eod: bool = True) -> None:
        super().__init__(make_model(), tokenizer, 48, stop_at_eod=stop_at_eod)
        object.__setattr__(self, "said", list(said))

    def _take(self, texts, chosen, seconds):  # type: ignore[no-untyped-def]
        for text in texts:
            self._append(text, (self.said + [self.tokenizer.eod_id] * 48)[len(text.tokens)], None)  # type: ignore[attr-defined]


def said(tokenizer: HFTokenizer, prompt: str, text: str) -> list[int]:
    """The tokens with which `text` goes on behind `prompt`."""
    ids = tokenizer.encode(prompt + text)
    assert ids[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
    return ids[len(tokenizer.encode(prompt)) :]


def completed(decoder: Decoder, prompt: str, **settings: object) -> Text:
    (text,) = start_texts(decoder, [prompt], [Sampling(**settings)], 0)  # type: ignore[arg-type]
    decoder.complete([text])
    return text


@pytest.mark.parametrize("continuation", [" people of the states", ", and the congress", " caf\u00e9 \U0001f600"])
def test_a_completion_keeps_its_leading_space(tokenizer: HFTokenizer, continuation: str) -> None:
    decoder = Script(tokenizer, said(tokenizer, "of the state", continuation))
    assert completed(decoder, "of the state").text == continuation
    (text,) = start_texts(decoder, ["of the state"], [Sampling()], 0)
    assert "".join(stream(decoder, text)) == continuation


def test_every_tail_of_a_text_is_what_its_tokens_add(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode(CORPUS[0][:160])
    whole = tokenizer.decode(ids)
    assert whole == CORPUS[0][:160]
    for cut in range(len(ids) + 1):
        assert tokenizer.decode(ids[:cut]).rstrip("\ufffd") + tokenizer.decode_after(ids[:cut], ids[cut:]) == whole


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        (f" of the{TURN} states", [TURN], " of the"),
        (f" of the{TURN} states", [f"he{TURN}"], " of t"),
        (f" of the{TURN} states", ["<|im"], " of the"),
        (f" of the{TURN} states", [f"{TURN} st", "zzz"], " of the"),
        (f"{TURN} states", [TURN], ""),
        (f" of{TURN} the people{TURN} and", [" people"], " of the"),
        (f" of{TURN} the people{TURN} and", [f"people{TURN}", "and"], " of the "),
        (f" of the{TURN} states", ["the states"], " of "),
        (f" of the{TURN} states", ["states", TURN], " of the"),
        (" of the states", [TURN], " of the states"),
    ],
)
def test_a_special_token_stops_a_text_and_is_not_shown(
    tokenizer: HFTokenizer, text: str, stop: list[str], shown: str
) -> None:
    decoder = Script(tokenizer, said(tokenizer, "the people", text))
    settings = {"stop": tuple(stop)}
    found = completed(decoder, "the people", **settings)
    assert (found.text, found.finished) == (shown, True)
    (streamed,) = start_texts(decoder, ["the people"], [Sampling(**settings)], 0)  # type: ignore[arg-type]
    assert "".join(stream(decoder, streamed)) == shown


def test_the_end_of_document_token_is_a_stop_string_where_it_does_not_end_a_text(tokenizer: HFTokenizer) -> None:
    ids = said(tokenizer, "the people", f" of the{EOD} states")
    assert completed(Script(tokenizer, ids, stop_at_eod=False), "the people", stop=(EOD,)).text == " of the"
    assert completed(Script(tokenizer, ids, stop_at_eod=False), "the people").text.startswith(" of the states")


def test_generate_stops_at_a_special_token(tokenizer: HFTokenizer) -> None:
    model = make_model(padded_vocab_size=384)
    turn = tokenizer.encode(TURN)
    real = model.logits
    model.logits = lambda hidden: real(hidden).index_fill_(-1, real(hidden).new_tensor(turn).long(), 1e4)  # type: ignore
    (stopped,) = generate(model, tokenizer, ["the people"], stop=[TURN], maximum_tokens=5)
    assert (stopped.text, stopped.length, stopped.finished) == ("", 1, True)
    (other,) = generate(model, tokenizer, ["the people"], maximum_tokens=5)
    assert (other.text, other.length, other.finished) == ("", 5, False)


def test_a_session_goes_on_with_the_tokens_that_were_shown(tokenizer: HFTokenizer) -> None:
    ids = said(tokenizer, "the people", f" of the states{TURN} and")
    session = Session(Script(tokenizer, ids), Sampling(stop=(TURN,)), 0)
    assert "".join(session.answer("the people")) == " of the states"
    assert session.history == tokenizer.encode("the people of the states")
    session = Session(Script(tokenizer, ids), Sampling(stop=("tates",)), 0)
    assert "".join(session.answer("the people")) == " of the s"
    assert tokenizer.decode(session.history) in ("the people of the s", "the people of the  s")
