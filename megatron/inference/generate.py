"""Text generation: prompts in, completions out, in batches of texts of any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from megatron.inference.cache import KVCache
from megatron.inference.sampling import sample
from megatron.model import LanguageModel
from megatron.tokenizer import Tokenizer

# Prompt tokens computed at a time: bounds the logits at batch x 256 x V_pad.
PREFILL_TOKENS = 256
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Completion:
    """A prompt and what the model made of it, with GPT-NeoX's field names."""

    context: str
    """The prompt as it was given."""
    text: str
    """The generated text alone, without the end-of-document token or the stop string."""
    length: int
    """Number of generated tokens, the end-of-document token not counted."""
    finished: bool
    """Whether the text came to an end of its own (end of document or stop string) before a limit."""
    message: str | None
    """Why the text is not what was asked for: a prompt that was cut, a context that was full."""
    duration_seconds: float
    """Wall-clock time from the start of its batch."""


@dataclass(frozen=True)
class _Limits:
    maximum_tokens: int
    seq_length: int
    eod_id: int | None
    stop: tuple[str, ...]


@dataclass
class _Text:
    """A text while it is being generated."""

    context: str
    prompt: list[int]
    generator: torch.Generator | None = None
    messages: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    ended: bool = False
    seconds: float = 0.0

    def completion(self) -> Completion:
        message = "; ".join(self.messages) or None
        return Completion(self.context, self.text, len(self.tokens), self.finished, message, self.seconds)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    maximum_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    num_samples: int = 1,
    seed: int | None = None,
    recompute: bool = False,
    batch_size: int = 8,
    stop_at_eod: bool = True,
    stop: Sequence[str] = (),
    seq_length: int | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Complete every prompt `num_samples` times; all completions of the first prompt come first.

    Rows of the padded vocabulary are never sampled. A prompt and its completion take `seq_length` tokens at most:
    generation stops there with a message. A prompt that leaves no room loses its first tokens, until maximum_tokens
    fit, but never more than half of the context goes to the completion.

    Args:
        model: in any dtype, on any device.
        prompts: texts or token ids; an empty one starts from the end-of-document token.
        maximum_tokens: most tokens generated for a prompt.
        temperature, top_k, top_p: see megatron.inference.sampling.sample; temperature 0 is greedy.
        seed: the same seed gives the same texts, whatever the batch size; None takes a new one each time.
        recompute: compute the whole text anew for each token, without a cache (slow; for checks).
        batch_size: texts generated together.
        stop_at_eod: end a text at the end-of-document token.
        stop: strings that end a text.
        seq_length: context length in tokens; default the model's.
        progress: show a progress bar.
    """
    if min(maximum_tokens, num_samples, batch_size) < 1:
        raise ValueError("maximum_tokens, num_samples, batch_size: must be at least 1")
    eod_id = tokenizer.eod_id if stop_at_eod else None
    limits = _Limits(maximum_tokens, seq_length or model.config.seq_length, eod_id, tuple(stop))
    texts = [_start_text(prompt, tokenizer, limits) for prompt in prompts for _ in range(num_samples)]
    if temperature > 0:
        _seed_texts(texts, seed)

    def choose(logits: Tensor, rows: list[_Text]) -> list[int]:
        generators = [row.generator for row in rows if row.generator is not None]
        return sample(logits[:, : tokenizer.vocab_size], temperature, top_k, top_p, generators).tolist()

    by_length = sorted(texts, key=lambda text: len(text.prompt), reverse=True)
    with evaluating(model), tqdm(total=len(texts), desc="generating", disable=not progress) as bar:
        for start in range(0, len(texts), batch_size):
            batch = by_length[start : start + batch_size]
            _complete(batch, _Recomputed(model) if recompute else _Cached(model), choose, tokenizer, limits)
            bar.update(len(batch))
    return [text.completion() for text in texts]


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model is in its former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: rotary tables made in it could not be used in training afterwards.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _start_text(prompt: str | Sequence[int], tokenizer: Tokenizer, limits: _Limits) -> _Text:
    context = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt))
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    text = _Text(context, ids or [tokenizer.eod_id])
    if len(ids) >= limits.seq_length:
        kept = max(1, limits.seq_length - limits.maximum_tokens, limits.seq_length // 2)
        text.prompt = ids[-kept:]
        text.messages.append(f"prompt cut to its last {kept} of {len(ids)} tokens (seq_length {limits.seq_length})")
    return text


def _seed_texts(texts: list[_Text], seed: int | None) -> None:
    """A generator of its own for each text, so that its draws do not depend on batches."""
    base = torch.Generator().seed() if seed is None else seed * _SEED_STRIDE
    for i, text in enumerate(texts):
        text.generator = torch.Generator().manual_seed((base + i) % 2**63)


class _Cached:
    """Logits after the last token of each row; past tokens come from a cache."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.cache: KVCache | None = None

    def __call__(self, sequences: list[list[int]]) -> Tensor:
        """Whole texts in, first time with any number of tokens and later with one more each; logits [b, V_pad]."""
        device = next(self.model.parameters()).device
        if self.cache is None:
            longest = max(map(len, sequences))
            padding = [longest - len(row) for row in sequences]
            self.cache = KVCache(len(self.model.layers), torch.tensor(padding, device=device))
            rows = [[0] * count + row for count, row in zip(padding, sequences, strict=True)]
        else:
            rows = [row[-1:] for row in sequences]
        ids = torch.tensor(rows, device=device)
        for part in ids.split(PREFILL_TOKENS, dim=1):
            logits = self.model(part, cache=self.cache.step(part.shape[1]))
        return logits[:, -1]

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        assert self.cache is not None, "called after the first step"
        self.cache.select(torch.tensor(rows, device=self.cache.padding.device))


