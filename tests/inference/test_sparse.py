"""Sparse inference: what a model computes when each row uses its heaviest tokens alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.evaluation import perplexity
from megatron.inference.answers import fingerprint
from megatron.inference.cache import KVCache
from megatron.inference.decoding import Decoder
from megatron.inference.generate import generate
from megatron.inference.prepare import load_for_inference
from megatron.inference.prepared import PreparedPattention, prepared
from megatron.inference.sparse import as_configured, heaviest, shares_used, sparse, sparse_layers
from megatron.model import LanguageModel, Pattention
from megatron.model.pattention import ACTIVATIONS
from megatron.mpu import SINGLE
from megatron.ops.pattention import theta
from megatron.ops.pattention_sparse import Selection
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import OWN_NORMS, make_config, make_model, save_random_models

IDS = torch.randint(1, 600, (2, 9), generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, dict[str, Any]] = {
    **{activation: {"norm_activation_type": activation, "init_method_std": 0.1} for activation in ACTIVATIONS},
    "row norms": OWN_NORMS,
}


def of_share(model: LanguageModel, share: float) -> LanguageModel:
    return sparse(model, partial(heaviest, share=share))


def configured(model: LanguageModel, **keys: Any) -> LanguageModel:
    return as_configured(model, make_config(**keys).evaluation)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_one_changes_no_bit(variant: str, dtype: torch.dtype) -> None:
    """Nor does a threshold that every weight reaches, which goes the way of other thresholds."""
    model = make_model(dtype=dtype, **VARIANTS[variant])
    expected = model(IDS)
    whole = configured(model, pattention_top_k=1)
    assert torch.equal(whole(IDS), expected) and not list(sparse_layers(whole))
    assert torch.equal(configured(model, pattention_threshold=0.0)(IDS), expected)
    low = configured(model, pattention_threshold=1e-37)
    assert torch.equal(low(IDS), expected) and len(list(sparse_layers(low))) == 10


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_adds_up_its_heaviest_tokens_under_the_norm_of_all(activation: str) -> None:
    model = make_model(norm_activation_type=activation)
    layer = model.layers[0].mlp
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    weights = theta(x @ layer.key_param_tokens.T, layer.tau_tokens, activation)
    expected = torch.zeros_like(x)
    for place in ((i, j) for i in range(2) for j in range(3)):
        for token in weights[place].abs().argsort(descending=True)[:10].tolist():  # a quarter of 40
            expected[place] += weights[place][token] * layer.value_param_tokens[token]
    torch.testing.assert_close(of_share(model, 0.25).layers[0].mlp(x), expected)
    large = sparse(model, lambda _: Selection(threshold=0.3)).layers[0].mlp
    torch.testing.assert_close(large(x), (weights * (weights.abs() >= 0.3)) @ layer.value_param_tokens)


@torch.no_grad()
def test_kinds_have_shares_of_their_own() -> None:
    model = make_model()
    found = configured(model, pattention_top_k={"qkv": 0.5, "ffn": 0.1})
    assert isinstance(found.layers[1].attention.proj, Pattention)
    assert {name.rpartition(".")[2] for name, _ in sparse_layers(found)} == {"query", "key", "value", "mlp"}
    found(IDS)
    assert shares_used(found, SINGLE) == {"qkv": 0.5, "ffn": 0.1}
    assert all(a is b for a, b in zip(found.parameters(), sorted_like(found, model), strict=True))
    assert not list(sparse_layers(model)), "the model itself is as it was"


def sorted_like(found: LanguageModel, model: LanguageModel) -> list[Tensor]:
    own = dict(model.named_parameters())
    return [own[name.replace(".dense.", ".")] for name, _ in found.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prepared_layers_keep_the_same_tokens(variant: str, share: float) -> None:
    model = of_share(make_model(**VARIANTS[variant]), share)
    expected = model(IDS)
    ready = prepared(model)
    assert sum(isinstance(module, PreparedPattention) for module in ready.modules()) == 10
    cache = KVCache(len(model.layers), torch.zeros(2, dtype=torch.int64))
    parts = [ready(part, cache=cache.step(part.shape[1])) for part in IDS.split([5, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


def test_texts_are_those_of_the_sparse_model_with_and_without_copies() -> None:
    model = make_model()
    found = []
    for network in (model, of_share(model, 0.2)):
        for options in ({"recompute": True}, {"fast": False}, {}):
            texts = generate(network, CharLevelTokenizer(), ["a", "The state"], maximum_tokens=16, **options)
            found.append([completion.text for completion in texts])
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


def test_fewer_tokens_cost_more() -> None:
    """The loss of a model that has been fitted to its text rises as tokens are left out."""
    torch.manual_seed(0)
    model = make_model(dtype=torch.float32, init_method_std=0.1)
    text = torch.arange(1, 41).repeat(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:]).backward()
        optimizer.step()
    losses = [perplexity(of_share(model, share), text, 40)["loss"] for share in (1, 0.5, 0.1)]
    assert losses[0] < losses[1] < losses[2] and losses[1] < 2 * losses[2]


def test_what_is_hooked_stays_as_it_is() -> None:
    model = make_model()
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("hook"))
    found = of_share(model, 0.5)
    found(IDS)
    assert type(found.layers[0].mlp) is Pattention and seen == ["hook"]
    assert [name for name, _ in sparse_layers(found) if name.endswith("mlp")] == ["layers.1.mlp"]


def test_answers_of_other_tokens_are_not_gone_on_with() -> None:
    model = make_model()
    prints = set()
    for network in (model, of_share(model, 0.5), of_share(model, 0.25), sparse(model, lambda _: Selection(None, 0.5))):
        prints.add(fingerprint(Decoder(network, CharLevelTokenizer(), 48), []))
    assert len(prints) == 4


def test_models_are_loaded_as_configured(tmp_path: Path) -> None:
    config = make_config(load=str(tmp_path), pattention_top_k=0.5)
    save_random_models(tmp_path, config, (1,))
    model, _ = load_for_inference(config)
    assert len(list(sparse_layers(model))) == 10 and not model.training


@pytest.mark.parametrize("key", ["pattention_top_k", "pattention_threshold"])
def test_a_model_without_pattentions_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: the model has no Pattention whose tokens could be left out; remove"):
        configured(make_model("transformer"), **{key: 0.5})
