"""A run that is stopped and resumed is the run that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader, FolderLock, RunFolder
from megatron.config import RunConfig
from megatron.engine.state import EngineState
from megatron.errors import UserError
from megatron.training import train
from tests.whole_state import Whole

pytestmark = pytest.mark.usefixtures("single_process")
MakeConfig = Callable[..., RunConfig]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["lm_loss"] for line in lines if "lm_loss" in line}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    latest = RunFolder(folder).find()
    assert latest is not None
    reader = CheckpointReader(latest)
    kinds = ("model", "optimizer", "ema", "rng")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in kinds for n in reader.names(kind)}


def run(config: MakeConfig, folder: Path, **keys: Any) -> None:
    train(config(save=str(folder), load=str(folder), **keys))


SETTINGS = [
    pytest.param({"precision": "fp32", "zero_optimization": {"stage": stage}}, id=f"fp32-zero{stage}")
    for stage in (0, 1, 2, 3)
] + [
    pytest.param({"precision": "bf16", "zero_optimization": {"stage": stage}}, id=f"bf16-zero{stage}")
    for stage in (1, 2, 3)
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_four_and_four_iterations_equal_eight(
    tiny_config: MakeConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    keys = {**settings, "train_iters": 8, "eval_interval": 4, "checkpoint_factor": 4}
    keys |= {"hidden_dropout": 0.1, "ema_decay": 0.9}
    run(tiny_config, tmp_path / "whole", **keys)
    run(tiny_config, tmp_path / "parts", **keys, exit_interval=4)
    first = losses(tmp_path / "parts")
    assert max(first) == 4
    run(tiny_config, tmp_path / "parts", **keys)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert {"optimizer/exp_avg_sq/final_norm.weight", "ema/final_norm.weight"} <= whole.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_muon_is_the_same_optimizer_at_every_zero_stage(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"optimizer": {"type": "Muon", "params": {"lr": 5e-3}}, "gradient_clipping": 0.0, "train_iters": 6}
    for stage in (0, 1, 2):
        run(tiny_config, tmp_path / str(stage), zero_optimization={"stage": stage}, **keys)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), abs=1e-5)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "0"), abs=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "Lion", "Muon"])
def test_every_optimizer_resumes_exactly_and_learns(tiny_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    lr = {"SGD": 0.5, "Lion": 5e-3, "Muon": 3e-3}[kind]
    keys = {"optimizer": {"type": kind, "params": {"lr": lr, "momentum": 0.9}}, "zero_optimization": {"stage": 1}}
    keys["gradient_clipping"] = 0.0
    run(tiny_config, tmp_path / "whole", **keys)
    run(tiny_config, tmp_path / "parts", **keys, exit_interval=10)
    run(tiny_config, tmp_path / "parts", **keys)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    curve = losses(tmp_path / "whole")
    assert curve[20] < curve[1] - 0.1


def test_a_longer_run_keeps_the_data_it_consumed(tiny_config: MakeConfig, tmp_path: Path) -> None:
    # lr_decay_iters is fixed, so that only the data order could differ.
    keys = {"lr_decay_iters": 60, "train_micro_batch_size_per_gpu": 128}
    run(tiny_config, tmp_path / "short", **keys, train_iters=3)
    short = losses(tmp_path / "short")
    run(tiny_config, tmp_path / "short", **keys, train_iters=15)
    longer = losses(tmp_path / "short")
    assert {i: longer[i] for i in short} == short
    blocks = json.loads((tmp_path / "short/global_step15/train_state.json").read_text())["epoch_blocks"]["train/0"]
    first = json.loads((tmp_path / "short/global_step3/train_state.json").read_text())["epoch_blocks"]["train/0"]
    assert len(blocks) == len(first) + 1 and blocks[: len(first)] == first


def test_a_run_may_go_on_with_a_larger_batch(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=5, train_micro_batch_size_per_gpu=64)
    run(tiny_config, tmp_path, train_iters=10, train_micro_batch_size_per_gpu=16)
    state = json.loads((tmp_path / "global_step10/train_state.json").read_text())
    assert state["consumed_samples"] == 5 * 64 + 5 * 16


def test_the_optimizer_may_live_on_the_cpu(tiny_config: MakeConfig, tmp_path: Path) -> None:
    for name, extra in (("plain", {}), ("offloaded", {"offload_optimizer": {"device": "cpu"}})):
        run(tiny_config, tmp_path / name, train_iters=5, zero_optimization={"stage": 2, **extra})
    assert losses(tmp_path / "offloaded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_run_rolled_back_keeps_what_it_saves(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=8, checkpoint_factor=2)
    run(tiny_config, tmp_path, iteration=2, train_iters=3, keep_last_n_checkpoints=2)
    assert (tmp_path / "latest").read_text().strip() == "global_step3"
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == ["global_step3", "global_step8"]


def test_a_new_run_does_not_mix_with_an_old_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "old", train_iters=3)
    before = (tmp_path / "old" / "metrics.jsonl").read_text()
    for keys in ({}, {"load": str(tmp_path / "old"), "finetune": True}, {"load": str(tmp_path / "empty")}):
        with pytest.raises(UserError, match=r"save: .*old has checkpoints of a run that this one does not continue"):
            train(tiny_config(save=str(tmp_path / "old"), train_iters=2, **keys))
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == before
    logs = {"log_dir": str(tmp_path / "logs"), "train_iters": 2}
    for name in ("a", "b"):
        train(tiny_config(save=str(tmp_path / name), **logs))
    assert losses(tmp_path / "logs").keys() == {1, 2} and (tmp_path / "logs" / "metrics.jsonl.1").is_file()


def test_two_runs_do_not_write_into_one_folder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(UserError, match="another run is writing to"):
        run(tiny_config, tmp_path / "out", train_iters=1)
    lock.close()
    run(tiny_config, tmp_path / "out", train_iters=1)


@pytest.mark.parametrize(
    ("key", "value"), [("norm_activation_type", "softmax"), ("num_attention_heads", 4), ("rotary_pct", 0.5)]
)
def test_resuming_another_model_of_the_same_shapes_is_refused(
    tiny_config: MakeConfig, tmp_path: Path, key: str, value: Any
) -> None:
    run(tiny_config, tmp_path, train_iters=1)
    with pytest.raises(UserError, match=f"{key}: {value} in the configuration, .* in checkpoint"):
        run(tiny_config, tmp_path, train_iters=2, **{key: value})


def test_sgd_without_momentum_resumes(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    run(tiny_config, tmp_path, train_iters=2, **keys)
    run(tiny_config, tmp_path, train_iters=4, **keys)
    assert losses(tmp_path).keys() == {1, 2, 3, 4}


def test_state_of_another_optimizer_is_refused_with_the_way_out(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=2)
    lion = {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}
    with pytest.raises(UserError, match=r"optimizer\.type: Lion cannot take over the state of Adam.*no_load_optim"):
        run(tiny_config, tmp_path, train_iters=4, **lion)
    run(tiny_config, tmp_path, train_iters=4, no_load_optim=True, **lion)
    assert losses(tmp_path).keys() == {1, 2, 3, 4}


def test_step_counts_take_the_form_the_optimizer_wants() -> None:
    class GroupStep(torch.optim.Optimizer):
        """Counts its steps in the group, as apex's FusedAdam does."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0, "step": 7})

    model = torch.nn.Linear(2, 2, bias=False)
    source = EngineState(model, GroupStep(model.parameters()), zero_stage=0)
    saved = Whole(source)
    assert saved.names("optimizer") == ["step/weight"] and saved.tensor("optimizer", "step/weight").item() == 7
    adam = torch.optim.AdamW(model.parameters())
    EngineState(model, adam, 0).write_optimizer_state(saved)
    assert torch.equal(adam.state[model.weight]["step"], torch.tensor(7.0))
    target = GroupStep(model.parameters())
    target.param_groups[0]["step"] = 0
    EngineState(model, target, 0).write_optimizer_state(saved)
    assert target.param_groups[0]["step"] == 7


