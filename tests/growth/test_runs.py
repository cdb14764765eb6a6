"""Growth inside training runs of one process: what is carried over, learning rates, frozen tokens, where it is due."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import load_config
from megatron.errors import UserError
from megatron.inference import load_model
from megatron.model import LanguageModel
from megatron.model.init import initial_value
from megatron.training import train
from megatron.training.schedule import LRSchedule
from tests.growth.grown_runs import (
    CONTINUE,
    COUNTS,
    STEADY,
    MakeConfig,
    assert_equal,
    checkpoint,
    is_new,
    metric,
    run,
    stage,
    state,
    tensors,
    worst,
)

pytestmark = pytest.mark.usefixtures("single_process")
EVERYTHING = ("model", "optimizer", "rng")
NOTHING = {"qkv_slot_num": 24, "proj_slot_num": 24, "ffn_slot_num": 40}


@pytest.fixture(scope="module")
def ungrown(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of 12 iterations without clipping that never grows."""
    folder = tmp_path_factory.mktemp("ungrown")
    run(tiny_config, folder, **STEADY, train_iters=12, gradient_clipping=0.0, checkpoint_factor=1)
    return folder


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 1}, {"stage": 3}], ids=str)
def test_growing_by_nothing_equals_not_growing_bit_for_bit(
    tiny_config: MakeConfig, tmp_path: Path, zero: dict[str, int]
) -> None:
    keys = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 11, "zero_optimization": zero}
    run(tiny_config, tmp_path / "whole", **keys)
    run(
        tiny_config,
        tmp_path / "grown",
        **keys,
        growth=[stage(6, **NOTHING, **CONTINUE), stage(9, **NOTHING, **CONTINUE)],
    )
    for key in ("lm_loss", "valid_lm_loss", "learning_rate", "grad_norm"):
        assert metric(tmp_path / "grown", key) == metric(tmp_path / "whole", key), key
    assert_equal(tensors(tmp_path / "grown", kinds=EVERYTHING), tensors(tmp_path / "whole", kinds=EVERYTHING))
    assert len(state(tmp_path / "grown")["lineage"]) == 2


def test_everything_is_carried_over(tiny_config: MakeConfig, tmp_path: Path, ungrown: Path) -> None:
    """The first update after a growth moves the old parameters as if there had been none: same samples, same function,
    same moments, same count of updates. New tokens start without moments."""
    run(
        tiny_config, tmp_path, **STEADY, train_iters=12, gradient_clipping=0.0, checkpoint_factor=1,
        growth=[stage(6, **CONTINUE)],
    )  # fmt: skip
    grown, plain = tensors(tmp_path, 7), tensors(ungrown, 7)
    assert plain.keys() < grown.keys() and all(is_new(name) for name in grown.keys() - plain.keys())
    for name in plain:
        assert worst(grown[name].float(), plain[name].float()) < 1e-6, name
    steps = {name: int(tensor) for name, tensor in grown.items() if name.startswith("optimizer/step/")}
    assert {name: count for name, count in steps.items() if count != (1 if is_new(name) else 7)} == {}
    assert sum(map(is_new, steps)) == 2 * 5 * 2
    losses, expected = metric(tmp_path), metric(ungrown)
    assert [losses[i] for i in range(1, 7)] == [expected[i] for i in range(1, 7)]
    assert losses[7] == pytest.approx(expected[7], abs=1e-6) and losses[12] != pytest.approx(expected[12], abs=1e-6)
    before, after, never = state(tmp_path, 6), state(tmp_path, 12), state(ungrown, 12)
    assert before == {**state(ungrown, 6), "lineage": []}
    assert {**after, "lineage": []} == never
    [entry] = after["lineage"]
    assert entry.pop("logit_difference") < 1e-5
    assert entry == {
        "scheduled": True, "iteration": 6, "updates": 6, "consumed_tokens": 6 * 4 * 16, "new_keys": "zero", **COUNTS,
        "added": "qkv 24 -> 48, proj 24 -> 36, ffn 40 -> 72 in layers 0 to 1",
        "parameters": checkpoint_parameters(tmp_path),
    }  # fmt: skip
    assert_equal(tensors(tmp_path, 6), tensors(ungrown, 6))
    random = [tensors(folder, 12, ("rng",)) for folder in (tmp_path, ungrown)]
    assert_equal(*random)


