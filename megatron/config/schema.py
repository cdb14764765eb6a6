"""Every configuration key: its type, default and meaning, as frozen pydantic models, one per concern.

YAML files are flat (GPT-NeoX style): a key names a field, and the field's name is unique over all
sections, so `hidden_size: 768` finds `RunConfig.model.hidden_size`. This file is the single source of
the reference page docs/configuration.md and of `--help`.
"""

from __future__ import annotations

import math
import re
import shlex
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron.config.findings import WrongTypes
from megatron.config.update_size import UpdateSize
from megatron.config.yaml_loader import shortened
from megatron.config.zero_keys import type_mistakes
from megatron.errors import UserError

TOKENFORMER = "tokenformer"
TRANSFORMER_KINDS = ("global", "flash")
PATTENTION_ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")

PattentionActivation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
Norm = Literal["layernorm", "layernorm_nonparam", "rmsnorm"]
InitMethod = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "wang_init", "small_init", "xavier_uniform",
    "xavier_normal", "zero",
]  # fmt: skip

MAX_SIZE = 2**24
"""Largest width, length or number of tokens that a key takes: a mistyped size ends in a line, not in all memory."""
MAX_FACTOR = 1e6
"""Largest factor, rate or norm: far above what is of use, far below what fp32 holds."""


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent bool-to-number conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_silent_conversion(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        found = {key: _type_mistake(fields[key].annotation, value) for key, value in values.items() if key in fields}
        lines = [f"{key}: {mistake}" for key, mistake in found.items() if mistake]
        if lines:
            raise WrongTypes(lines)
        return values


def _type_mistake(annotation: Any, value: Any) -> str | None:
    """What pydantic would convert in silence: true to a number, a number to true, text to a number."""
    accepted = _plain_types(annotation)
    if isinstance(value, bool) and bool not in accepted and accepted & {int, float}:
        return f"expected a number, got {str(value).lower()}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and accepted == {bool}:
        return f"expected true or false, got {shortened(value)}"
    if isinstance(value, str) and value and accepted and accepted <= {int, bool}:
        return f"expected {'a whole number' if int in accepted else 'true or false'}, got '{shortened(value)}'"
    if isinstance(value, str) and float in accepted and str not in accepted and not _NUMBER.fullmatch(value):
        return f"expected a number, got '{shortened(value)}'"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"expected a number of at most 64 bits, got {hex(value)[:20]}..."
    return None


def _plain_types(annotation: Any) -> set[Any]:
    """The scalar types inside an annotation: `int | None` -> {int}; a Literal counts as its values' types."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_plain_types(item) for item in typing.get_args(annotation)))
    if annotation in (int, float, bool, str):
        return {annotation}
    return set() if annotation is type(None) else {annotation}


class ModelConfig(Section):
    """The network: what a checkpoint's tensors mean."""

    num_layers: int = Field(gt=0, le=10_000)
    """Number of blocks L."""
    hidden_size: int = Field(gt=0, le=MAX_SIZE)
    """Width d of the residual stream."""
    num_attention_heads: int = Field(gt=0, le=MAX_SIZE)
    """Number of attention heads; must divide hidden_size."""
    attention_config: list[Any] | None = None
    """Kind of each block in GPT-NeoX form, for example [[["tokenformer"], 12]]; kinds are tokenformer and
    global (a Transformer block; flash means the same). The number may be "all". Default: tokenformer where
    the token counts are given, else global."""
    qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of each of the query, key and value projections (TokenFormer blocks)."""
    proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the attention output projection (TokenFormer blocks)."""
    ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the feed-forward Pattention (TokenFormer blocks)."""
    token_segments: dict[Literal["qkv", "proj", "ffn"], list[list[Annotated[int, Field(ge=0)]]]] | None = None
    """Written by growth, not by hand: for each block the tokens it was made with and those that each growth added. The
    slot numbers are then the largest sums."""
    norm_activation_type: PattentionActivation = "l2_norm_gelu"
    """How Pattention turns scores into weights (theta of the paper). l2_norm_gelu is the published form."""
    seq_length: int = Field(gt=0, le=MAX_SIZE)
    """Tokens a training sample holds; also the context length at evaluation and generation."""
    max_position_embeddings: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Positions the rotary tables are made for at first (65,536 at most); they grow on demand. Default: seq_length."""
    pos_emb: Literal["rotary", "none"] = "rotary"
    """Position information: rotary embeddings or none."""
    rotary_pct: float = Field(default=1.0, gt=0, le=1)
    """Part of each head's dimensions that is rotated; published TokenFormer and Pythia use 0.25."""
    rotary_emb_base: float = Field(default=10000, gt=0, le=1e12)
    """Base of the rotary frequencies."""
    norm: Norm = "layernorm"
    """Norm of the blocks; layernorm_nonparam (published TokenFormer) has no weight and no bias."""
    final_norm: Norm | None = None
    """Norm before the logits. Default: the block norm."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of layernorm, inside the root."""
    rms_norm_epsilon: float = Field(default=1e-8, ge=0, le=1)
    """Epsilon of rmsnorm, added to the root mean square outside the root."""
    no_weight_tying: bool = False
    """true: logits come from a matrix of their own; false: from the transposed embedding."""
    gpt_j_residual: bool = False
    """true: attention and feed-forward read the same input in parallel (Pythia, GPT-J); false: one after the other."""
    use_bias_in_attn_linear: bool = True
    """Biases in the attention projections of Transformer blocks; Pattention never has a bias."""
    intermediate_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Inner width of the Transformer blocks' feed-forward. Default: 4 * hidden_size."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Activation of the Transformer blocks' feed-forward; gelu is the exact (erf) form."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the embedding and on both residual branches."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the attention weights."""
    init_method: InitMethod = "normal"
    """Initialisation of keys, embedding and Transformer input matrices."""
    output_layer_init_method: InitMethod = "scaled_normal"
    """Initialisation of Pattention values and Transformer output matrices; the published one is wang_init.
    scaled_normal is normal with its deviation over sqrt(2 * num_layers), single_residual_scaled_normal over
    sqrt(num_layers)."""
    init_method_std: float = Field(default=0.02, gt=0, le=1000)
    """Standard deviation of normal and scaled_normal."""
    make_vocab_size_divisible_by: int = Field(default=128, gt=0, le=MAX_SIZE)
    """The vocabulary is padded to a multiple of this, whatever the layout of the run."""
    vocab_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Number of token ids of the tokenizer; filled in from it, rarely given by hand: a larger one makes more rows."""
    padded_vocab_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Rows of the embedding. Default: vocab_size padded to make_vocab_size_divisible_by."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide hidden_size "
                f"{self.hidden_size}; choose a divisor of it"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct: {self.rotary_pct} of a head of {self.head_dim} dimensions (hidden_size over "
                f"num_attention_heads) rotates {self.rotary_dim} of them, which must be an even number"
            )
        if TOKENFORMER in self.layer_kinds:
            for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
                if getattr(self, key) is None:
                    raise ValueError(f"{key}: a tokenformer block needs it; give the number of parameter tokens")
        for kind, blocks in (self.token_segments or {}).items():
            self._check_segments(kind, blocks)
        if self.padded_vocab_size and self.vocab_size and self.vocab_size > self.padded_vocab_size:
            raise ValueError(_too_many_ids(self.padded_vocab_size, self.vocab_size))
        return self

    def _check_segments(self, kind: str, blocks: list[list[int]]) -> None:
        slots, sums = getattr(self, f"{kind}_slot_num"), [sum(block) for block in blocks]
        if len(blocks) != self.num_layers or len({len(block) for block in blocks}) != 1 or max(sums) != slots:
            raise ValueError(
                f"token_segments: {kind} of {len(blocks)} blocks with up to {max(sums, default=0)} tokens does not "
                f"belong to num_layers {self.num_layers} and {kind}_slot_num {slots}; leave it to growth"
            )

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every block, `tokenformer` or `global`, in order; length num_layers."""
        if self.attention_config is None:
            has_tokens = any((self.qkv_slot_num, self.proj_slot_num, self.ffn_slot_num))
            return (TOKENFORMER if has_tokens else "global",) * self.num_layers
        kinds: list[str] = []
        for entry in self.attention_config:
            kinds.extend(_expand_attention_entry(entry, self.num_layers - len(kinds)))
        if len(kinds) != self.num_layers:
            raise ValueError(
                f"attention_config: describes {len(kinds)} layers, num_layers is {self.num_layers}; make them equal"
            )
        return tuple(kinds)

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of one head; 0 without rotary embeddings."""
        return int(self.head_dim * self.rotary_pct) if self.pos_emb == "rotary" else 0

    @property
    def final_norm_kind(self) -> Norm:
        """The norm before the logits."""
        return self.final_norm or self.norm

    def with_vocabulary(self, size: int) -> ModelConfig:
        """A new config for a tokenizer of `size` ids, padded; raises UserError when they do not fit."""
        padded = self.padded_vocab_size
        if padded is not None and size > padded:
            raise UserError(_too_many_ids(padded, size))
        if self.vocab_size is not None and size > self.vocab_size:
            raise UserError(
                f"vocab_size: {self.vocab_size} is below the {size} token ids of the tokenizer; remove it, or choose "
                "another tokenizer"
            )
        if padded is None:
            multiple = self.make_vocab_size_divisible_by
            padded = math.ceil(max(size, self.vocab_size or 0) / multiple) * multiple
        return ModelConfig(**{**self.model_dump(), "vocab_size": size, "padded_vocab_size": padded})


def _too_many_ids(rows: int, size: int) -> str:
    return (
        f"padded_vocab_size: {rows} rows cannot hold the vocabulary of {size} token ids; "
        "raise it or choose another tokenizer"
    )


def _expand_attention_entry(entry: Any, remaining: int) -> list[str]:
    well_formed = (
        isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], (list, tuple)) and entry[0]
    )
    if not well_formed or not (entry[1] == "all" or isinstance(entry[1], int)):
        raise ValueError(f'attention_config: {shortened(entry)} is not of the form [["tokenformer"], 12]')
    kinds, count = entry
    for kind in kinds:
        if kind != TOKENFORMER and kind not in TRANSFORMER_KINDS:
            raise ValueError(
                f"attention_config: unknown kind '{shortened(kind)}'; known are tokenformer, global and flash"
            )
    if count == "all":
        count = remaining // len(kinds)
    if not 0 <= count <= MAX_SIZE // len(kinds) or isinstance(count, bool):
        raise ValueError(f"attention_config: {shortened(entry)} has no sensible number of layers; make it num_layers")
    return [TOKENFORMER if kind == TOKENFORMER else "global" for kind in kinds] * count


