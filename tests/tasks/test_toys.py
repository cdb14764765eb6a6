"""Training, resuming, growing and cutting up models that are no language models: training knows nothing of either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig, load_config
from megatron.errors import UserError
from megatron.exchange import open_checkpoint
from megatron.growth.convert import grow_checkpoint
from megatron.growth.describe import as_text, describe_checkpoint
from megatron.growth.plan import TokenCounts
from megatron.inference import load_model
from megatron.model.compatibility import check_fit, described_model
from megatron.tasks import Task, register
from megatron.training import train
from tests.ranks import run_ranks
from tests.tasks.toys import SAMPLES, VectorsTask

KEYS: dict[str, Any] = {
    "task": "vectors", "num_layers": 2, "hidden_size": 16, "ffn_slot_num": 24, "train_batch_size": 8, "train_iters": 8,
    "eval_iters": 1, "eval_interval": 4, "log_interval": 1, "num_workers": 0, "warmup": 0.0, "weight_decay": 0.0,
    "distributed_backend": "gloo", "precision": "fp32",
    "optimizer": {"type": "Adam", "params": {"lr": 0.02, "betas": [0.9, 0.95]}},
}  # fmt: skip
GROWTH = [{"at_iteration": 4, "ffn_slot_num": 40, "lr_policy": "continue"}]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor ranks": {"model_parallel_size": 2}, "stages": {"pipe_parallel_size": 2},
    "ZeRO 1": {"zero_optimization": {"stage": 1}}, "ZeRO 2": {"zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
}  # fmt: skip


def config_of(folder: Path, **keys: Any) -> RunConfig:
    return load_config([], {**KEYS, "save": str(folder), "load": str(folder), **keys})


def metrics(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def train_all(configs: list[RunConfig]) -> None:
    for config in configs:
        train(config)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of one process that has grown."""
    folder = tmp_path_factory.mktemp("grown")
    train(config_of(folder, growth=GROWTH))
    return folder


def test_it_learns_and_its_metrics_have_its_names(grown: Path) -> None:
    losses = metrics(grown, "loss")
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert len(metrics(grown, "valid_loss")) == 2
    names = set().union(*(json.loads(line) for line in (grown / "metrics.jsonl").read_text().splitlines()))
    assert not {name for name in names if "lm_loss" in name or "perplexity" in name}


def test_its_growth_is_exact_and_its_checkpoint_says_what_it_is(grown: Path) -> None:
    checkpoint = open_checkpoint(grown)
    (entry,) = checkpoint.train_state["lineage"]
    assert entry["iteration"] == 4 and entry["logit_difference"] < 1e-5 and entry["added"].startswith("ffn 24 -> 40")
    assert checkpoint.resolved()["task"] == "vectors" and checkpoint.model_config.task == "vectors"
    assert checkpoint.tensors.shape("model", "layers.1.key_tokens_1") == (16, 16)


def test_it_resumes_bit_for_bit(tmp_path: Path, grown: Path) -> None:
    for stop in (3, 6, None):
        train(config_of(tmp_path, growth=GROWTH, exit_interval=stop))
    whole, parts = open_checkpoint(grown).tensors, open_checkpoint(tmp_path).tensors
    assert metrics(tmp_path, "loss") == metrics(grown, "loss")
    for kind in ("model", "optimizer"):
        assert whole.names(kind) == parts.names(kind)
        assert all(whole.tensor(kind, name).equal(parts.tensor(kind, name)) for name in whole.names(kind))


@pytest.mark.processes
def test_it_trains_and_grows_alike_in_every_layout(tmp_path: Path, grown: Path) -> None:
    run_ranks(2, train_all, [config_of(tmp_path / name, growth=GROWTH, **keys) for name, keys in LAYOUTS.items()])
    for name in LAYOUTS:
        assert metrics(tmp_path / name, "loss") == pytest.approx(metrics(grown, "loss"), rel=1e-4), name
        assert metrics(tmp_path / name, "valid_loss") == pytest.approx(metrics(grown, "valid_loss"), rel=1e-4), name


def test_its_checkpoint_is_described(grown: Path) -> None:
    facts = describe_checkpoint(grown)
    assert facts["tau_tokens"] == {"ffn": [24, 24]} and facts["segments"]["ffn"] == [[24, 16], [24, 16]]
    assert facts["parameters_of"] == {"tokenformer blocks": 2 * 2 * 40 * 16}
    assert "2 tokenformer blocks of width 16, 2 heads, l2_norm_gelu" in as_text(facts)


