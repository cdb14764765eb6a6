"""Section `model`: what a checkpoint's tensors mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron.config.sections.base import MAX_SIZE, Section
from megatron.config.sections.mup import MupKeys
from megatron.errors import ConfigError
from megatron.text import shortened

TOKENFORMER = "tokenformer"
TRANSFORMER_KINDS = ("global", "flash")
PATTENTION_ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")

PattentionActivation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
RowNorm = Literal["joint", "segment"]
"""Do the tokens of a growth share the row norm of those before them, or have they one of their own?"""
Norm = Literal["layernorm", "layernorm_nonparam", "rmsnorm"]
InitMethod = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "wang_init", "small_init", "xavier_uniform",
    "xavier_normal", "zero",
]  # fmt: skip


@dataclass(frozen=True)
class Initialisation:
    """How matrices start (megatron.model.init)."""

    method: InitMethod
    """That of matrices in general."""
    output: InitMethod
    """That of matrices whose output joins the residual stream."""
    std: float
    """Standard deviation of normal, and of the methods that scale it."""
    logit_scale: float = 0.0
    """Logarithm of a learned factor on logits."""


class ModelSection(Section):
    """What growth, initialisation and the cuts into stages and shares read of a network, whatever it learns."""

    task: ClassVar[str]
    """The name under which megatron.tasks knows what such a model learns."""
    needs_data: ClassVar[bool] = True
    """Is a run of no use without data_path or train_data_paths?"""
    samples: ClassVar[type[Section]] = Section
    """Section of the keys that are about its kind of samples; empty where the section `data` says all."""
    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """By role of a parameter outside the blocks, the keys that set its first and its second dimension: those of the
    parameter's tower, where there are several (`towers`)."""
    placeholders: ClassVar[Mapping[str, Any]] = {}
    """Values of needed keys of its own that are missing or wrong, while other keys are looked at."""

    num_layers: int = Field(gt=0, le=10_000)
    """Number of blocks L."""
    hidden_size: int = Field(gt=0, le=MAX_SIZE)
    """Width d of the residual stream."""
    num_attention_heads: int = Field(gt=0, le=MAX_SIZE)
    """Number of attention heads; must divide hidden_size."""
    attention_config: list[Any] | None = None
    """Kind of each block in GPT-NeoX form, for example [[["tokenformer"], 12]]. The kinds are tokenformer and
    global (a Transformer block; flash means the same); the number may be "all". Default: tokenformer where token
    counts are given, else global."""
    qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of each of the query, key and value projections (TokenFormer blocks)."""
    proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the attention output projection (TokenFormer blocks)."""
    ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the feed-forward Pattention (TokenFormer blocks)."""
    token_segments: dict[Literal["qkv", "proj", "ffn"], list[list[Annotated[int, Field(ge=0)]]]] | None = None
    """Written by growth, not by hand: for each block, the tokens it was made with and those that each growth added.
    The slot numbers are then the largest of these sums."""
    segment_norms: list[RowNorm] | None = None
    """Written by growth, not by hand: the row_norm of each of these segments, where one has a norm of its own."""
    norm_activation_type: PattentionActivation = "l2_norm_gelu"
    """How Pattention turns scores into weights (theta of the paper). l2_norm_gelu is the published form."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            reason = f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}"
            raise ConfigError("num_attention_heads", reason, "choose a divisor of it", beside=["hidden_size"])
        for kind, blocks in (self.token_segments or {}).items():
            self._check_segments(kind, blocks)
        if self.segment_norms is not None and {len(self.segment_norms)} != self._numbers_of_segments():
            reason = f"{len(self.segment_norms)} norms do not belong to token_segments"
            raise ConfigError("segment_norms", reason, "leave it to growth", beside=["token_segments"])
        return self

    def _numbers_of_segments(self) -> set[int]:
        return {len(block) for blocks in (self.token_segments or {}).values() for block in blocks}

    def _check_segments(self, kind: str, blocks: list[list[int]]) -> None:
        slots, sums = getattr(self, f"{kind}_slot_num") or 0, [sum(block) for block in blocks]
        if len(blocks) != self.num_layers or len({len(block) for block in blocks}) != 1 or max(sums) != slots:
            reason = (
                f"{kind} of {len(blocks)} blocks with up to {max(sums, default=0)} tokens does not belong to "
                f"num_layers {self.num_layers} and {kind}_slot_num {slots}"
            )
            beside = ["num_layers", f"{kind}_slot_num"]
            raise ConfigError("token_segments", reason, "leave it to growth", beside=beside)

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
    def norm_groups(self) -> int:
        """How many row norms the tokens of a layer have at most."""
        return 1 + (self.segment_norms or [])[1:].count("segment")

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def towers(self) -> Mapping[str, ModelSection]:
        """The section of each part of the network with blocks and sizes of its own, by what its names begin with."""
        return {"": self}

    def tower_of(self, name: str) -> tuple[str, ModelSection]:
        """What the names of the tower begin with that a tensor is in, and the section of it."""
        return next((item for item in self.towers().items() if name.startswith(item[0])), ("", self))

    def with_towers(self, towers: Mapping[str, ModelSection]) -> ModelSection:
        """The same network with such towers in place of its `towers()`."""
        (section,) = towers.values()
        return section

    def spelled(self, key: str) -> str:
        """A key of this section as a configuration has it, dotted where it is in a table."""
        return key

    def tokens_per_sample(self) -> int:
        """Vectors of the residual stream that one training sample has."""
        raise NotImplementedError

    def cannot_shard_tokens(self, ranks: int) -> ConfigError | None:
        """Why so many ranks cannot share the tokens of a sample between the projections; None where they can."""
        tokens = self.tokens_per_sample()
        if tokens % ranks == 0:
            return None
        reason = f"seq_length {tokens} is no multiple of model_parallel_size {ranks}"
        advice = "change one of them or set sequence_parallel: false"
        return ConfigError("sequence_parallel", reason, advice, beside=["seq_length", "model_parallel_size"])

    def initialisation(self) -> Initialisation:
        """How the matrices of this network start."""
        raise NotImplementedError


