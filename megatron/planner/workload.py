"""What a prediction reads of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.optimization import OptimizerSpec
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.update_size import UpdateSize
from megatron.errors import ConfigError, UserError
from megatron.mpu import Layout
from megatron.ops.pattention_backends import planned_backend
from megatron.planner.choice import Choice
from megatron.planner.networks import NETWORKS, Network, networks
from megatron.tasks import task_of


@dataclass(frozen=True)
class Workload:
    """What is trained, and how the configuration asks for it; a `Choice` is one of the ways to run it."""

    model: Any
    """The model's section; of one with a vocabulary, padded_vocab_size has to be known for bytes and FLOPs."""
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
    part: Network | None = None
    """The network that this is the workload of, whose section is `model`; see `parts`."""

    @classmethod
    def of(cls, config: RunConfig) -> Workload:
        """The workload of a configuration's run, before any growth. Raises UserError for what cannot be planned."""
        model, images = config.model, config.images
        if type(model) not in NETWORKS:
            known = ", ".join(section.task for section in NETWORKS)
            raise ConfigError("task", f"plans are made for {known}, and not for what learns '{model.task}'")
        in_pairs = isinstance(images, ImagesConfig) and images.mixes
        optimizer, dtype = config.optimization.optimizer, config.precision.dtype
        return cls(model, dtype, optimizer, config.parallel, config.training, in_pairs)

    def parts(self) -> list[Workload]:
        """The workload of each network of the model, which process a sample one after the other."""
        if self.part is not None:
            return [self]
        return [replace(self, model=network.model, part=network) for network in networks(self.model)]

    @property
    def network(self) -> Network:
        """The network that this is the workload of, or the only one of the model."""
        if self.part is not None:
            return self.part
        (network,) = networks(self.model)
        return network

    @property
    def unit(self) -> str:
        """What rates count: tokens, or samples by their name."""
        return task_of(self.model).unit

    @property
    def tokens_per_unit(self) -> int:
        """Tokens of one of these."""
        tokens: int = 1 if self.unit == "tokens" else self.model.tokens_per_sample()
        return tokens

    @property
    def is_joint(self) -> bool:
        """Is the loss of all samples of an update together, whatever micro-batches it is divided into?"""
        return task_of(self.model).joint

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
        return choice.micro_batch * self.network.tokens

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
