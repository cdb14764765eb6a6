"""Models of the experiment, whose shapes are the published ones at a small width, and how long they train.

The published models have 0.75 d tokens a projection and grow to 1.75 d (the released pair, d 1024) or to 2.8 d, 6.3 d
and 11.2 d (the paper's chain, d 768); the feed-forward has four times as many. The base is trained with 890 tokens a
parameter, and a stage after a growth has a tenth or a fifth of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.sections.model import ModelConfig
from megatron.model import LanguageModel

WIDTH, LAYERS, HEAD_DIM, SEQUENCE, BATCH = 32, 2, 16, 128, 2
VOCABULARY = 258
"""The bytes, the end of a document, and one merge."""
TOKENS_PER_UPDATE = SEQUENCE * BATCH
TOKENS_PER_PARAMETER = 890
"""Of the released base model: 354M parameters, 600,000 updates of 512 x 1024 tokens."""
HELD_OUT_SEQUENCES = 512
STAGES = {"tenth": 0.1, "fifth": 0.2, "two fifths": 0.4, "all": 1.0}
"""Lengths of a run, as parts of the base's."""

Kind = Literal["tokenformer", "transformer"]


@dataclass(frozen=True)
class Size:
    """One shape."""

    name: str
    kind: Kind
    slots: int = 0
    """TokenFormer: tokens of each projection; the feed-forward has four times as many."""
    width: int = WIDTH
    inner: int = 4 * WIDTH
    """Transformer: inner width of the feed-forward."""
    layers: int = LAYERS
    milliseconds: float = 0.0
    """Of one core for an update; for estimates."""

    def model(self) -> dict[str, Any]:
        """The model's configuration keys; initial sizes and rates are scaled from the base of its kind (muP)."""
        keys: dict[str, Any] = {
            "num_layers": self.layers, "hidden_size": self.width, "num_attention_heads": self.width // HEAD_DIM,
            "seq_length": SEQUENCE, "rotary_pct": 0.25, "norm": "layernorm_nonparam", "final_norm": "layernorm",
            "make_vocab_size_divisible_by": 2, "use_mup": True, "mup_base_hidden_size": WIDTH,
            "mup_base_num_attention_heads": WIDTH // HEAD_DIM, "mup_base_num_layers": LAYERS,
        }  # fmt: skip
        if self.kind == "transformer":
            return keys | {"intermediate_size": self.inner, "mup_base_intermediate_size": 4 * WIDTH}
        base = SIZES["base"].slots
        return keys | {
            "init_method_std": 0.1,
            **_counts("", self.slots), **_counts("mup_base_", base),
        }  # fmt: skip

    def config(self) -> ModelConfig:
        """The model, vocabulary included."""
        return ModelConfig(**self.model()).with_vocabulary(VOCABULARY)

    def parameters(self) -> int:
        """All parameters, embedding included."""
        return LanguageModel(self.config(), device="meta").num_parameters()


def _counts(prefix: str, slots: int) -> dict[str, int]:
    return {f"{prefix}qkv_slot_num": slots, f"{prefix}proj_slot_num": slots, f"{prefix}ffn_slot_num": 4 * slots}


SIZES = {
    size.name: size
    for size in (
        Size("base", "tokenformer", 24, milliseconds=5.7),
        Size("grown", "tokenformer", 56, milliseconds=6.6),
        Size("tripled", "tokenformer", 89, milliseconds=7.8),
        Size("chain 2", "tokenformer", 89, milliseconds=7.8),
        Size("chain 3", "tokenformer", 202, milliseconds=12.2),
        Size("chain 4", "tokenformer", 359, milliseconds=20.0),
        Size("transformer", "transformer", milliseconds=4.4),
        Size("wide", "transformer", width=2 * WIDTH, milliseconds=6.0),
        Size("double", "transformer", width=2 * WIDTH, inner=8 * WIDTH, milliseconds=7.0),
        Size("deep", "transformer", layers=2 * LAYERS, milliseconds=6.3),
    )
}
"""`grown` is the released growth (2.3 times the tokens, 2.0 times the parameters here), `chain 2` to `4` the paper's;
`tripled` is the first of those at once, as another factor (3.0 times the parameters);
Net2Net leads to `wide`, cloned widths to `double`, stacked layers to `deep`."""


def base_updates() -> int:
    """Updates of the base, at TOKENS_PER_PARAMETER."""
    return round(TOKENS_PER_PARAMETER * SIZES["base"].parameters() / TOKENS_PER_UPDATE)
