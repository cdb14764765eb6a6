"""What DeepSpeed is told."""

from __future__ import annotations

from typing import Any

from megatron.config.schema import RunConfig
from megatron.mpu import Layout
from megatron.mpu.device import uses_gpu


def deepspeed_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The JSON configuration DeepSpeed is given."""
    update = config.update_size(layout.data.size)
    zero = config.parallel.zero_optimization.model_dump(exclude_none=True)
    if zero.pop("cpu_offload", False):
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    for table in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if isinstance(table, dict) and table.get("device") == "cpu":
            table.setdefault("pin_memory", uses_gpu())  # else every copy to the GPU goes through a second one
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": update.micro,
        "gradient_accumulation_steps": update.steps,
        # Always set: DeepSpeed's own default is 1.0. Without ZeRO in fp32 Engine clips, to know the norm.
        "gradient_clipping": config.optimization.gradient_clipping if zero["stage"] else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload_optimizer torch's fused AdamW runs on the CPU too; optimizer.type CPU_Adam asks for DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown,
    }
    if layout.pipeline.size > 1:
        # Tensor ranks send different activations between stages: DeepSpeed must not cut them up again.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.precision.dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if config.precision.dtype == "fp16":
        result["fp16"] = {**config.precision.fp16.model_dump(exclude={"fp16", "type"}), "enabled": True}
    return result
