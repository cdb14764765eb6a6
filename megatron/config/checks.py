"""What is wrong between the keys of several sections, or for one command."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.base import Section
from megatron.config.sections.checkpoint import TOWER_KEYS, CheckpointConfig
from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.evaluation import OF_CLASSES, OF_IMAGES, OF_LANGUAGE, OF_PAIRS, OF_TEXTS, EvaluationConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.mup import MupKeys
from megatron.config.sections.optimization import ADAM_FAMILY, OptimizationConfig
from megatron.config.sections.parallel import ParallelConfig, ZeroConfig
from megatron.config.sections.scaling import NewTokensWarmup, ScalingConfig, ScheduledGrowth
from megatron.config.sections.training import TrainingConfig
from megatron.config.sections.vision import ImageConfig
from megatron.errors import ConfigError


def find_parallel_mistakes(model: ModelSection, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Axes that the model cannot be cut along, whatever the number of processes."""
    tensor, zero_stage = parallel.model_parallel_size, parallel.zero_optimization.stage
    return axis_mistakes(model, tensor, parallel.pipeline_stages, parallel.sequence_parallel, zero_stage)


def axis_mistakes(
    model: ModelSection, tensor: int, pipeline: int, sequence_parallel: bool, zero_stage: int
) -> Iterator[ConfigError]:
    """Why a model cannot be cut into `pipeline` stages of `tensor` ranks; the same whatever the number of processes."""
    yield from _tensor_axis(model, tensor, sequence_parallel)
    if pipeline > 1 and len(model.towers()) > 1:
        reason = f"a model of {len(model.towers())} towers cannot be cut into {pipeline} stages"
        yield ConfigError("pipe_parallel_size", reason, "set it to 1")
    elif pipeline > model.num_layers:
        reason = f"{pipeline} stages for num_layers {model.num_layers}"
        yield ConfigError("pipe_parallel_size", reason, "each needs a block", beside=["num_layers"])
    if pipeline > 1 and zero_stage > 1:
        yield ConfigError(
            "zero_optimization.stage",
            f"DeepSpeed has no stage {zero_stage} beside pipe_parallel_size {pipeline}",
            "use stage 0 or 1, or no pipeline",
            beside=["pipe_parallel_size"],
        )


def _tensor_axis(model: ModelSection, ranks: int, sequence_parallel: bool) -> Iterator[ConfigError]:
    if ranks == 1:
        return
    for tower in model.towers().values():
        heads = tower.spelled("num_attention_heads")
        if tower.num_attention_heads % ranks:
            reason = f"{ranks} ranks cannot share {heads} {tower.num_attention_heads} evenly"
            yield ConfigError("model_parallel_size", reason, "choose a divisor of it", beside=[heads])
        for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
            tokens = getattr(tower, key)
            if tokens is not None and tokens < ranks:
                reason = f"{tokens} parameter tokens for model_parallel_size {ranks}"
                beside = ["model_parallel_size"]
                yield ConfigError(tower.spelled(key), reason, "each rank needs one", beside=beside)
    fault = model.cannot_shard_tokens(ranks) if sequence_parallel else None
    if fault is not None:
        yield fault


def find_training_mistakes(config: RunConfig) -> Iterator[ConfigError]:
    """What a run cannot be trained without, or with; evaluation and generation do not mind."""
    training, data, options = config.training, config.data, config.checkpoint
    needed: dict[str, Any] = {
        "train_iters": training.train_iters,
        "train_micro_batch_size_per_gpu": training.train_micro_batch_size_per_gpu or training.train_batch_size,
    }
    if config.model.needs_data:
        needed["data_path"] = data.data_path or data.train_data_paths
    names = [name for name, value in needed.items() if value is None]
    if names:
        advice = f"add to a YAML file, or give --set {names[0]}=VALUE"
        yield ConfigError("", f"training needs {', '.join(names)}: {advice}", beside=names)
    if options.load is None:
        yield from broken_promises(options, "load is not given")
    if config.scaling.partial_init_policy == "continue" and options.pretrain_partial_init is None:
        reason = "continue goes on from a smaller model, and pretrain_partial_init is not given"
        beside = ["pretrain_partial_init"]
        yield ConfigError("partial_init_policy", reason, "name one, or remove it", beside=beside)
    yield from _towers(config)
    if config.launch.max_restarts:
        yield from _restarting(options)
    yield from find_setting_mistakes(config)


