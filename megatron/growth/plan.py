"""From token counts to the configuration of the grown model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from megatron.config.sections.model import TOKENFORMER, ModelSection, RowNorm
from megatron.config.sections.scaling import NewKeys, Tower, initial_keys
from megatron.errors import UserError
from megatron.model.pattention import norm_groups

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
    new_keys: NewKeys | None = None
    """What the new keys start as; None: random with row_norm segment, else zero."""
    row_norm: RowNorm = "joint"
    """Whether the new tokens share the row norm of those before them, or have their own (segment)."""
    tower: Tower | None = None
    """Which network of a model with an image tower and a text tower; None means both."""

    @property
    def keys(self) -> NewKeys:
        """`new_keys`, known. Raises ConfigError for keys that cannot learn with this row norm."""
        return initial_keys(self.new_keys, self.row_norm)

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
        or the activation cannot grow to the count exactly with such keys, which `official` are not to be.
    """
    growing = _growing_towers(config, counts.tower)
    return _with_growth(config, {prefix: counts for prefix in growing}, counts)


def grown_to(config: Model, target: ModelSection, new_keys: NewKeys | None, row_norm: RowNorm) -> Model:
    """The model with one more growth, after which its layers have as many tokens as those of `target`."""
    how = TokenCounts(new_keys=new_keys, row_norm=row_norm)
    growing = _growing_towers(config, None)
    slots = {
        prefix: [getattr(tower, f"{kind}_slot_num") for kind in KINDS] for prefix, tower in target.towers().items()
    }
    sizes = {prefix: dict(zip(KINDS, slots[prefix], strict=True)) for prefix in growing}
    return _with_growth(config, {prefix: replace(how, **of_tower) for prefix, of_tower in sizes.items()}, how)


def adds_tokens(config: ModelSection) -> bool:
    """Did the last growth of a model add any?"""
    return any(
        block[-1] for tower in config.towers().values() for blocks in (tower.token_segments or {}).values()
        for block in blocks
    )  # fmt: skip


def _growing_towers(config: ModelSection, asked: Tower | None) -> list[str]:
    """Prefixes of the towers that grow: those that are asked for, else all that can."""
    towers = config.towers()
    if asked is not None and len(towers) == 1:
        raise UserError(f"tower: {asked} of a model that has no towers; leave it out")
    if asked not in (None, "both"):
        return [f"{asked}."]
    able = [prefix for prefix, tower in towers.items() if TOKENFORMER in tower.layer_kinds]
    return able if asked is None and able else list(towers)


def _with_growth(config: Model, counts: Mapping[str, TokenCounts], how: TokenCounts) -> Model:
    """The model with one more growth, of the towers that have counts; the others get a segment without tokens."""
    towers = {
        prefix: _grown_tower(tower, counts[prefix]) if prefix in counts else _with_segments(tower, {}, how.row_norm)
        for prefix, tower in config.towers().items()
    }
    grown = config.with_towers(towers)
    assert isinstance(grown, type(config))
    return grown


def _grown_tower(config: ModelSection, counts: TokenCounts) -> ModelSection:
    if counts.keys == "rotated" and config.norm_activation_type != "l2_norm_gelu":
        raise UserError(
            f"new_keys: rotated needs norm_activation_type l2_norm_gelu, this model has {config.norm_activation_type}; "
            "leave new_keys out"
        )
    blocks, added = _growing_blocks(config, counts.layers), dict[Kind, list[int]]()
    for kind in KINDS:
        target, key = counts.of(kind), config.spelled(f"{kind}_slot_num")
        for index, block in enumerate(segments_of(config, kind)):
            have = sum(block)
            wanted = target if target is not None and index in blocks else have
            if wanted < have:
                raise UserError(
                    f"{key}: {wanted} is fewer than the {have} tokens of layer {index}; tokens can only be added"
                )
            _check_new(config, counts, f"{key}: {wanted}", index, block, wanted - have)
            added.setdefault(kind, []).append(wanted - have)
    return _with_segments(config, added, counts.row_norm)