def checkpoint_parameters(folder: Path) -> int:
    reader = checkpoint(folder)
    buffers = [name for name in reader.names("model") if name.endswith("tau_tokens")]
    return sum(torch.Size(reader.shape("model", n)).numel() for n in reader.names("model") if n not in buffers)


@pytest.mark.parametrize("activation", ["gelu_l2_norm", "softmax"])
def test_the_loss_after_growth_is_that_of_the_model_before(
    tiny_config: MakeConfig, tmp_path: Path, activation: str
) -> None:
    keys = {"norm_activation_type": activation, "train_iters": 8, **STEADY}
    run(tiny_config, tmp_path / "plain", **keys)
    growth = [
        stage(4, proj_slot_num=72, ffn_slot_num=80, **CONTINUE),
        stage(6, qkv_slot_num=96, proj_slot_num=None, ffn_slot_num=160, **CONTINUE),
    ]
    run(tiny_config, tmp_path / "grown", **keys, growth=growth)
    plain, grown = metric(tmp_path / "plain"), metric(tmp_path / "grown")
    assert grown[5] == pytest.approx(plain[5], abs=1e-5)
    assert max(entry["logit_difference"] for entry in state(tmp_path / "grown")["lineage"]) < 1e-5


def test_a_growth_by_tokens_of_some_layers(tiny_config: MakeConfig, tmp_path: Path) -> None:
    growth = [{**stage(1, **CONTINUE), "at_iteration": None, "at_tokens": 300, "layers": [1]}]
    run(tiny_config, tmp_path, train_iters=7, growth=growth)
    [entry] = state(tmp_path)["lineage"]
    assert (entry["iteration"], entry["consumed_tokens"]) == (5, 320)  # the first iteration with 300 tokens behind it
    new = [name for name in checkpoint(tmp_path).names("model") if is_new(name)]
    assert len(new) == 10 and all(name.startswith("layers.1.") for name in new)
    assert entry["added"] == "qkv 24 -> 48, proj 24 -> 36, ffn 40 -> 72 in layer 1"


def test_learning_rates_restart_or_go_on(tiny_config: MakeConfig, tmp_path: Path, ungrown: Path) -> None:
    keys = {**STEADY, "train_iters": 12, "gradient_clipping": 0.0}
    restart = stage(6, lr=5e-4, min_lr=1e-5, warmup=0.5)
    run(tiny_config, tmp_path / "restart", **keys, growth=[restart])
    run(tiny_config, tmp_path / "continue", **keys, growth=[stage(6, **CONTINUE)])
    assert metric(tmp_path / "continue", "learning_rate") == metric(ungrown, "learning_rate")
    rates = metric(tmp_path / "restart", "learning_rate")
    own = tiny_config(
        warmup=0.5, min_lr=1e-5, lr_decay_iters=6, optimizer={"type": "Adam", "params": {"lr": 5e-4}}, train_iters=12
    )
    assert [rates[i] for i in range(7, 13)] == [LRSchedule(own, 6)(i) for i in range(6, 12)]
    assert rates[7] == 0 and rates[10] == pytest.approx(5e-4)
    # The first update of a restart with warm-up has a learning rate of 0: nothing moves.
    run(tiny_config, tmp_path / "one", **{**keys, "train_iters": 7}, growth=[{**restart, "lr_decay_iters": 6}])
    first = tensors(tmp_path / "one", kinds=("model",))
    for name, tensor in tensors(tmp_path / "one", 6, ("model",)).items():
        assert torch.equal(first[name], tensor), name