class BlocksSection(ModelSection):
    """A network whose body is the blocks of megatron.model.blocks, whatever its input and output are."""

    norm: Norm = "layernorm"
    """Norm of the blocks; layernorm_nonparam (published TokenFormer) has neither weight nor bias."""
    final_norm: Norm | None = None
    """Norm before the logits. Default: the block norm."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of layernorm, inside the square root."""
    rms_norm_epsilon: float = Field(default=1e-8, ge=0, le=1)
    """Epsilon of rmsnorm, added to the root mean square outside the square root."""
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
    """Initialisation of Pattention values and Transformer output matrices; the published models use wang_init.
    scaled_normal is normal with its standard deviation divided by sqrt(2 * num_layers),
    single_residual_scaled_normal by sqrt(num_layers)."""
    init_method_std: float = Field(default=0.02, gt=0, le=1000)
    """Standard deviation of normal and scaled_normal."""

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        try:
            kinds = self.layer_kinds
        except ValueError as error:  # an export holds the same code, and knows no ConfigError
            reason = str(error).removeprefix("attention_config: ")
            raise ConfigError("attention_config", reason, beside=["num_layers"]) from None
        if TOKENFORMER in kinds:
            for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
                if getattr(self, key) is None:
                    advice = "give the number of parameter tokens"
                    raise ConfigError(key, "a tokenformer block needs it", advice, beside=[key])
        return self

    @property
    def final_norm_kind(self) -> Norm:
        """The norm before the logits."""
        return self.final_norm or self.norm

    def initialisation(self) -> Initialisation:
        """How the matrices of this network start."""
        return Initialisation(self.init_method, self.output_layer_init_method, self.init_method_std)


