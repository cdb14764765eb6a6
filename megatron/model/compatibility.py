"""Does a set of tensors fit a model? The answer names the tensor and the configuration key at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from megatron.checkpoint.tensors import Tensors
from megatron.config.sections.model import ModelSection
from megatron.config.sections.mup import MupKeys
from megatron.errors import UserError
from megatron.model.build import build_model
from megatron.model.layered import LayeredModel, block_of
from megatron.model.pattention import named_pattentions
from megatron.mpu.roles import role_of


def _responsible_keys(name: str, parameter: Tensor, config: ModelSection) -> tuple[str, str]:
    """The configuration keys that set the first and the second dimension of a parameter."""
    prefix, tower = config.tower_of(name)
    first, second = _keys_of_tower(name.removeprefix(prefix), parameter, tower.sizes)
    return tower.spelled(first), tower.spelled(second)


def _keys_of_tower(name: str, parameter: Tensor, sizes: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    role = role_of(parameter)
    if role.what in sizes:
        return sizes[role.what]
    if name.startswith("head.") and "head" in sizes:
        return sizes["head"]
    if role.what in ("key_tokens", "value_tokens"):
        return f"{role.projection}_slot_num", "hidden_size"
    if "fc_in" in name:
        return "intermediate_size", "hidden_size"
    return "hidden_size", "intermediate_size" if "fc_out" in name else "hidden_size"


_KEYS_OF_PARTS = {
    "embedding.class_token": "class_token", "embedding.patches.bias": "patch_bias", "pre_norm.weight": "pre_norm",
}  # fmt: skip


def _key_of_missing(name: str, config: ModelSection) -> str:
    name = name.removeprefix(config.tower_of(name)[0])
    if name.startswith("layers."):
        return "norm" if "layernorm" in name else "num_layers, attention_config or use_bias_in_attn_linear"
    if name in _KEYS_OF_PARTS:
        return _KEYS_OF_PARTS[name]
    return "no_weight_tying" if name.startswith("head.") else "final_norm"


def check_fit(model: LayeredModel, tensors: Tensors, source: str) -> None:
    """Raise a UserError unless `tensors` has every parameter of `model`, in its shape, and nothing else.

    Args:
        model: without storage; see `described_model`.
        tensors: those of kind `model` are meant. Buffers may be among them, see `tau_fault`.
        source: what is being loaded, for the message.
    """
    shapes = {name: tensors.shape("model", name) for name in tensors.names("model")}
    expected = dict(model.named_parameters())
    buffers = {name for name, _ in model.named_buffers()}
    for name, parameter in expected.items():
        if name not in shapes:
            raise UserError(
                f"{source} has no tensor {name}; does {_key_of_missing(name, model.config)} fit this checkpoint?"
            )
        found, shape = shapes[name], tuple(parameter.shape)
        if found != shape:
            keys = _responsible_keys(name, parameter, model.config)
            axis = next((i for i, (a, b) in enumerate(zip(found, shape, strict=False)) if a != b), 0)
            raise UserError(
                f"{source}: {name} has shape {list(found)}, the configuration makes it {list(shape)}; "
                f"{keys[min(axis, 1)]}: {shape[axis]} does not fit this checkpoint"
            )
    for name in shapes:
        if name not in expected and name not in buffers:
            key = _key_of_missing(name, model.config)
            raise UserError(f"{source} has a tensor {name} the model lacks; does {key} fit it?")


# Keys that may differ between training and use without changing what the tensors mean.
_FREE_KEYS = {
    "seq_length", "max_position_embeddings", "hidden_dropout", "attention_dropout", "drop_path_rate",
    "init_method", "init_method_std", "output_layer_init_method", "vocab_size", "padded_vocab_size",
    "make_vocab_size_divisible_by", "attention_config", "final_norm", "token_segments",
    "text_tower", "image_tower",  # whose keys are looked at by themselves
    *MupKeys.model_fields,
}  # fmt: skip


def count_layers(names: Iterable[str], tower: str = "") -> int:
    """Of how many blocks there are tensors among these canonical names, in the longest of the model's lists.

    tower: what the names of the lists begin with that are meant.
    """
    blocks = {block for name in names if name.startswith(tower) and (block := block_of(name)) is not None}
    return max(Counter(prefix for prefix, _ in blocks).values(), default=0)


def described_model(config: ModelSection) -> LayeredModel:
    """The model on the meta device. Raises ValueError, in one line, for sizes beyond any memory."""
    try:
        return build_model(config, device="meta")
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None


def tau_fault(model: nn.Module, tensors: Tensors) -> str | None:
    """What is wrong with the layers' tau^2 among `tensors`, each a number of tokens its layer has, or once had."""
    names = set(tensors.names("model"))
    for layer, module in named_pattentions(model):
        name = f"{layer}.tau_tokens"
        if name not in names:
            return f"has no tensor {name}, without which a layer computes something else"
        counts, shape = module.norm_sizes, tensors.shape("model", name)
        if shape != tuple(module.tau_tokens.shape):
            norms = "one row norm" if len(counts) == 1 else f"{len(counts)} row norms"
            return f"has {name} of shape {list(shape)} in a layer with {norms}"
        for tau, count in zip(tensors.tensor("model", name).view(-1).tolist(), counts, strict=True):
            if not 1 <= tau <= count:
                return f"says that {name} is {tau} in a layer with {count} tokens"
    return None


def check_same_task(config: ModelSection, saved: ModelSection, folder: Path) -> None:
    """Raise a UserError unless the checkpoint in `folder` is of a model that learns what `config` learns."""
    if config.task != saved.task:
        raise UserError(f"task: {config.task} in the configuration, {saved.task} in checkpoint {folder}; set the same")


def check_same_model(config: ModelSection, saved: ModelSection, folder: Path, free: Collection[str] = ()) -> None:
    """Raise a UserError that names the first key in which `config` is another model than the one in `folder`.

    free: further keys that may differ.
    """
    check_same_task(config, saved, folder)
    towers = zip(config.towers().values(), saved.towers().values(), strict=True)
    for own, other in ((config, saved), *towers):
        check_same_network(own, other, folder, free)


def check_same_network(config: ModelSection, saved: ModelSection, folder: Path, free: Collection[str] = ()) -> None:
    """Raise a UserError that names the first key that both sections have, and in which they are not one network.

    free: keys that may differ.
    """
    for key in (key for key in type(saved).model_fields if key in type(config).model_fields):
        if key not in _FREE_KEYS and key not in free and getattr(config, key) != getattr(saved, key):
            raise UserError(
                f"{config.spelled(key)}: {getattr(config, key)} in the configuration, {getattr(saved, key)} in "
                f"checkpoint {folder}; use the configuration the model was trained with"
            )
    for name in ("layer_kinds", "final_norm_kind"):
        if getattr(config, name, None) != getattr(saved, name, None):
            key = saved.spelled("attention_config" if name == "layer_kinds" else "final_norm")
            raise UserError(
                f"{key}: does not describe the model of checkpoint {folder}; use the one it was trained with"
            )
