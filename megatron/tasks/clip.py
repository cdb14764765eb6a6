"""Images and texts that belong together: contrastive learning of two towers (CLIP: Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelSection
from megatron.data.datasets import Datasets
from megatron.data.image_batch import ImageShape, TextShape, image_texts_of
from megatron.data.pillow import pillow_needed
from megatron.errors import RankError
from megatron.model.build import PAIRS, Architecture
from megatron.mpu.layout import Layout
from megatron.ops.contrastive import contrastive_logits, contrastive_loss, loss_of_logits
from megatron.tasks.normalise import Normalise
from megatron.tasks.task import Task, Tensors
from megatron.tasks.texts import Texts
from megatron.tokenizer import build_tokenizer


class ClipTask(Task[dict[str, Tensor]]):
    """A batch is images, uint8 [b, c, H, W], ids [b, s] of a caption of each, and `end` [b], where their last id is.

    Every image of an update is compared with every caption of it. An evaluation does the same with held-out updates;
    its image_to_text is the share of images whose own caption is the likest one of the update, text_to_image the same
    of captions.

    Raises: UserError, when it is made, for a tokenizer that is not there or does not fit the model.
    """

    name: ClassVar[str] = "clip"
    section: ClassVar[type[ModelSection]] = ClipConfig
    architecture: ClassVar[Architecture] = PAIRS
    unit: ClassVar[str] = "pairs"
    measures: ClassVar[tuple[str, ...]] = ("loss", "image_to_text", "text_to_image", "count")
    console: ClassVar[Mapping[str, str]] = {
        "loss": "loss {:.4f}", "valid_loss": "validation loss {:.4f}", "test_loss": "test loss {:.4f}",
        **{f"{split}_{measure}": f"{measure.replace('_', ' ')} {{:.4f}}"
           for split in ("valid", "test") for measure in ("image_to_text", "text_to_image")},
    }  # fmt: skip
    joint: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        tokenizer = build_tokenizer(config.tokenizer)
        super().__init__(config.with_vocabulary(tokenizer.vocab_size))
        model, images = self.config.model, self.config.images
        assert isinstance(model, ClipConfig) and isinstance(images, ImagesConfig)
        self.texts = Texts(tokenizer, model.text.seq_length)
        self.normalise = Normalise(images, model.in_channels)
        self._images, self._rows = images, model.padded_vocab_size or 0
        self._image_shape = ImageShape(model.in_channels, model.image_size)
        self.text_shape = TextShape(self.texts.length, self.texts.eod_id)

    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        """Training images as often as they are needed, augmented, each time with one of their captions; every image of
        the others once, with its first caption."""
        with pillow_needed():
            from megatron.data.image_text import build_image_text_datasets
        shapes = self._image_shape, self.text_shape
        data, seed = self.config.data, self.config.training.seed
        return build_image_text_datasets(data, self._images, *shapes, seed, samples)

    def collate(self, samples: list[Any], size: int) -> dict[str, Tensor]:
        """{images, ids, end} of `size` samples; see the class."""
        return image_texts_of(samples, size, self._image_shape, self.text_shape)

    def check(self, batch: dict[str, Tensor]) -> None:
        """Raise a RankError for images of another shape and token ids that the embedding has no rows for."""
        shape, images, ids = self._image_shape, batch["images"], batch["ids"]
        expected = (shape.channels, shape.size, shape.size)
        if images.shape[1:] != expected:
            raise RankError(
                f"data_path: an image of the data is {list(images.shape[1:])}, the model takes {list(expected)} "
                "(in_channels, image_size, image_size)"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._rows:
            wrong = ids[(ids < 0) | (ids >= self._rows)][0].item()
            raise RankError(
                f"data_path: the captions have token id {wrong}, the embedding {self._rows} rows (padded_vocab_size); "
                "were they prepared with the tokenizer of vocab_file?"
            )

    def split(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensors, Tensors]:
        """([images [b, c, H, W], normalised, fp32; ids [b, s], NO_TOKEN behind the last], [])."""
        ids, ends = (batch[name].to(device, non_blocking=True) for name in ("ids", "end"))
        return (self.normalise(batch["images"], device), self.texts.of_ids(ids, ends)), ()

    def loss(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Contrastive loss in nats of this rank's pairs among those of all data ranks, the mean of both directions.

        outputs: PairFeatures.
        """
        image, text, scale = outputs
        return contrastive_loss(image, text, scale, layout.data)

    def joined(self, outputs: Sequence[Tensors], targets: Sequence[Tensors]) -> tuple[Any, Tensors]:
        """The features of all micro-batches, and the factor on their products, which is that of each."""
        images, texts, scales = zip(*outputs, strict=True)
        return (torch.cat(images), torch.cat(texts), scales[0]), ()

    def measure(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Sums over this rank's pairs; see the class."""
        image, text, scale = outputs
        of_images, of_texts, partners = contrastive_logits(image, text, scale, layout.data)
        hits = ((logits.argmax(1) == partners).sum() for logits in (of_images, of_texts))
        count = partners.new_tensor(len(partners))
        return torch.stack([count * loss_of_logits(of_images, of_texts, partners), *hits, count])

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the pairs."""
        return {f"{split}_{name}": sums[name] / sums["count"] for name in self.measures if name != "count"}

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> Tensors:
        """Images of noise, and random texts of the whole length."""
        random = torch.Generator().manual_seed(0)
        images = torch.randn((size, model.in_channels, model.image_size, model.image_size), generator=random)
        vocabulary = model.vocab_size or model.padded_vocab_size
        return images, torch.randint(vocabulary, (size, model.text.seq_length), generator=random)

    def held_out(self, datasets: Datasets, size: int) -> Tensors:
        """Pairs of the validation set, else of the training set; noise where the run has neither."""
        dataset = datasets.valid if datasets.valid is not None and len(datasets.valid) else datasets.train
        if dataset is None:
            return self.example_inputs(self.config.model, {}, size)
        batch = self.collate([dataset[i] for i in range(min(size, len(dataset)))], min(size, len(dataset)))
        self.check(batch)
        return self.split(batch, torch.device("cpu"))[0]
