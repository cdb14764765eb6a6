"""What becomes of every GPT-NeoX key that no section has: another name of one, ignored, or refused.

The official TokenFormer code accepts 276 keys. None of them is unknown here; a test compares this file with the
list. A key is *ignored* when leaving it out changes neither the model nor its training, and *refused* when it
would: a refused key is an error, an ignored one a warning line. Values that ask for nothing are accepted silently;
megatron.config.neox_rules says which do beside the other keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALIASES: dict[str, str] = {
    "learning_rate": "optimizer.params.lr",
    "lr": "optimizer.params.lr",
    "optimizer_type": "optimizer.type",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.max_grad_norm": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "batch_size": "train_micro_batch_size_per_gpu",
    "zero_stage": "zero_optimization.stage",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "loss_scale": "fp16.loss_scale",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_scale": "fp16.min_loss_scale",
}
"""Other names of the keys of sections."""

VALUE_SPELLINGS: dict[str, dict[str, str]] = {"activation": {"swish": "silu"}}
"""Other names of values."""


@dataclass(frozen=True)
class Rule:
    """Why a key is ignored or refused, and the values that are accepted without a word."""

    reason: str
    harmless: tuple[Any, ...] = ()
    refused: bool = False

    def is_harmless(self, value: Any) -> bool:
        """Whether `value` asks for nothing: null, false, empty, a disabled table or a listed value."""
        if value is None or (isinstance(value, dict) and value.get("enabled") is False):
            return True
        if self.harmless and isinstance(self.harmless[0], bool):
            return value in self.harmless
        if isinstance(value, bool):
            return not value
        return value in self.harmless or value in ("", [], {})


def _group(reason: str, *keys: str | tuple[str, Any], refused: bool = False) -> dict[str, Rule]:
    """One rule for several keys; `(key, value)` names a key's harmless value besides false, null and empty."""
    pairs = [key if isinstance(key, tuple) else (key, None) for key in keys]
    return {key: Rule(reason, () if value is None else (value,), refused) for key, value in pairs}


