"""Initialisation of every parameter, the same for every layout.

| parameter                                                      | initialisation           |
|----------------------------------------------------------------|--------------------------|
| Pattention keys; embedding; input; head; linear q, k, v, fc_in | init_method              |
| Pattention values; linear proj, fc_out                         | output_layer_init_method |
| norm weights and scales                                        | 1                        |
| vectors of positions                                           | normal                   |
| biases, vectors before those of the data                       | 0                        |
| logarithm of a factor on logits                                | logit_scale_init         |

With `use_mup` these are the values of the base model, and megatron.model.mup has the factors from it to this one.

Each parameter draws from a generator of its own, seeded by the run's seed and the parameter's name: what a parameter
starts as does not depend on which process builds it, in what order, or on which other parameters exist.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensors import Tensors
from megatron.config.sections.model import InitMethod, ModelSection
from megatron.model.mup import fan_in_ratio, fan_out_ratio, mup_scale, ratio
from megatron.model.pattention import named_pattentions
from megatron.mpu.roles import Role, role_of
from megatron.mpu.shard import whole_shape

_OUTPUTS = ("value_tokens", "output_matrix")


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the parameter's canonical name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def init_std(method: InitMethod, role: Role, shape: torch.Size, config: ModelSection) -> float:
    """Standard deviation of an initialisation for a matrix of `shape` [out or tokens, in].

    With muP it is that of the base model, times what megatron.model.mup says of the role.
    """
    std, width = config.initialisation().std, config.hidden_size / ratio(config, "hidden_size")
    depth = config.num_layers / ratio(config, "num_layers")
    first, second = fan_out_ratio(role, config), fan_in_ratio(role, config)
    rows, columns = (second, first) if role.what == "value_tokens" else (first, second)
    fan_out, fan_in = shape[0] / rows, shape[1] / columns
    base = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2.0 * depth),
        "single_residual_scaled_normal": std / math.sqrt(depth),
        "wang_init": 2.0 / depth / math.sqrt(width),
        "small_init": math.sqrt(2.0 / (5 * width)),
        "xavier_normal": math.sqrt(2.0 / (fan_in + fan_out)),
        "xavier_uniform": math.sqrt(2.0 / (fan_in + fan_out)),
        "zero": 0.0,
    }[method]
    return base * mup_scale(role, config).initial


def initial_value(name: str, parameter: Tensor, config: ModelSection, seed: int) -> Tensor:
    """The whole fp32 value that `parameter`, whose canonical name is `name`, starts with, on the CPU."""
    shape, role, (_, config) = whole_shape(parameter), role_of(parameter), config.tower_of(name)
    if role.is_vector:
        return _initial_vectors(name, shape, role, config, seed)
    settings = config.initialisation()
    method = settings.output if role.what in _OUTPUTS else settings.method
    std, generator = init_std(method, role, shape, config), parameter_generator(seed, name)
    if method == "xavier_uniform":
        bound = std * math.sqrt(3.0)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(std=std, generator=generator) if std else torch.zeros(shape)


def _initial_vectors(name: str, shape: torch.Size, role: Role, config: ModelSection, seed: int) -> Tensor:
    if role.what == "position":
        std = config.initialisation().std
        return torch.empty(shape).normal_(std=std, generator=parameter_generator(seed, name))
    if role.what == "logit_scale":
        return torch.full(shape, config.initialisation().logit_scale)
    return torch.full(shape, mup_scale(role, config).initial if role.what == "norm" else 0.0)


class InitialTensors(Tensors):
    """What a model starts with, as the tensors of a checkpoint: made when asked for, the same for every layout.

    Args:
        model: whole or a part of it; its parameters need no storage.
        config: the model section.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, config: ModelSection, seed: int) -> None:
        self._parameters, self._config, self._seed = dict(model.named_parameters()), config, seed
        self._counts = {f"{name}.tau_tokens": layer.initial_tau for name, layer in named_pattentions(model)}

    def names(self, kind: str) -> list[str]:
        """Names of parameters and buffers; nothing but a model is there."""
        return [*self._parameters, *self._counts] if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._counts[name].shape if name in self._counts else whole_shape(self._parameters[name]))

    def tensor(self, kind: str, name: str) -> Tensor:
        """The value: fp32, or the number of tokens that tau_tokens starts as."""
        if name in self._counts:
            return self._counts[name]
        return initial_value(name, self._parameters[name], self._config, self._seed)
