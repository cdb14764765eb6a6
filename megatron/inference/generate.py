"""Text generation: prompts in, completions out, in batches of texts of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from megatron.inference.decoding import Decoder, Text
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.mpu.collectives import object_from_first_rank
from megatron.tokenizer import Tokenizer

_SEED_STRIDE = 1_000_003
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """A prompt and what the model made of it, with GPT-NeoX's field names."""

    context: str
    """The prompt as it was given."""
    text: str
    """The generated text alone, without the end-of-document token or the stop string."""
    length: int
    """Number of generated tokens, those of a stop string counted and the end-of-document token not."""
    finished: bool
    """Whether the text came to an end of its own (end of document or stop string) before a limit."""
    message: str | None
    """Why the text is not what was asked for: a prompt that was cut, a context that was full."""
    duration_seconds: float
    """Wall-clock time from the start of its batch."""
    logprobs: list[float] | None = None
    """Where asked for, the log-probability of each of the `length` tokens by the model itself, before penalty,
    temperature and filters: the logarithm of a softmax over all rows of the embedding, as in evaluation."""
    image: str | None = None
    """File of the image that stands before it, where one does."""


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    settings: Sequence[Sampling] | None = None,
    maximum_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    seed: int | None = None,
    logprobs: bool = False,
    recompute: bool = False,
    fast: bool = True,
    batch_size: int = 8,
    stop_at_eod: bool = True,
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
        settings: one for each prompt, instead of the next eight arguments.
        maximum_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, num_samples: of every prompt; see
            megatron.inference.sampling.Sampling.
        seed: the same seed gives the same texts, whatever the batch size; None takes a new one each time.
        logprobs: see Completion.
        recompute: compute the whole text anew for each token, without a cache (slow; for checks).
        fast: decode with a prepared copy of the matrices, which takes their memory once more; see Decoder.
        batch_size: texts generated together.
        stop_at_eod: end a text at the end-of-document token.
        seq_length: context length in tokens; default the model's.
        progress: show a progress bar.
    """
    if settings is None:
        of_all = Sampling(
            maximum_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop), num_samples
        )
        settings = [of_all] * len(prompts)
    decoder = Decoder(model, tokenizer, seq_length or model.config.seq_length, recompute, logprobs, stop_at_eod, fast)
    texts = start_texts(decoder, prompts, settings, seed)
    with evaluating(model), tqdm(total=len(texts), desc="generating", disable=not progress) as bar:
        for batch in length_batches(texts, batch_size):
            decoder.complete([texts[i] for i in batch])
            bar.update(len(batch))
    return [completion_of(text, logprobs) for text in texts]


def start_texts(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    settings: Sequence[Sampling],
    seed: int | None,
    images: Sequence[str | None] | None = None,
) -> list[Text]:
    """All texts of all prompts, each with a seed of its own, so that its draws do not depend on batches.

    A prompt with its own seed gives what it would give alone with that seed.
    """
    if seed is None:
        base = object_from_first_rank(torch.Generator().seed(), decoder.model.layout.tensor)
    else:
        base = seed * _SEED_STRIDE
    texts: list[Text] = []
    for prompt, sampling, image in zip(prompts, settings, images or [None] * len(prompts), strict=True):
        own = len(texts) + base if sampling.seed is None else sampling.seed * _SEED_STRIDE
        for number in range(sampling.num_samples):
            text_seed = (own + number) % 2**63 if sampling.temperature > 0 else None
            texts.append(decoder.start(prompt, sampling, text_seed, image))
    return texts


def length_batches(texts: Sequence[Text], batch_size: int) -> list[list[int]]:
    """Indices of texts of similar length, longest first: little padding, and too little memory shows at once."""
    if batch_size < 1:
        raise ValueError("batch_size: must be at least 1")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def completion_of(text: Text, logprobs: bool) -> Completion:
    """What is reported of a text that has ended."""
    message = "; ".join(text.messages) or None
    noted, length = text.logprobs if logprobs else None, len(text.tokens)
    return Completion(text.context, text.text, length, text.finished, message, text.seconds, noted, text.image)