def find_evaluation_mistakes(config: RunConfig) -> Iterator[ConfigError]:
    """What the model of a run is not evaluated by."""
    options, defaults, model = config.evaluation, EvaluationConfig(), config.model
    for keys, fits, kind in (
        (OF_LANGUAGE, model.task == ModelConfig.task, "language models"),
        (OF_IMAGES, model.samples is ImagesConfig, "models of images"),
        (OF_CLASSES, isinstance(model, (ImageConfig, ClipConfig)), "image classifiers"),
        (OF_PAIRS, isinstance(model, ClipConfig), "models of images and texts"),
        (OF_TEXTS, isinstance(model, ModelConfig), "models that make texts"),
    ):
        for key in keys if not fits else ():
            if getattr(options, key) != getattr(defaults, key):
                reason = f"this is for {kind}, and not for what learns '{config.model.task}'"
                yield ConfigError(key, reason, "remove it", beside=["task"])


def _towers(config: RunConfig) -> Iterator[ConfigError]:
    options = config.checkpoint
    for key, prefix in TOWER_KEYS.items():
        if getattr(options, key) is None:
            continue
        if prefix not in config.model.towers():
            reason = f"a model that learns {config.model.task} has no {prefix.rstrip('.')} tower"
            yield ConfigError(key, reason, "remove it; pretrain_partial_init is for whole models")
        elif options.pretrain_partial_init is not None:
            yield ConfigError(key, "pretrain_partial_init is given too", "keep one", beside=["pretrain_partial_init"])


def broken_promises(options: CheckpointConfig, missing: str) -> Iterator[ConfigError]:
    """What promises that a run starts from a checkpoint; `missing` says why there is none."""
    told = f"is for a start from a checkpoint, and {missing}"
    for key in ("finetune", "no_load_optim", "no_load_rng") if options.pretrain_partial_init is None else ():
        if getattr(options, key):
            yield ConfigError(key, f"true {told}", f"name one, or set {key}: false", beside=["load"])
    if options.iteration is not None:
        yield ConfigError("iteration", f"{options.iteration} {told}", "name one, or remove it", beside=["load"])


def find_setting_mistakes(config: RunConfig) -> Iterator[ConfigError]:
    """What a run cannot be trained with; nothing need be given for this."""
    optimization, zero = config.optimization, config.parallel.zero_optimization
    peak, floor = optimization.optimizer.params.lr, optimization.min_lr
    if peak < floor:
        reason = f"{floor:g} is above the learning rate lr, {peak:g}"
        yield ConfigError("min_lr", reason, "lower it", beside=["optimizer.params.lr"])
    yield from _wsd(optimization, optimization.lr_decay_iters or config.training.train_iters)
    yield from _zero(zero.stage, zero.model_extra or {})
    yield from _compiling(config.training, zero.stage)
    if config.logging.profile and not (config.logging.log_dir or config.checkpoint.save):
        yield ConfigError(
            "profile", "there is no folder for what it writes", "give log_dir or save", beside=["log_dir"]
        )
    yield from _loss_package(config.training.cross_entropy, config.parallel.model_parallel_size, config.precision.dtype)
    if optimization.optimizer.type == "Muon":
        yield from _muon(zero, optimization, config.parallel.model_parallel_size)
        yield from _treated_by_age([config.scaling, *config.scaling.growth])
    yield from _moments(optimization.optimizer.type, [config.scaling, *config.scaling.growth])
    if config.scaling.growth:
        yield from _through_checkpoints(config.checkpoint, "growth", "grows")
    yield from _spikes(config)
    yield from _mixing(config.images, config.training)
    if config.training.check_replicas_interval and zero.stage == 3:
        reason = "with ZeRO 3 no two ranks hold the same weights, there is nothing to compare"
        yield ConfigError("check_replicas_interval", reason, "remove it", beside=["zero_optimization.stage"])
    if isinstance(config.model, ModelConfig) and config.model.use_mup:
        yield from _mup(config.model, optimization.optimizer.type)