IGNORED: dict[str, Rule] = {
    **_group(
        "attention always runs fused (SDPA), its softmax in fp32",
        "scaled_upper_triang_masked_softmax_fusion",
        "scaled_masked_softmax_fusion",
        "attention_softmax_in_fp32",
    ),
    **_group(
        "the fastest implementation for the device is picked by itself",
        "bias_gelu_fusion",
        "bias_dropout_fusion",
        "rope_fusion",
        "layernorm_fusion",
    ),
    **_group("the cross entropy is always computed in fp32", "fp16_lm_cross_entropy"),
    **_group("the logits are always split over the vocabulary", ("output_layer_parallelism", "column")),
    **_group("rotary tables are recomputed, never saved", "rotary_save_freqs_buffer"),
    **_group(
        "checkpoint_activations alone decides what is recomputed",
        "partition_activations",
        "synchronize_each_layer",
        "contiguous_checkpointing",
        "checkpoint_in_cpu",
        "activation_checkpointing",
        ("deepspeed_activation_checkpointing", True),
    ),
    **_group("a signal saves and stops the run instead", "adlr_autoresume", ("adlr_autoresume_interval", 1000)),
    **_group("every checkpoint is verified by its checksums", "checkpoint_validation_with_forward_pass"),
    **_group("loading is always strict", ("load_module_strict", True)),
    **_group("checkpoints have a format of their own that loads at any layout", "checkpoint"),
    **_group("random states are always saved; no_load_rng leaves them out at loading", "no_save_rng"),
    **_group(
        "the learning rate follows from the schedule keys and the iteration",
        "override_lr_scheduler",
        "use_checkpoint_lr_scheduler",
        ("old_lr_decay_scale", 0.1),
    ),
    **_group("derived: fp16.loss_scale 0 means dynamic", "dynamic_loss_scale"),
    **_group("DeepSpeed would cast inputs of type float, and the inputs are token ids", "fp16.auto_cast"),
    **_group(
        "bf16 has the range of fp32 and needs no loss scale",
        ("bf16.loss_scale", 0),
        ("bf16.loss_scale_window", 1000),
        ("bf16.initial_scale_power", 12),
        ("bf16.hysteresis", 2),
        ("bf16.min_loss_scale", 1),
    ),
    **_group("derived from checkpoint_factor and extra_save_iters", "save_iters"),
    **_group("derived from attention_config", "tokenformer_use"),
    **_group("derived from train_iters, eval_iters and the data", "do_train", "do_valid", "do_test"),
    **_group("derived from pipe_parallel_size", "is_pipe_parallel"),
    **_group("pipeline stages are cut by FLOPs", ("pipe_partition_method", "type:transformer|mlp")),
    **_group(
        "set by the launcher",
        "local_rank",
        "rank",
        "world_size",
        "global_num_gpus",
        "user_script",
        "config_files",
        "git_hash",
    ),
    **_group("the grad norm, loss scale and throughput are always logged", "log_grad_norm"),
    **_group(
        "not measured by this version",
        "log_grad_pct_zeros",
        "log_gradient_noise_scale",
        ("gradient_noise_scale_n_batches", 5),
        "gradient_noise_scale_cpu_offload",
        "log_optimizer_states",
        "log_param_norm",
        "char_level_ppl",
        "comms_logger",
        "dump_state",
        "flops_profiler",
        "memory_profiling",
        "memory_profiling_path",
        "profile_backward",
    ),
    **_group("give profile: {start: N, stop: M}", ("profile_step_start", 10), ("profile_step_stop", 12)),
    **_group("use tensorboard_dir, use_wandb and log_dir instead of DeepSpeed's monitors", "tensorboard", "wandb"),
    **_group("metrics are written to metrics.jsonl in log_dir", "csv_monitor"),
    **_group(
        "Comet is not supported; use tensorboard_dir or use_wandb",
        "use_comet",
        "comet_workspace",
        "comet_project",
        "comet_experiment_name",
        "comet_experiment",
        "comet_tags",
        "comet_others",
    ),
    **_group("rank 0 logs for all", "wandb_init_all_ranks"),
    **_group("processes are started in slot order", "detect_nvlink_pairs"),
    **_group("the model is always built on its device from a seed", "use_cpu_initialization", "lazy_mpu_init"),
    **_group("memory maps are read on demand", "mmap_warmup"),
    **_group("only BERT-like data has short sequences", ("short_seq_prob", 0.1)),
    **_group("nothing is exported to ONNX", "onnx_safe"),
    **_group("texts are written, not logits", "return_logits"),
    **_group("only matters with s3_path", ("s3_chunk_size", 104857600)),
    **_group("only matters with mlp_type gmlp", ("gmlp_attn_dim", 64)),
    **_group("only matters with num_unique_layers", ("param_sharing_style", "grouped")),
    **_group("only matters with norm scalenorm", ("scalenorm_epsilon", 1e-8)),
    **_group("only matters with pos_emb rpe", ("rpe_num_buckets", 32), ("rpe_max_distance", 128)),
    **_group("only matters with curriculum learning", ("curriculum_seqlen", 0)),
    **_group(
        "only matters with num_experts above 1",
        ("create_moe_param_group", True),
        ("expert_interval", 2),
        ("moe_eval_capacity_factor", 1.0),
        ("moe_expert_parallel_size", 1),
        ("moe_loss_coeff", 0.1),
        ("moe_min_capacity", 4),
        ("moe_token_dropping", True),
        ("moe_top_k", 1),
        ("moe_train_capacity_factor", 1.0),
        ("moe_use_residual", True),
        ("moe_type", "megablocks"),
        "moe_glu",
        "moe_lbl_in_fp32",
        "moe_jitter_eps",
        "enable_expert_tensor_parallelism",
        "use_tutel",
    ),
    **_group("only matters with pos_emb rpe", ("mup_rp_embedding_mult", 1.0)),
    **_group("the sizes of the base model are the keys mup_base_*", "base_shapes_file", "save_base_shapes"),
    **_group(
        "only matters with layers of Transformer Engine",
        ("te_fp8_format", "hybrid"),
        ("te_fp8_wgrad", True),
        ("te_fp8_amax_history_len", 1),
        ("te_fp8_amax_compute_algo", "most_recent"),
        ("te_fp8_margin", 0),
    ),
    **_group(
        "only matters with mamba blocks",
        "mamba_causal_conv_fusion",
        "mamba_inner_func_fusion",
        ("mamba_selective_fp32_params", True),
        "mamba_selective_scan_fusion",
        ("mamba_use_bias_in_conv", True),
        "mamba_use_bias_in_linears",
    ),
}
"""Keys without effect here; one warning line when set to something else than a harmless value."""