class OptimizerParams(Section):
    """Arguments of the optimizer."""

    lr: float = Field(default=6e-4, ge=0, le=1000)
    """Peak learning rate (alias at top level: learning_rate, lr)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's and Lion's moments."""
    eps: float = Field(default=1e-8, ge=0, le=1)
    """Term added to Adam's denominator."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of SGD and Muon (Muon: 0 means its usual 0.95)."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, values: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"betas: each must be at least 0 and below 1, got [{values[0]:g}, {values[1]:g}]")
        return values


OptimizerType = Literal["Adam", "AdamW", "CPU_Adam", "FusedAdam", "ApexAdam", "Lion", "Muon", "SGD"]
OPTIMIZER_SPELLINGS: dict[str, OptimizerType] = {
    "adam": "Adam", "adamw": "AdamW", "cpu_adam": "CPU_Adam", "cpuadam": "CPU_Adam",
    "deepspeedcpuadam": "CPU_Adam", "fusedadam": "FusedAdam", "apexadam": "ApexAdam", "apex_adam": "ApexAdam",
    "lion": "Lion", "muon": "Muon", "sgd": "SGD",
}  # fmt: skip


class OptimizerSpec(Section):
    """Which optimizer and its arguments."""

    type: OptimizerType = "Adam"
    """Adam and AdamW: AdamW of torch, fused where the device has it. FusedAdam: DeepSpeed's. ApexAdam: NVIDIA
    apex's. CPU_Adam: DeepSpeed's for offloaded states. Lion, Muon, SGD."""
    params: OptimizerParams = OptimizerParams()
    """Its arguments."""

    @field_validator("type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in OPTIMIZER_SPELLINGS:
            return OPTIMIZER_SPELLINGS[value.lower()]
        names = ", ".join(typing.get_args(OptimizerType))
        raise ValueError(f"optimizer.type: '{shortened(value)}' is not supported; choose one of {names}")


class OptimizationConfig(Section):
    """Optimizer, weight decay, clipping and learning-rate schedule."""

    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer, for example {type: Adam, params: {lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-8}}."""
    weight_decay: float = Field(default=0.1, ge=0, le=1000)
    """Decoupled decay of every matrix; vectors (norms, biases) have none."""
    gradient_clipping: float = Field(default=1.0, ge=0, le=1e12)
    """Largest global gradient norm; 0 switches clipping off."""
    min_lr: float = Field(default=0.0, ge=0, le=1000)
    """Learning rate at the end of the decay and afterwards."""
    lr_decay_style: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    """Shape of the decay after the warm-up."""
    lr_decay_iters: int | None = Field(default=None, gt=0)
    """Iterations until min_lr is reached. Default: train_iters."""
    warmup: float = Field(default=0.01, ge=0, le=1)
    """Part of lr_decay_iters with a linear warm-up from 0."""


