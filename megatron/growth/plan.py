"""From token counts to the configuration of the grown model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from megatron.config.sections.model import TOKENFORMER, ModelSection
from megatron.config.sections.scaling import NewKeys
from megatron.errors import UserError

Kind = Literal["qkv", "proj", "ffn"]
Model = TypeVar("Model", bound=ModelSection)
KINDS: tuple[Kind, ...] = ("qkv", "proj", "ffn")


@dataclass(frozen=True)
class TokenCounts:
    """What layers grow to."""

    qkv: int | None = None
    """Tokens afterwards of each query, key and value; None: as many as there are."""
    proj: int | None = None
    """The same of the attention output projection."""
    ffn: int | None = None
    """The same of the feed-forward."""
    layers: tuple[int, ...] | None = None
    """Blocks that grow, from 0; None means all TokenFormer blocks."""
    new_keys: NewKeys = "zero"
    """What the new keys start as."""

    def of(self, kind: Kind) -> int | None:
        """The count called `kind`."""
        count: int | None = getattr(self, kind)
        return count


def segments_of(config: ModelSection, kind: Kind) -> list[list[int]]:
    """For each block the tokens that each growth gave it; a Transformer block has none."""
    if config.token_segments:
        return [list(block) for block in config.token_segments[kind]]
    count = getattr(config, f"{kind}_slot_num") or 0
    return [[count if block == TOKENFORMER else 0] for block in config.layer_kinds]


def grown_config(config: Model, counts: TokenCounts) -> Model:
    """The model with one more growth: `counts` tokens in the layers that grow.

    Raises: UserError when a count is smaller than what a layer has, a layer is not there or not a TokenFormer block,
        or the activation cannot grow to the count exactly with such keys.
    """
    if counts.new_keys == "rotated" and config.norm_activation_type != "l2_norm_gelu":
        raise UserError(
            f"new_keys: rotated needs norm_activation_type l2_norm_gelu, this model has {config.norm_activation_type}; "
            "leave new_keys at zero"
        )
    blocks = _growing_blocks(config, counts.layers)
    segments = {kind: segments_of(config, kind) for kind in KINDS}
    for kind in KINDS:
        target = counts.of(kind)
        for index, block in enumerate(segments[kind]):
            have = sum(block)
            wanted = target if target is not None and index in blocks else have
            _check_count(config, kind, index, have, wanted)
            if counts.new_keys == "rotated":
                _check_rotation(kind, index, have, wanted, config.hidden_size)
            block.append(wanted - have)
    totals = {f"{kind}_slot_num": max(map(sum, segments[kind])) or None for kind in KINDS}
    return type(config)(**{**config.model_dump(), **totals, "token_segments": segments})


def _growing_blocks(config: ModelSection, layers: Iterable[int] | None) -> set[int]:
    able = {index for index, kind in enumerate(config.layer_kinds) if kind == TOKENFORMER}
    if not able:
        raise UserError("the model has no tokenformer blocks; only parameter tokens can be added")
    if layers is None:
        return able
    for index in layers:
        if index not in able:
            raise UserError(f"layers: {index} is not a tokenformer block of this model; it has {_ranges(able)}")
    return set(layers)


def _ranges(indices: set[int]) -> str:
    ordered = sorted(indices)
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def _check_count(config: ModelSection, kind: Kind, index: int, have: int, wanted: int) -> None:
    if wanted < have:
        raise UserError(
            f"{kind}_slot_num: {wanted} is fewer than the {have} tokens of layer {index}; tokens can only be added"
        )
    if config.norm_activation_type == "softmax" and have and wanted % have:
        raise UserError(
            f"{kind}_slot_num: with norm_activation_type softmax every key has to be duplicated a whole number of "
            f"times: {wanted} is no multiple of {have}; choose {have * (wanted // have + 1)}, or a GELU activation"
        )


def _check_rotation(kind: Kind, index: int, have: int, wanted: int, width: int) -> None:
    fewest = min(have, width)  # as many as the old keys have dimensions
    if have < wanted < have + fewest:
        raise UserError(
            f"{kind}_slot_num: {wanted} are {wanted - have} more than the {have} tokens of layer {index}; new_keys "
            f"rotated needs {fewest} more: grow to {have + fewest}, or leave new_keys at zero"
        )


def describe(before: ModelSection, after: ModelSection) -> str:
    """One line: which counts a growth changes, for example `qkv 768 -> 1792, ffn 3072 -> 7168 in layers 0 to 23`."""
    parts, layers = [], set[int]()
    for kind in KINDS:
        pairs = list(zip(segments_of(before, kind), segments_of(after, kind), strict=True))
        grown = {index for index, (old, new) in enumerate(pairs) if sum(new) > sum(old)}
        if grown:
            old, new = pairs[min(grown)]
            parts.append(f"{kind} {sum(old)} -> {sum(new)}")
            layers |= grown
    where = f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}" if layers else ""
    return f"{', '.join(parts)} in {where}" if parts else "no tokens"