class VocabularySection(BlocksSection):
    """A network that reads token ids."""

    make_vocab_size_divisible_by: int = Field(default=128, gt=0, le=MAX_SIZE)
    """The vocabulary is padded to a multiple of this, whatever the layout of the run."""
    vocab_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Number of token ids of the tokenizer. Filled in from the tokenizer and rarely given by hand; a larger number
    makes more rows."""
    padded_vocab_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Rows of the embedding. Default: vocab_size padded to make_vocab_size_divisible_by."""

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        if self.padded_vocab_size and self.vocab_size and self.vocab_size > self.padded_vocab_size:
            raise _too_many_ids(self.padded_vocab_size, self.vocab_size)
        return self

    def with_vocabulary(self, size: int) -> Self:
        """A new config for a tokenizer of `size` ids, padded; raises UserError when they do not fit."""
        padded = self.padded_vocab_size
        if padded is not None and size > padded:
            raise _too_many_ids(padded, size)
        if self.vocab_size is not None and size > self.vocab_size:
            reason = f"{self.vocab_size} is below the {size} token ids of the tokenizer"
            raise ConfigError("vocab_size", reason, "remove it, or choose another tokenizer")
        if padded is None:
            multiple = self.make_vocab_size_divisible_by
            padded = math.ceil(max(size, self.vocab_size or 0) / multiple) * multiple
        return type(self)(**{**self.model_dump(), "vocab_size": size, "padded_vocab_size": padded})


def _too_many_ids(rows: int, size: int) -> ConfigError:
    reason = f"{rows} rows cannot hold the vocabulary of {size} token ids"
    return ConfigError("padded_vocab_size", reason, "raise it or choose another tokenizer")


class ModelConfig(MupKeys, VocabularySection):
    """The network: what a checkpoint's tensors mean."""

    task: ClassVar[str] = "language"
    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {
        what: ("padded_vocab_size", "hidden_size") for what in ("embedding", "head")
    }

    seq_length: int = Field(gt=0, le=MAX_SIZE)
    """Tokens a training sample holds; also the context length at evaluation and generation."""
    max_position_embeddings: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Positions that the rotary tables are first built for (65,536 at most); they grow on demand. Default:
    seq_length."""
    pos_emb: Literal["rotary", "none"] = "rotary"
    """Position information: rotary embeddings or none."""
    rotary_pct: float = Field(default=1.0, gt=0, le=1)
    """Fraction of each head's dimensions that is rotated; the published TokenFormer and Pythia models use 0.25."""
    rotary_emb_base: float = Field(default=10000, gt=0, le=1e12)
    """Base of the rotary frequencies."""
    no_weight_tying: bool = False
    """true: the logits come from a matrix of their own; false: from the transposed embedding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rotary_dim % 2:
            reason = (
                f"{self.rotary_pct} of a head of {self.head_dim} dimensions (hidden_size over num_attention_heads) "
                f"rotates {self.rotary_dim} of them, which must be an even number"
            )
            raise ConfigError("rotary_pct", reason, beside=["hidden_size", "num_attention_heads"])
        return self

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of one head; 0 without rotary embeddings."""
        return int(self.head_dim * self.rotary_pct) if self.pos_emb == "rotary" else 0

    def tokens_per_sample(self) -> int:
        """Predictions that one training sample asks for: seq_length."""
        return self.seq_length


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


def language_section(model: ModelSection) -> ModelConfig:
    """The section of a language model. Raises ConfigError for one that learns something else."""
    if not isinstance(model, ModelConfig) or model.task != ModelConfig.task:
        raise ConfigError("task", f"this is for language models, and not for what learns '{model.task}'")
    return model


MODEL_SECTIONS: dict[str, type[ModelSection]] = {ModelConfig.task: ModelConfig}
"""By task. megatron.tasks.register adds to it."""


def model_section(task: Any) -> type[ModelSection]:
    """The model section of a task. Raises ValueError, which names those there are."""
    if not isinstance(task, str) or task not in MODEL_SECTIONS:
        raise ValueError(f"there is no task '{shortened(task)}'; there are {', '.join(MODEL_SECTIONS)}")
    return MODEL_SECTIONS[task]
