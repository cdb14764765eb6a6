"""What an engine is told of a run's configuration."""

from __future__ import annotations

from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.parallel import ZeroConfig
from megatron.config.sections.scaling import ScalingConfig
from megatron.config.update_size import UpdateSize
from megatron.mpu.device import uses_gpu


class EngineSettings:
    """The part of a configuration that the engine goes by, for updates of this size."""

    model: ModelSection
    """The model section, of the stage of growth that is trained."""
    dtype: str
    """`fp32`, `bf16` or `fp16`."""
    zero_stage: int
    """ZeRO stage."""
    deepspeed: dict[str, Any]
    """DeepSpeed's JSON configuration."""
    optimization: OptimizationConfig
    """Optimizer, decay, clipping and learning-rate schedule."""
    scaling: ScalingConfig
    """Growth: what is frozen, and factors on learning rates."""
    pattention_backend: str
    """Implementation of Pattention."""
    recompute_scores: bool
    """Keep a Pattention's input instead of its scores."""
    attention_backend: str
    """Implementation of attention."""
    defer_logits: bool
    """The loss computes the head's outputs."""
    checkpoint_layers: int
    """Blocks recomputed together; 0 keeps all activations."""
    compile_blocks: bool
    """Compile each block with torch.compile."""
    allow_nonfinite_loss: bool
    """Go on after a loss or gradient norm that is not finite."""
    ema_decay: float | None
    """Decay of the average of the weights; None: none is kept."""
    use_ema: bool
    """Evaluate the average."""

    def __init__(self, config: RunConfig, update: UpdateSize) -> None:
        training = config.training
        self.model, self.optimization, self.scaling = config.model, config.optimization, config.scaling
        self.dtype, self.zero_stage = config.precision.dtype, config.parallel.zero_optimization.stage
        self.deepspeed = _deepspeed_config(config, update)
        self.pattention_backend, self.attention_backend = training.pattention_backend, training.attention_backend
        self.recompute_scores = training.recompute_scores
        self.defer_logits = training.cross_entropy != "eager"
        self.checkpoint_layers = training.checkpoint_num_layers if training.checkpoint_activations else 0
        self.compile_blocks = training.compile == "blocks"
        self.allow_nonfinite_loss = training.allow_nonfinite_loss
        self.ema_decay, self.use_ema = training.ema_decay, config.evaluation.use_ema

    @property
    def growths(self) -> int:
        """How many growths the model has behind it."""
        segments = self.model.token_segments
        return len(next(iter(segments.values()))[0]) - 1 if segments else 0


def _zero_config(zero: ZeroConfig) -> dict[str, Any]:
    table = zero.model_dump(exclude_none=True)
    if table.pop("cpu_offload", False):
        table.setdefault("offload_optimizer", {"device": "cpu"})
    for offload in (table.get("offload_optimizer"), table.get("offload_param")):
        if isinstance(offload, dict) and offload.get("device") == "cpu":
            offload.setdefault("pin_memory", uses_gpu())  # else every copy to the GPU goes through a second one
    return table


def _deepspeed_config(config: RunConfig, update: UpdateSize) -> dict[str, Any]:
    zero = config.parallel.zero_optimization
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": update.micro,
        "gradient_accumulation_steps": update.steps,
        # Always set: DeepSpeed's own default is 1.0. Without ZeRO in fp32 Engine clips, to know the norm.
        "gradient_clipping": config.optimization.gradient_clipping if zero.stage else 0.0,
        "zero_optimization": _zero_config(zero),
        "zero_allow_untested_optimizer": True,
        # With offload_optimizer torch's fused AdamW runs on the CPU too; optimizer.type CPU_Adam asks for DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown,
    }
    if config.parallel.pipeline_stages > 1:
        # Tensor ranks send different activations between stages: DeepSpeed must not cut them up again.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.precision.dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if config.precision.dtype == "fp16":
        result["fp16"] = {**config.precision.fp16.model_dump(exclude={"fp16", "type"}), "enabled": True}
    return result
