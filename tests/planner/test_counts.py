"""What is counted of a model and of its parts are the model's own numbers."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.model import LanguageModel
from megatron.mpu import Layout
from megatron.planner.networks import Stage, flops_per_token, networks, num_parameters, stages
from tests.planner.workloads import PUBLISHED, published, small


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_those_of_the_model(name: str) -> None:
    config = published(name).model
    model = LanguageModel(config, device="meta")
    assert num_parameters(config) == model.num_parameters()
    assert flops_per_token(config) == model.flops_per_token(config.seq_length)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm", "no_weight_tying": True},
        {"norm": "rmsnorm", "final_norm": None},
        {"kind": "global", "use_bias_in_attn_linear": False},
        {"kind": "global", "intermediate_size": 200},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_variants_are_counted_too(options: dict[str, Any]) -> None:
    config = small(**options).model
    model = LanguageModel(config, device="meta")
    assert num_parameters(config) == model.num_parameters()
    assert flops_per_token(config) == model.flops_per_token(config.seq_length)


@pytest.mark.parametrize("kind", ["tokenformer", "global"])
def test_the_first_ranks_share_is_counted_exactly(kind: str) -> None:
    config = small(kind).model
    shard = LanguageModel(config, device="meta", layout=Layout.for_world(0, 4, tensor_size=4))
    (stage,), (network,) = stages(config, 1), networks(config)
    assert stage.parameters(network, 4) == sum(parameter.numel() for parameter in shard.parameters())


def test_uneven_shares_count_the_largest() -> None:
    config = small(qkv_slot_num=65, num_attention_heads=4).model
    largest = max(
        sum(
            p.numel()
            for p in LanguageModel(config, device="meta", layout=Layout.for_world(r, 4, tensor_size=4)).parameters()
        )
        for r in range(4)
    )
    assert stages(config, 1)[0].parameters(*networks(config), 4) == largest


@pytest.mark.engine
@pytest.mark.parametrize(("layers", "count"), [(12, 5), (7, 7), (40, 6)])
def test_stages_are_cut_as_the_pipeline_cuts_them(layers: int, count: int) -> None:
    from megatron.engine.pipeline_model import partition

    config = small(num_layers=layers).model
    bounds = partition([0, *[1] * layers, 0, 0], count)
    sizes = [sum(0 < i <= layers for i in range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert [len(stage.kinds) for stage in stages(config, count)] == sizes


def test_a_stage_without_ends_has_no_vocabulary() -> None:
    config = small().model
    middle = Stage(config.layer_kinds[:1], first=False, last=False)
    assert middle.parameters(*networks(config), 1) == 2 * 64 * (3 * 64 + 96 + 256)