def _with_segments(config: ModelSection, added: Mapping[Kind, Sequence[int]], row_norm: RowNorm) -> ModelSection:
    """A tower with one more segment, of so many tokens in each block; none where nothing is said."""
    segments = {kind: segments_of(config, kind) for kind in KINDS}
    for kind, blocks in segments.items():
        for block, size in zip(blocks, added.get(kind, [0] * len(blocks)), strict=True):
            block.append(size)
    norms = [*(config.segment_norms or ["joint"] * (len(segments["qkv"][0]) - 1)), row_norm]
    return with_tokens(config, segments, norms)


def with_tokens(
    config: ModelSection, segments: Mapping[Kind, list[list[int]]] | None, norms: Sequence[RowNorm]
) -> ModelSection:
    """A tower whose blocks have these segments, with these row norms; None leaves its slot numbers and no segments."""
    totals = {f"{kind}_slot_num": max(map(sum, blocks)) or None for kind, blocks in (segments or {}).items()}
    new = {**totals, "token_segments": segments, "segment_norms": list(norms) if "segment" in norms else None}
    return type(config)(**{**config.model_dump(), **new})


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


def _check_new(config: ModelSection, counts: TokenCounts, asked: str, index: int, block: list[int], new: int) -> None:
    """Can `new` tokens more leave what a layer with the segments `block` computes as it is?"""
    if counts.keys == "official":
        return
    have = sum(block)
    sharing = sum(block[i] for i in sharing_segments(block, config.segment_norms, counts.row_norm))
    if config.norm_activation_type == "softmax" and sharing and new % sharing:
        raise UserError(
            f"{asked}: with norm_activation_type softmax every key of layer {index} has to be duplicated a whole "
            f"number of times: {new} more are no multiple of {sharing}; choose "
            f"{have + sharing * (new // sharing + 1)}, row_norm: segment, or a GELU activation"
        )
    fewest = min(sharing or have, config.hidden_size)  # as many as the old keys have dimensions
    if counts.keys == "rotated" and 0 < new < fewest:
        raise UserError(
            f"{asked} are {new} more than the {have} tokens of layer {index}; new_keys rotated needs {fewest} more: "
            f"grow to {have + fewest}, or leave new_keys out"
        )


def sharing_segments(sizes: Sequence[int], norms: Sequence[RowNorm] | None, row_norm: RowNorm) -> list[int]:
    """With the tokens of which segments of a layer new ones share their row norm; none if they have their own."""
    groups = norm_groups(sizes, norms)
    return groups[-1] if groups and row_norm == "joint" else []


def with_tokens_of(config: Model, other: ModelSection) -> Model:
    """The model with the tokens of another one that has as many blocks."""
    towers = dict[str, ModelSection]()
    for (prefix, tower), source in zip(config.towers().items(), other.towers().values(), strict=True):
        keys = (*(f"{kind}_slot_num" for kind in KINDS), "token_segments", "segment_norms")
        towers[prefix] = type(tower)(**{**tower.model_dump(), **{key: getattr(source, key) for key in keys}})
    found = config.with_towers(towers)
    assert isinstance(found, type(config))
    return found


def describe(before: ModelSection, after: ModelSection) -> str:
    """One line: which counts a growth changes, for example `qkv 768 -> 1792, ffn 3072 -> 7168 in layers 0 to 23`."""
    towers = zip(before.towers().items(), after.towers().values(), strict=True)
    found = [(prefix.rstrip("."), _describe_tower(old, new)) for (prefix, old), new in towers]
    return "; ".join(f"{name} {text}".strip() for name, text in found if text) or "no tokens"


def _describe_tower(before: ModelSection, after: ModelSection) -> str:
    parts, layers = [], set[int]()
    for kind in KINDS:
        pairs = list(zip(segments_of(before, kind), segments_of(after, kind), strict=True))
        grown = {index for index, (old, new) in enumerate(pairs) if sum(new) > sum(old)}
        if grown:
            old, new = pairs[min(grown)]
            parts.append(f"{kind} {sum(old)} -> {sum(new)}")
            layers |= grown
    return f"{', '.join(parts)} in layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}" if parts else ""