@pytest.mark.parametrize("zero", [0, 3])
def test_old_and_new_tokens_have_learning_rates_of_their_own(
    tiny_config: MakeConfig, tmp_path: Path, zero: int
) -> None:
    """Measured on the first update after a growth: Adam moves a new key, which was zero, by the learning rate."""
    keys = {**STEADY, "zero_optimization": {"stage": zero}, "weight_decay": 0.0, "lr_decay_iters": 12}
    run(tiny_config, tmp_path / "base", **keys, train_iters=6)
    start = tensors(tmp_path / "base", kinds=("model",))
    moves = {}
    for old, new in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.25)):
        scales = {"old_tokens_lr_scale": old, "new_tokens_lr_scale": new}
        folder = tmp_path / f"{old}-{new}"
        run(
            tiny_config, folder, **keys, train_iters=7, load=str(tmp_path / "base"),
            growth=[stage(6, **CONTINUE, **scales)],
        )  # fmt: skip
        rate, after = metric(folder, "learning_rate")[7], tensors(folder, kinds=("model",))
        model_config = load_model(folder).config
        parameters = dict(LanguageModel(model_config, device="meta").named_parameters())
        for name in after:
            if name.endswith("tau_tokens"):
                continue
            if not is_new(name):
                moves[old, new, name] = after[name] - start[name]
            elif "key_tokens" in name:
                assert after[name].abs().max().item() == pytest.approx(rate * new, rel=0.02), (name, new)
            else:
                canonical = name.removeprefix("model/")
                value = initial_value(canonical, parameters[canonical], model_config, 1234)
                assert worst(after[name], value) <= 1e-9, name  # no gradient in the first step, and no decay
    old_names = {name for _, _, name in moves}
    for name in old_names:
        assert torch.equal(moves[0.0, 1.0, name], torch.zeros_like(moves[0.0, 1.0, name])), name
        assert moves[1.0, 1.0, name].abs().max() > 1e-5
        assert worst(moves[1.0, 0.0, name], moves[1.0, 1.0, name]) < 1e-7, name
        assert worst(moves[0.5, 0.25, name], moves[1.0, 1.0, name] / 2) < 1e-7, name


FROZEN = [
    pytest.param({"zero_optimization": {"stage": 0}}, id="fp32"),
    pytest.param({"precision": "bf16", "zero_optimization": {"stage": 1}}, id="bf16-zero1"),
    pytest.param({"zero_optimization": {"stage": 3}}, id="fp32-zero3"),
    pytest.param({"precision": "bf16", "zero_optimization": {"stage": 3}}, id="bf16-zero3"),
]


@pytest.mark.parametrize("keys", FROZEN)
def test_frozen_tokens_stay_while_new_ones_learn(tiny_config: MakeConfig, tmp_path: Path, keys: dict[str, Any]) -> None:
    growth = [stage(5, freeze_old_tokens=True, lr=5e-3, warmup=0.1)]
    run(tiny_config, tmp_path, **keys, train_iters=55, growth=growth, weight_decay=0.1, checkpoint_factor=30)
    for middle in (30, 55):
        before, after = tensors(tmp_path, 5, ("model",)), tensors(tmp_path, middle, ("model",))
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
    new = [name for name in after if is_new(name)]
    assert len(new) == 20 and all(after[name].abs().max() > 1e-3 for name in new)
    states = checkpoint(tmp_path).names("optimizer")
    assert states and all(is_new(name) for name in states)
    losses = metric(tmp_path)
    early, late = (sum(losses[i] for i in range(a, a + 5)) / 5 for a in (6, 51))
    assert late < early - 0.1


def test_tokens_thaw_with_the_next_growth(tiny_config: MakeConfig, tmp_path: Path) -> None:
    growth = [stage(3, freeze_old_tokens=True, **CONTINUE), stage(6, qkv_slot_num=60, ffn_slot_num=80, **CONTINUE)]
    run(tiny_config, tmp_path, train_iters=8, growth=growth)
    before, after = tensors(tmp_path, 6, ("model",)), tensors(tmp_path, kinds=("model",))
    assert all(not torch.equal(after[n], t) for n, t in before.items() if not n.endswith("tau_tokens"))
    steps = {name: int(t) for name, t in tensors(tmp_path, kinds=("optimizer",)).items() if "/step/" in name}
    expected = {name: 5 if is_new(name) else 2 for name in steps}  # moments of frozen tokens are given up
    assert steps == expected


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("kind", ["SGD", "Lion", "Muon"])
def test_every_optimizer_grows_and_freezes(tiny_config: MakeConfig, tmp_path: Path, kind: str, zero: int) -> None:
    keys = {
        "optimizer": {"type": kind, "params": {"lr": 1e-3, "momentum": 0.9}}, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero}, "weight_decay": 0.1, "checkpoint_factor": 1,
    }  # fmt: skip
    growth = [
        stage(3, **CONTINUE),
        stage(6, qkv_slot_num=60, proj_slot_num=48, ffn_slot_num=80, freeze_old_tokens=True),
    ]
    run(tiny_config, tmp_path, train_iters=9, growth=growth, **keys)
    six, nine = tensors(tmp_path, 6, ("model",)), tensors(tmp_path, 9, ("model",))
    assert all(torch.equal(nine[name], tensor) for name, tensor in six.items())
    assert all(nine[name].abs().max() > 0 for name in nine if is_new(name, 2))
    three = tensors(tmp_path, 3, ("model",))
    assert all(not torch.equal(six[n], t) for n, t in three.items() if not n.endswith("tau_tokens"))


