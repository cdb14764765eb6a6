"""Configuration: YAML files in, one validated and frozen RunConfig out. Imports no torch."""

from megatron.config.explain import explain
from megatron.config.load import Resolved, load_config, resolve_config
from megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TokenizerConfig,
    TrainingConfig,
)

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
