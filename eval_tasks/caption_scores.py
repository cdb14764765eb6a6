"""What a model says of images: how likely it finds their captions, and whether what it says is one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from megatron.data.image_text import ImageTextDataset
from megatron.evaluation.sharing import shared
from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import length_batches, start_texts
from megatron.inference.images import ImageReader
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating, overflow
from megatron.ops.cross_entropy import token_losses
from megatron.tasks import ImageToTextTask
from megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageScores:
    """Of one image."""

    loss: float
    """Sum of the cross-entropies of the learned tokens of its captions, in nats."""
    tokens: int
    """How many there are."""
    captions: int
    matches: int
    """How many of its prompts are answered as one of its captions does; an image without prompts has an empty one."""
    prompts: int


@dataclass(frozen=True)
class _ReadFromSet:
    """Images of a data set, by their numbers in place of names of files."""

    reader: ImageReader
    dataset: ImageTextDataset

    def __call__(self, files: Sequence[str]) -> Tensor:
        return self.reader.of_pixels(torch.stack([self.dataset[int(number)]["images"] for number in files]))

    def digest(self, file: str) -> str:
        return file


@dataclass(frozen=True)
class CaptionScorer:
    """A model, and the set of images, each once, whose captions it is asked for."""

    model: LanguageModel
    reader: ImageReader
    tokenizer: Tokenizer
    task: ImageToTextTask
    dataset: ImageTextDataset
    batch_size: int = 8
    """Texts that are computed together."""
    fast: bool = True
    """See Decoder."""

    def scores(self, progress: str = "") -> list[ImageScores]:
        """Of every image, on every data rank. Collective.

        Args:
            progress: name of a progress bar; "" shows none.

        Raises: UserError for an image that is broken and for logits that are not finite.
        """
        count, axis = len(self.dataset), self.model.layout.data
        with evaluating(self.model), tqdm(total=-(-count // axis.size), desc=progress, disable=not progress) as bar:
            return shared(range(count), lambda number: 1, partial(self._of_images, bar=bar), axis)

    def _of_images(self, numbers: list[int], bar: tqdm[None]) -> list[ImageScores]:
        found = list[ImageScores]()
        for first in range(0, len(numbers), self.batch_size):
            part = numbers[first : first + self.batch_size]
            for number, losses, matches in zip(part, self._losses(part), self._matches(part), strict=True):
                loss, tokens = losses
                captions = len(self.dataset.captions(number))
                found.append(ImageScores(loss, tokens, captions, sum(matches), len(matches)))
            bar.update(len(part))
        return found

    def _losses(self, numbers: Sequence[int]) -> list[tuple[float, int]]:
        """(loss, tokens) of the captions of each image."""
        images = self.reader.of_pixels(torch.stack([self.dataset[number]["images"] for number in numbers]))
        owners, samples = list[int](), list[dict[str, Tensor]]()
        for row, number in enumerate(numbers):
            captions = [caption.padded(self.dataset.text) for caption in self.dataset.captions(number)]
            samples += [{"images": self.task.blank, **caption} for caption in captions]
            owners += [row] * len(captions)
        sums = torch.zeros(len(numbers), 2, dtype=torch.float64)
        for first in range(0, len(samples), self.batch_size):
            part = slice(first, first + self.batch_size)
            rows = torch.tensor(owners[part])
            batch = self.task.collate(samples[part], len(rows))
            self.task.check(batch)
            sums.index_add_(0, rows, self._sums(images[rows.to(images.device)], batch).cpu())
        return [(loss, int(tokens)) for loss, tokens in sums.tolist()]

    @torch.no_grad()
    def _sums(self, images: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """[b, (loss, tokens)] of texts behind images [b, T, d]."""
        (_, before), (ids, mask) = self.task.split(batch, images.device)
        hidden = self.model.through_blocks(torch.cat([images, self.model.embedding(before)], dim=1))
        logits = self.model.logits(hidden[:, images.shape[1] :])
        if not logits.isfinite().all():
            raise overflow(logits.dtype)
        losses = token_losses(logits, ids)
        return torch.stack([(losses * mask).sum(1).double(), mask.sum(1).double()], dim=1)

    def _matches(self, numbers: Sequence[int]) -> list[list[bool]]:
        """For each prompt of each image whether the most likely answer is one of its captions."""
        length = self.dataset.text.seq_length
        decoder = Decoder(
            self.model, self.tokenizer, length, fast=self.fast, images=_ReadFromSet(self.reader, self.dataset)
        )
        asked = [(number, prompt, answers) for number in numbers for prompt, answers in self._answers(number).items()]
        prompts, images = [list(prompt) for _, prompt, _ in asked], [str(number) for number, _, _ in asked]
        greedy = Sampling(maximum_tokens=length)
        texts = start_texts(decoder, prompts, [greedy] * len(asked), 0, images)
        for batch in length_batches(texts, self.batch_size):
            decoder.complete([texts[index] for index in batch])
        found: dict[int, list[bool]] = {number: [] for number in numbers}
        for (number, _, answers), text in zip(asked, texts, strict=True):
            found[number].append(text.finished and self._said(text) in answers)
        return [found[number] for number in numbers]

    def _answers(self, number: int) -> dict[tuple[int, ...], list[str]]:
        """The texts of an image's captions, by the ids of the prompt."""
        found = dict[tuple[int, ...], list[str]]()
        for caption in self.dataset.captions(number):
            prompt, answer = caption.ids[: caption.prompt_length], caption.ids[caption.prompt_length : -1]
            text = self.tokenizer.decode_after(prompt.tolist(), answer.tolist()).strip()
            found.setdefault(tuple(prompt.tolist()), []).append(text)
        return found

    def _said(self, text: Text) -> str:
        return text.text.strip()


def summary(scores: Sequence[ImageScores]) -> Mapping[str, float | int]:
    """Perplexity and loss a token, the share of prompts answered as a caption does with its standard error, counts."""
    tokens, prompts = sum(score.tokens for score in scores), sum(score.prompts for score in scores)
    loss = sum(score.loss for score in scores) / max(1, tokens)
    share = sum(score.matches for score in scores) / max(1, prompts)
    return {
        "perplexity": math.exp(min(loss, 80.0)),
        "loss": loss,
        "exact_match": share,
        "exact_match_stderr": math.sqrt(share * (1 - share) / (prompts - 1)) if prompts > 1 else math.nan,
        "num_images": len(scores),
        "num_captions": sum(score.captions for score in scores),
    }
