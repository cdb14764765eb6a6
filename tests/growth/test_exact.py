"""Growth changes nothing at first and something afterwards: logits, gradients, on one process and on tensor ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.growth import grow
from megatron.inference import load_model
from megatron.model import LanguageModel, Pattention
from megatron.model.init import parameter_generator
from megatron.model.pattention import named_pattentions
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.roles import role_of
from megatron.mpu.shard import take_share, whole_shape
from tests.growth.grown_runs import worst
from tests.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "model_A"
SMALL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 12, "padded_vocab_size": 64,
    "rotary_pct": 0.5, "norm": "layernorm_nonparam", "final_norm": "layernorm", "init_method_std": 0.5,
    "qkv_slot_num": 12, "proj_slot_num": 10, "ffn_slot_num": 20,
}  # fmt: skip
IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))
GELUS = ("l2_norm_gelu", "gelu_l2_norm")
ROTATED = "l2_norm_gelu, rotated"
"""Recipes are named by their activation; this one has other new keys than zero."""
OWN_NORMS = tuple(f"{activation}, own norms" for activation in (*GELUS, "softmax"))
"""Kinds of growths are mixed in these: one gives the new tokens a row norm of their own, which the next ones share."""
OWN: dict[str, Any] = {"row_norm": "segment"}
# Three growths, the second of them of the feed-forward only.
CHAIN: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(GELUS, [{"qkv": 19, "proj": 11, "ffn": 50}, {"ffn": 51}, {"qkv": 40, "proj": 40, "ffn": 90}]),
    "softmax": [{"qkv": 24, "proj": 30, "ffn": 40}, {"ffn": 120}, {"qkv": 96, "proj": 60, "ffn": 240}],
    # More old tokens than dimensions from the second growth on: the feed-forward has 42 of 16.
    ROTATED: [{"qkv": 26, "proj": 20, "ffn": 42}, {"ffn": 74}, {"qkv": 60, "proj": 60, "ffn": 120}],
    OWN_NORMS[0]: [
        {"qkv": 20, "proj": 12, "ffn": 50},
        {"qkv": 28, "proj": 20, "ffn": 60, **OWN},
        {"qkv": 36, "proj": 28, "ffn": 72, "new_keys": "rotated"},
    ],
    OWN_NORMS[1]: [{"qkv": 19, "proj": 11, "ffn": 50}, {"ffn": 61, **OWN}, {"qkv": 40, "proj": 40, "ffn": 90}],
    OWN_NORMS[2]: [
        {"qkv": 24, "proj": 30, "ffn": 40},
        {"proj": 34, "ffn": 50, **OWN},
        {"qkv": 96, "proj": 42, "ffn": 70},
    ],
}
TAUS: dict[str, list[Any]] = {
    **dict.fromkeys(GELUS, [12, 10, 20]), "softmax": [96, 60, 240], ROTATED: [60, 60, 120],
    OWN_NORMS[0]: [[12, 16], [10, 16], [20, 22]], OWN_NORMS[1]: [12, 10, [20, 11]],
    OWN_NORMS[2]: [96, [30, 12], [40, 30]],
}  # fmt: skip
"""tau^2 of q, k and v, of proj and of the feed-forward after three growths."""
SUBSETS = [layers for size in range(1, 4) for layers in itertools.combinations(range(3), size)]


def options(recipe: str) -> dict[str, Any]:
    """What a growth by a recipe is told besides counts; one of a chain may tell for itself."""
    return OWN if recipe in OWN_NORMS else {"new_keys": "rotated"} if recipe == ROTATED else {}


def model(recipe: str, dtype: torch.dtype = torch.float64, layout: Layout = SINGLE) -> LanguageModel:
    config = ModelConfig(**SMALL, norm_activation_type=recipe.partition(",")[0])
    return LanguageModel(config, seed=3, dtype=dtype, layout=layout).eval()


def chain_differences(grown: LanguageModel, recipe: str) -> list[float]:
    """How far logits are from those before any growth, after each growth of the chain.

    Where growths of several kinds are mixed, each is compared with a model whose last tokens have learned something:
    values of zero would hide what the next growth does to their weights.
    """
    own = {} if recipe in OWN_NORMS else options(recipe)
    with torch.no_grad():
        before, found = grown(IDS), []
        for counts in CHAIN[recipe]:
            grow(grown, **own, **counts)
            found.append(worst(grown(IDS), before))
            if recipe in OWN_NORMS:
                change_last_tokens(grown)
                before = grown(IDS)
    return found


def change_last_tokens(grown: LanguageModel) -> None:
    for name, parameter in grown.named_parameters():
        if role_of(parameter).segment == len(grown.layers[0].mlp.segment_sizes) - 1:  # type: ignore[union-attr, arg-type]
            new = torch.empty(whole_shape(parameter)).normal_(std=0.1, generator=parameter_generator(1, name))
            parameter.add_(take_share(new, parameter, grown.layout.tensor))


@pytest.mark.parametrize("recipe", CHAIN)
def test_three_growths_leave_fp64_logits_as_they_were(recipe: str) -> None:
    grown = model(recipe)
    assert max(chain_differences(grown, recipe)) < 1e-12
    layers = [module for module in grown.modules() if isinstance(module, Pattention)]
    last = CHAIN[recipe][-1]
    assert [layer.num_tokens for layer in layers] == [
        last["qkv"],
        last["qkv"],
        last["qkv"],
        last["proj"],
        last["ffn"],
    ] * 3
    qkv, proj, ffn = TAUS[recipe]
    assert [layer.tau_tokens.tolist() for layer in layers] == [qkv, qkv, qkv, proj, ffn] * 3
    assert grown.num_parameters() == LanguageModel(grown.config, device="meta").num_parameters()


@pytest.mark.parametrize("recipe", CHAIN)
def test_fp32_and_bf16_logits_change_by_rounding_only(recipe: str) -> None:
    scale = model(recipe)(IDS).abs().max().item()
    assert max(chain_differences(model(recipe, torch.float32), recipe)) < 1e-5 * (scale if recipe in OWN_NORMS else 1)
    # bf16 has 8 bits: one rounding of the largest logit and one of the residual stream before the head; where new
    # keys are not zero, one of keys and one of row norms too.
    roundings = 2 if recipe in (*GELUS, "softmax") else 4
    assert max(chain_differences(model(recipe, torch.bfloat16), recipe)) <= roundings * 2**-8 * scale


@pytest.mark.parametrize("recipe", CHAIN)
@pytest.mark.parametrize("layers", SUBSETS, ids=str)
def test_any_subset_of_layers_grows(recipe: str, layers: tuple[int, ...]) -> None:
    grown = model(recipe)
    with torch.no_grad():
        before = grown(IDS)
        grow(grown, qkv=36, proj=20, ffn=40, layers=layers, **options(recipe))
        assert worst(grown(IDS), before) < 1e-12
    for index, layer in enumerate(grown.layers):
        assert layer.mlp.num_tokens == (40 if index in layers else 20)  # type: ignore[union-attr]


@pytest.mark.parametrize("activation", GELUS)
def test_other_recipes_do_change_logits(activation: str) -> None:
    """The bounds above mean something: with keys that are not zero, or another tau, logits are far off."""
    for spoil in ("keys", "tau"):
        grown = model(activation)
        with torch.no_grad():
            before = grown(IDS)
            grow(grown, qkv=24, proj=20, ffn=40)
            for name, tensor in grown.state_dict().items():
                if spoil == "keys" and "key_tokens_1" in name:
                    tensor.normal_(std=0.5)
                if spoil == "tau" and name.endswith("tau_tokens"):
                    tensor.mul_(2)
            assert worst(grown(IDS), before) > 0.1 * before.abs().max().item(), spoil


def test_softmax_with_tokens_of_another_recipe_would_change_logits() -> None:
    grown = model("softmax")
    with torch.no_grad():
        before = grown(IDS)
        grow(grown, qkv=24, proj=20, ffn=40)
        for name, tensor in grown.state_dict().items():
            if "key_tokens_1" in name:
                tensor.zero_()
        assert worst(grown(IDS), before) > 1e-3


@pytest.mark.parametrize("recipe", [*GELUS, ROTATED, *OWN_NORMS])
def test_new_keys_learn_in_the_first_step_and_new_values_in_the_second(recipe: str) -> None:
    """Rotated keys have scores, a share of the norm, and values of zero: all of them learn in the first step. With a
    norm of their own values come first."""
    grown = model(recipe).train()
    grow(grown, qkv=24, proj=20, ffn=40, **options(recipe))
    new = {name: p for name, p in grown.named_parameters() if name.endswith("_tokens_1")}
    assert len(new) == 2 * 5 * 3
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        F.cross_entropy(grown(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        for name, parameter in new.items():
            assert parameter.grad is not None, name
            moves = parameter.grad.abs().sum(-1) > 0  # [n]
            is_first = ("key_tokens" in name) != (recipe in OWN_NORMS)
            if is_first or recipe == ROTATED or step == 2:
                assert moves.all(), (name, step)
            else:
                assert not moves.any(), name
        optimizer.step()


def test_random_keys_are_as_large_as_the_old_ones() -> None:
    grown = model("l2_norm_gelu")
    with torch.no_grad():
        grown.layers[1].mlp.key_tokens_0.mul_(3)  # type: ignore[union-attr, operator]
    grow(grown, qkv=30, proj=30, ffn=40, row_norm="segment")
    for name, layer in named_pattentions(grown):
        old, new = (layer.get_parameter(f"key_tokens_{i}") for i in (0, 1))
        assert (new.square().mean() / old.square().mean()).sqrt().item() == pytest.approx(1, abs=1e-6), name
        assert torch.linalg.matrix_rank(new) == 16 and not layer.get_parameter("value_tokens_1").any()
    grow(grown, qkv=50, new_keys="rotated", row_norm="segment")
    last = grown.get_parameter("layers.0.attention.query.key_tokens_2")
    old = torch.cat([grown.get_parameter(f"layers.0.attention.query.key_tokens_{i}") for i in (0, 1)])
    assert (last.square().mean() / old.square().mean()).sqrt().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("activation", [*GELUS, "softmax"])
def test_official_growth_is_a_model_of_that_size_with_the_old_tokens_in_it(activation: str) -> None:
    """No factor but the number of tokens says what a row's weights are: the old ones change, too."""
    grown = model(activation)
    layers = dict(named_pattentions(grown))
    old = {name: layer.get_parameter("key_tokens_0").clone() for name, layer in layers.items()}
    with torch.no_grad():
        before = grown(IDS)
        grow(grown, qkv=19, proj=11, ffn=50, new_keys="official")
        after = grown(IDS)
    sizes = {"qkv_slot_num": 19, "proj_slot_num": 11, "ffn_slot_num": 50}
    config = ModelConfig(**{**SMALL, **sizes}, norm_activation_type=activation)
    whole = LanguageModel(config, dtype=torch.float64).eval()
    for name, layer in named_pattentions(whole):
        segments = [layers[name].get_parameter(f"key_tokens_{i}") for i in (0, 1)]
        assert torch.equal(segments[0], old[name]) and 0.3 < segments[1].std().item() < 0.7
        assert layer.tau_tokens == layer.num_tokens == layers[name].tau_tokens
    tensors = dict(grown.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            new = [tensors[f"{name[:-1]}1"]] if name.endswith("_tokens_0") else []
            parameter.copy_(torch.cat([tensors[name], *new]))
        assert worst(whole(IDS), after) < 1e-12 < 1e-2 < worst(before, after)


@pytest.mark.parametrize("own", [{}, OWN], ids=str)
def test_a_growth_of_nothing_is_counted_and_changes_nothing(own: dict[str, Any]) -> None:
    grown = model("l2_norm_gelu")
    before = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    grow(grown, **own)
    after = grown.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert grown.config.token_segments == {"qkv": [[12, 0]] * 3, "proj": [[10, 0]] * 3, "ffn": [[20, 0]] * 3}


def test_an_impossible_growth_leaves_the_model_as_it_was() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("l2_norm_gelu", {"qkv": 24, "ffn": 19}, "ffn_slot_num: 19 is fewer than the 20 tokens of layer 0"),
        ("softmax", {"qkv": 24, "proj": 25}, "15 more are no multiple of 10; choose 30, row_norm: segment, or a GELU"),
        (
            "l2_norm_gelu",
            {"qkv": 24, "layers": (1, 3)},
            "layers: 3 is not a tokenformer block of this model; it has 0 to 2",
        ),
        (
            "l2_norm_gelu",
            {"qkv": 24, "ffn": 35, "new_keys": "rotated"},
            "ffn_slot_num: 35 are 15 more than the 20 tokens of layer 0; new_keys rotated needs 16 more: grow to 36",
        ),
        ("gelu_l2_norm", {"qkv": 24, "new_keys": "rotated"}, "rotated needs norm_activation_type l2_norm_gelu"),
        ("softmax", {"qkv": 24, "new_keys": "rotated"}, "rotated needs norm_activation_type l2_norm_gelu"),
        ("l2_norm_gelu", {"qkv": 24, "new_keys": "random"}, "new_keys: random keys would change the row norm that"),
        ("softmax", {"qkv": 24, "new_keys": "zero", **OWN}, "new_keys: zero keys cannot learn under a row norm of"),
        ("softmax", {"qkv": 24, "new_keys": "official", **OWN}, "new_keys: the official code knows no row norm of"),
        ("l2_norm_gelu", {"qkv": 20, "new_keys": "rotated", **OWN}, "rotated needs 12 more: grow to 24, or leave"),
    ]
    for activation, counts, message in cases:
        grown = model(activation)
        config, names = grown.config, list(grown.state_dict())
        with pytest.raises(UserError, match=message):
            grow(grown, **counts)
        assert grown.config is config and list(grown.state_dict()) == names


