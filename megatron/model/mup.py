"""muP: by what initial sizes and learning rates of a model differ from those of its base model (docs/mup.md).

With r the ratio of a size to that of the base model, and l = 1 / sqrt(r of num_layers):

| parameter                                     | initial size      | rate (Adam)   |
|-----------------------------------------------|-------------------|---------------|
| matrix of fan-in f                            | 1 / sqrt(r of f)  | l / (r of f)  |
| also, where it joins the residual stream      | l                 | l             |
| also, where it makes queries, h the head size | 1 / sqrt(r of h)  | the same      |
| vector of a block                             | 1                 | l             |
| embedding                                     | 1                 | 1             |
| what makes logits: final norm, or untied head | 1 / (r of d)      | 1 / (r of d)  |

The fan-in of keys is the width d, that of values the number of tokens n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron.config.sections.model import ModelSection
from megatron.config.sections.mup import MupKeys
from megatron.mpu.roles import Role


class Scale(NamedTuple):
    """Factors on what a parameter is in the base model."""

    initial: float = 1.0
    """On its initial size: the standard deviation of a matrix, the value of a norm's weight."""
    rate: float = 1.0
    """On its learning rate."""

    def times(self, initial: float, rate: float) -> Scale:
        """Both factors."""
        return Scale(self.initial * initial, self.rate * rate)


def ratio(config: ModelSection, key: str) -> float:
    """A size over that of the base model; 1 without muP, or where the base model has the same."""
    if not (isinstance(config, MupKeys) and config.use_mup):
        return 1.0
    own, base = getattr(config, key), getattr(config, f"mup_base_{key}")
    if key == "intermediate_size" and own is None:  # both are 4 * hidden_size, unless the base model's is given
        inner = 4 * config.hidden_size
        return inner / base if base else ratio(config, "hidden_size")
    return own / base if base and own else 1.0


def fan_in_ratio(role: Role, config: ModelSection) -> float:
    """What `ratio` is of the number of terms that each output of a matrix sums."""
    if role.what == "value_tokens":
        return ratio(config, f"{role.projection}_slot_num")
    if role.what == "output_matrix" and role.projection == "ffn":
        return ratio(config, "intermediate_size")
    return ratio(config, "hidden_size")


def fan_out_ratio(role: Role, config: ModelSection) -> float:
    """What `ratio` is of the number of a matrix's outputs."""
    if role.what in ("embedding", "head"):
        return 1.0
    if role.what == "key_tokens":
        return ratio(config, f"{role.projection}_slot_num")
    if role.what == "matrix" and role.projection == "ffn":
        return ratio(config, "intermediate_size")
    return ratio(config, "hidden_size")


def mup_scale(role: Role, config: ModelSection) -> Scale:
    """How a parameter of this role differs from that of the base model; ones without muP."""
    if not (isinstance(config, MupKeys) and config.use_mup):
        return Scale()
    if role.what == "embedding":
        return _initially(Scale(config.mup_embedding_mult, config.mup_embedding_mult), config)
    if role.what == "head" or role.feeds == "logits":
        return _of_logits(role, config)
    depth = 1.0 / math.sqrt(ratio(config, "num_layers"))
    scale = Scale(1.0, depth)
    if not role.is_vector:
        fan_in = fan_in_ratio(role, config)
        scale = _initially(scale.times(1.0 / math.sqrt(fan_in), 1.0 / fan_in), config)
    if role.feeds == "residual":
        scale = scale.times(depth, depth)
    if role.feeds == "scores":
        heads = ratio(config, "num_attention_heads")
        temperature = math.sqrt(heads / ratio(config, "hidden_size")) / config.mup_attn_temp
        scale = scale.times(temperature, temperature)
    return scale


def _initially(scale: Scale, config: MupKeys) -> Scale:
    return scale.times(config.mup_init_scale, 1.0)


def _of_logits(role: Role, config: ModelSection) -> Scale:
    """A tied embedding is larger by what it is multiplied by, and the final norm takes that out of the logits."""
    assert isinstance(config, MupKeys)
    factor = 1.0 / (ratio(config, "hidden_size") * config.mup_output_temp)
    if role.what == "head":
        return _initially(Scale(factor, factor), config)
    if getattr(config, "no_weight_tying", False):
        return Scale()
    factor /= config.mup_embedding_mult
    return Scale(factor, factor)
