"""Configuration: YAML files in, one validated and frozen RunConfig out. Imports no torch."""

from megatron.config.explain import explain
from megatron.config.load import Resolved, load_config, resolve_config
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.launch import LaunchConfig
from megatron.config.sections.logging import LoggingConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.precision import PrecisionConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.config.sections.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LaunchConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizationConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "Resolved",
    "RunConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "explain",
    "load_config",
    "resolve_config",
]
