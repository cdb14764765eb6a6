"""Scheduled growth on real processes: every layout grows as one process does, and freezes, scales and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.training import train
from tests.growth.grown_runs import (
    CONTINUE,
    DATA,
    PIPELINE,
    STEADY,
    TENSOR,
    MakeConfig,
    assert_equal,
    checkpoint,
    is_new,
    logits,
    metric,
    run,
    stage,
    state,
    tensors,
    worst,
    zero,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("single_process")
TOLERANCE = 1e-5
# Three growths, by tokens that two ranks cannot share evenly.
CHAIN = [
    stage(3, qkv_slot_num=45, ffn_slot_num=71, old_tokens_lr_scale=0.5, lr=5e-4),
    stage(5, qkv_slot_num=48, proj_slot_num=None, ffn_slot_num=None, layers=[1], **CONTINUE),
    stage(7, qkv_slot_num=64, proj_slot_num=64, ffn_slot_num=101, new_tokens_warmup=3, new_moments="mean", **CONTINUE),
]
FROZEN = [stage(3, freeze_old_tokens=True, warmup=0.1, lr=2e-3, new_keys_decay="at_old_rms", new_moments="mean")]
AGES = {
    "lr_scale": {"new_keys": 2.0, "new_values": 0.5, "old_keys": 0.3, "other": 0.7}, "new_tokens_warmup": 4,
    "new_keys_decay": "at_old_rms", "new_moments": "mean",
}  # fmt: skip
# The second growth rotates keys that have rotated once, and more of them (72) than they have dimensions (32).
ROTATED = [
    stage(3, qkv_slot_num=48, proj_slot_num=48, ffn_slot_num=72, new_keys="rotated", **AGES, **CONTINUE),
    stage(6, qkv_slot_num=None, proj_slot_num=None, ffn_slot_num=104, layers=[1], new_keys="rotated", **CONTINUE),
]
# Kinds mixed: zero keys, random ones with a row norm of their own, and rotations of these, which share it.
OWN_NORMS = [
    stage(3, qkv_slot_num=45, ffn_slot_num=71, **CONTINUE),
    stage(5, qkv_slot_num=60, proj_slot_num=50, ffn_slot_num=90, row_norm="segment", **AGES, **CONTINUE),
    stage(7, qkv_slot_num=75, proj_slot_num=64, ffn_slot_num=109, new_keys="rotated", **CONTINUE),
]
SOFTMAX = [stage(3, proj_slot_num=72, ffn_slot_num=80, **AGES, **CONTINUE)]
RUN = {
    **STEADY, "train_batch_size": 4, "train_iters": 9, "lr_decay_iters": 40, "eval_interval": 9, "weight_decay": 0.1,
    "gradient_clipping": 0.5, "norm": "layernorm",
}  # fmt: skip
# An average of the weights, which validations put in their place.
AVERAGED = {"ema_decay": 0.8, "eval_interval": 6}
MODELS: dict[str, dict[str, Any]] = {
    "chain": {"growth": CHAIN},
    "frozen": {"growth": FROZEN, **AVERAGED},
    "rotated": {"growth": ROTATED},
    "norms": {"growth": OWN_NORMS, **AVERAGED},
    "softmax": {"growth": SOFTMAX, "norm_activation_type": "softmax"},
    "ungrown": {},
}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TENSOR,
    "tp2-sp-zero1": {**TENSOR, "sequence_parallel": True, **zero(1)},
    "tp2-zero3": {**TENSOR, **zero(3)},
    "pp2": PIPELINE,
    "pp2-zero1-recomputed": {**PIPELINE, **zero(1), "checkpoint_activations": True},
    "dp2-zero1": {**DATA, **zero(1)},
    "dp2-zero2": {**DATA, **zero(2)},
    "dp2-zero3": {**DATA, **zero(3)},
}
# Every model where its tokens are shared, where stages are, and where ranks have batches of their own; but softmax by
# its tokens only, and rotated keys pass through stages as one of the kinds that `norms` mixes.
CASES = [
    *((layout, "chain") for layout in ("tp2-sp-zero1", "pp2", "dp2-zero3")),
    *((layout, "frozen") for layout in ("tp2-zero3", "pp2-zero1-recomputed", "dp2-zero1")),
    *((layout, "rotated") for layout in ("tp2-sp-zero1", "dp2-zero3")),
    *((layout, "norms") for layout in ("tp2-zero3", "pp2-zero1-recomputed", "dp2-zero2")),
    ("tp2", "softmax"),
]


def train_all(configs: list[RunConfig]) -> list[int]:
    return [train(config).iteration for config in configs]


@pytest.fixture(scope="module")
def runs(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """Every case on two processes, and every model on one."""
    root = tmp_path_factory.mktemp("layouts")
    for model, keys in MODELS.items():
        run(tiny_config, root / model, **{**RUN, **keys})
    configs = [
        tiny_config(**{**RUN, **MODELS[m], **LAYOUTS[n]}, save=str(root / f"{n}-{m}"), load=str(root / f"{n}-{m}"))
        for n, m in CASES
    ]
    assert run_ranks(2, train_all, configs) == [[9] * len(CASES)] * 2
    return root


@pytest.mark.processes
@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_grows_as_one_process_does(runs: Path, layout: str, model: str) -> None:
    found, expected = runs / f"{layout}-{model}", runs / model
    for key in ("lm_loss", "valid_lm_loss", "learning_rate"):
        assert metric(found, key) == pytest.approx(metric(expected, key), abs=TOLERANCE), key
    assert metric(found, "grad_norm") == pytest.approx(metric(expected, "grad_norm"), rel=2 * TOLERANCE)
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys()
    for name in right:
        assert worst(left[name].double(), right[name].double()) < TOLERANCE, name
    here, there = state(found)["lineage"], state(expected)["lineage"]
    assert len(here) == len(MODELS[model]["growth"])
    for entry, other in zip(here, there, strict=True):
        for key in ("logit_difference", *(["ema_logit_difference"] if "ema_decay" in MODELS[model] else [])):
            assert entry.pop(key) < TOLERANCE and other.pop(key) < TOLERANCE
        assert entry == other


def messages(configs: list[RunConfig]) -> list[str]:
    """What each run is refused with."""
    found = []
    for config in configs:
        with pytest.raises(UserError) as error:
            train(config)
        found.append(str(error.value))
    return found


@pytest.mark.processes
def test_every_rank_refuses_a_growth_that_leaves_one_without_work(tiny_config: MakeConfig, tmp_path: Path) -> None:
    growth = [stage(2, layers=[1], freeze_old_tokens=True)]
    configs = [
        tiny_config(**{**RUN, **PIPELINE, **zero(number)}, save=str(tmp_path / str(number)), growth=growth)
        for number in (0, 1)
    ]
    configs.append(tiny_config(**{**RUN, **TENSOR}, save=str(tmp_path / "tp"), growth=[stage(2, ffn_slot_num=41)]))
    for found in run_ranks(2, messages, configs):
        assert all("freeze_old_tokens: a pipeline stage has no new tokens" in message for message in found[:2])
        assert "growth: ffn_slot_num grows by 1 where model_parallel_size is 2" in found[2]
    assert state(tmp_path / "0", 2)["iteration"] == 2 and not (tmp_path / "tp").exists()


@pytest.mark.processes
def test_the_loss_right_after_a_growth_is_that_of_the_ungrown_model(runs: Path) -> None:
    plain = metric(runs / "ungrown")
    for layout, model in CASES:
        if model != "softmax":
            grown = metric(runs / f"{layout}-{model}")
            assert grown[4] == pytest.approx(plain[4], abs=TOLERANCE), layout
            assert grown[9] != pytest.approx(plain[9], abs=TOLERANCE), layout


@pytest.mark.processes
def test_frozen_tokens_are_bit_identical_on_every_layout(runs: Path) -> None:
    for layout, model in CASES:
        if model == "frozen":
            before, after = (tensors(runs / f"{layout}-{model}", at, ("model",)) for at in (3, 9))
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), layout
            began, ended = (tensors(runs / f"{layout}-{model}", at, ("ema",)) for at in (3, 9))
            for name, average in began.items():  # it comes closer to what is frozen, too
                weight = before[name.replace("ema/", "model/")]
                assert worst(ended[name], weight.lerp(average, 0.8**6)) < 1e-6, (layout, name)
            assert all(is_new(name) for name in checkpoint(runs / f"{layout}-{model}").names("optimizer")), layout


@pytest.mark.processes
def test_keys_as_large_as_the_old_ones_decay_at_once_on_every_layout(runs: Path) -> None:
    for layout, model in CASES:
        if model in ("rotated", "frozen"):
            since = state(runs / f"{layout}-{model}")["lineage"][0].get("decays_since")
            assert since == (dict.fromkeys(("qkv", "proj", "ffn"), 3) if model == "rotated" else None), layout


@pytest.mark.processes
def test_a_grown_checkpoint_goes_on_in_one_process(tiny_config: MakeConfig, runs: Path, tmp_path: Path) -> None:
    """tau^2 is not the number of tokens there, and stays what it was."""
    ids = torch.randint(290, (2, 16), generator=torch.Generator().manual_seed(0))
    for name in ("chain", "tp2-sp-zero1-chain", "pp2-chain"):
        shutil.copytree(runs / name, tmp_path / name)
        run(tiny_config, tmp_path / name, **{**RUN, **MODELS["chain"], "train_iters": 10})
        assert int(tensors(tmp_path / name)["model/layers.0.mlp.tau_tokens"]) == 40
        assert metric(tmp_path / name)[10] == pytest.approx(metric(tmp_path / "chain")[10], abs=TOLERANCE), name
        for at in (9, 10):
            found, expected = (logits(tmp_path / run_name / f"global_step{at}", ids) for run_name in (name, "chain"))
            assert worst(found, expected) < TOLERANCE * expected.abs().max().item() * 10, (name, at)


@pytest.mark.processes
def test_legs_of_a_growing_run_may_have_other_layouts(tiny_config: MakeConfig, runs: Path, tmp_path: Path) -> None:
    """Stopped just before, at and after growths and taken up by another layout each time: the run of one process."""
    legs = [("tp2-sp-zero1", 3), ("pp2", 6), ("dp2-zero3", 9)]
    folder = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    configs = [
        tiny_config(**{**RUN, **MODELS["norms"], **LAYOUTS[layout]}, **folder, exit_interval=until)
        for layout, until in legs
    ]
    assert run_ranks(2, train_all, configs) == [[until for _, until in legs]] * 2
    assert metric(tmp_path / "run") == pytest.approx(metric(runs / "norms"), abs=TOLERANCE)
    left, right = tensors(tmp_path / "run"), tensors(runs / "norms")
    for name in right:
        assert worst(left[name].double(), right[name].double()) < 2 * TOLERANCE, name


@pytest.mark.processes
def test_one_layout_grows_alike_twice(tiny_config: MakeConfig, runs: Path, tmp_path: Path) -> None:
    """Split at a growth or not, two tensor ranks compute the same bits, dropout included."""
    keys = {
        **RUN,
        **MODELS["chain"],
        **LAYOUTS["tp2-sp-zero1"],
        "hidden_dropout": 0.1,
        "train_iters": 5,
        "eval_iters": 0,
    }
    configs = []
    for name, intervals in (("whole", [None]), ("parts", [3, None])):
        folder = {"save": str(tmp_path / name), "load": str(tmp_path / name)}
        configs += [tiny_config(**keys, **folder, exit_interval=interval) for interval in intervals]
    run_ranks(2, train_all, configs)
    assert metric(tmp_path / "parts") == metric(tmp_path / "whole")
    kinds = ("model", "optimizer", "ema", "rng")
    assert_equal(tensors(tmp_path / "parts", kinds=kinds), tensors(tmp_path / "whole", kinds=kinds))
