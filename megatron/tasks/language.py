"""Next-token prediction: what the published models learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.data import IndexedDataset, build_datasets
from megatron.data.datasets import Datasets
from megatron.data.loader import tokens_of
from megatron.errors import RankError, UserError
from megatron.model.build import LANGUAGE, Architecture
from megatron.mpu.layout import Layout
from megatron.tasks.task import Task, Tensors
from megatron.tasks.token_loss import TokenLoss
from megatron.tokenizer import build_tokenizer

_LONGEST_EXAMPLE = 512
LARGEST_EXPONENT = 80.0  # a perplexity beyond e^80 says no more


class LanguageTask(Task[Tensor]):
    """A batch is token ids [b, s + 1]; the first s predict the last s. With eod_mask_loss, no document's end predicts.

    Raises: UserError, when it is made, for a tokenizer that is not there or does not fit the model.
    """

    name: ClassVar[str] = "language"
    section: ClassVar[type[ModelSection]] = ModelConfig
    architecture: ClassVar[Architecture] = LANGUAGE
    loss_name: ClassVar[str] = "lm_loss"
    console: ClassVar[Mapping[str, str]] = {
        "lm_loss": "loss {:.4f}", "valid_lm_loss": "validation loss {:.4f}", "valid_perplexity": "perplexity {:.2f}",
        "test_lm_loss": "test loss {:.4f}", "test_perplexity": "perplexity {:.2f}",
    }  # fmt: skip
    data_keys: ClassVar[tuple[str, ...]] = ("seq_length",)

    def __init__(self, config: RunConfig) -> None:
        tokenizer = build_tokenizer(config.tokenizer)
        super().__init__(config.with_vocabulary(tokenizer.vocab_size))
        model = self.config.language
        self._rows, self._length = model.padded_vocab_size or 0, model.seq_length
        self._loss = TokenLoss(config.training.cross_entropy, self._rows)
        self._masked = tokenizer.eod_id if config.training.eod_mask_loss else None

    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        """Samples of seq_length + 1 tokens from the indexed files that the data section names."""
        return build_datasets(self.config.data, self._length, self.config.training.seed, samples, order)

    def collate(self, samples: list[Any], size: int) -> Tensor:
        """Token ids, int64 [size, s + 1]."""
        return tokens_of(samples, size)["tokens"]

    def check(self, batch: Tensor) -> None:
        """Raise a RankError for a token id that the embedding has no row for."""
        self._loss.check_ids(batch, RankError)

    def split(self, batch: Tensor, device: torch.device) -> tuple[Tensors, Tensors]:
        """([inputs [b, s]], [labels [b, s] and, with eod_mask_loss, which predictions count, bool [b, s]])."""
        tokens = batch.to(device, non_blocking=True)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        return (inputs,), (labels,) if self._masked is None else (labels, inputs != self._masked)

    def loss(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Mean cross-entropy in nats a token.

        outputs: this tensor rank's share of the logits [b, s, V_pad], or what they are computed from.
        """
        labels, mask = targets if len(targets) == 2 else (targets[0], None)
        return self._loss(outputs, labels, mask, layout)

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss and perplexity."""
        loss = sums["loss"] / sums["count"]
        return {f"{split}_lm_loss": loss, f"{split}_perplexity": math.exp(min(loss, LARGEST_EXPONENT))}

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> Tensors:
        """The first tokens [b, s] of the run's data; random ones where it is not there or of another tokenizer."""
        if (found := _ids_of_data(settings, model, size)) is None:
            vocabulary = model.vocab_size or model.padded_vocab_size
            found = _random_ids(vocabulary, size, min(model.seq_length, _LONGEST_EXAMPLE))
        return (found,)

    def held_out(self, datasets: Datasets, size: int) -> Tensors:
        """Sequences [b, s] of the validation set, else of the training set.

        Random ones where the run has neither, as at its end without evaluation.
        """
        dataset = datasets.valid if datasets.valid is not None and len(datasets.valid) else datasets.train
        if dataset is None:
            return (_random_ids(self._rows or 1, size, self._length),)
        rows = [torch.as_tensor(dataset[i])[:-1] for i in range(min(size, len(dataset)))]
        ids = torch.stack(rows).long()
        self._loss.check_ids(ids, UserError)
        return (ids,)


def _ids_of_data(settings: Mapping[str, Any], model: ModelConfig, size: int) -> Tensor | None:
    prefix = settings.get("data_path") or (settings.get("train_data_paths") or [None])[0]
    if prefix is None or not Path(f"{prefix}.idx").is_file():
        return None
    length = min(model.seq_length, _LONGEST_EXAMPLE)
    ids: list[int] = []
    dataset = IndexedDataset(prefix)
    for number in range(len(dataset)):
        ids.extend(dataset.get(number, length=size * length - len(ids)).tolist())
        if len(ids) == size * length:
            break
    rows = len(ids) // length
    found = torch.tensor(ids[: rows * length]).view(rows, length)
    return found if rows and int(found.max()) < (model.padded_vocab_size or 0) else None


def _random_ids(vocabulary: int, size: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
