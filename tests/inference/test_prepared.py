"""A prepared model computes what the model computes, and leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.inference.cache import KVCache
from megatron.inference.decoding import Decoder
from megatron.inference.generate import generate
from megatron.inference.prepared import PreparedPattention, prepared
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.model.pattention import Pattention, named_pattentions
from megatron.ops.inference import can_pack, product_with, row_weights
from megatron.ops.pattention import theta
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import OWN_NORMS, make_model

VARIANTS: dict[str, dict[str, Any]] = {
    "tokenformer": {},
    "transformer": {"kind": "transformer"},
    "gelu_l2_norm": {"norm_activation_type": "gelu_l2_norm"},
    # Smaller weights: where one token takes all, rounding decides which one does.
    "softmax": {"norm_activation_type": "softmax", "norm": "rmsnorm", "init_method_std": 0.1},
    "untied": {"no_weight_tying": True, "gpt_j_residual": True},
    "all rotary": {"rotary_pct": 1.0},
    "row norms": OWN_NORMS,
    "row norms, softmax": {"norm_activation_type": "softmax", "init_method_std": 0.1, **OWN_NORMS},
}
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.05}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = DTYPES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_same_with_and_without_a_cache(variant: str, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype, **VARIANTS[variant])
    ids = torch.randint(1, 600, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model(ids)
    ready = prepared(model)
    close(ready(ids), expected)
    cache = KVCache(len(model.layers), torch.zeros(3, dtype=torch.int64))
    parts = [ready(part, cache=cache.step(part.shape[1])) for part in ids.split([11, 1, 1, 4, 3], dim=1)]
    close(torch.cat(parts, dim=1), expected)
    assert torch.equal(model(ids), expected)


@torch.no_grad()
def test_a_grown_model_is_prepared_with_all_its_tokens() -> None:
    model = make_model(dtype=torch.float32)
    for _, layer in named_pattentions(model):
        layer.append(7)
        layer.get_parameter("key_tokens_1").normal_(std=0.3)
    ids = torch.randint(1, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    close(prepared(model)(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_row_weights_are_theta_of_each_layer_and_zero_for_a_row_of_zeros(activation: str, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 3, 5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0, 1] = 0.0
    scores[1, 0, 2] *= 1e-18  # its squares are hardly numbers in fp32
    counts = torch.tensor([33, 16, 7, 1, 50])
    expected = torch.stack([theta(scores[..., i, :], count, activation) for i, count in enumerate(counts)], dim=-2)
    close(row_weights(scores.clone(), counts, activation), expected)
    close(row_weights(scores[..., 0, :].clone(), counts[0], activation), expected[..., 0, :])
    if activation != "softmax":
        assert not row_weights(scores.clone(), counts, activation)[0, 1].any()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 5, 7), (0, 7)])
def test_a_packed_product_is_the_product(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(19, 7, generator=generator), torch.randn(shape, generator=generator)
    assert can_pack(matrix), "this torch has no oneDNN: nothing is packed, and this test says nothing"
    torch.testing.assert_close(product_with(matrix)(x), x @ matrix.T)
    torch.testing.assert_close(product_with(torch.randn(7, 19, generator=generator).T)(x).shape, (*shape[:-1], 19))


def test_what_is_wrapped_or_hooked_stays_as_it_is() -> None:
    model = make_model()
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("hook"))
    model.layers[1].attention.query.forward = lambda x: x * 0  # type: ignore[method-assign]
    ids = torch.tensor([[1, 2, 3]])
    ready = prepared(model)
    assert type(ready.layers[0].mlp) is Pattention and type(ready.layers[1].mlp) is PreparedPattention
    with torch.no_grad():
        close(ready(ids), model(ids))
    assert seen == ["hook", "hook"]


def test_a_model_that_does_not_fit_twice_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(dtype=torch.float32)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "MemTotal:  9 kB\nMemAvailable:  9 kB\n")
    assert prepared(model) is model
    assert "fast_decoding: 0.0 GiB for copies of the matrices are not free" in capsys.readouterr().out
    assert prepared(make_model()) is not model, "nothing is packed in fp64"


def test_a_decoder_prepares_once_and_only_for_texts_that_are_long_enough(model: LanguageModel) -> None:
    decoder = Decoder(model, CharLevelTokenizer(), 48)
    with evaluating(model):
        decoder.complete([decoder.start("a", Sampling(maximum_tokens=15))])
        assert "_prepared" not in vars(decoder)
        decoder.complete([decoder.start("a", Sampling(maximum_tokens=16))])
        first = decoder._prepared
        decoder.complete([decoder.start("b", Sampling(maximum_tokens=16))])
    assert decoder._prepared is first is not model


def test_texts_are_those_of_the_model_as_it_is(model: LanguageModel) -> None:
    options: dict[str, Any] = {"maximum_tokens": 20, "logprobs": True}
    prompts = ["The state", "a", "We hold", "", "liberty and"]
    model.float()
    fast, plain = (generate(model, CharLevelTokenizer(), prompts, fast=fast, **options) for fast in (True, False))
    assert [completion.text for completion in fast] == [completion.text for completion in plain]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)
    assert model.training is False
