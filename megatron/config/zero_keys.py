"""The keys of DeepSpeed 0.19.8's zero_optimization table, all of which are handed to it, and what it takes for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.errors import ConfigError

_SWITCHES = (
    "allgather_partitions", "allgather_sequential", "compute_grad_norm", "contiguous_gradients", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
    "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_scatter", "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip
_NUMBERS = (
    "allgather_bucket_size", "max_live_parameters", "max_reuse_distance", "model_persistence_threshold",
    "param_persistence_threshold", "prefetch_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size", "zero_hpz_partition_size",
)  # fmt: skip
_TABLES = ("leaf_module", "offload_optimizer", "offload_param")

ZERO_KEYS = tuple(sorted((*_SWITCHES, *_NUMBERS, *_TABLES, "stage")))


def type_mistakes(values: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What DeepSpeed would not take; other keys are none of this."""
    for key, value in values.items():
        if value is None:
            continue
        is_whole = value.is_integer() if isinstance(value, float) else type(value) is int
        if key in _SWITCHES and not isinstance(value, bool):
            yield ConfigError(key, "expected true or false", value=value)
        elif key in (*_NUMBERS, "stage") and not is_whole:
            yield ConfigError(key, "expected a whole number", value=value)
        elif key in _NUMBERS and (value < 0 or value > 2**63):
            yield ConfigError(key, "must be at least 0, and below 2^63", value=value)
        elif key in _TABLES and not isinstance(value, dict):
            yield ConfigError(key, "expected a table {key: value}", value=value)
