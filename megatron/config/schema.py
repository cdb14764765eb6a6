"""The whole of a configuration: RunConfig, whose sections hold the keys, each with its type, default and meaning.

YAML files are flat (GPT-NeoX style): a key names a field, and the field's name is unique over all
sections, so `hidden_size: 768` finds `RunConfig.model.hidden_size`. The sections are the single source of
the reference page docs/configuration.md and of `--help`.
"""

from __future__ import annotations

from typing import Any

from pydantic import SerializeAsAny, ValidationInfo, field_validator

from megatron.config.sections.base import Section
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.launch import LaunchConfig
from megatron.config.sections.logging import LoggingConfig
from megatron.config.sections.model import (
    MODEL_SECTIONS,
    ModelConfig,
    ModelSection,
    VocabularySection,
    language_section,
    model_section,
)
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.precision import PrecisionConfig
from megatron.config.sections.scaling import ScalingConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.sections.vision import ImageConfig
from megatron.config.update_size import UpdateSize
from megatron.errors import UserError

SECTIONS = (
    "model", "optimization", "precision", "parallel", "scaling", "training", "data", "images", "tokenizer",
    "checkpoint", "logging", "launch", "evaluation", "generation",
)  # fmt: skip


MODEL_SECTIONS |= {section.task: section for section in (ImageConfig, ClipConfig, ImageTextConfig)}


class RunConfig(Section):
    """One run: everything that the YAML files and the command line say, validated and frozen."""

    model: SerializeAsAny[ModelSection]
    optimization: OptimizationConfig = OptimizationConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    scaling: ScalingConfig = ScalingConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    images: SerializeAsAny[Section] = Section()
    """ImagesConfig where the model learns from images, else empty."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _of_its_task(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return model_section(value.get("task", ModelConfig.task))(**{k: v for k, v in value.items() if k != "task"})

    @field_validator("images", mode="before")
    @classmethod
    def _of_its_samples(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict) or "model" not in info.data:
            return value
        return info.data["model"].samples(**value)

    @property
    def last_iteration(self) -> int:
        """Iteration after which a run is done. Raises UserError where train_iters is not given."""
        if self.training.train_iters is None:
            raise UserError("train_iters: missing; give the number of updates of the run")
        return self.training.train_iters

    @property
    def lr_decay_iters(self) -> int:
        """Iterations of the learning-rate decay: lr_decay_iters, else train_iters."""
        return self.optimization.lr_decay_iters or self.last_iteration

    def gpu_request(self) -> tuple[str | None, list[str]]:
        """What asks for a GPU, as `key: value`, and the overrides with which the run would train on a CPU.

        fp16 and packages of kernels have no CPU form. bf16 has a slow one, which distributed_backend: gloo asks for.
        """
        found = []
        dtype, backend = self.precision.dtype, self.launch.distributed_backend
        if self.training.attention_backend == "flash_attn":
            found.append(("attention_backend: flash_attn", "attention_backend=sdpa"))
        if self.training.cross_entropy in ("liger", "quack"):
            found.append((f"cross_entropy: {self.training.cross_entropy}", "cross_entropy=auto"))
        if dtype == "fp16":
            found.append(("precision: fp16", "precision=bf16"))
        if backend == "nccl" or (dtype != "fp32" and backend is None):
            asking = "precision: bf16" if backend is None else "distributed_backend: nccl"
            found.append((asking, "distributed_backend=gloo"))
        return (found[0][0] if found else None), [override for _, override in found]

    def update_size(self, data_ranks: int) -> UpdateSize:
        """What an update of so many data ranks reads; raises UserError when the batch keys do not fit each other."""
        return self.training.update_size(data_ranks, self.model.tokens_per_sample())

    @property
    def language(self) -> ModelConfig:
        """The model section of a language model. Raises UserError where the run learns something else."""
        return language_section(self.model)

    def with_vocabulary(self, size: int) -> RunConfig:
        """A new frozen config whose model fits a tokenizer of `size` ids. Raises UserError for one that reads none."""
        model = self.model if isinstance(self.model, VocabularySection) else self.language
        return self.replaced(model=model.with_vocabulary(size))

    def flat(self) -> dict[str, Any]:
        """All keys in the flat form of the YAML files, ready to be dumped and loaded again."""
        task = {} if self.model.task == ModelConfig.task else {"task": self.model.task}
        sections = (getattr(self, name).model_dump(mode="json") for name in SECTIONS)
        return task | {key: value for section in sections for key, value in section.items()}
