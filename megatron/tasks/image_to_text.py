"""Image to text: what is said of an image, by itself or in answer to a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelSection
from megatron.data.datasets import Datasets
from megatron.data.image_batch import ImageShape, TextShape, image_texts_of
from megatron.data.pillow import pillow_needed
from megatron.errors import ConfigError, RankError, UserError
from megatron.model.build import IMAGE_TO_TEXT, Architecture
from megatron.mpu.layout import Layout
from megatron.tasks.language import LARGEST_EXPONENT
from megatron.tasks.normalise import Normalise
from megatron.tasks.task import Task, Tensors
from megatron.tasks.token_loss import TokenLoss
from megatron.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from megatron.data.image_text import ImageTextDataset


class ImageToTextTask(Task[dict[str, Tensor]]):
    """A batch is images, uint8 [b, c, H, W], ids [b, s] and loss_mask [b, s]: which of the ids are learned.

    The model reads the image, the end-of-document id, and all ids but the last; so a text begins as it does for a
    language model. The loss is the mean over the samples of a sample's mean over its learned ids: it does not depend
    on how samples are dealt to ranks. An evaluation reads every caption of its set once, and counts ids alike.

    Raises: UserError, when it is made, for a tokenizer that is not there or does not fit the model.
    """

    name: ClassVar[str] = "image_to_text"
    section: ClassVar[type[ModelSection]] = ImageTextConfig
    architecture: ClassVar[Architecture] = IMAGE_TO_TEXT
    unit: ClassVar[str] = "pairs"
    loss_name: ClassVar[str] = "lm_loss"
    console: ClassVar[Mapping[str, str]] = {
        "lm_loss": "loss {:.4f}", "valid_lm_loss": "validation loss {:.4f}", "valid_perplexity": "perplexity {:.2f}",
        "test_lm_loss": "test loss {:.4f}", "test_perplexity": "perplexity {:.2f}",
    }  # fmt: skip
    evaluates_every_sample: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        tokenizer = build_tokenizer(config.tokenizer)
        super().__init__(config.with_vocabulary(tokenizer.vocab_size))
        model, images, package = self.config.model, config.images, config.training.cross_entropy
        assert isinstance(model, ImageTextConfig) and isinstance(images, ImagesConfig)
        if package in ("liger", "quack"):
            raise ConfigError("cross_entropy", f"{package} cannot weigh tokens", "use auto", beside=["task"])
        tower, self._images = model.image_tower, images
        self._shape = ImageShape(tower.in_channels, tower.image_size)
        self._text = TextShape(model.seq_length, tokenizer.eod_id)
        self._normalise = Normalise(images, tower.in_channels)
        self._loss = TokenLoss(package, model.padded_vocab_size or 0)

    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        """Training images as often as they are needed, augmented, with a caption each; every caption of the others."""
        with pillow_needed():
            from megatron.data.image_text import build_image_text_datasets
        config = self.config
        return build_image_text_datasets(
            config.data, self._images, self._shape, self._text, config.training.seed, samples, every_caption=True
        )

    def evaluated_sets(self) -> dict[str, ImageTextDataset]:
        """The sets of eval_data_paths, else that of eval_split, by name, each image once. Raises UserError."""
        with pillow_needed():
            from megatron.data.evaluated_images import evaluated_parts
            from megatron.data.image_text import CaptionedImages, ImageTextDataset
        parts = evaluated_parts(self.config.data, self._shape, self.config.evaluation)
        return {
            name: ImageTextDataset([CaptionedImages(part)], self._shape, self._text, self._images)
            for name, part in parts.items()
        }

    @property
    def blank(self) -> Tensor:
        """A black image, uint8 [c, H, W]."""
        return self._shape.blank()

    def collate(self, samples: list[Any], size: int) -> dict[str, Tensor]:
        """{images, ids, end, loss_mask} of `size` samples; see megatron.data.image_text."""
        return image_texts_of(samples, size, self._shape, self._text)

    def check(self, batch: dict[str, Tensor]) -> None:
        """Raise a RankError for images of another shape and token ids that the embedding has no row for."""
        self._check(batch, RankError)

    def _check(self, batch: dict[str, Tensor], error: type[UserError]) -> None:
        expected = tuple(self._shape.blank().shape)
        if batch["images"].shape[1:] != expected:
            raise error(f"data_path: an image of the data is {list(batch['images'].shape[1:])}, not {list(expected)}")
        self._loss.check_ids(batch["ids"], error)

    def split(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensors, Tensors]:
        """([images [b, c, H, W], normalised, fp32; ids before each [b, s]], [ids [b, s], loss_mask [b, s]])."""
        ids, mask = (batch[name].to(device, non_blocking=True) for name in ("ids", "loss_mask"))
        start = ids.new_full((len(ids), 1), self._text.eod_id)
        return (self._normalise(batch["images"], device), torch.cat([start, ids[:, :-1]], dim=1)), (ids, mask)

    def loss(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Mean over the samples, in nats a token.

        outputs: this tensor rank's share of the logits [b, s, V_pad], or what they are computed from.
        """
        ids, mask = targets
        return self._loss(outputs, ids, mask / mask.sum(1, keepdim=True).clamp(min=1), layout)

    def measure(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Sums over the learned ids; what fills up a batch has none."""
        ids, mask = targets
        count = mask.sum()
        return torch.stack([self._loss(outputs, ids, mask, layout) * count, count])

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss and perplexity, a token."""
        loss = sums["loss"] / max(1.0, sums["count"])
        return {f"{split}_lm_loss": loss, f"{split}_perplexity": math.exp(min(loss, LARGEST_EXPONENT))}

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> Tensors:
        """Images of noise and random ids."""
        random, tower = torch.Generator().manual_seed(0), model.image_tower
        images = torch.randn(size, tower.in_channels, tower.image_size, tower.image_size, generator=random)
        vocabulary = model.vocab_size or model.padded_vocab_size
        return images, torch.randint(vocabulary, (size, model.seq_length), generator=random)

    def held_out(self, datasets: Datasets, size: int) -> Tensors:
        """Images and ids of the validation set, else of the training set; noise where the run has neither."""
        dataset = datasets.valid if datasets.valid is not None and len(datasets.valid) else datasets.train
        if dataset is None:
            return self.example_inputs(self.config.model, {}, size)
        count = min(size, len(dataset))
        batch = self.collate([dataset[i] for i in range(count)], count)
        self._check(batch, UserError)
        return self.split(batch, torch.device("cpu"))[0]