def _mixing(images: Section, training: TrainingConfig) -> Iterator[ConfigError]:
    if not isinstance(images, ImagesConfig) or not images.mixes:
        return
    of, told = "mixup" if images.mixup else "cutmix", "images are mixed two by two, and"
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
        size = getattr(training, key) or 0
        if size % 2:
            yield ConfigError(of, f"{told} {key} {size} is odd", "make it even, or set 0", beside=[key])
            return
    batch, steps = training.train_batch_size, training.gradient_accumulation_steps
    if batch and steps and not training.train_micro_batch_size_per_gpu and batch // steps % 2:
        reason = f"{told} train_batch_size {batch} is {steps} times an odd number (gradient_accumulation_steps)"
        beside = ["train_batch_size", "gradient_accumulation_steps"]
        yield ConfigError(of, reason, "choose others, or set 0", beside=beside)


def _spikes(config: RunConfig) -> Iterator[ConfigError]:
    spikes, zero = config.training.spikes, config.parallel.zero_optimization
    if spikes.action in ("none", "log"):
        return
    if config.training.allow_nonfinite_loss:
        reason = f"true lets through what spikes.action {spikes.action} is for"
        yield ConfigError("allow_nonfinite_loss", reason, "set false", beside=["spikes.action"])
    if spikes.action == "rewind":
        yield from _through_checkpoints(config.checkpoint, "spikes.action", "rewinds")
    elif config.optimization.optimizer.type == "Muon" and zero.stage:
        reason = "skip_update comes too late for Muon, whose momentum DeepSpeed updates before the norm is known"
        yield ConfigError("spikes.action", reason, "use rewind, or ZeRO 0", beside=["optimizer.type"])


def _restarting(options: CheckpointConfig) -> Iterator[ConfigError]:
    folders = [os.path.realpath(folder) for folder in (options.save, options.load) if folder is not None]
    if len(folders) < 2 or folders[0] != folders[1]:
        reason = "a run that is started again resumes from what it saved, and load and save do not name one folder"
        yield ConfigError("max_restarts", reason, "set load to the folder of save", beside=["load", "save"])


def _wsd(options: OptimizationConfig, total: int | None) -> Iterator[ConfigError]:
    warmup = options.warmup_iters(total or 0)
    if total is not None and 0 < options.lr_wsd_decay_iters > total - warmup:
        reason = f"{options.lr_wsd_decay_iters} of {total} iterations, of which {warmup:g} are warm-up"
        beside = ["lr_decay_iters", "train_iters", "warmup", "lr_warmup_iters"]
        yield ConfigError("lr_wsd_decay_iters", reason, "shorten the decay or the warm-up", beside=beside)


def _mup(model: ModelConfig, optimizer: str) -> Iterator[ConfigError]:
    bases = [key for key in MupKeys.model_fields if key.startswith("mup_base_")]
    if all(getattr(model, key) is None for key in bases):
        reason = f"true scales from a base model, and none of its sizes is given ({', '.join(bases)})"
        yield ConfigError("use_mup", reason, "give those that differ from the model's", beside=bases)
    if optimizer in ("SGD", "Muon"):
        reason = f"true, and its rates are those of Adam and Lion, not of {optimizer}"
        yield ConfigError("use_mup", reason, "use Adam", beside=["optimizer.type"])
    if not model.no_weight_tying and model.final_norm_kind == "layernorm_nonparam":
        reason = "layernorm_nonparam has no weight, which with use_mup takes the factor of the logits"
        advice = "set layernorm or rmsnorm, or no_weight_tying: true"
        yield ConfigError("final_norm", reason, advice, beside=["norm", "use_mup"])
    width = model.mup_base_hidden_size or model.hidden_size
    heads = model.mup_base_num_attention_heads or model.num_attention_heads
    if width % heads:
        reason, beside = f"{heads} heads do not divide the base model's {width}", ["mup_base_hidden_size"]
        yield ConfigError("mup_base_num_attention_heads", reason, "choose a divisor of hidden_size", beside=beside)


def _compiling(training: TrainingConfig, zero_stage: int) -> Iterator[ConfigError]:
    if training.compile == "none":
        return
    if zero_stage == 3:
        reason = "blocks cannot be compiled where ZeRO 3 fetches their parameters one by one"
        yield ConfigError("compile", reason, "set none, or a stage below 3", beside=["zero_optimization.stage"])
    if training.deterministic:
        reason = "blocks picks kernels by their time, which may differ from run to run, and deterministic is true"
        yield ConfigError("compile", reason, "set none", beside=["deterministic"])


