"""What is before and after the blocks of a model: its memory, work and communication, by the kind of model.

Legend: as in memory.py; b samples of a micro-batch, C classes, P numbers in the pixels of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from megatron.config.sections.model import ModelConfig
from megatron.config.sections.vision import ImageConfig
from megatron.ops.cross_entropy import CHUNK_ROWS
from megatron.ops.linear_cross_entropy import chunk_rows
from megatron.planner.choice import Choice
from megatron.planner.counts import class_matrix, patch_matrix, share, vocabulary_matrix
from megatron.planner.workload import Workload

_LOSS_WORKSPACE = 12
"""Bytes for one logit of a chunk of rows that `cross_entropy: eager` has in flight: three fp32 matrices."""
_EAGER_LOGIT_TRAFFIC = 56
"""Bytes a logit that the loss moves, forward and backward, with `cross_entropy: eager`."""
_LOGIT_PASSES = 3
"""How often the kernels of the loss in chunks read or write a logit."""
_PIXEL_BYTES = 5
"""Of one number of an image that waits for its update: uint8, and normalised in fp32."""
_PIXEL_TRAFFIC = 21
"""Bytes that normalising one number of an image moves: uint8 read, and fp32 written, read and written twice."""


def stream_bytes(work: Workload, choice: Choice) -> float:
    """The residual stream of a micro-batch: T d e, a t-th of it with sequence parallelism."""
    ranks = choice.tensor if choice.sequence_parallel else 1
    return work.tokens(choice) * work.model.hidden_size * work.element_bytes / ranks


class Ends(ABC):
    """Beginning and end of one kind of model; `first` and `last` say which of them a stage has."""

    @abstractmethod
    def kept_bytes(self, work: Workload, choice: Choice) -> float:
        """What the first stage keeps of one micro-batch, besides what its blocks do."""

    @abstractmethod
    def head_bytes(self, work: Workload, choice: Choice) -> float:
        """Final norm, head and loss of one micro-batch."""

    @abstractmethod
    def flops(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """FLOPs of one micro-batch, forward and backward, on one GPU."""

    @abstractmethod
    def traffic(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """Bytes of one micro-batch that element-wise operations move through memory."""

    @abstractmethod
    def sent(self, work: Workload, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """(bytes that a tensor rank sends for one micro-batch, messages)."""

    @abstractmethod
    def shared_matrix(self, work: Workload, choice: Choice) -> int:
        """Entries of a matrix that the first and the last stage both hold, on one rank; 0 where there is none."""


def ends_of(work: Workload) -> Ends:
    """Those of the model that is planned."""
    return ImageEnds() if isinstance(work.model, ImageConfig) else LanguageEnds()


class LanguageEnds(Ends):
    """Embedding, head and loss over the vocabulary."""

    def kept_bytes(self, work: Workload, choice: Choice) -> float:
        """Token ids, which are next to nothing."""
        return 0.0

    def head_bytes(self, work: Workload, choice: Choice) -> float:
        """Final norm, the head's input, and what head and loss keep and have in flight."""
        hidden = work.tokens(choice) * work.model.hidden_size * work.element_bytes
        loss = _eager_loss_bytes if work.training.cross_entropy == "eager" else _chunked_loss_bytes
        return stream_bytes(work, choice) + hidden + loss(work, choice)

    def flops(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """Of the head."""
        return 6 * work.tokens(choice) * vocabulary_matrix(_language(work), choice.tensor) if last else 0.0

    def traffic(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """Of the loss; in chunks, each of them also reads and writes the weight's fp32 gradient."""
        if not last:
            return 0.0
        count, columns = work.tokens(choice), vocabulary_share(work, choice)
        if work.training.cross_entropy == "eager":
            return _EAGER_LOGIT_TRAFFIC * count * columns
        chunks = math.ceil(count / loss_chunk_rows(work, choice))
        return columns * (_LOGIT_PASSES * work.element_bytes * count + 8 * chunks * work.model.hidden_size)

    def sent(self, work: Workload, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Embedding and head move 2 T d (t-1)/t each, the loss 6 T (t-1)/t fp32 numbers."""
        count, part = work.tokens(choice), (choice.tensor - 1) / choice.tensor
        ends = first + last
        sent = ends * 2 * count * work.model.hidden_size * part * work.element_bytes + last * 6 * count * part * 4
        chunked = last and work.training.cross_entropy != "eager"
        chunks = math.ceil(count / loss_chunk_rows(work, choice)) if chunked else 1
        return sent, 2 * ends + 2 * last * chunks

    def shared_matrix(self, work: Workload, choice: Choice) -> int:
        """A tied embedding."""
        model = _language(work)
        return 0 if model.no_weight_tying else vocabulary_matrix(model, choice.tensor)


def _language(work: Workload) -> ModelConfig:
    assert isinstance(work.model, ModelConfig), "of a language model"
    return work.model


def vocabulary_share(work: Workload, choice: Choice) -> int:
    """Rows of the head's matrix on the tensor rank that has most."""
    rows = _language(work).padded_vocab_size
    assert rows is not None, "the vocabulary is known before a plan is made"
    return share(rows, choice.tensor)


def loss_chunk_rows(work: Workload, choice: Choice) -> int:
    """Rows of logits that head and loss take at a time."""
    return min(work.tokens(choice), chunk_rows(vocabulary_share(work, choice), work.element_bytes, "cuda"))


def _eager_loss_bytes(work: Workload, choice: Choice) -> float:
    """Logits and their gradients, and the loss's fp32 chunks."""
    count, columns = work.tokens(choice), vocabulary_share(work, choice)
    return 2 * work.element_bytes * count * columns + _LOSS_WORKSPACE * min(count, CHUNK_ROWS) * columns


def _chunked_loss_bytes(work: Workload, choice: Choice) -> float:
    """Gradients of the head's input and, in fp32, of its matrix; beside them a chunk's logits, or what is returned."""
    e, d, columns = work.element_bytes, work.model.hidden_size, vocabulary_share(work, choice)
    of_hidden, of_weight = work.tokens(choice) * d * e, columns * d
    logits = loss_chunk_rows(work, choice) * columns * e
    return of_hidden + 4 * of_weight + max(logits, of_hidden + e * of_weight)


class ImageEnds(Ends):
    """Patches and positions; a pooled vector, and the head over the classes."""

    def kept_bytes(self, work: Workload, choice: Choice) -> float:
        """The images, their pixels as the patches' matrix takes them, whole on every rank; a first norm's input."""
        pixels = (_PIXEL_BYTES + work.element_bytes) * _pixels(work, choice)
        return pixels + (stream_bytes(work, choice) if _image(work).pre_norm else 0.0)

    def head_bytes(self, work: Workload, choice: Choice) -> float:
        """The stream, one vector of which is read, and its gradient; logits, theirs, and fp32 copies of both."""
        logits = choice.micro_batch * _image(work).num_classes
        return 2 * stream_bytes(work, choice) + (2 * work.element_bytes + _LOSS_WORKSPACE) * logits

    def flops(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """Of the patches' matrix, and of the head, which reads one vector an image."""
        model, t = _image(work), choice.tensor
        patches = (model.tokens_per_sample() - model.class_token) * patch_matrix(model, t)
        return 6.0 * choice.micro_batch * (first * patches + last * class_matrix(model, t))

    def traffic(self, work: Workload, choice: Choice, first: bool, last: bool) -> float:
        """Of normalising the images and cutting them into patches."""
        return (_PIXEL_TRAFFIC + 2 * work.element_bytes) * _pixels(work, choice) if first else 0.0

    def sent(self, work: Workload, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Tokens of the patches are summed, 2 T d (t-1)/t; logits gathered, and the gradient of a vector summed."""
        model, part = _image(work), (choice.tensor - 1) / choice.tensor
        of_tokens = 2 * work.tokens(choice) * model.hidden_size
        of_logits = choice.micro_batch * (model.num_classes + 2 * model.hidden_size)
        return (first * of_tokens + last * of_logits) * part * work.element_bytes, first + 2 * last

    def shared_matrix(self, work: Workload, choice: Choice) -> int:
        """None."""
        return 0


def _image(work: Workload) -> ImageConfig:
    assert isinstance(work.model, ImageConfig), "of an image classifier"
    return work.model


def _pixels(work: Workload, choice: Choice) -> int:
    """Numbers in the images of a micro-batch."""
    model = _image(work)
    return choice.micro_batch * model.in_channels * model.image_size**2
