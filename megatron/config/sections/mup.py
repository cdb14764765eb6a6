"""Keys of muP: initial sizes and learning rates that carry over from a small model (docs/mup.md)."""

from __future__ import annotations

from pydantic import Field

from megatron.config.sections.base import MAX_FACTOR, MAX_SIZE, Section


class MupKeys(Section):
    """What a model section says of muP, beside its sizes."""

    use_mup: bool = False
    """Scale initial sizes and learning rates from a base model, whose sizes are the `mup_base_*` keys, to this one, so
    that what is best for the base model is best here (docs/mup.md). A model of the base sizes is left as it is."""
    mup_base_hidden_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """hidden_size of the base model. Default of this and the other base sizes: that of the model itself."""
    mup_base_num_attention_heads: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """num_attention_heads of the base model."""
    mup_base_num_layers: int | None = Field(default=None, gt=0, le=10_000)
    """num_layers of the base model."""
    mup_base_qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """qkv_slot_num of the base model."""
    mup_base_proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """proj_slot_num of the base model."""
    mup_base_ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """ffn_slot_num of the base model."""
    mup_base_intermediate_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """intermediate_size of the base model. Default: 4 * mup_base_hidden_size where intermediate_size is not given."""
    mup_init_scale: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """Factor on the initial size of every matrix."""
    mup_attn_temp: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """What attention's logits are divided by. It goes into the queries' initial size and rate."""
    mup_output_temp: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """What the model's logits are divided by. It goes into the initial size and rate of the final norm, or of an untied
    head."""
    mup_embedding_mult: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """What the embedding is multiplied by. It goes into its initial size and rate."""
