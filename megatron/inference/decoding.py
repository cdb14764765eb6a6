"""Token after token: texts of any length, each with settings of its own, generated together in one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.inference.cache import KVCache
from megatron.inference.sampling import Sampling, sample_rows
from megatron.model import LanguageModel
from megatron.model.forward_only import overflow
from megatron.mpu.collectives import from_first_rank
from megatron.tokenizer import Tokenizer

# Prompt tokens computed at a time: bounds activations at batch x 256 x the largest number of slots.
PREFILL_TOKENS = 256


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
    messages: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    """Ended by itself: end of document or stop string."""
    ended: bool = False
    seconds: float = 0.0


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

    def start(self, prompt: str | Sequence[int], sampling: Sampling, seed: int | None = None) -> Text:
        """A text to be generated behind `prompt`; an empty one starts from the end-of-document token."""
        context = prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = Text(context, ids or [self.tokenizer.eod_id], sampling, seed)
        if len(ids) >= self.seq_length:
            kept = max(1, self.seq_length - sampling.maximum_tokens, self.seq_length // 2)
            text.prompt = ids[-kept:]
            text.messages.append(cut_message(kept, len(ids), self.seq_length))
        return text

    def steps(self, texts: list[Text]) -> Iterator[None]:
        """Generate until every text has ended, one token for each of them a step; the ended ones leave the batch."""
        started = time.perf_counter()
        next_logits = _Recomputed(self.model) if self.recompute else _Cached(self.model, self._slots(texts))
        generators = [torch.Generator() if text.seed is None else _generator(text.seed) for text in texts]
        while texts:
            self._step(texts, next_logits([text.prompt + text.tokens for text in texts]), generators)
            for text in texts:
                text.seconds = time.perf_counter() - started
            yield
            going = [i for i, text in enumerate(texts) if not text.ended]
            if 0 < len(going) < len(texts):
                next_logits.select(going)
            texts, generators = [texts[i] for i in going], [generators[i] for i in going]

    def complete(self, texts: list[Text]) -> None:
        """All steps."""
        for _ in self.steps(texts):
            pass

    def _slots(self, texts: list[Text]) -> int:
        """Cache slots that the batch can fill: the padding to the longest prompt, and the longest text behind it."""
        longest = max(len(text.prompt) for text in texts)
        room = [min(text.sampling.maximum_tokens, self.seq_length - len(text.prompt)) for text in texts]
        return longest + max(room)

    def _step(self, texts: list[Text], logits: Tensor, generators: list[torch.Generator]) -> None:
        """Choose a token for each text from logits [b, V_pad]; rows of the padded vocabulary are never chosen."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if not wide.isfinite().all():
            raise overflow(logits.dtype)
        settings = [text.sampling for text in texts]
        seen = [text.prompt + text.tokens for text in texts]
        tokens = sample_rows(wide[:, : self.tokenizer.vocab_size], settings, seen, generators)
        tokens = from_first_rank(tokens, self.model.layout.tensor)
        logprobs: list[float | None] = [None] * len(texts)
        if self.logprobs:
            logprobs = wide.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].tolist()
        for text, token, logprob in zip(texts, tokens.tolist(), logprobs, strict=True):
            self._append(text, token, logprob)

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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Cached:
    """Logits after the last token of each row; past tokens come from a cache of `slots` allocated at once."""

    def __init__(self, model: LanguageModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self.cache: KVCache | None = None

    @torch.no_grad()
    def __call__(self, sequences: list[list[int]]) -> Tensor:
        """Whole texts in, first time with any number of tokens and later with one more each; logits [b, V_pad]."""
        device = next(self.model.parameters()).device
        if self.cache is None:
            longest = max(map(len, sequences))
            padding = [longest - len(row) for row in sequences]
            self.cache = KVCache(len(self.model.layers), torch.tensor(padding, device=device), self.slots)
            rows = [[0] * count + row for count, row in zip(padding, sequences, strict=True)]
        else:
            rows = [row[-1:] for row in sequences]
        ids = torch.tensor(rows, device=device)
        for part in ids.split(PREFILL_TOKENS, dim=1):
            hidden = self.model.hidden(part, self.cache.step(part.shape[1]))
        return self.model.logits(hidden[:, -1])

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        assert self.cache is not None, "called after the first step"
        self.cache.select(torch.tensor(rows, device=self.cache.padding.device))


class _Recomputed:
    """The same without a cache: padding goes to the right, where causal attention never sees it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, sequences: list[list[int]]) -> Tensor:
        """Whole texts in; logits after the last token of each, [b, V_pad]."""
        device = next(self.model.parameters()).device
        longest = max(map(len, sequences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=device)
        last = torch.tensor([len(row) - 1 for row in sequences], device=device)
        return self.model.logits(self.model.hidden(ids)[torch.arange(len(sequences), device=device), last])

    def select(self, rows: list[int]) -> None:
        """Nothing is kept between steps."""