def _refused(reason: str, *keys: str | tuple[str, Any]) -> dict[str, Rule]:
    return _group(reason, *keys, refused=True)


REFUSED: dict[str, Rule] = {
    **_refused("grouped-query attention is not supported; set it to num_attention_heads or remove it", "num_kv_heads"),
    **_refused(
        "norm and final_norm layernorm have a bias; set true, or norm: rmsnorm or layernorm_nonparam",
        ("use_bias_in_norms", True),
    ),
    **_refused("the feed-forward of Transformer blocks has biases; set true", ("use_bias_in_mlp", True)),
    **_refused(
        "the feed-forward is as wide as intermediate_size says, else 4 * hidden_size; set intermediate_size instead",
        ("mlp_multiple_of", 1),
    ),
    **_refused(
        "sums over tensor ranks are made in the precision of training; set false, or model_parallel_size: 1",
        "fp32_allreduce",
    ),
    **_refused(
        "DeepSpeed's configuration is made here from the keys of this program; remove it", "deepspeed_extra_args"
    ),
    **_refused("mixtures of experts are not supported; set 1", ("num_experts", 1), ("moe_num_experts", 1)),
    **_refused("attention is always dense and causal; remove it", "sparse_attention", "sparsity_config"),
    **_refused("attention always sees the whole context; remove it", "sliding_window_width"),
    **_refused("queries and keys are not normalised; set false", "use_qk_layernorm"),
    **_refused("scores are scaled by 1/sqrt(head_dim) only; set false", "apply_query_key_layer_scaling"),
    **_refused("the feed-forward is a Pattention or a two-layer MLP; set regular", ("mlp_type", "regular")),
    **_refused("gpt_j_residual never shares its norm; set false", "gpt_j_tied"),
    **_refused("every layer has parameters of its own; remove it", "num_unique_layers"),
    **_refused("only learned positions have an offset; set 0", ("opt_pos_emb_offset", 0)),
    **_refused("the embedding is used as it is; set false", "word_embed_fuse"),
    **_refused("soft prompts are not supported; remove it", "soft_prompt_tuning"),
    **_refused("labels are the next tokens; remove it", "label_data_paths"),
    **_refused("the schedule comes from lr_decay_style, warmup and min_lr; remove it", "scheduler"),
    **_refused("choose lr_decay_style instead; set false", "old_lr_decay"),
    **_refused("the learning rate decays to min_lr; set that instead", "decay_lr_to"),
    **_refused("the warm-up is warmup of lr_decay_iters, or lr_warmup_iters; set one of these instead", "warmup_iters"),
    **_refused("the kinds of blocks are those of attention_config; set that instead", "attention_type"),
    **_refused("apex amp is gone from DeepSpeed; use precision: fp16 or bf16", "amp"),
    **_refused(
        "layers of Transformer Engine, which compute in fp8, are not supported; set false",
        "te_columnparallel",
        "te_rowparallel",
        "te_layernorm_mlp",
        "te_mha",
        "te_fp8_mha",
    ),
    **_refused("bitsandbytes optimizers are not supported; set false", "use_bnb_optimizer"),
    **_refused(
        "gradients are averaged as DeepSpeed does by default; remove it",
        "communication_data_type",
        "data_types",
        "prescale_gradients",
        ("gradient_predivide_factor", 1.0),
        "sparse_gradients",
    ),
    **_refused(
        "this feature of DeepSpeed is not supported; remove it",
        "autotuning",
        "autotuning_run",
        "compression_training",
        "curriculum_learning",
        "data_efficiency",
        "deepscale",
        "deepscale_config",
        "elasticity",
    ),
    **_refused("DeepSpeed is the engine; set true", ("deepspeed", True)),
    **_refused("use launcher: openmpi", "deepspeed_mpi"),
    **_refused("checkpoints need a folder that all nodes see; set true", ("use_shared_fs", True)),
    **_refused("checkpoints are not uploaded; remove it", "s3_path"),
    **_refused(
        "grow with `growth` or pretrain_partial_init; remove it",
        "qkv_slot_num_new",
        "proj_slot_num_new",
        "ffn_slot_num_new",
        "frozen_old",
        "scale_pretrain",
        ("transformer_increase_dim", 0),
    ),
}
"""Keys that would change the model or its training; an error when set to something else than a harmless value."""

RULES: dict[str, Rule] = {**IGNORED, **REFUSED}