class Fp16(Section):
    """fp16 training with loss scaling."""

    enabled: bool = False
    """Train in fp16 (GPU only)."""
    fp16: bool | None = None
    """Repeats `enabled` in official files; no effect of its own."""
    type: Literal["fp16", "bfloat16"] = "fp16"
    """bfloat16: `enabled` asks for bf16, as in a file of Pythia."""
    loss_scale: float = Field(default=0, ge=0, le=2**32)
    """Fixed loss scale; 0 means dynamic."""
    initial_scale_power: int = Field(default=16, ge=0, le=32)
    """The dynamic scale starts at 2 to this power."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """Updates without overflow before the scale doubles."""
    hysteresis: int = Field(default=2, gt=0)
    """Overflows before the scale halves."""
    min_loss_scale: float = Field(default=1, gt=0, le=2**32)
    """Smallest dynamic scale."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis at every update without overflow."""


class Bf16(Section):
    """bf16 training."""

    enabled: bool = False
    """Train in bf16 with fp32 master weights."""
    bf16: bool | None = None
    """Repeats `enabled` in files of GPT-NeoX; no effect of its own."""


class PrecisionConfig(Section):
    """Number format of parameters and activations; master weights and moments are always fp32."""

    precision: Literal["fp32", "bf16", "bfloat16", "fp16"] | None = None
    """fp32, bf16 or fp16; wins over the fp16 and bf16 tables. Default: what these say, else fp32."""
    fp16: Fp16 = Fp16()
    """fp16 settings, for example {enabled: true, loss_scale: 0, initial_scale_power: 12}."""
    bf16: Bf16 = Bf16()
    """bf16 settings: {enabled: true}."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        is_bf16 = self.fp16.type == "bfloat16"
        if self.precision == "fp16" and self.fp16.enabled and is_bf16:
            raise ValueError("fp16.type: bfloat16 beside precision fp16; keep one of them")
        if self.precision is None and self.fp16.enabled and self.bf16.enabled and not is_bf16:
            raise ValueError("fp16.enabled: fp16 and bf16 are both enabled; set `precision` to one of them")
        return self

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """The training dtype's short name."""
        if self.precision is not None:
            return "bf16" if self.precision == "bfloat16" else self.precision
        if self.bf16.enabled or (self.fp16.enabled and self.fp16.type == "bfloat16"):
            return "bf16"
        return "fp16" if self.fp16.enabled else "fp32"


