"""Parameter groups and optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.sections.optimization import OptimizationConfig
from megatron.engine.adamw import AdamW
from megatron.engine.extensions import one_build_at_a_time
from megatron.engine.new_keys import part_of
from megatron.engine.settings import EngineSettings
from megatron.errors import UserError
from megatron.model.mup import mup_scale
from megatron.mpu.device import process_device, uses_gpu
from megatron.mpu.roles import Role, role_of


def freeze_old_parameters(layers: Sequence[nn.Module], growths: int) -> None:
    """Leave only the tokens of the latest growth to be trained, and what connects networks that were trained apart.

    Args:
        layers: those of a model, or of this process's stage of it.
        growths: how many the model has behind it.

    Collective. Raises: UserError on every process when one of them has none of these tokens.
    """
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    for parameter in parameters:
        role = role_of(parameter)
        parameter.requires_grad_(role.projection == "connector" or (growths > 0 and role.segment == growths))
    idle = torch.tensor(not any(parameter.requires_grad for parameter in parameters), dtype=torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        idle = idle.to(process_device())
        dist.all_reduce(idle, op=dist.ReduceOp.MAX)
    if idle:
        what = "a pipeline stage has no new tokens" if growths else "the model has not grown"
        raise UserError(f"freeze_old_tokens: {what}, there would be nothing to train; set it to false")
    for layer in layers:
        layer.register_forward_hook(_let_gradients_through)


def _let_gradients_through(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Give the output of a frozen layer that reads the data a gradient that nobody needs.

    ZeRO 3 lets go of a module's parameters once the gradient of its input is known. When the first block's input has
    none, that is before its backward pass.
    """
    reads_data = isinstance(output, Tensor) and output.is_leaf
    return output.requires_grad_() if reads_data and torch.is_grad_enabled() else output


class _GroupKey(NamedTuple):
    """What decides a parameter's count of updates, rate and decay: parameters alike in all of it are one group.

    Stages of a pipeline make the same groups of the same settings, but may lack parameters of some.
    """

    segment: int
    is_vector: bool
    lr_scale: float
    warmup: int
    """Updates since the latest growth in which the rate rises from 0."""
    decay: float
    waits: str
    """Of new keys whose decay waits for their size: the projection; else nothing."""


def _group_of(role: Role, settings: EngineSettings) -> _GroupKey:
    part, rate = part_of(role, settings.growths), mup_scale(role, settings.model).rate
    # An update takes learning rate * decay of a weight: as much of it whatever muP makes of the rate.
    decay = 0.0 if role.is_vector else settings.optimization.weight_decay / rate
    waits = part == "new_keys" and settings.scaling.new_keys_decay == "at_old_rms"
    scale, warmup = settings.scaling.lr_factor(part) * rate, settings.scaling.warmup_of(part)
    return _GroupKey(role.segment, role.is_vector, scale, warmup, decay, (role.projection or "") if waits else "")


def parameter_groups(model: nn.Module, settings: EngineSettings) -> list[dict[str, Any]]:
    """Groups by growth, learning rate and decay; matrices decay, vectors (norms, biases) do not.

    The tokens of each growth have groups of their own, so that they have their own count of updates (Adam's bias
    correction). Beside what the optimizer reads, a group has `lr_scale`, the factor on the learning rate; `warmup`, the
    updates since the latest growth in which its rate rises; and `waits`, the projection of new keys that do not decay
    yet, and `decay`, by what they will.
    """
    members: dict[_GroupKey, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(_group_of(role_of(parameter), settings), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if key.waits else key.decay,
            "lr_scale": key.lr_scale,
            "warmup": key.warmup,
            "waits": key.waits,
            "decay": key.decay,
        }
        for key, parameters in sorted(members.items(), key=lambda item: item[0])
    ]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, algorithm 2), on any device."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[parameter], parameter.grad
                momentum: Tensor = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.lerp(grad, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(grad, 1.0 - beta2)


def build_optimizer(model: nn.Module, settings: EngineSettings) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.type` names; UserError with the pip line when its package is missing."""
    config = settings.optimization
    spec, params = config.optimizer, config.optimizer.params
    groups = parameter_groups(model, settings)
    adam: dict[str, Any] = {"lr": params.lr, "betas": params.betas, "eps": params.eps}
    if spec.type in ("Adam", "AdamW"):
        return AdamW(groups, **adam, fused=_fused_available(model))
    if spec.type == "SGD":
        return torch.optim.SGD(groups, lr=params.lr, momentum=params.momentum)
    if spec.type == "Lion":
        return Lion(groups, params.lr, params.betas, config.weight_decay)
    if spec.type == "Muon":
        return _muon(model, config)
    if spec.type == "CPU_Adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with one_build_at_a_time():
            return DeepSpeedCPUAdam(groups, **adam, adamw_mode=True)
    fused_adam = _fused_adam(spec.type)
    with one_build_at_a_time():
        return fused_adam(groups, **adam, adam_w_mode=True)


def _fused_available(model: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


def _fused_adam(kind: str) -> Callable[..., torch.optim.Optimizer]:
    if not uses_gpu():
        raise UserError(f"optimizer.type: {kind} needs a GPU; use Adam, which is torch's fused AdamW")
    if kind == "FusedAdam":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam
    try:
        from apex.optimizers import FusedAdam as ApexFusedAdam
    except ImportError as error:
        raise UserError(
            "optimizer.type: ApexAdam needs NVIDIA apex (PyPI's apex is another package; see "
            "requirements/requirements-apex-pip.txt); Adam is as fast"
        ) from error
    return ApexFusedAdam


def _muon(model: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """DeepSpeed's Muon for the blocks' matrices, Adam for embedding, head and vectors."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    params = config.optimizer.params
    muon: dict[str, Any] = {"lr": params.lr, "momentum": params.momentum or 0.95, "use_muon": True}
    adam: dict[str, Any] = {"lr": params.lr, "betas": params.betas, "eps": params.eps, "use_muon": False}
    halves: dict[bool, dict[float, list[nn.Parameter]]] = {True: {}, False: {}}
    for parameter in model.parameters():
        role = role_of(parameter)
        parameter.use_muon = role.is_block_matrix  # type: ignore[attr-defined]
        if not parameter.requires_grad:
            continue  # Muon would take the missing gradient for zero, and decay the weights
        decay = 0.0 if role.is_vector else config.weight_decay
        halves[role.is_block_matrix].setdefault(decay, []).append(parameter)
    groups = [
        {"params": members, "weight_decay": decay, **(muon if is_muon else adam)}
        for is_muon, by_decay in halves.items()
        for decay, members in by_decay.items()
    ]
    return MuonWithAuxAdam(groups)