class _Recomputed:
    """The same without a cache: padding goes to the right, where causal attention never sees it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def __call__(self, sequences: list[list[int]]) -> Tensor:
        """Whole texts in; logits after the last token of each, [b, V_pad]."""
        device = next(self.model.parameters()).device
        longest = max(map(len, sequences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=device)
        last = torch.tensor([len(row) - 1 for row in sequences], device=device)
        return self.model(ids)[torch.arange(len(sequences), device=device), last]

    def select(self, rows: list[int]) -> None:
        """Nothing is kept between steps."""


def _complete(
    texts: list[_Text],
    next_logits: _Cached | _Recomputed,
    choose: Callable[[Tensor, list[_Text]], list[int]],
    tokenizer: Tokenizer,
    limits: _Limits,
) -> None:
    """Generate until every text of the batch has ended; a text that has ended leaves the batch."""
    started = time.perf_counter()
    while texts:
        logits = next_logits([text.prompt + text.tokens for text in texts])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        for text, token in zip(texts, choose(wide, texts), strict=True):
            _append(text, token, tokenizer, limits)
            text.seconds = time.perf_counter() - started
        going = [i for i, text in enumerate(texts) if not text.ended]
        if 0 < len(going) < len(texts):
            next_logits.select(going)
        texts = [texts[i] for i in going]


def _append(text: _Text, token: int, tokenizer: Tokenizer, limits: _Limits) -> None:
    """Add a token and see whether the text has ended."""
    if token == limits.eod_id:
        text.finished = text.ended = True
    else:
        text.tokens.append(token)
        full = len(text.prompt) + len(text.tokens) >= limits.seq_length
        text.ended = full or len(text.tokens) >= limits.maximum_tokens
        if full and len(text.tokens) < limits.maximum_tokens:
            text.messages.append(f"stopped at the context length of {limits.seq_length} tokens (seq_length)")
    if limits.stop or text.ended:
        text.text = tokenizer.decode(text.tokens)
    ends = [text.text.find(string) for string in limits.stop if string in text.text]
    if ends:
        text.text = text.text[: min(ends)]
        text.finished = text.ended = True