def test_a_smaller_models_run_goes_on_in_a_larger_one(tiny_config: MakeConfig, tmp_path: Path, ungrown: Path) -> None:
    """pretrain_partial_init: the schedule starts anew or goes on; data, moments and lineage are carried over."""
    keys = {**STEADY, **COUNTS, "gradient_clipping": 0.0, "pretrain_partial_init": str(ungrown / "global_step6")}
    run(tiny_config, tmp_path / "restart", **keys, train_iters=6, lr_decay_iters=12, checkpoint_factor=1)
    run(tiny_config, tmp_path / "continue", **keys, train_iters=12, partial_init_policy="continue", checkpoint_factor=1)
    losses, expected = metric(tmp_path / "restart"), metric(ungrown)
    assert losses.keys() == set(range(1, 7)) and metric(tmp_path / "continue").keys() == set(range(7, 13))
    assert losses[1] == pytest.approx(expected[7], abs=1e-6)
    assert metric(tmp_path / "continue")[7] == pytest.approx(expected[7], abs=1e-6)
    rates = [metric(folder, "learning_rate") for folder in (tmp_path / "restart", tmp_path / "continue", ungrown)]
    assert [rates[0][i] for i in range(1, 7)] == [rates[2][i] for i in range(1, 7)]
    assert [rates[1][i] for i in range(7, 13)] == [rates[2][i] for i in range(7, 13)]
    for name in ("restart", "continue"):
        after = state(tmp_path / name)
        assert after["consumed_samples"] == 12 * 4 and after["consumed_tokens"] == 12 * 64
        [entry] = after["lineage"]
        assert not entry["scheduled"] and entry["logit_difference"] < 1e-5
    grown, plain = tensors(tmp_path / "continue", 7), tensors(ungrown, 7)
    assert all(worst(grown[name].float(), plain[name].float()) < 1e-6 for name in plain)


@pytest.mark.parametrize("growth", [{"new_keys": "rotated"}, {"row_norm": "segment"}], ids=str)
def test_a_smaller_model_may_grow_by_other_keys(
    tiny_config: MakeConfig, tmp_path: Path, ungrown: Path, growth: dict[str, Any]
) -> None:
    """Exact, and unlike zero keys they give the new tokens weights that differ from the first."""
    counts = {"qkv_slot_num": 48, "proj_slot_num": 48, "ffn_slot_num": 72}
    keys = {**STEADY, **counts, "gradient_clipping": 0.0, "pretrain_partial_init": str(ungrown / "global_step6")}
    run(tiny_config, tmp_path, **keys, **growth, train_iters=2, checkpoint_factor=1)
    assert metric(tmp_path)[1] == pytest.approx(metric(ungrown)[7], abs=1e-5)
    [entry] = state(tmp_path)["lineage"]
    assert entry.items() >= {"new_keys": "random", **growth}.items() and entry["logit_difference"] < 1e-5
    grown = tensors(tmp_path, 1, ("model",))
    assert all(tensor.any() for name, tensor in grown.items() if is_new(name)), "values moved in the first step"


def test_official_growth_is_made_though_the_loss_jumps(tiny_config: MakeConfig, tmp_path: Path, ungrown: Path) -> None:
    keys = {**STEADY, **COUNTS, "gradient_clipping": 0.0, "pretrain_partial_init": str(ungrown / "global_step6")}
    run(tiny_config, tmp_path, **keys, new_keys="official", train_iters=2, checkpoint_factor=1)
    [entry] = state(tmp_path)["lineage"]
    assert entry["new_keys"] == "official" and entry["logit_difference"] > 1e-3
    assert abs(metric(tmp_path)[1] - metric(ungrown)[7]) > 1e-4