def test_its_checkpoint_grows_outside_a_run(tmp_path: Path, grown: Path) -> None:
    made = grow_checkpoint(grown, tmp_path / "larger", TokenCounts(ffn=64))
    assert made.difference.largest < 1e-5
    larger = open_checkpoint(tmp_path / "larger")
    assert larger.model_config.task == "vectors" and larger.model_config.ffn_slot_num == 64


@pytest.mark.processes
def test_a_loss_over_all_data_ranks_is_that_of_one_process(tmp_path: Path, single_process: None) -> None:
    train(config_of(tmp_path / "one", task="pairs"))
    zero = [config_of(tmp_path / str(stage), task="pairs", zero_optimization={"stage": stage}) for stage in (0, 1, 3)]
    run_ranks(2, train_all, zero)
    for folder in ("0", "1", "3"):
        for name in ("loss", "valid_loss", "valid_alike", "grad_norm"):
            assert metrics(tmp_path / folder, name) == pytest.approx(metrics(tmp_path / "one", name), rel=1e-4), name
        assert metrics(tmp_path / folder, "valid_samples") == [SAMPLES, SAMPLES]
    assert metrics(tmp_path / "one", "valid_samples") == [SAMPLES, SAMPLES]
    assert metrics(tmp_path / "one", "loss")[-1] < metrics(tmp_path / "one", "loss")[0]


def test_a_model_of_two_lists_of_layers_grows(tmp_path: Path, single_process: None) -> None:
    train(config_of(tmp_path, task="pairs", growth=GROWTH))
    (entry,) = open_checkpoint(tmp_path).train_state["lineage"]
    assert entry["logit_difference"] < 1e-5
    assert "right.layers.0.key_tokens_1" in open_checkpoint(tmp_path).tensors.names("model")


def refusal_of(config: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        train(config)
    return str(error.value)


@pytest.mark.processes
def test_a_model_of_two_lists_of_layers_is_not_cut_into_stages(tmp_path: Path) -> None:
    for message in run_ranks(2, refusal_of, config_of(tmp_path, task="pairs", pipe_parallel_size=2)):
        assert message.startswith("pipe_parallel_size: a model of the lists left, right cannot be cut into stages")


def test_a_spike_names_samples_where_a_data_set_has_no_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_process: None
) -> None:
    loss, calls = VectorsTask.loss, []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(VectorsTask, "loss", lambda *arguments, **named: broken(*arguments, *named.values()))
    train(config_of(tmp_path, eval_iters=0, checkpoint_factor=2, spikes={"action": "rewind"}))
    [record] = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert record["loss"] == "nan" and record["skip_iterations"] == [3, 3]
    assert record["documents"] == [{"set": "train", "index": number} for number in range(16, 24)]


def test_what_is_for_language_models_says_so(grown: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task: this is for language models, and not for what learns 'vectors'"):
        load_model(grown)


def test_a_checkpoint_of_another_task_is_not_continued(grown: Path) -> None:
    other = {key: value for key, value in KEYS.items() if key not in ("train_iters",)}
    with pytest.raises(UserError, match="task: pairs in the configuration, vectors in checkpoint"):
        train(load_config([], {**other, "task": "pairs", "load": str(grown), "train_iters": 9}))


def test_other_token_counts_than_a_checkpoint_has_are_blamed_on_their_key(grown: Path) -> None:
    checkpoint = open_checkpoint(grown)
    model = described_model(checkpoint.model_config.replaced(ffn_slot_num=64, token_segments={"ffn": [[48, 16]] * 2}))
    with pytest.raises(UserError, match=r"layers.0.key_tokens_0 has shape .*; ffn_slot_num: 48 does not fit"):
        check_fit(model, checkpoint.tensors, "it")


def test_an_unknown_task_is_one_line() -> None:
    with pytest.raises(UserError, match="task: there is no task 'vektors'; there are language, .*vectors"):
        load_config([], {**KEYS, "task": "vektors"})


def test_a_key_of_a_task_can_be_taken_back(tmp_path: Path) -> None:
    base, later = tmp_path / "base.yml", tmp_path / "later.yml"
    base.write_text("task: vectors\nnoise: 0.5\n")
    later.write_text("noise: null\n")
    assert load_config([base, later], {key: value for key, value in KEYS.items() if key != "task"}).flat()["noise"] == 0


def test_a_name_is_given_once() -> None:
    class Other(VectorsTask):
        pass

    with pytest.raises(ValueError, match="there is a task 'vectors' already"):
        register(Other)
    assert register(VectorsTask) is VectorsTask and issubclass(VectorsTask, Task)
