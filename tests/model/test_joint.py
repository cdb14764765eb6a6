"""Parameters are used in their own module's forward only, so that whatever stands around a forward acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import parametrize

from megatron.model import LanguageModel
from tests.random_models import make_model

IDS = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "tokenformer": {},
    "untied-rmsnorm": {"no_weight_tying": True, "norm": "rmsnorm", "final_norm": "rmsnorm"},
    "transformer": {"kind": "transformer", "norm": "layernorm", "gpt_j_residual": True},
    "mixed": {"attention_config": [[["tokenformer", "global"], 1]], "intermediate_size": 48},
}


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> LanguageModel:
    return make_model(**KINDS[request.param])


def with_parameters(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own, by name."""
    return {name: module for name, module in network.named_modules() if list(module.parameters(recurse=False))}


def gradients(network: nn.Module) -> list[Tensor]:
    network.zero_grad()
    network(IDS).square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def test_every_module_with_parameters_is_called(network: LanguageModel) -> None:
    called: list[str] = []
    modules = with_parameters(network)
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    network(IDS)
    assert set(called) == set(modules)
    # The tied table is called for its rows and for the logits.
    assert len(called) == len(modules) + (network.head is None)


def test_weights_that_are_there_during_their_modules_forward_only_are_enough(network: LanguageModel) -> None:
    expected = network(IDS)
    for module in with_parameters(network).values():
        own = dict(module.named_parameters(recurse=False))
        kept = {name: parameter.detach().clone() for name, parameter in own.items()}

        def fetch(module: nn.Module, *_: Any, own: Any = own, kept: Any = kept) -> None:
            for name, parameter in own.items():
                parameter.data.copy_(kept[name])

        def drop(module: nn.Module, *_: Any, own: Any = own) -> None:
            for parameter in own.values():
                parameter.data.fill_(torch.nan)

        drop(module)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    with torch.no_grad():
        assert torch.equal(network(IDS), expected)


def test_offloaded_weights_give_the_same_logits(network: LanguageModel) -> None:
    expected = network(IDS)
    cpu_offload(network, execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(network(IDS), expected)


@pytest.mark.parametrize("name", ["query", "key", "value", "proj"])
def test_hooks_read_and_replace_inputs_and_outputs(network: LanguageModel, name: str) -> None:
    projection, seen = getattr(network.layers[0].attention, name), []
    before = network(IDS)
    projection.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),))
    projection.register_forward_hook(lambda module, args, output: seen.append((args, output)) or output.flip(-1))
    after = network(IDS)
    ((args, output),) = seen
    assert len(args) == 1 and output.shape == (2, 12, 32)
    assert torch.allclose(output, type(projection).forward(projection, args[0]), atol=1e-12)
    assert not torch.allclose(after, before)


def test_a_parametrised_or_wrapped_projection_computes_with_its_new_weight() -> None:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    expected = make_model()
    expected.layers[0].attention.key.value_tokens_0.data *= 2
    network = make_model()
    parametrize.register_parametrization(network.layers[0].attention.key, "value_tokens_0", Doubled())
    assert torch.equal(network(IDS), expected(IDS))
    network.layers[0].attention.key = Wrapped(network.layers[0].attention.key)
    assert torch.equal(network(IDS), expected(IDS))
    replaced = network.layers[1].attention.query
    replaced.forward = lambda x: torch.zeros_like(x)
    assert torch.isfinite(network(IDS)).all()


def test_hooks_change_no_gradient(network: LanguageModel) -> None:
    expected = gradients(network)
    for module in with_parameters(network).values():
        module.register_forward_pre_hook(lambda module, args: tuple(x.view_as(x) for x in args))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(network), expected, strict=True))


def test_several_layers_in_one_call_have_the_bits_of_one_by_one() -> None:
    together, apart = make_model(), make_model()
    for layer in apart.layers:
        for name in ("query", "key", "value"):
            projection = getattr(layer.attention, name)
            projection.forward = projection.forward  # no longer the class's own
    assert torch.equal(together(IDS), apart(IDS))
    assert all(torch.equal(a, b) for a, b in zip(gradients(together), gradients(apart), strict=True))