def test_a_run_that_began_with_a_smaller_model_resumes_and_grows_on(
    tiny_config: MakeConfig, tmp_path: Path, ungrown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**COUNTS, "pretrain_partial_init": str(ungrown), "train_iters": 9, "hidden_dropout": 0.1}
    growth = [stage(5, ffn_slot_num=96, **CONTINUE)]
    capsys.readouterr()
    run(tiny_config, tmp_path / "whole", **keys, growth=growth)
    assert f"no checkpoint in {tmp_path / 'whole'}: starting from {ungrown}" in capsys.readouterr().out
    for interval in (3, 7, None):
        run(tiny_config, tmp_path / "parts", **keys, growth=growth, exit_interval=interval)
    assert metric(tmp_path / "parts") == metric(tmp_path / "whole")
    assert_equal(tensors(tmp_path / "parts", kinds=EVERYTHING), tensors(tmp_path / "whole", kinds=EVERYTHING))
    assert [entry["scheduled"] for entry in state(tmp_path / "parts")["lineage"]] == [False, True]


def test_a_larger_model_may_have_other_lengths_and_dropout(
    tiny_config: MakeConfig, tmp_path: Path, ungrown: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {**COUNTS, "seq_length": 24, "hidden_dropout": 0.1, "pretrain_partial_init": str(ungrown)}
    run(tiny_config, tmp_path, **keys, train_iters=2)
    saved = checkpoint(tmp_path).config
    assert (saved["seq_length"], saved["hidden_dropout"]) == (24, 0.1)
    # Other samples: the data starts anew, the count of tokens goes on.
    after = state(tmp_path)
    assert after["consumed_samples"] == 2 * 4 and after["consumed_tokens"] == 12 * 64 + 2 * 4 * 24
    run(tiny_config, tmp_path, **keys, train_iters=3)
    assert json.loads(json.dumps(state(tmp_path)["lineage"])) == after["lineage"]


def test_a_grown_run_is_evaluated_with_its_own_configuration(tiny_config: MakeConfig, tmp_path: Path) -> None:
    growth = [stage(1), stage(2, ffn_slot_num=80, row_norm="segment")]
    config = tiny_config(save=str(tmp_path), load=str(tmp_path), train_iters=4, growth=growth)
    run(tiny_config, tmp_path, train_iters=4, growth=growth)
    assert load_model(tmp_path, config.with_vocabulary(290)).config.ffn_slot_num == 80
    written = load_config([tmp_path / "global_step4" / "config.yml"])
    assert load_model(tmp_path, written).config.segment_norms == ["joint", "joint", "segment"]
    train(load_config([tmp_path / "global_step4" / "config.yml"], {"train_iters": 5}))
    assert state(tmp_path)["iteration"] == 5 and len(state(tmp_path)["lineage"]) == 2
    run(tiny_config, tmp_path, train_iters=7, growth=[*growth, stage(6, ffn_slot_num=96, row_norm="segment")])
    assert checkpoint(tmp_path).config["segment_norms"] == ["joint", "joint", "segment", "segment"]


def test_a_run_that_is_done_does_not_grow(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        run(tiny_config, tmp_path, train_iters=3, growth=[stage(3)])
    assert "growth at iteration" not in capsys.readouterr().out and state(tmp_path)["lineage"] == []
    run(tiny_config, tmp_path, train_iters=4, growth=[stage(3)])
    assert len(state(tmp_path)["lineage"]) == 1
    keys = {**COUNTS, "pretrain_partial_init": str(tmp_path / "global_step3"), "partial_init_policy": "continue"}
    with pytest.raises(UserError, match="train_iters: 3 is not more than the 3 iterations of .*global_step3; raise it"):
        run(tiny_config, tmp_path / "larger", **keys, train_iters=3)


def test_finetuning_takes_weights_and_lineage_only(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "base", train_iters=4, growth=[stage(2)])
    [entry] = state(tmp_path / "base")["lineage"]
    tuned = {"save": str(tmp_path / "tuned"), "load": str(tmp_path / "base"), "finetune": True, "train_iters": 2}
    run(tiny_config, tmp_path, **{**tuned, **COUNTS})
    assert state(tmp_path / "tuned")["lineage"] == [{**entry, "scheduled": False}]
    assert state(tmp_path / "tuned")["consumed_samples"] == 2 * 4
    larger = {"pretrain_partial_init": str(tmp_path / "base"), "ffn_slot_num": 96, "finetune": True}
    run(tiny_config, tmp_path / "larger", **{**COUNTS, **larger}, train_iters=2)
    after = state(tmp_path / "larger")
    assert after["consumed_samples"] == 2 * 4 and after["consumed_tokens"] == 2 * 64
    assert after["lineage"][0] == {**entry, "scheduled": False} and len(after["lineage"]) == 2
