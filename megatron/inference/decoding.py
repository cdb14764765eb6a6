"""Token after token: texts of any length, each with settings of its own, generated together in one batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron.inference.cuda_graphs import Recorded, recorder_for
from megatron.inference.next_logits import Cached, NextLogits, Recomputed
from megatron.inference.prepared import prepared
from megatron.inference.sampling import Chooser, Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import overflow
from megatron.mpu.collectives import from_first_rank
from megatron.tokenizer import Tokenizer

_WORTH_PREPARING = 16
"""Tokens of a text from which on preparing a model takes less time than it saves."""


@dataclass
class Text:
    """A text while it is being generated."""

    context: str
    """The prompt as it was given."""
    prompt: list[int]
    """Its tokens, as many as fit."""
    sampling: Sampling
    seed: int | None = None
    """Seed of this text's own draws; None for a greedy one."""
    image: str | None = None
    """File of the image that stands before it."""
    messages: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    """Ended by itself: end of document or stop string."""
    ended: bool = False
    seconds: float = 0.0


class ReadsImages(Protocol):
    """Files of images to what stands before texts; megatron.inference.images.ImageReader is one."""

    def __call__(self, files: Sequence[str]) -> Tensor:
        """[number of files, T, d]."""

    def digest(self, file: str) -> str:
        """What changes where a file does."""