def _loss_package(name: str, tensor: int, dtype: str) -> Iterator[ConfigError]:
    if name in ("liger", "quack") and tensor > 1:
        reason = f"{name} needs the whole vocabulary, model_parallel_size {tensor} shares it"
        yield ConfigError("cross_entropy", reason, "use auto", beside=["model_parallel_size"])
    if name == "liger" and dtype == "fp16":
        reason = "liger rounds the weight's gradient to fp16 before the loss is scaled"
        yield ConfigError("cross_entropy", reason, "use auto, or bf16", beside=["precision"])


def _through_checkpoints(options: CheckpointConfig, key: str, does: str) -> Iterator[ConfigError]:
    """What keeps a run that grows or rewinds, as `key` says, from going on from its own checkpoint."""
    if options.save is None:
        reason = f"a run that {does} goes through a checkpoint"
        yield ConfigError(key, reason, "give `save` (and the same folder as load)", beside=["save"])
    if options.no_save_optim:
        reason = f"a run that {does} goes on from its checkpoint"
        yield ConfigError("no_save_optim", reason, "set no_save_optim: false", beside=[key])


def _treated_by_age(growths: Sequence[ScalingConfig | ScheduledGrowth]) -> Iterator[ConfigError]:
    """What Muon's groups, which are not by growth, cannot do."""
    nothing: dict[str, tuple[Any, ...]] = {
        "new_tokens_lr_scale": (None, 1), "old_tokens_lr_scale": (None, 1), "lr_scale": (None,),
        "new_tokens_warmup": (NewTokensWarmup(),), "new_keys_decay": ("always",),
    }  # fmt: skip
    for key, values in nothing.items():
        if any(getattr(growth, key) not in values for growth in growths):
            reason, beside = "Muon has no learning rates and decay by age of tokens", ["optimizer.type"]
            yield ConfigError(key, reason, "use Adam", beside=beside)
            return


def _moments(optimizer: str, growths: Sequence[ScalingConfig | ScheduledGrowth]) -> Iterator[ConfigError]:
    if optimizer not in ADAM_FAMILY and any(growth.new_moments == "mean" for growth in growths):
        reason = f"mean is of Adam's second moments, and {optimizer} has none of tokens"
        yield ConfigError("new_moments", reason, "use Adam, or set zero", beside=["optimizer.type"])


def _zero(stage: int, extra: dict[str, Any]) -> Iterator[ConfigError]:
    for key in ("offload_optimizer", "offload_param"):
        device = extra[key].get("device", "cpu") if isinstance(extra.get(key), dict) else "cpu"
        if device not in ("cpu", "none"):
            reason = f"{device} cannot be checkpointed here"
            yield ConfigError(f"zero_optimization.{key}.device", reason, "use cpu or none")
    if extra.get("round_robin_gradients"):
        reason = "true orders DeepSpeed's fp32 values in a way that cannot be checkpointed here"
        yield ConfigError("zero_optimization.round_robin_gradients", reason, "set it to false")
    size = extra.get("zero_hpz_partition_size") or 1
    if stage == 3 and size > 1:
        reason = (
            f"{size}: DeepSpeed makes a model's secondary partitions once, and here a model is partitioned part by part"
        )
        beside = ["zero_optimization.stage"]
        yield ConfigError("zero_optimization.zero_hpz_partition_size", reason, "set 1", beside=beside)


def _muon(zero: ZeroConfig, optimization: OptimizationConfig, tensor: int) -> Iterator[ConfigError]:
    if tensor > 1:
        reason = f"Muon orthogonalises whole matrices, model_parallel_size {tensor} splits them"
        yield ConfigError("optimizer.type", reason, "use Adam", beside=["model_parallel_size"])
    clipping, beside = optimization.gradient_clipping, ["optimizer.type"]
    if zero.stage == 3:
        reason = "DeepSpeed's Muon cannot run at stage 3"
        yield ConfigError("zero_optimization.stage", reason, "use stage 0, 1 or 2", beside=beside)
    elif zero.stage and clipping:
        reason = f"{clipping}: at ZeRO 1 and 2 DeepSpeed clips Muon's finished update instead of the gradient"
        advice = "set gradient_clipping: 0 (Muon does not depend on the gradient's size)"
        yield ConfigError("gradient_clipping", reason, advice, beside=[*beside, "zero_optimization.stage"])
