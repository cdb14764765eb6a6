"""What a prediction reads of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.optimization import OptimizerSpec
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.sections.vision import ImageConfig
from megatron.config.update_size import UpdateSize
from megatron.errors import ConfigError, UserError
from megatron.mpu import Layout
from megatron.ops.pattention_backends import planned_backend
from megatron.planner.choice import Choice


@dataclass(frozen=True)
class Workload:
    """What is trained, and how the configuration asks for it; a `Choice` is one of the ways to run it."""

    model: ModelConfig | ImageConfig
    """Of a language model, padded_vocab_size has to be known for bytes and FLOPs."""
    dtype: str
    """Precision of parameters and activations: fp32, bf16 or fp16."""
    optimizer: OptimizerSpec
    """Its type and arguments."""
    parallel: ParallelConfig
    """The axes that are asked for, and the ZeRO settings."""
    training: TrainingConfig
    """Batch keys, recomputation and the Pattention backend that are asked for."""
    in_pairs: bool = False
    """Samples are mixed two by two, so that a micro-batch has an even number."""

    @classmethod
    def of(cls, config: RunConfig) -> Workload:
        """The workload of a configuration's run, before any growth. Raises UserError for what cannot be planned."""
        model, images = config.model, config.images
        if not isinstance(model, (ModelConfig, ImageConfig)):
            reason = f"plans are made for language models and image classifiers, and not for what learns '{model.task}'"
            raise ConfigError("task", reason)
        in_pairs = isinstance(images, ImagesConfig) and images.mixes
        optimizer, dtype = config.optimization.optimizer, config.precision.dtype
        return cls(model, dtype, optimizer, config.parallel, config.training, in_pairs)

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter or activation entry (e in formulas)."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def backend(self) -> str:
        """The Pattention backend on a GPU."""
        return planned_backend(self.training.pattention_backend)

    @property
    def zero_keys(self) -> dict[str, Any]:
        """The keys of zero_optimization that are handed to DeepSpeed as they are."""
        return self.parallel.zero_optimization.model_extra or {}

    def tokens(self, choice: Choice) -> int:
        """Tokens of a micro-batch on one data rank (T in formulas)."""
        return choice.micro_batch * self.model.tokens_per_sample()

    def update_size(self, data_ranks: int) -> UpdateSize:
        """What an update of so many data ranks reads; UserError when the batch keys do not fit each other."""
        return self.training.update_size(data_ranks, self.model.tokens_per_sample())

    def samples(self, gpus: int) -> int:
        """Samples of an update: train_batch_size, else what the configured layout would take on `gpus` GPUs."""
        if self.training.train_batch_size is not None:
            return self.training.train_batch_size
        ranks_of_a_copy = self.parallel.pipeline_stages * self.parallel.model_parallel_size
        return self.update_size(1).samples * max(1, gpus // ranks_of_a_copy)

    def configured(self, gpus: int) -> Choice:
        """What the configuration asks for on `gpus` processes; UserError when it does not fit that number."""
        parallel = self.parallel
        try:
            layout = Layout.for_world(0, gpus, parallel.pipeline_stages, parallel.model_parallel_size)
        except ValueError as error:
            raise UserError(str(error)) from None
        update = self.update_size(layout.data.size)
        return Choice(
            layout.tensor.size,
            layout.pipeline.size,
            layout.data.size,
            parallel.sequence_parallel and layout.tensor.size > 1,
            parallel.zero_optimization.stage,
            update.micro,
            update.steps,
            self.training.checkpoint_activations,
        )