def golden_model() -> LanguageModel:
    arguments = json.loads((GOLDEN / "config.json").read_text())["neox_args"]
    config = ModelConfig(**{key: value for key, value in arguments.items() if key in ModelConfig.model_fields})
    return load_model(GOLDEN / "pytorch_model.bin", config)


def test_the_official_model_grows_and_keeps_the_official_logits() -> None:
    grown, io = golden_model(), load_file(GOLDEN / "io.safetensors")
    grow(grown, qkv=128, proj=128, ffn=512)
    with torch.no_grad():
        assert worst(grown(io["input_ids"]), io["logits"]) < 1e-5
    assert grown.num_parameters() > golden_model().num_parameters()


def chains_on_tensor_ranks() -> dict[str, list[float]]:
    torch.distributed.init_process_group("gloo")
    layout = Layout.for_world(torch.distributed.get_rank(), 2, tensor_size=2).connect()
    found = {}
    for recipe in CHAIN:
        # A rank's share of q, k, v is the same for two ranks: 12, 10 and 20 tokens are even.
        sharded = model(recipe, layout=layout)
        with torch.no_grad():
            found[f"{recipe} before"] = [worst(sharded(IDS), model(recipe)(IDS))]
        found[recipe] = chain_differences(sharded, recipe)
    sharded, alone = model("l2_norm_gelu", layout=layout), model("l2_norm_gelu")
    for grown in (sharded, alone):
        grow(grown, qkv=19, proj=11, ffn=51, new_keys="official")
    with torch.no_grad():
        found["official"] = [worst(sharded(IDS), alone(IDS))]
    uneven = LanguageModel(
        ModelConfig(**{**SMALL, "norm_activation_type": "softmax", "ffn_slot_num": 21}), layout=layout
    )
    with pytest.raises(UserError, match="21 tokens shared unevenly by 2 ranks .* grow the checkpoint instead"):
        grow(uneven, ffn=42)
    few = LanguageModel(ModelConfig(**{**SMALL, "ffn_slot_num": 40}), layout=layout)
    with pytest.raises(UserError, match="grow the checkpoint instead"):
        grow(few, ffn=56, new_keys="rotated")  # 8 new tokens a rank, whose 20 old ones have 16 dimensions
    with pytest.raises(UserError, match="1 new tokens with a row norm of their own for 2 ranks; each needs one"):
        grow(few, ffn=41, row_norm="segment")
    return found


@pytest.mark.processes
def test_tensor_ranks_grow_in_place() -> None:
    for found in run_ranks(2, chains_on_tensor_ranks):
        assert {name for name, values in found.items() if max(values) > 1e-12} == set()