def test_a_finished_run_says_so_and_adds_nothing(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=3)
    before = (tmp_path / "metrics.jsonl").read_text()
    run(tiny_config, tmp_path, train_iters=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_lm_loss_is_the_mean_since_the_last_line(tiny_config: MakeConfig, tmp_path: Path) -> None:
    for name, interval in (("each", 1), ("every", 5)):
        run(tiny_config, tmp_path / name, train_iters=10, log_interval=interval)
    each, every = losses(tmp_path / "each"), losses(tmp_path / "every")
    assert every.keys() == {5, 10}
    assert every[5] == pytest.approx(sum(each[i] for i in range(1, 6)) / 5, abs=1e-6)


def test_finetune_takes_the_weights_and_nothing_else(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "base", train_iters=5)
    state = train(tiny_config(load=str(tmp_path / "base"), finetune=True, train_iters=2, save=str(tmp_path / "tuned")))
    assert state.iteration == 2
    steps = tensors(tmp_path / "tuned")["optimizer/step/final_norm.weight"]
    assert steps.item() == 2


def test_an_empty_load_folder_starts_from_scratch(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    state = train(tiny_config(load=str(tmp_path / "empty"), train_iters=1))
    assert state.iteration == 1


def test_a_checkpoint_of_another_shape_names_tensor_and_key(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=1)
    with pytest.raises(UserError, match="ffn_slot_num: 48 in the configuration, 40 in checkpoint"):
        run(tiny_config, tmp_path, ffn_slot_num=48)
    with pytest.raises(UserError, match="num_layers"):
        run(tiny_config, tmp_path, num_layers=3)


def test_checkpoints_are_kept_and_removed_as_asked(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"checkpoint_factor": 2, "extra_save_iters": [0, 1], "keep_last_n_checkpoints": 2, "train_iters": 8}
    run(tiny_config, tmp_path, **keys)
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == [f"global_step{i}" for i in (0, 1, 6, 8)]


def test_missing_optimizer_state_is_an_error_that_names_the_way_out(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=2, no_save_optim=True)
    with pytest.raises(UserError, match="no_load_optim: true"):
        run(tiny_config, tmp_path, train_iters=4)
