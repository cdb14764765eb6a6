"""A new model of networks that were trained apart: each of its towers comes from a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.tensors import Tensors
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import TOWER_KEYS, CheckpointConfig
from megatron.config.sections.model import ModelSection
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.growth.plan import KINDS, segments_of, with_tokens
from megatron.model.compatibility import check_fit, check_same_network, described_model
from megatron.model.init import InitialTensors
from megatron.mpu import Layout
from megatron.mpu.processes import first_rank_does
from megatron.training.soundness import require_consistent, verify_together

_SLOTS = tuple(f"{kind}_slot_num" for kind in KINDS)


class TowerTensors(Tensors):
    """The tensors of towers as those of one model, and initial values of all that is in none of them.

    Args:
        initial: of the whole model.
        towers: tensors of some of its towers, by what their names begin with in the model, and what with there.
    """

    def __init__(self, initial: Tensors, towers: Mapping[str, tuple[Tensors, str]]) -> None:
        self._initial, self._sources = initial, dict[str, tuple[Tensors, str]]()
        expected = initial.names("model")
        for prefix, (tensors, own) in towers.items():
            # A source has more than its tower: a head for what it has learned.
            parts = {_part(name, prefix) for name in expected if name.startswith(prefix)}
            for name in tensors.names("model"):
                if name.startswith(own) and _part(name, own) in parts:
                    self._sources[prefix + name.removeprefix(own)] = tensors, name
        given = tuple(towers)
        self._names = [*self._sources, *(name for name in expected if not given or not name.startswith(given))]

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors; there are no others."""
        return self._names if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        source, there = self._sources.get(name, (self._initial, name))
        return source.shape(kind, there)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        source, there = self._sources.get(name, (self._initial, name))
        return source.tensor(kind, there)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor."""
        source, there = self._sources.get(name, (self._initial, name))
        return source.part(kind, there, *ranges)


def _part(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0]


def named_towers(options: CheckpointConfig) -> dict[str, str]:
    """The paths of the towers that a new run starts from, by key."""
    return {key: path for key in TOWER_KEYS if (path := getattr(options, key))}


def joined_towers(config: RunConfig, layout: Layout) -> Checkpoint:
    """The model of `config` with the towers that it names, each with the tokens that it has. Collective.

    Raises: UserError for a checkpoint that is damaged, or whose tower is another one than that of the configuration.
    """
    found = dict[str, tuple[Checkpoint, str, ModelSection]]()
    for key, path in named_towers(config.checkpoint).items():
        prefix = TOWER_KEYS[key]
        tower = config.model.towers()[prefix]
        checkpoint = open_checkpoint(path, key=key)
        _verify(checkpoint, key, layout)
        found[prefix] = (checkpoint, *_tower_of(checkpoint, prefix, tower, key))
    saved = {prefix: section for prefix, (_, _, section) in found.items()}
    model = _with_tokens_of(config.model, saved)
    initial = InitialTensors(described_model(model), model, config.training.seed)
    sources = {prefix: (checkpoint.tensors, own) for prefix, (checkpoint, own, _) in found.items()}
    tensors = TowerTensors(initial, sources)
    named = zip(named_towers(config.checkpoint), found.values(), strict=True)
    where = " and ".join(f"{key}: {checkpoint.folder}" for key, (checkpoint, _, _) in named)
    check_fit(described_model(model), tensors, where)
    return Checkpoint(next(iter(found.values()))[0].folder, model, tensors)


def _verify(checkpoint: Checkpoint, key: str, layout: Layout) -> None:
    if isinstance(checkpoint.tensors, CheckpointReader):
        first_rank_does(partial(require_consistent, checkpoint.tensors), layout)
        verify_together(partial(CheckpointReader, checkpoint.folder, verify=False, key=key), layout)


def _tower_of(checkpoint: Checkpoint, prefix: str, tower: ModelSection, key: str) -> tuple[str, ModelSection]:
    """(what the names of the tower begin with in a checkpoint, its section there)."""
    towers = checkpoint.model_config.towers()
    own = prefix if prefix in towers else ""
    saved = towers.get(own)
    if saved is None or not type(tower).model_fields.keys() <= type(saved).model_fields.keys():
        learned, what = checkpoint.model_config.task, prefix.rstrip(".")
        raise UserError(
            f"{key}: {checkpoint.folder} learned '{learned}' and has no such {what} tower; name another one"
        )
    check_same_network(tower, saved, checkpoint.folder, free=[*_SLOTS, "segment_norms", "global_pool"])
    return own, saved


def _with_tokens_of(model: ModelSection, saved: Mapping[str, ModelSection]) -> ModelSection:
    """The model whose towers have the segments of the saved ones, and all as many stages of growth."""
    towers = {prefix: saved.get(prefix, tower) for prefix, tower in model.towers().items()}
    stages = max(len(segments_of(tower, "qkv")[0]) for tower in towers.values())
    return model.with_towers({
        prefix: _with_stages(model.towers()[prefix], tower, stages) for prefix, tower in towers.items()
    })  # fmt: skip


def _with_stages(tower: ModelSection, saved: ModelSection, stages: int) -> ModelSection:
    if stages == 1:
        return tower.replaced(**{key: getattr(saved, key) for key in _SLOTS})
    segments = {kind: [_padded(block, stages, 0) for block in segments_of(saved, kind)] for kind in KINDS}
    norms = saved.segment_norms or ["joint"] * len(segments_of(saved, "qkv")[0])
    return with_tokens(tower, segments, _padded(norms, stages, "joint"))


def _padded(values: Sequence[Any], length: int, value: Any) -> list[Any]:
    return [*values, *[value] * (length - len(values))]
