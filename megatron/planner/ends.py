"""What is before and after the blocks of a network: its parameters, memory, work and communication, by its kind.

Legend: as in memory.py; b samples of a micro-batch, C outputs of a head, P numbers in the pixels of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.config.sections.training import TrainingConfig
from megatron.ops.cross_entropy import CHUNK_ROWS
from megatron.ops.linear_cross_entropy import chunk_rows
from megatron.planner.choice import Choice
from megatron.planner.counts import norm_entries, share

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
_OUTPUT_WORKSPACE = 12
"""Bytes of one output of a head that reads a vector a sample: fp32 copies, and the loss's gradient."""
_COMPARISON_BYTES = 24
"""Of an image and a text that are compared: a logit, its log-softmax and gradient in fp32, in both directions."""


class NetworkWork(Protocol):
    """What the ends of a network read of its workload (megatron.planner.workload)."""

    @property
    def model(self) -> Any:
        """The section of the network."""

    @property
    def training(self) -> TrainingConfig:
        """The loss that is asked for."""

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter or activation entry (e in formulas)."""

    def tokens(self, choice: Choice) -> int:
        """Tokens of a micro-batch that the blocks read on one data rank (T in formulas)."""


def stream_bytes(work: NetworkWork, choice: Choice) -> float:
    """The residual stream of a micro-batch: T d e, a t-th of it with sequence parallelism."""
    ranks = choice.tensor if choice.sequence_parallel else 1
    return work.tokens(choice) * work.model.hidden_size * work.element_bytes / ranks


class Ends(ABC):
    """Beginning and end of one kind of network; `first` and `last` say which of them a stage has."""

    @abstractmethod
    def parameters(self, model: Any, first: bool, last: bool, t: int) -> int:
        """Entries of the parameters on one of t tensor ranks.

        model: the section of the network.
        """

    @abstractmethod
    def kept_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """What the first stage keeps of one micro-batch, besides what its blocks do."""

    @abstractmethod
    def head_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """Final norm, head and loss of one micro-batch."""

    @abstractmethod
    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """FLOPs of so many samples, forward and backward, on one of t tensor ranks."""

    @abstractmethod
    def traffic(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> float:
        """Bytes of one micro-batch that element-wise operations move through memory."""

    @abstractmethod
    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """(bytes that a tensor rank sends for one micro-batch, messages)."""

    @abstractmethod
    def shared_matrix(self, work: NetworkWork, choice: Choice) -> int:
        """Entries of a matrix that the first and the last stage both hold, on one rank; 0 where there is none."""


class LanguageEnds(Ends):
    """Embedding, head and loss over the vocabulary."""

    def parameters(self, model: Any, first: bool, last: bool, t: int) -> int:
        """A tied embedding counts once where both ends are."""
        matrices = 1 if first and last and not model.no_weight_tying else first + last
        return last * norm_entries(model, model.final_norm_kind) + matrices * vocabulary_matrix(model, t)

    def kept_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """Token ids, which are next to nothing."""
        return 0.0

    def head_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """Final norm, the head's input, and what head and loss keep and have in flight."""
        hidden = predictions(work, choice) * work.model.hidden_size * work.element_bytes
        loss = _eager_loss_bytes if work.training.cross_entropy == "eager" else _chunked_loss_bytes
        return stream_bytes(work, choice) + hidden + loss(work, choice)

    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """Of the head."""
        return 6.0 * samples * model.tokens_per_sample() * vocabulary_matrix(model, t) * last

    def traffic(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> float:
        """Of the loss; in chunks, each of them also reads and writes the weight's fp32 gradient."""
        if not last:
            return 0.0
        count, columns = predictions(work, choice), vocabulary_share(work, choice)
        if work.training.cross_entropy == "eager":
            return _EAGER_LOGIT_TRAFFIC * count * columns
        chunks = math.ceil(count / loss_chunk_rows(work, choice))
        return columns * (_LOGIT_PASSES * work.element_bytes * count + 8 * chunks * work.model.hidden_size)

    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Embedding and head move 2 T d (t-1)/t each, the loss 6 T (t-1)/t fp32 numbers."""
        count, part = predictions(work, choice), (choice.tensor - 1) / choice.tensor
        ends = first + last
        sent = ends * 2 * count * work.model.hidden_size * part * work.element_bytes + last * 6 * count * part * 4
        chunked = last and work.training.cross_entropy != "eager"
        chunks = math.ceil(count / loss_chunk_rows(work, choice)) if chunked else 1
        return sent, 2 * ends + 2 * last * chunks

    def shared_matrix(self, work: NetworkWork, choice: Choice) -> int:
        """A tied embedding."""
        return 0 if work.model.no_weight_tying else vocabulary_matrix(work.model, choice.tensor)


def predictions(work: NetworkWork, choice: Choice) -> int:
    """Tokens of a micro-batch that the head of a language model reads: those of the texts."""
    tokens: int = choice.micro_batch * work.model.tokens_per_sample()
    return tokens


def vocabulary_matrix(model: Any, t: int = 1) -> int:
    """Entries of the embedding (or of an untied head) of a model with a vocabulary on one rank."""
    assert model.padded_vocab_size is not None, "the vocabulary is known before a plan is made"
    entries: int = share(model.padded_vocab_size, t) * model.hidden_size
    return entries


def vocabulary_share(work: NetworkWork, choice: Choice) -> int:
    """Rows of the head's matrix on the tensor rank that has most."""
    return vocabulary_matrix(work.model, choice.tensor) // work.model.hidden_size


def loss_chunk_rows(work: NetworkWork, choice: Choice) -> int:
    """Rows of logits that head and loss take at a time."""
    return min(predictions(work, choice), chunk_rows(vocabulary_share(work, choice), work.element_bytes, "cuda"))


def _eager_loss_bytes(work: NetworkWork, choice: Choice) -> float:
    """Logits and their gradients, and the loss's fp32 chunks."""
    count, columns = predictions(work, choice), vocabulary_share(work, choice)
    return 2 * work.element_bytes * count * columns + _LOSS_WORKSPACE * min(count, CHUNK_ROWS) * columns


def _chunked_loss_bytes(work: NetworkWork, choice: Choice) -> float:
    """Gradients of the head's input and, in fp32, of its matrix; beside them a chunk's logits, or what is returned."""
    e, d, columns = work.element_bytes, work.model.hidden_size, vocabulary_share(work, choice)
    of_hidden, of_weight = predictions(work, choice) * d * e, columns * d
    logits = loss_chunk_rows(work, choice) * columns * e
    return of_hidden + 4 * of_weight + max(logits, of_hidden + e * of_weight)


class _PatchEnds(Ends):
    """Patches and positions; what comes behind the blocks is another class's."""

    def _before(self, model: Any, t: int) -> int:
        """Entries of the parameters before the blocks."""
        rows = model.patch_bias + model.class_token + model.tokens_per_sample()  # and positions, one a token
        norm = model.pre_norm * norm_entries(model, model.final_norm_kind)
        before: int = patch_matrix(model, t) + rows * model.hidden_size + norm
        return before

    def kept_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """The images, their pixels as the patches' matrix takes them, whole on every rank; a first norm's input."""
        pixels = (_PIXEL_BYTES + work.element_bytes) * _pixels(work, choice)
        return pixels + (stream_bytes(work, choice) if work.model.pre_norm else 0.0)

    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """Of the patches' matrix."""
        return 6.0 * samples * first * (model.tokens_per_sample() - model.class_token) * patch_matrix(model, t)

    def traffic(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> float:
        """Of normalising the images and cutting them into patches."""
        return (_PIXEL_TRAFFIC + 2 * work.element_bytes) * _pixels(work, choice) if first else 0.0

    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Tokens of the patches are summed, 2 T d (t-1)/t."""
        return first * _summed(work, choice), int(first)

    def shared_matrix(self, work: NetworkWork, choice: Choice) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class ImageEnds(_PatchEnds):
    """Patches and positions; a vector of each image, and a head.

    outputs: of the head: classes, or the width of vectors that are compared.
    bias: has the head one?
    """

    outputs: int
    bias: bool = True

    def parameters(self, model: Any, first: bool, last: bool, t: int) -> int:
        """See Ends."""
        head = share(self.outputs, t) * (model.hidden_size + self.bias)
        return first * self._before(model, t) + last * (norm_entries(model, model.final_norm_kind) + head)

    def head_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """The stream, one vector of which is read, and its gradient; outputs, theirs, and fp32 copies of both."""
        return _vector_head_bytes(work, choice, self.outputs)

    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """Of the patches' matrix, and of the head, which reads one vector an image."""
        head = 6.0 * samples * last * share(self.outputs, t) * model.hidden_size
        return super().flops(model, samples, first, last, t) + head

    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Tokens of the patches are summed; outputs gathered, and the gradient of a vector summed."""
        of_patches, messages = super().sent(work, choice, first, last)
        return of_patches + last * _gathered(work, choice, self.outputs), messages + 2 * last


@dataclass(frozen=True)
class ReadImageEnds(_PatchEnds):
    """Patches and positions; all tokens through a Pattention to the width of a language model that reads them.

    Its FLOPs count, what its row functions move through memory does not.

    tokens: parameter tokens of that Pattention.
    width: of the language model.
    """

    tokens: int
    width: int

    def parameters(self, model: Any, first: bool, last: bool, t: int) -> int:
        """See Ends."""
        pairs = share(self.tokens, t) * (model.hidden_size + self.width)
        return first * self._before(model, t) + last * (norm_entries(model, model.final_norm_kind) + pairs)

    def kept_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """Also the inputs of the last norm and of the Pattention, its scores, and what it gives."""
        columns = 2 * work.model.hidden_size + share(self.tokens, choice.tensor) + self.width
        return super().kept_bytes(work, choice) + work.tokens(choice) * columns * work.element_bytes

    def head_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """No loss of its own."""
        return 0.0

    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """Of the patches' matrix, and of the Pattention, which reads every token."""
        pairs = share(self.tokens, t) * (model.hidden_size + self.width)
        return super().flops(model, samples, first, last, t) + 6.0 * samples * last * model.tokens_per_sample() * pairs

    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """Tokens of the patches are summed; what the Pattention gives too, and the gradient of what it reads."""
        of_patches, messages = super().sent(work, choice, first, last)
        part = (choice.tensor - 1) / choice.tensor
        summed = 2 * work.tokens(choice) * (self.width + work.model.hidden_size) * part * work.element_bytes
        return of_patches + last * summed, messages + 2 * last


@dataclass(frozen=True)
class PairedTextEnds(Ends):
    """Embedding and positions; the last token's vector of each text, projected and compared with those of images.

    outputs: width of the vectors that are compared.
    """

    outputs: int

    def parameters(self, model: Any, first: bool, last: bool, t: int) -> int:
        """See Ends."""
        before = vocabulary_matrix(model, t) + model.tokens_per_sample() * model.hidden_size
        after = norm_entries(model, model.final_norm_kind) + share(self.outputs, t) * model.hidden_size
        total: int = first * before + last * after
        return total

    def kept_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """Token ids, which are next to nothing."""
        return 0.0

    def head_bytes(self, work: NetworkWork, choice: Choice) -> float:
        """As of images; and a GPU's own pairs, compared with those of the whole update."""
        own = choice.micro_batch * choice.accumulation
        return _vector_head_bytes(work, choice, self.outputs) + _COMPARISON_BYTES * own * choice.samples

    def flops(self, model: Any, samples: int, first: bool, last: bool, t: int) -> float:
        """Of the projection, which reads one vector a text."""
        return 6.0 * samples * last * share(self.outputs, t) * model.hidden_size

    def traffic(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> float:
        """Next to none."""
        return 0.0

    def sent(self, work: NetworkWork, choice: Choice, first: bool, last: bool) -> tuple[float, int]:
        """The embedding moves 2 T d (t-1)/t; outputs are gathered, and the gradient of a vector summed."""
        return first * _summed(work, choice) + last * _gathered(work, choice, self.outputs), first + 2 * last

    def shared_matrix(self, work: NetworkWork, choice: Choice) -> int:
        """None."""
        return 0


def patch_matrix(model: Any, t: int = 1) -> int:
    """Entries of the matrix that makes tokens of patches, on one rank."""
    entries: int = share(model.patch_values, t) * model.hidden_size
    return entries


def _vector_head_bytes(work: NetworkWork, choice: Choice, outputs: int) -> float:
    entries = choice.micro_batch * outputs
    return 2 * stream_bytes(work, choice) + (2 * work.element_bytes + _OUTPUT_WORKSPACE) * entries


def _summed(work: NetworkWork, choice: Choice) -> float:
    """Bytes that summing all tokens over the tensor ranks sends."""
    part = (choice.tensor - 1) / choice.tensor
    return 2 * work.tokens(choice) * work.model.hidden_size * part * work.element_bytes


def _gathered(work: NetworkWork, choice: Choice, outputs: int) -> float:
    """Bytes that gathering a head's outputs sends, and summing the gradients of the vectors that it reads."""
    part = (choice.tensor - 1) / choice.tensor
    return choice.micro_batch * (outputs + 2 * work.model.hidden_size) * part * work.element_bytes


def _pixels(work: NetworkWork, choice: Choice) -> int:
    """Numbers in the images of a micro-batch."""
    model = work.model
    numbers: int = choice.micro_batch * model.in_channels * model.image_size**2
    return numbers