@dataclass(frozen=True)
class Decoder:
    """A model, its tokenizer, and what is common to all texts."""

    model: LanguageModel
    tokenizer: Tokenizer
    seq_length: int
    """Context length: a prompt and its completion take this many tokens at most."""
    recompute: bool = False
    """Compute the whole text anew for each token, without a cache."""
    logprobs: bool = False
    """Note the log-probability of every generated token."""
    stop_at_eod: bool = True
    """End a text at the end-of-document token."""
    fast: bool = True
    """Decode with a prepared copy of the model's matrices (megatron.inference.prepared), made when it is first worth
    while. The model must not change while the decoder is in use."""
    images: ReadsImages | None = None
    """Of a model that reads an image before each text. The images do not count for `seq_length`."""

    def start(
        self, prompt: str | Sequence[int], sampling: Sampling, seed: int | None = None, image: str | None = None
    ) -> Text:
        """A text to be generated behind `prompt`; an empty one starts from the end-of-document token.

        Behind an image every text does, as in training.
        """
        context = prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if self.images is not None:
            ids = [self.tokenizer.eod_id, *ids]
        text = Text(context, ids or [self.tokenizer.eod_id], sampling, seed, image)
        if len(ids) >= self.seq_length:
            kept = max(1, self.seq_length - sampling.maximum_tokens, self.seq_length // 2)
            text.prompt = ids[-kept:]
            text.messages.append(cut_message(kept, len(ids), self.seq_length))
        return text

    def steps(self, texts: list[Text]) -> Iterator[None]:
        """Generate until every text has ended, one token for each of them a step; the ended ones leave the batch."""
        started, batch = time.perf_counter(), list(texts)
        source = self._source(batch)
        choose = self._chooser(batch)
        tokens: Tensor | None = None
        waiting = deque[tuple[list[Text], Chosen]]()
        while not all(text.ended for text in batch):
            if not waiting or any(self._room(text) > len(waiting) for text in batch if not text.ended):
                sequences = [text.prompt + text.tokens for text in batch]
                logits = source.first(sequences) if tokens is None else source.next(tokens, sequences)
                tokens, chosen = self._chosen(logits, choose)
                waiting.append((batch, chosen))
                if len(waiting) <= source.ahead:
                    continue
            self._take(*waiting.popleft(), time.perf_counter() - started)
            yield
            going = [i for i, text in enumerate(batch) if not text.ended]
            if tokens is not None and going and source.can_select(len(going), len(batch)):
                source.select(going)
                choose.select(going)
                batch, tokens = [batch[i] for i in going], tokens[torch.tensor(going, device=tokens.device)]

    def complete(self, texts: list[Text]) -> None:
        """All steps."""
        for _ in self.steps(texts):
            pass

    def _source(self, texts: list[Text]) -> NextLogits:
        images = None if self.images is None else self.images([text.image or "" for text in texts])
        if self.recompute:
            return Recomputed(self.model, images)
        # The padding to the longest prompt, and the longest text behind it.
        slots = max(len(text.prompt) for text in texts) + max(map(self._room, texts))
        # Decided by the batch alone: an interrupted run computes the others as it would have.
        is_long = max(map(self._room, texts)) >= _WORTH_PREPARING
        if not (self.fast and is_long):
            return Cached(self.model, slots, images)
        recorder = recorder_for(next(self.model.parameters()).device)
        if recorder is None or self.model.layout.tensor.size > 1:
            return Cached(self._prepared, slots, images)
        return Recorded(self._prepared, slots, recorder, images)

    @cached_property
    def _prepared(self) -> LanguageModel:
        return prepared(self.model)

    def _room(self, text: Text) -> int:
        """How many tokens a text may still get."""
        room = self.seq_length - len(text.prompt)
        return min(text.sampling.maximum_tokens, room) - len(text.tokens)

    def _chooser(self, texts: list[Text]) -> Chooser:
        generators = [None if text.seed is None else torch.Generator().manual_seed(text.seed) for text in texts]
        device = next(self.model.parameters()).device
        seen = [text.prompt for text in texts]
        return Chooser([text.sampling for text in texts], seen, generators, self.tokenizer.vocab_size, device)

    def _chosen(self, logits: Tensor, choose: Chooser) -> tuple[Tensor, Chosen]:
        """A token for each row of logits [b, V_pad], on the device and on its way to the host."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        tokens = from_first_rank(choose(wide), self.model.layout.tensor)
        logprobs = wide.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0] if self.logprobs else None
        # One number that is not finite makes the sum so, and a sum is one pass.
        return tokens, Chosen(tokens, wide.sum(dim=-1), logprobs, logits.dtype)

    def _take(self, texts: list[Text], chosen: Chosen, seconds: float) -> None:
        """Add the chosen tokens to the texts that had not ended."""
        tokens, logprobs = chosen.read()
        for text, token, logprob in zip(texts, tokens, logprobs, strict=True):
            if not text.ended:
                self._append(text, token, logprob)
                text.seconds = seconds

    def _append(self, text: Text, token: int, logprob: float | None) -> None:
        """Add a token and see whether the text has ended."""
        if self.stop_at_eod and token == self.tokenizer.eod_id:
            text.finished = text.ended = True
        else:
            text.tokens.append(token)
            if logprob is not None:
                text.logprobs.append(logprob)
            self._check_limits(text)
        if (before := self._before_stop(text)) is not None:
            text.text = before
            text.finished = text.ended = True
        elif text.ended:
            text.text = self.text_of(text)

    def text_of(self, text: Text, count: int | None = None) -> str:
        """What has been generated, or its first `count` tokens, as text behind the prompt; without special tokens."""
        return self.tokenizer.decode_after(text.prompt, text.tokens[:count])

    def _before_stop(self, text: Text) -> str | None:
        """The text up to the first stop string, special tokens counting for the search only; None without one."""
        if not text.sampling.stop:
            return None
        shown = self.text_of(text)
        found = _cut(shown, text.sampling.stop)
        if not self.tokenizer.specials.keys().isdisjoint(text.tokens):
            whole = self._whole(text, len(text.tokens))
            if (before := _cut(whole, text.sampling.stop)) is not None:
                without = self._without_specials(text, whole, len(before))
                found = without if found is None else min(found, without, key=len)
        return found

    def _whole(self, text: Text, count: int) -> str:
        return self.tokenizer.decode_whole(text.tokens[:count], text.prompt)

    def _without_specials(self, text: Text, whole: str, end: int) -> str:
        """whole[:end], special tokens left out; `end` may lie inside of a token."""
        count = len(text.tokens)
        while count and len(before := self._whole(text, count)) > end:
            whole, count = before, count - 1
        start, shown = self.text_of(text, count), self.text_of(text, count + 1)
        return shown[: max(len(start), len(shown) - (len(whole) - end))]

    def kept_tokens(self, text: Text) -> list[int]:
        """Tokens of what is shown of a text: those of a stop string are not among them."""
        count = len(text.tokens)
        while count and self.text_of(text, count - 1).startswith(text.text):
            count -= 1
        if self.text_of(text, count) == text.text:
            return text.tokens[:count]
        before = self.text_of(text, count - 1)
        return text.tokens[: count - 1] + self.tokenizer.encode(text.text[len(before) :])

    def _check_limits(self, text: Text) -> None:
        full = len(text.prompt) + len(text.tokens) >= self.seq_length
        text.ended = full or len(text.tokens) >= text.sampling.maximum_tokens
        if full and len(text.tokens) < text.sampling.maximum_tokens:
            text.messages.append(f"stopped at the context length of {self.seq_length} tokens (seq_length)")


def _cut(text: str, stop: tuple[str, ...]) -> str | None:
    """`text` before the stop string that begins first; None without one."""
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends)] if ends else None


def cut_message(kept: int, given: int, seq_length: int) -> str:
    """What is said of a prompt that does not fit: how many of its tokens are kept."""
    return f"prompt cut to its last {kept} of {given} tokens (seq_length {seq_length})"


class Chosen:
    """What was chosen in a step, on its way to the host.

    Args:
        tokens: int64 [b].
        sums: [b], not finite for a row of logits that are not.
        logprobs: [b].
        dtype: of the logits, for the message about them.
    """

    def __init__(self, tokens: Tensor, sums: Tensor, logprobs: Tensor | None, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._copies = [None if x is None else x.to("cpu", non_blocking=True) for x in (tokens, sums, logprobs)]
        self._arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[list[int], Sequence[float | None]]:
        """Tokens and log-probabilities. Raises UserError where logits were not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, sums, logprobs = self._copies
        assert tokens is not None and sums is not None
        if not sums.isfinite().all():
            raise overflow(self._dtype)
        return tokens.tolist(), [None] * len(tokens) if logprobs is None else logprobs.tolist()