class ZeroConfig(Section):
    """DeepSpeed's zero_optimization; keys beyond these are handed to DeepSpeed as they are."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    stage: Literal[0, 1, 2, 3] = 0
    """0: replicated; 1: optimizer states sharded over data ranks; 2: gradients too; 3: parameters too."""
    cpu_offload: bool | None = None
    """Old spelling of offload_optimizer {device: cpu}."""

    @model_validator(mode="before")
    @classmethod
    def _check_types(cls, values: Any) -> Any:
        lines = list(type_mistakes(values)) if isinstance(values, dict) else []
        if lines:
            raise WrongTypes(lines)
        return values


class ParallelConfig(Section):
    """How a model is spread over processes."""

    pipe_parallel_size: int = Field(default=0, ge=0, le=65_536)
    """Pipeline stages; 0 and 1 both mean no pipeline."""
    model_parallel_size: int = Field(default=1, gt=0, le=65_536)
    """Tensor-parallel ranks that share one layer."""
    sequence_parallel: bool = False
    """With model_parallel_size above 1: shard activations between the projections by tokens over the same ranks. Saves
    activation memory at the same communication volume."""
    zero_optimization: ZeroConfig = ZeroConfig()
    """DeepSpeed's ZeRO table, for example {stage: 1, reduce_bucket_size: 500000000}."""

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, at least 1."""
        return max(1, self.pipe_parallel_size)


NewKeys = Literal["zero", "rotated"]
"""What new keys start as; megatron.growth.grow says how."""


class GrowthStage(Section):
    """One growth inside a run: when, to how many tokens, and how training goes on."""

    at_iteration: int | None = Field(default=None, gt=0)
    """Grow after this many iterations of the run."""
    at_tokens: int | None = Field(default=None, gt=0)
    """Grow once this many tokens of training data have been consumed; instead of at_iteration."""
    qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens afterwards of each query, key and value. Default: as many as before."""
    proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens afterwards of the attention output projection. Default: as many as before."""
    ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens afterwards of the feed-forward. Default: as many as before."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Blocks that grow, from 0. Default: all."""
    lr_policy: Literal["restart", "continue"] = "restart"
    """restart: a schedule of its own, warm-up included; continue: the schedule goes on as if nothing had happened."""
    lr: float | None = Field(default=None, ge=0, le=1000)
    """Peak learning rate of a restart. Default: that of the run."""
    min_lr: float | None = Field(default=None, ge=0, le=1000)
    """Learning rate at the end of a restart's decay. Default: that of the run."""
    warmup: float | None = Field(default=None, ge=0, le=1)
    """Part of a restart's lr_decay_iters with a linear warm-up. Default: that of the run."""
    lr_decay_iters: int | None = Field(default=None, gt=0)
    """Iterations of a restart's decay. Default: until the next restart or train_iters."""
    new_keys: NewKeys = "zero"
    """zero: as in the paper. rotated: random rotations of the old keys with values of zero, which is as exact and
    learns faster; with l2_norm_gelu, by at least min(tokens, hidden_size) tokens."""
    freeze_old_tokens: bool = False
    """Train the new tokens only, until the next stage."""
    old_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of everything but the new tokens."""
    new_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of the new tokens."""

    @model_validator(mode="before")
    @classmethod
    def _spell_with_underscores(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {str(key).replace("-", "_"): value for key, value in values.items()}

    @model_validator(mode="after")
    def _check(self) -> GrowthStage:
        if (self.at_iteration is None) == (self.at_tokens is None):
            raise ValueError("growth: each stage needs at_iteration or at_tokens, one of the two")
        if self.qkv_slot_num is None and self.proj_slot_num is None and self.ffn_slot_num is None:
            raise ValueError(
                "growth: each stage needs qkv_slot_num, proj_slot_num or ffn_slot_num; as many as before add none"
            )
        for key in ("lr", "min_lr", "warmup", "lr_decay_iters"):
            if self.lr_policy == "continue" and getattr(self, key) is not None:
                raise ValueError(f"growth.{key}: belongs to a schedule of its own; set lr_policy: restart")
        return self


class ScalingConfig(Section):
    """Incremental scaling: growing the model by parameter tokens."""

    growth: list[GrowthStage] = []
    """Growths inside the run, in order, for example [{at_iteration: 1000, qkv_slot_num: 1792, ffn_slot_num: 7168}]. The
    token counts of the model section are those before the first."""
    partial_init_policy: Literal["restart", "continue"] = "restart"
    """With pretrain_partial_init: iterations and learning-rate schedule start anew, or go on."""
    new_keys: NewKeys = "zero"
    """What the new keys of pretrain_partial_init start as: zero as in the paper, or random rotations of the old keys
    (l2_norm_gelu), which is as exact and learns faster."""
    freeze_old_tokens: bool = False
    """Train only the tokens of the latest growth."""
    old_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of everything but the tokens of the latest growth."""
    new_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of the tokens of the latest growth."""

    @model_validator(mode="after")
    def _check(self) -> ScalingConfig:
        for key in ("at_iteration", "at_tokens"):
            times = [value for stage in self.growth if (value := getattr(stage, key)) is not None]
            for earlier, later in zip(times, times[1:], strict=False):
                if later <= earlier:
                    raise ValueError(
                        f"growth: stages are out of order, {key} {later} follows {earlier}; sort them by time"
                    )
        return self


class TrainingConfig(Section):
    """Length and batches of a run."""

    train_iters: int | None = Field(default=None, gt=0)
    """Optimizer updates in the whole run, those before a resume included."""
    train_micro_batch_size_per_gpu: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Samples a process takes through one forward and backward pass."""
    gradient_accumulation_steps: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Micro-batches accumulated for one update. Default: from train_batch_size, else 1."""
    train_batch_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Samples of one update over all data-parallel processes; follows from the other two if not given."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout, below 2^32."""
    eval_interval: int = Field(default=1000, gt=0)
    """Iterations between validations."""
    eval_iters: int = Field(default=100, ge=0)
    """Batches of a validation, always the same ones; 0 switches validation off."""
    exit_interval: int | None = Field(default=None, gt=0)
    """Save and stop after this many iterations of the run; resuming continues."""
    checkpoint_activations: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    checkpoint_num_layers: int = Field(default=1, gt=0, le=10_000)
    """Blocks recomputed together."""
    eod_mask_loss: bool = False
    """Leave predictions made from an end-of-document token out of the loss."""
    pattention_backend: Literal["auto", "reference", "fused"] = "auto"
    """Implementation of Pattention; auto picks the fastest one for the device."""
    attention_backend: Literal["sdpa", "flash_attn"] = "sdpa"
    """Causal attention: torch's scaled_dot_product_attention or the flash-attn package."""
    deterministic: bool = False
    """true: only kernels that give the same bits every time, so that a resumed run on the same GPUs equals one that was
    not interrupted bit for bit. Attention and its backward pass are slower."""
    allow_nonfinite_loss: bool = False
    """false: a loss that is not finite stops the run before the update."""


class DataConfig(Section):
    """Training, validation and test data."""

    data_path: str | None = None
    """Prefix of one .bin/.idx pair, divided by `split`."""
    train_data_paths: list[str] | None = None
    """Prefixes of training sets to blend (with train_data_weights)."""
    valid_data_paths: list[str] | None = None
    """Prefixes of validation sets."""
    test_data_paths: list[str] | None = None
    """Prefixes of test sets."""
    train_data_weights: list[float] | None = None
    """Blending weights of train_data_paths; default equal."""
    valid_data_weights: list[float] | None = None
    """Blending weights of valid_data_paths; default equal."""
    test_data_weights: list[float] | None = None
    """Blending weights of test_data_paths; default equal."""
    weight_by_num_documents: bool = False
    """Derive the blending weights from the number of documents."""
    weighted_sampler_alpha: float = Field(default=1.0, ge=0, le=1)
    """With weight_by_num_documents: weights follow p^alpha (1 - p), p a set's share of documents; below 1 lifts small
    sets."""
    split: str = "969, 30, 1"
    """Shares of data_path's documents for training, validation and test."""
    data_impl: Literal["mmap", "infer"] = "mmap"
    """Format of the data files; only memory-mapped .bin/.idx exist here."""
    num_workers: int = Field(default=2, ge=0, le=1024)
    """Loader processes per training process; 0 loads in the training process."""
    data_cache_dir: str | None = None
    """Folder for the sample-order files. Default: beside the data."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name in ("train", "valid", "test"):
            paths, weights = getattr(self, f"{name}_data_paths"), getattr(self, f"{name}_data_weights")
            if weights is not None and len(weights) != len(paths or []):
                raise ValueError(
                    f"{name}_data_weights: {len(weights)} weights for {len(paths or [])} {name}_data_paths; "
                    "give one weight for each path"
                )
            if weights is not None and (min(weights, default=0) < 0 or not 0 < sum(weights) < math.inf):
                raise ValueError(
                    f"{name}_data_weights: {shortened(weights)}: each must be at least 0, and one of them above 0"
                )
        if self.data_path and self.train_data_paths:
            raise ValueError("train_data_paths: data_path is given too; keep one of them")
        return self


TokenizerType = Literal["HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer", "TiktokenTokenizer", "CharLevelTokenizer"]


class TokenizerConfig(Section):
    """The tokenizer."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    """HFTokenizer: a tokenizer.json; GPT2BPETokenizer: vocab.json and merges.txt; SPMTokenizer: a sentencepiece model;
    TiktokenTokenizer: a ranks file or the name of an encoding; CharLevelTokenizer: bytes."""
    vocab_file: str | None = None
    """tokenizer.json, vocab.json of GPT-2, a sentencepiece .model, or a .tiktoken file or the name of an encoding."""
    merge_file: str | None = None
    """merges.txt of GPT-2."""


class CheckpointConfig(Section):
    """Saving and loading."""

    save: str | None = None
    """Folder for checkpoints; none are saved without it."""
    load: str | None = None
    """Folder of checkpoints to resume from; an empty or missing one means: start from scratch."""
    iteration: int | None = Field(default=None, ge=0)
    """Iteration to load instead of the latest one: the run is rolled back to it. Once that has saved, the same
    configuration goes on from what it saved."""
    strict_load: bool = False
    """true: stop where the latest checkpoint is missing or damaged, instead of going on from the newest whole one."""
    checkpoint_factor: int | None = Field(default=None, gt=0)
    """Iterations between checkpoints (checkpoint_scale linear), or the factor between them (log)."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """Checkpoints at multiples of checkpoint_factor, or at its powers."""
    extra_save_iters: list[Annotated[int, Field(ge=0)]] | None = None
    """Further iterations to save at; these checkpoints are never removed."""
    keep_last_n_checkpoints: int | None = Field(default=None, gt=0)
    """Remove older checkpoints than this many; extra_save_iters stay."""
    finetune: bool = False
    """Take only the weights of the loaded checkpoint: iteration, optimizer and data start anew."""
    no_load_optim: bool = False
    """Do not load optimizer states."""
    no_load_rng: bool = False
    """Do not load random-number states."""
    no_save_optim: bool = False
    """Do not save optimizer states; such a checkpoint cannot resume exactly."""
    eval_ckpt: str | None = None
    """Checkpoint for eval.py and generate.py: an official pytorch_model.bin or a checkpoint folder; wins over load."""
    pretrain_partial_init: Annotated[str, Field(min_length=1)] | None = None
    """Checkpoint of a smaller model that training starts from, with parameter tokens added up to the token counts given
    here; a run's folder, or an official pytorch_model.bin or training folder. Ignored once `load` has a checkpoint."""


class LoggingConfig(Section):
    """What a run reports, and where."""

    log_interval: int = Field(default=100, gt=0)
    """Iterations between log lines."""
    steps_per_print: int = Field(default=10, gt=0)
    """Handed to DeepSpeed, whose own progress lines are off; log_interval rules."""
    log_dir: str | None = None
    """Folder for metrics.jsonl (default: `save`) and for train.log, a copy of the console log (default: none)."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files; none without it."""
    use_wandb: bool = False
    """Log to Weights & Biases (pip install wandb); WANDB_MODE=offline works."""
    wandb_project: str = "neox"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group of the run."""
    wandb_team: str | None = None
    """Weights & Biases team."""
    wandb_host: str = "https://api.wandb.ai"
    """Weights & Biases server."""
    wall_clock_breakdown: bool = False
    """DeepSpeed's timers of forward, backward and step."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device that MFU is measured against. Default: the data sheet's dense 16-bit rate of a known
    GPU; MFU is left out elsewhere (CPUs, fp32, MIG slices, unknown GPUs)."""


class LaunchConfig(Section):
    """How deepy.py starts processes."""

    launcher: Literal["local", "pdsh", "openmpi", "mvapich", "slurm"] = "pdsh"
    """Launcher for several nodes; on one node processes start locally whatever it says."""
    deepspeed_slurm: bool = False
    """true: start through Slurm even without a hostfile."""
    hostfile: str | None = None
    """Hostfile of the nodes (`name slots=8` a line). Default: DLTS_HOSTFILE in the environment."""
    include: str | None = None
    """Nodes and slots to use, in DeepSpeed's syntax."""
    exclude: str | None = None
    """Nodes and slots to leave out, in DeepSpeed's syntax."""
    num_nodes: int = Field(default=-1, ge=-1)
    """Number of nodes of the hostfile to use; -1 means all."""
    num_gpus: int | None = Field(default=None, gt=0, le=65_536)
    """Processes per node. Default: one per GPU, or one on a machine without GPUs."""
    master_addr: str | None = None
    """Address of the first node. Default: from the launcher or MASTER_ADDR."""
    master_port: int = Field(default=29500, gt=0, lt=65536)
    """Port of the first node."""
    no_ssh_check: bool = False
    """Do not test ssh to the nodes first."""
    force_multi: bool = False
    """Use the multi-node launcher for one node too."""
    launcher_args: str = ""
    """Further arguments of the multi-node launcher (srun, mpirun or pdsh), as on a shell command line."""
    comment: str | None = None
    """Comment for the Slurm job."""
    account: str | None = None
    """Account of the Slurm job."""
    distributed_backend: Literal["nccl", "gloo", "mpi"] | None = None
    """Backend of torch.distributed. nccl asks for GPUs: without one training is refused. gloo lets it run on CPUs.
    Default: nccl where there is a GPU, gloo elsewhere."""
    distributed_timeout_minutes: int = Field(default=10, gt=0, le=1_000_000)
    """How long a collective of training waits for a rank before the run ends. Work that one rank does for all, such as
    reading a checkpoint's checksums, does not count."""
    ranks_per_gpu: int = Field(default=1, gt=0, le=1024)
    """Processes that share a GPU, for tests of layouts on one card; above 1 only with distributed_backend: gloo."""

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            raise ValueError(f"launcher_args: {shortened(self.launcher_args)}: {error}; close what is quoted") from None
        if self.num_nodes == 0:
            raise ValueError("num_nodes: 0 nodes run nothing; give a number of nodes, or -1 for all")
        if self.ranks_per_gpu > 1 and self.distributed_backend != "gloo":
            raise ValueError(
                f"ranks_per_gpu: NCCL refuses {self.ranks_per_gpu} processes on one GPU; set distributed_backend: gloo"
            )
        return self


class EvaluationConfig(Section):
    """Zero-shot evaluation with lm-eval."""

    eval_tasks: list[str] | None = None
    """Names of lm-eval tasks."""
    eval_results_prefix: str = ""
    """Prefix of the results file (JSON)."""
    eval_batch_size: int | Literal["auto"] = 8
    """Requests evaluated together, or auto: as many as fit in memory."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt. Default: as the task says."""
    eval_limit: int | None = Field(default=None, gt=0)
    """Documents per task; all without it."""
    include_path: str | None = None
    """Folder with further task YAMLs."""
    perplexity_data: str | None = None
    """Text whose perplexity eval.py measures: the prefix of a .bin/.idx pair, or a .txt or .jsonl file."""
    perplexity_stride: int | None = Field(default=None, gt=0)
    """Tokens by which the window moves on, at most seq_length; a smaller one gives each token a longer context and
    takes longer. Default: half of seq_length."""

    @field_validator("eval_batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and value > 0):
            return value
        raise ValueError(f"eval_batch_size: expected a positive whole number or auto, got {shortened(repr(value))}")


class GenerationConfig(Section):
    """Text generation."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    """What generate.py does."""
    maximum_tokens: int = Field(default=64, gt=0)
    """Most tokens generated for a prompt."""
    prompt_end: str = Field(default="\n", min_length=1)
    """End of each prompt, in a file of prompts and in interactive mode."""
    temperature: float = Field(default=0.0, ge=0, le=MAX_FACTOR)
    """Softmax temperature; 0 means greedy, whatever the filters say."""
    top_k: int = Field(default=0, ge=0)
    """Sample among this many most probable tokens; 0 is off."""
    top_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among the most probable tokens of this total probability; 0 is off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among tokens at least this times as probable as the most probable one; 0 is off."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """Positive logits of tokens seen before are divided by it, negative ones multiplied; 1 is off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a text, one or a list; the text is cut before the first of them."""
    logprobs: bool = False
    """Write the log-probability of each generated token too."""
    recompute: bool = False
    """Generate without a key-value cache (slow; for checks)."""
    num_samples: int = Field(default=1, gt=0)
    """Texts of unconditional generation."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Texts of each prompt of a file."""
    interactive_history: bool = True
    """Answer a typed prompt in the context of the earlier ones; false answers each on its own, as GPT-NeoX does."""
    sample_input_file: str | None = None
    """File of prompts that end with prompt_end; a .jsonl file has objects with a prompt and settings of its own."""
    sample_output_file: str = "samples.txt"
    """File the texts are written to, one JSON object a line."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


SECTIONS = (
    "model", "optimization", "precision", "parallel", "scaling", "training", "data", "tokenizer", "checkpoint",
    "logging", "launch", "evaluation", "generation",
)  # fmt: skip


class RunConfig(Section):
    """One run: everything that the YAML files and the command line say, validated and frozen."""

    model: ModelConfig
    optimization: OptimizationConfig = OptimizationConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    scaling: ScalingConfig = ScalingConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def lr_decay_iters(self) -> int:
        """Iterations of the learning-rate decay: lr_decay_iters, else train_iters."""
        iters = self.optimization.lr_decay_iters or self.training.train_iters
        if iters is None:
            raise UserError("train_iters: missing; give the number of updates of the run")
        return iters

    def gpu_request(self) -> tuple[str | None, list[str]]:
        """What asks for a GPU, as `key: value`, and the overrides with which the run would train on a CPU.

        fp16 and flash-attn have no CPU form. bf16 has a slow one, which distributed_backend: gloo asks for.
        """
        found = []
        dtype, backend = self.precision.dtype, self.launch.distributed_backend
        if self.training.attention_backend == "flash_attn":
            found.append(("attention_backend: flash_attn", "attention_backend=sdpa"))
        if dtype == "fp16":
            found.append(("precision: fp16", "precision=bf16"))
        if backend == "nccl" or (dtype != "fp32" and backend is None):
            asking = "precision: bf16" if backend is None else "distributed_backend: nccl"
            found.append((asking, "distributed_backend=gloo"))
        return (found[0][0] if found else None), [override for _, override in found]

    def update_size(self, data_ranks: int) -> UpdateSize:
        """What an update of so many data ranks reads; raises UserError when the batch keys do not fit each other."""
        keys = self.training
        batch = keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps, keys.train_batch_size
        return UpdateSize.of(*batch, data_ranks, self.model.seq_length)

    def with_vocabulary(self, size: int) -> RunConfig:
        """A new frozen config whose model fits a tokenizer of `size` ids."""
        return self.model_copy(update={"model": self.model.with_vocabulary(size)})

    def flat(self) -> dict[str, Any]:
        """All keys in the flat form of the YAML files, ready to be dumped and loaded again."""
        return {key: value for name in SECTIONS for key, value in getattr(self, name).model_dump(mode="json").items()}
