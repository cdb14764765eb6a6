"""The canonical names of a language model's tensors: their order, and what belongs together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "head.final_linear.weight"
TAU = "tau_tokens"
"""What a layer's number of tokens at its first, its tau^2, is called. It is data: the other names are parameters'."""

_PARTS = ("embedding", "final_norm", "layers", "head")
_LAYERS = (
    "input_layernorm", "attention.query", "attention.key", "attention.value", "attention.proj",
    "post_attention_layernorm", "mlp", "mlp.fc_in", "mlp.fc_out",
)  # fmt: skip
SEGMENT = re.compile(r"(.+\.)(key|value)_tokens_(\d+)")


def in_model_order(names: Iterable[str]) -> list[str]:
    """The names in the order in which LanguageModel has them; unknown ones at the end of their part."""
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, int, int, int, str]:
    part, _, rest = name.partition(".")
    number = 0
    if part == "layers":
        digits, _, rest = rest.partition(".")
        number = int(digits) if digits.isdecimal() else 0
    layer, _, leaf = rest.rpartition(".")
    segment = SEGMENT.fullmatch(name)
    # Of each segment its keys, then its values; tau_tokens after them, as buffers are; a weight before its bias.
    kind = 2 * int(segment[3]) + (segment[2] == "value") if segment else 1 << 62 if leaf in (TAU, "bias") else 0
    return _index(_PARTS, part), number, _index(_LAYERS, layer), kind, name


def _index(known: tuple[str, ...], word: str) -> int:
    return known.index(word) if word in known else len(known)


def is_parameter(name: str) -> bool:
    """Is it a parameter's name, not a buffer's?"""
    return not name.endswith(f".{TAU}")


def projection_of(layer: str) -> Literal["qkv", "proj", "ffn"]:
    """Which count of tokens the Pattention of this name has: `layers.0.attention.proj` has that of proj."""
    last = layer.rpartition(".")[2]
    return "proj" if last == "proj" else "ffn" if last == "mlp" else "qkv"
