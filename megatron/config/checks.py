"""What is wrong between the keys of several sections, or for one command; each as `key: what is wrong, what to do`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.scaling import GrowthStage, ScalingConfig
from megatron.errors import UserError, UserErrors


def find_parallel_mistakes(config: RunConfig) -> Iterator[str]:
    """Axes that the model cannot be cut along, whatever the number of processes."""
    parallel = config.parallel
    tensor, zero_stage = parallel.model_parallel_size, parallel.zero_optimization.stage
    return axis_mistakes(config.model, tensor, parallel.pipeline_stages, parallel.sequence_parallel, zero_stage)


def axis_mistakes(
    model: ModelSection, tensor: int, pipeline: int, sequence_parallel: bool, zero_stage: int
) -> Iterator[str]:
    """Why a model cannot be cut into `pipeline` stages of `tensor` ranks; the same whatever the number of processes."""
    yield from _tensor_axis(model, tensor, sequence_parallel)
    if pipeline > model.num_layers:
        yield f"pipe_parallel_size: {pipeline} stages for num_layers {model.num_layers}; each needs a block"
    if pipeline > 1 and zero_stage > 1:
        yield (
            f"zero_optimization.stage: DeepSpeed has no stage {zero_stage} beside pipe_parallel_size {pipeline}; "
            "use stage 0 or 1, or no pipeline"
        )


def _tensor_axis(model: ModelSection, ranks: int, sequence_parallel: bool) -> Iterator[str]:
    if ranks == 1:
        return
    if model.num_attention_heads % ranks:
        yield (
            f"model_parallel_size: {ranks} ranks cannot share num_attention_heads {model.num_attention_heads} evenly; "
            "choose a divisor of it"
        )
    for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
        tokens = getattr(model, key)
        if tokens is not None and tokens < ranks:
            yield f"{key}: {tokens} parameter tokens for model_parallel_size {ranks}; each rank needs one"
    if sequence_parallel and model.tokens_per_sample() % ranks:
        yield (
            f"sequence_parallel: seq_length {model.tokens_per_sample()} is no multiple of model_parallel_size {ranks}; "
            "change one of them or set sequence_parallel: false"
        )


def check_trainable(config: RunConfig) -> None:
    """Refuse what cannot be trained (evaluation and generation do not mind); raises UserError with all mistakes."""
    found = [*find_training_mistakes(config)]
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserErrors(found)


def find_training_mistakes(config: RunConfig) -> Iterator[str]:
    """What a run cannot be trained without, or with."""
    training, data = config.training, config.data
    missing = {
        "train_iters": training.train_iters,
        "train_micro_batch_size_per_gpu": training.train_micro_batch_size_per_gpu or training.train_batch_size,
        "data_path": data.data_path or data.train_data_paths,
    }
    names = [name for name, value in missing.items() if value is None]
    if names:
        yield f"training needs {', '.join(names)}: add to a YAML file, or give --set {names[0]}=VALUE"
    yield from _starts(config)
    yield from find_setting_mistakes(config)


def broken_promises(config: RunConfig, missing: str) -> Iterator[str]:
    """What promises that a run starts from a checkpoint; `missing` says why there is none."""
    options = config.checkpoint
    if options.pretrain_partial_init is None:
        for key in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(options, key):
                yield f"{key}: true is for a start from a checkpoint, and {missing}; name one, or set {key}: false"
    if options.iteration is not None:
        yield f"iteration: {options.iteration} is for a start from a checkpoint, and {missing}; name one, or remove it"


def _starts(config: RunConfig) -> Iterator[str]:
    if config.checkpoint.load is None:
        yield from broken_promises(config, "load is not given")
    if config.scaling.partial_init_policy == "continue" and config.checkpoint.pretrain_partial_init is None:
        yield (
            "partial_init_policy: continue goes on from a smaller model, and pretrain_partial_init is not given; name "
            "one, or remove it"
        )


def find_setting_mistakes(config: RunConfig) -> Iterator[str]:
    """What a run cannot be trained with; nothing need be given for this."""
    peak, floor = config.optimization.optimizer.params.lr, config.optimization.min_lr
    if peak < floor:
        yield f"min_lr: {floor:g} is above the learning rate lr, {peak:g}; lower it"
    yield from _zero(config)
    yield from _muon(config)
    yield from _growth(config)


def _growth(config: RunConfig) -> Iterator[str]:
    scaling, options = config.scaling, config.checkpoint
    if scaling.growth and options.save is None:
        yield "growth: a run that grows goes through a checkpoint; give `save` (and the same folder as load)"
    if scaling.growth and options.no_save_optim:
        yield "no_save_optim: a run that grows goes on from its checkpoint; set no_save_optim: false"
    stages: list[ScalingConfig | GrowthStage] = [scaling, *scaling.growth]
    scaled = any(stage.old_tokens_lr_scale != 1 or stage.new_tokens_lr_scale != 1 for stage in stages)
    if scaled and config.optimization.optimizer.type == "Muon":
        yield "new_tokens_lr_scale: Muon has no learning rates by age of tokens; use Adam"


def _zero(config: RunConfig) -> Iterator[str]:
    zero = config.parallel.zero_optimization
    extra: dict[str, Any] = zero.model_extra or {}
    for key in ("offload_optimizer", "offload_param"):
        device = extra[key].get("device", "cpu") if isinstance(extra.get(key), dict) else "cpu"
        if device not in ("cpu", "none"):
            yield f"zero_optimization.{key}.device: {device} cannot be checkpointed here; use cpu or none"
    if extra.get("round_robin_gradients"):
        yield (
            "zero_optimization.round_robin_gradients: true orders DeepSpeed's fp32 values in a way that cannot be "
            "checkpointed here; set it to false"
        )
    if zero.stage == 3 and (extra.get("zero_hpz_partition_size") or 1) > 1:
        yield (
            f"zero_optimization.zero_hpz_partition_size: {extra['zero_hpz_partition_size']}: DeepSpeed makes a model's "
            "secondary partitions once, and here a model is partitioned part by part; set 1"
        )


def _muon(config: RunConfig) -> Iterator[str]:
    zero, options = config.parallel.zero_optimization, config.optimization
    if options.optimizer.type != "Muon":
        return
    if config.parallel.model_parallel_size > 1:
        yield (
            f"optimizer.type: Muon orthogonalises whole matrices, model_parallel_size "
            f"{config.parallel.model_parallel_size} splits them; use Adam"
        )
    if zero.stage == 3:
        yield "zero_optimization.stage: DeepSpeed's Muon cannot run at stage 3; use stage 0, 1 or 2"
    elif zero.stage and options.gradient_clipping:
        yield (
            f"gradient_clipping: {options.gradient_clipping}: at ZeRO 1 and 2 DeepSpeed clips Muon's finished update "
            "instead of the gradient; set gradient_clipping: 0 (Muon does not depend on the gradient's size)"
        )
