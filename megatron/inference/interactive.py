"""Generation from the keyboard: text appears as it is generated, and the context carries on."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TextIO

from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import start_texts
from megatron.inference.sampling import Sampling
from megatron.model.forward_only import evaluating
from megatron.mpu.collectives import object_from_first_rank

_PROMPT = "Context prompt >>> "
_RESET = "/reset"
# What the decoder writes for a character whose last bytes are still to come.
_INCOMPLETE = "\ufffd"


def stream(decoder: Decoder, text: Text) -> Iterator[str]:
    """Generate `text` and give it piece by piece, as soon as it is sure.

    Only whole characters come, and nothing of a stop string: an end that may become one waits for the next token.
    """
    shown = 0
    for _ in decoder.steps([text]):
        so_far = text.text if text.ended else decoder.text_of(text)
        sure = len(so_far) if text.ended else _sure_length(so_far, text.sampling.stop)
        if sure > shown:
            yield so_far[shown:sure]
            shown = sure


def _sure_length(text: str, stop: tuple[str, ...]) -> int:
    """Characters that no later token can change or cut off."""
    text = text.rstrip(_INCOMPLETE)
    waiting = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return len(text) - max(waiting, default=0)


@dataclass
class Session:
    """A conversation: each prompt is answered in the context of the earlier ones and their answers.

    Args:
        sampling: of every answer; one sample each.
        seed: a fixed one makes a session repeatable; a reset changes nothing in the draws that follow.
    """

    decoder: Decoder
    sampling: Sampling
    seed: int | None = None
    history: list[int] = field(default_factory=list)
    """Tokens of all prompts and answers since the last reset."""
    answers: int = 0

    def answer(self, prompt: str) -> Iterator[str]:
        """The answer piece by piece, and the messages about it; a prompt behind others starts a new line."""
        ids = self.decoder.tokenizer.encode("\n" + prompt if self.history else prompt)
        seed = None if self.seed is None else self.seed + self.answers
        self.answers += 1
        (text,) = start_texts(self.decoder, [self.history + ids], [replace(self.sampling, num_samples=1)], seed)
        try:
            yield from stream(self.decoder, text)
        finally:
            was_cut = text.finished and text.sampling.stop
            self.history = text.prompt + (self.decoder.kept_tokens(text) if was_cut else text.tokens)
        if text.messages:
            yield f"\n[{'; '.join(text.messages)}]"

    def reset(self) -> None:
        """Forget the context."""
        self.history = []


def converse(
    decoder: Decoder, sampling: Sampling, prompt_end: str, seed: int | None, with_history: bool = True
) -> None:
    """Answer what is typed, until the end of input (Ctrl-D) or Ctrl-C; Ctrl-C in an answer ends that answer only.

    An empty prompt or /reset clears the context; without history every answer does. Of several tensor ranks the first
    reads and prints; with them, Ctrl-C in an answer ends the session.
    """
    session, axis = Session(decoder, sampling, seed), decoder.model.layout.tensor
    typed = _typed_prompts(prompt_end) if axis.rank == 0 else iter(())
    output = sys.stdout if axis.rank == 0 else io.StringIO()
    with evaluating(decoder.model):
        while (prompt := object_from_first_rank(next(typed, None), axis)) is not None:
            if prompt.strip() in ("", _RESET):
                session.reset()
                print("[context cleared]", flush=True, file=output)
            else:
                _print_answer(session.answer(prompt), output, ends_on_interrupt=axis.size == 1)
                if not with_history:
                    session.reset()


def _print_answer(pieces: Iterator[str], output: TextIO, ends_on_interrupt: bool) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True, file=output)
    except KeyboardInterrupt:
        if not ends_on_interrupt:
            raise
    print(flush=True, file=output)


def _typed_prompts(prompt_end: str) -> Iterator[str]:
    """Texts from the keyboard, each up to `prompt_end`; the last may end with the input."""
    typed = ""
    while True:
        try:
            typed += input("" if typed else _PROMPT) + "\n"
        except (EOFError, KeyboardInterrupt):
            print()
            if typed.strip():
                yield typed.removesuffix("\n")
            return
        if prompt_end in typed:
            prompt, typed = typed.partition(prompt_end)[0], ""
            yield prompt
