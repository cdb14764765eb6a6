"""All mistakes of a configuration are told at once, each in a line of its own; none that only follows from another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import explain, load_config, resolve_config
from megatron.config.checks import find_training_mistakes
from megatron.config.cli import parse_run
from megatron.config.places import places_named
from megatron.errors import UserError, run_command

MINIMUM: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
Refusals = Callable[..., list[str]]


@pytest.fixture
def refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    """Mistakes of a text beside a small model; [] when there are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yml").write_text(json.dumps(MINIMUM))

    def find(text: str, *overrides: str) -> list[str]:
        (tmp_path / "a.yml").write_text(text)
        try:
            load_config(["base.yml", "a.yml"], overrides)
        except UserError as error:
            return str(error).split("\n")
        return []

    return find


def test_mistakes_of_every_kind_are_told_together(refusals: Refusals) -> None:
    text = """\
seed: 010
hiden_size: 3
num_experts: 4
train_iters: many
optimizer: {params: {lr: fast, betas: [2, 0.5]}}
zero_optimization: {stage: 4, reduce_bucket_size: abc}
fp16: {enabled: true, hysteresis: 0}
bf16: {enabled: 1}
vocab_file: a
vocab-file: b
save: ''
model_parallel_size: 3
norm: scalenorm
growth: [{at_iteration: 0, layers: []}]
"""
    lines = refusals(text, "sede=1", "log_interval=[1")
    starts = [
        "a.yml:1: seed: 010 is 8", "a.yml:2: hiden_size: unknown key", "a.yml:3: num_experts: 4 is refused",
        "a.yml:4: train_iters: expected a whole", "a.yml:5: optimizer.params.lr: expected a number",
        "a.yml:5: optimizer.params.betas: each must be", "a.yml:6: zero_optimization.stage: 4 is not supported",
        "a.yml:6: zero_optimization.reduce_bucket_size: expected a whole", "a.yml:7: fp16.hysteresis: must be greater",
        "a.yml:8: bf16.enabled: expected true or false", "a.yml:10: 'vocab_file' is given twice",
        "a.yml:11: save: '' is no path", "a.yml:12: model_parallel_size: 3 ranks cannot share",
        "a.yml:13: norm: 'scalenorm' is not supported", "a.yml:14: growth: entry 1: at_iteration: must be greater",
        "a.yml:14: growth: entry 1: layers: ", "--set: sede: unknown key", "--set log_interval=[1: ",
    ]  # fmt: skip
    assert [next((line for line in lines if line.startswith(start)), None) for start in starts] == [
        line for start in starts for line in lines if line.startswith(start)
    ]
    assert len(lines) == len(starts), lines


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("num_attention_heads: 5\nwarmup: 2\nmin_lr: 2000", ["a.yml:1: num_att", "a.yml:2: warmup", "a.yml:3: min_lr"]),
        ("hidden_size: 63\nrotary_pct: 3", ["a.yml:1: num_attention_heads: 4 heads", "a.yml:2: rotary_pct: must be"]),
        ("train_data_weights: [1]\ndata_path: a\nvalid_data_weights: [x]", ["a.yml:1: train_data", "a.yml:3: valid_d"]),
        ("num_layers: x\npipe_parallel_size: 9\nattention_config: [[[global], 2]]", ["a.yml:1: num_layers: expected"]),
        ("ffn_slot_num: 0\nqkv_slot_num: 3", ["a.yml:1: ffn_slot_num: must be", "base.yml a.yml: proj_slot_num: a"]),
        ("seq_length: []\nsequence_parallel: true\nmodel_parallel_size: 3", ["a.yml:1: seq_l", "a.yml:3: model_p"]),
        ("pipe_parallel_size: 2\nzero_optimization: {stage: two}", ["a.yml:2: zero_optimization.stage: exp"]),
        ("train_micro_batch_size_per_gpu: 1.5\nnum_workers: -1", ["a.yml:1: train_micro_b", "a.yml:2: num_workers"]),
    ],
)  # fmt: skip
def test_what_follows_from_a_mistake_is_not_told(refusals: Refusals, text: str, starts: list[str]) -> None:
    lines = refusals(text)
    if "hidden_size: 63" in text:
        starts = ["base.yml:1: num_attention_heads: 4 heads", *starts[1:]]
    assert len(lines) == len(starts) and all(any(line.startswith(s) for line in lines) for s in starts), lines


def test_missing_keys_and_others_are_told_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text("num_layer: 2\nhidden_size: 64\nwarmup: 2\n")
    with pytest.raises(UserError) as error:
        load_config("a.yml")
    assert str(error.value).split("\n") == [
        "a.yml:1: num_layer: unknown key; did you mean num_layers?",
        "a.yml:3: warmup: must be at most 1, got 2",
        "a.yml: missing num_attention_heads, seq_length: add to a YAML file, or give --set num_attention_heads=VALUE",
    ]


@pytest.mark.parametrize("mistake", ["train_iters: many", "train_iters: 010", "train_itres: 3", "train_iters: 0"])
def test_what_training_lacks_is_told_beside_a_key_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text(f"{mistake}\n" + "".join(f"{key}: {value}\n" for key, value in MINIMUM.items()))
    assert run_command(lambda: parse_run(["a.yml"], "train.py") and 0) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: a.yml:1: ") and "train_it" in first
    assert second.startswith("error: training needs train_micro_batch_size_per_gpu, data_path: add")


def test_a_wrong_batch_and_wrong_paths_are_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {**MINIMUM, "train_iters": 1, "train_batch_size": 0, "train_data_paths": "a"}
    (tmp_path / "a.yml").write_text(json.dumps(keys))
    with pytest.raises(UserError) as error:
        parse_run(["a.yml"], "train.py")
    starts = ["a.yml:1: train_batch_size: must be", "a.yml:1: train_data_paths: expected a list"]
    assert [line[: len(start)] for line, start in zip(str(error.value).split("\n"), starts, strict=True)] == starts


def test_a_file_that_is_not_there_hides_no_mistake_and_makes_none(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("warmup: 2\ninclude: [absent.yml, broken.yml]\n")
    (tmp_path / "broken.yml").write_text("a: [\n")
    with pytest.raises(UserError) as error:
        load_config([tmp_path / "a.yml", tmp_path / "gone.yml"])
    lines = str(error.value).replace(f"{tmp_path}/", "").split("\n")
    starts = [
        "a.yml:1: warmup",
        "a.yml:2: include: config file 'absent.yml' not f",
        "broken.yml:2: not v",
        "config file",
    ]
    assert len(lines) == 4 and all(any(line.startswith(start) for line in lines) for start in starts), lines


def test_a_run_tells_what_training_needs_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {**MINIMUM, "min_lr": 1.0, "warmup": 2, "growth": [{"at_iteration": 3, "ffn_slot_num": 80}], "sead": 1}
    (tmp_path / "a.yml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    assert run_command(lambda: parse_run(["a.yml"], "train.py") and 0) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = [
        "a.yml:5: min_lr: 1 is above",
        "a.yml:6: warmup: ",
        "a.yml:7: growth: ",
        "a.yml:8: sead: unknown key",
        "training n",
    ]
    assert [line.startswith(f"error: {start}") for line, start in zip(lines, starts, strict=True)] == [True] * 5, lines
    assert run_command(lambda: parse_run(["a.yml"], "eval.py") and 0) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
@pytest.mark.parametrize("name", ["bsae", "worker-0:0@worker-1"])
def test_an_include_that_names_neither_a_file_nor_a_host_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, name: str
) -> None:
    for variable in ("DLTS_HOSTFILE", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    keys = {**MINIMUM, "train_iters": 1, "batch_size": 1, "data_path": "a", "include": name}
    (tmp_path / "a.yml").write_text(json.dumps(keys))
    assert run_command(lambda: parse_run([str(tmp_path / "a.yml")], script) and 0) == 2
    host = name.partition(":")[0]
    assert f"a.yml:1: include: '{host}' is neither a YAML file nor a host" in capsys.readouterr().err
    assert run_command(lambda: parse_run([str(tmp_path / "a.yml"), "-H", "hosts"], script) and 0) == 0


def test_a_mistake_that_is_found_later_names_the_file_too(refusals: Refusals) -> None:
    refusals("load: somewhere # nothing\ntrain-micro-batch-size-per-gpu: 3\ntrain_batch_size: 4\n")
    overrides = ["vocab_file=x", "data_path=/data/a", "eval_results_prefix=''", "tensorboard_dir=.", "log_dir=/"]
    resolved = resolve_config(["base.yml", "a.yml"], overrides)
    for text, place in (
        ("load: somewhere is damaged", " (a.yml:1)"), ("train_batch_size: 4 is not 3 x 1", " (a.yml:3)"),
        ("vocab_file, merge_file: no pair", " (--set)"), ("seed: its default", ""), ("no key at all", ""),
        ("/data/a.idx: cut", " (--set)"), ("/data2: none of these", ""),
        ("8 do not fit train_batch_size 4", " (a.yml:3)"), ("in /x/train_batch_size/y", ""),
    ):  # fmt: skip
        with pytest.raises(UserError) as error, places_named(resolved.settings):
            raise UserError(text)
        assert str(error.value) == ("data_path: " if text.startswith("/data/") else "") + text + place


# ---- values that make no sense ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {params: {betas: [1, 0.9]}}", "optimizer.params.betas: each must be at least 0 and below 1"),
        (
            "optimizer: {type: Lion, params: {betas: [5, -1]}}",
            "optimizer.params.betas: each must be at least 0 and below",
        ),
        ("lr: 1e39", "lr: must be at most 1000"),
        ("min_lr: 1e39", "min_lr: must be at most 1000"),
        ("optimizer: {params: {eps: 1e30}}", "optimizer.params.eps: must be at most 1"),
        ("layernorm_epsilon: 1e30", "layernorm_epsilon: must be at most 1"),
        ("rms_norm_epsilon: 1e30", "rms_norm_epsilon: must be at most 1"),
        ("init_method_std: 1e30", "init_method_std: must be at most"),
        ("weight_decay: 1e30", "weight_decay: must be at most"),
        ("fp16: {initial_scale_power: 1000}", "fp16.initial_scale_power: must be at most"),
        ("extra_save_iters: [4, -1]", "extra_save_iters: must be at least 0, got -1"),
        ("num_nodes: -7", "num_nodes: must be at least -1, got -7"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [1, -1]", "train_data_weights: [1.0, -1.0]: each must be at"),
        ('launcher_args: "--comment=\'a"', "launcher_args: --comment='a: No closing quotation; close what is quoted"),
        ("num_nodes: 0", "num_nodes: 0 nodes run nothing"),
        ("num_workers: 1000000", "num_workers: must be at most"),
        ("num_layers: 1000000000", "num_layers: must be at most"),
        ("hidden_size: 1000000000000", "hidden_size: must be at most"),
        ("attention_config: [[[global], 1000000000]]", "attention_config: [['global'], 1000000000] has no sensible"),
        ("attention_config: [[[global], -2]]", "attention_config: [['global'], -2] has no sensible number"),
        ("attention_config: [[[global], true]]", "has no sensible number"),
        ("distributed_timeout_minutes: 999999999999", "distributed_timeout_minutes: must be at most"),
        ("watchdog: {factor: 0.5}", "watchdog.factor: must be at least 1, got 0.5"),
        ("watchdog: {heartbeat_seconds: 1}", "watchdog.heartbeat_seconds: must be at least 10, got 1"),
        ("watchdog: {limits: {update: 0}}", "watchdog.limits.update: must be greater than 0, got 0"),
        ("watchdog: {limits: {step: 3}}", "watchdog.limits.step: unknown key"),
        ("watchdog: 5", "watchdog: expected a table"),
        ("growth: [{1: 2, at_iteration: 3, ffn_slot_num: 3}]", "growth: entry 1: 1: unknown key"),
        (
            "zero_optimization: {overlap_comm: maybe}",
            "zero_optimization.overlap_comm: expected true or false",
        ),
        (
            "zero_optimization: {reduce_bucket_size: .inf}",
            "zero_optimization.reduce_bucket_size: expected a whole",
        ),
        ("zero_optimization: {offload_optimizer: cpu}", "zero_optimization.offload_optimizer: expected a table"),
        ("eps: '1.0e_8'", "eps: unknown key"),
        ("min_lr: 1.0e_8", "min_lr: expected a number, got '1.0e_8'"),
        (
            "pattention_top_k: 64",
            "pattention_top_k: expected a share of the tokens, above 0 and at most 1, or {qkv: ..",
        ),
        ("pattention_top_k: {ffn: 1.5}", "pattention_top_k.ffn: must be at most 1, got 1.5"),
        ("pattention_top_k: {mlp: 0.5}", "pattention_top_k.mlp: unknown key"),
        ("pattention_threshold: [1]", "pattention_threshold: expected a size of weights, 0 or more, or {qkv: .."),
        (
            "pattention_top_k: 0.5\npattention_threshold: 0.1",
            "pattention_threshold: is another way of saying what pattention_top_k says; keep one of them",
        ),
        ("include: bse", "include: 'bse' is no file in .; did you mean base.yml?"),
        ("include: ../configs/base", "include: config file '../configs/base' not found"),
        ("include: [3]", "include: expected names of YAML files, got [3]"),
    ],
)
def test_nonsense_is_refused(refusals: Refusals, text: str, message: str) -> None:
    (line,) = refusals(text)
    assert line.startswith("a.yml:") and message in line


def test_partitions_of_partitions_are_refused_where_they_cannot_be() -> None:
    def check(stage: int, size: int) -> None:
        zero = {"stage": stage, "zero_hpz_partition_size": size}
        keys = {**MINIMUM, "train_iters": 1, "batch_size": 1, "data_path": "a", "zero_optimization": zero}
        resolve_config([], keys, checks=[find_training_mistakes])

    with pytest.raises(UserError, match="zero_optimization.zero_hpz_partition_size: 2: DeepSpeed makes .* set 1"):
        check(3, 2)
    check(3, 1)
    check(2, 2)


# ---- values that change nothing ----


@pytest.mark.parametrize(
    ("keys", "effect"),
    [
        ({"fp16": {"enabled": True, "type": "bfloat16", "auto_cast": True}}, "bf16"),
        ({"fp16": {"enabled": False, "type": "bfloat16"}}, "fp32"),
        ({"fp16": {"enabled": True, "type": "fp16", "auto_cast": False}}, "fp16"),
        ({"bf16": {"bf16": True, "enabled": True, "loss_scale": 0, "initial_scale_power": 12}}, "bf16"),
        ({"bf16": {"bf16": True}}, "fp32"),
        ({"fp32_allreduce": True, "model_parallel_size": 1}, "fp32"),
        ({"use_bias_in_norms": False, "norm": "rmsnorm"}, "fp32"),
        ({"use_bias_in_norms": False, "norm": "layernorm_nonparam"}, "fp32"),
        ({"num_kv_heads": 4}, "fp32"),
        ({"comms_logger": {"enabled": True, "verbose": True}}, "fp32"),
        ({"deepspeed_extra_args": {"comms_logger": {"enabled": True}}}, "fp32"),
        ({"use_comet": True, "comet_project": "a", "comet_tags": ["b"]}, "fp32"),
        ({"output_layer_init_method": "single_residual_scaled_normal"}, "fp32"),
        ({"mlp_multiple_of": 64, "te_mha": False, "moe_num_experts": 1}, "fp32"),
    ],
)
def test_what_changes_nothing_is_accepted(keys: dict[str, Any], effect: str) -> None:
    assert load_config([], {**MINIMUM, **keys}).precision.dtype == effect


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"fp16": {"enabled": True, "type": "bfloat16"}, "precision": "fp16"},
            "fp16.type: bfloat16 beside precision",
        ),
        ({"fp32_allreduce": True, "model_parallel_size": 2}, "sums over tensor ranks are made in the precision of tr"),
        ({"use_bias_in_norms": False, "norm": "layernorm"}, "norm and final_norm layernorm have a bias; set true"),
        ({"use_bias_in_norms": False, "norm": "rmsnorm", "final_norm": "layernorm"}, "have a bias; set true"),
        ({"num_kv_heads": 2}, "grouped-query attention is not supported; set it to num_attention_heads"),
        ({"num_kv_heads": True, "num_attention_heads": 1}, "grouped-query attention is not supported"),
        ({"deepspeed_extra_args": {"amp": {"enabled": True}}}, "DeepSpeed's configuration is made here"),
        ({"mlp_multiple_of": 96}, "the feed-forward is as wide as intermediate_size says"),
        ({"use_bias_in_mlp": False}, "the feed-forward of Transformer blocks has biases; set true"),
    ],
)
def test_what_would_change_something_is_refused_with_the_reason(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], {**MINIMUM, **keys})


def test_a_repeated_switch_that_says_another_thing_is_told() -> None:
    lines = resolve_config([], {**MINIMUM, "bf16": {"bf16": True}}).warnings
    assert lines == ["bf16.bf16: true changes nothing by itself, training is in fp32; set bf16.enabled"]
    lines = resolve_config([], {**MINIMUM, "fp16": {"fp16": True}}).warnings
    assert lines == ["fp16.fp16: true changes nothing by itself, training is in fp32; set fp16.enabled"]
    assert resolve_config([], {**MINIMUM, "bf16": {"bf16": True, "enabled": True}, "zero_stage": 1}).warnings == []


def test_explain_tells_of_a_hostfile_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)
    (tmp_path / "hosts").write_text("a slots=1\n")

    def line(path: str) -> str:
        text = explain(resolve_config([], {**MINIMUM, "hostfile": path}))
        return next(line for line in text.splitlines() if line.startswith("  hostfile "))

    assert line("/mock_path").endswith("override: /mock_path does not exist: the run is on this machine alone")
    assert line(str(tmp_path / "hosts")).endswith("override")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"zero_optimization": {"stage": 3}}, r"compile: blocks cannot be compiled where ZeRO 3 .*; set none"),
        ({"deterministic": True}, "compile: blocks picks kernels by their time, .* deterministic is true; set none"),
    ],
    ids=["zero3", "deterministic"],
)
def test_blocks_that_cannot_be_compiled_are_refused(keys: dict[str, Any], line: str) -> None:
    complete = {**MINIMUM, "train_iters": 1, "train_micro_batch_size_per_gpu": 1, "data_path": "x"}
    resolve_config([], {**complete, "compile": "blocks"}, checks=[find_training_mistakes])
    with pytest.raises(UserError, match=line):
        resolve_config([], {**complete, **keys, "compile": "blocks"}, checks=[find_training_mistakes])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"spikes": {"action": "rewind"}}, "spikes.action: a run that rewinds goes through a checkpoint; give `save`"),
        ({"spikes": {"action": "rewind"}, "save": "a", "no_save_optim": True}, "no_save_optim: a run that rewinds"),
        ({"spikes": {"action": "skip_update"}, "allow_nonfinite_loss": True}, "allow_nonfinite_loss: true lets"),
        ({"spikes": {"action": "skip_update"}, "optimizer": {"type": "Muon"}, "gradient_clipping": 0}, "too late for"),
        ({"spikes": {"action": "stop"}}, "spikes.action: 'stop' is not supported; choose one of none, log, skip_upd"),
        ({"spikes": {"threshold": 3}}, "spikes.action: is not given, so that the other keys have no eff"),
        ({"spikes": {"action": "log", "window": 7}}, "spikes.window: must be at least 8, got 7"),
        ({"spikes": {"action": "log", "threshold": 0}}, "spikes.threshold: must be greater than 0"),
        ({"spikes": {"action": "log", "limit": 0}}, "spikes.limit: must be greater than 0"),
        ({"spikes": {"acton": "log"}}, "spikes.acton: unknown key; did you mean spikes.action?"),
        ({"spikes": True}, "spikes: expected a table"),
        ({"skip_iterations": [[1, 2], [5, 4]]}, r"skip_iterations: \[5, 4\] is no span \[first, last\] of iterations"),
        ({"skip_iterations": [[0, 4]]}, r"skip_iterations: \[0, 4\] is no span"),
        ({"skip_iterations": [[3]]}, r"skip_iterations: \[3\] is no span"),
        ({"skip_iterations": [3, 4]}, "skip_iterations: expected a list"),
        ({"check_replicas_interval": 0}, "check_replicas_interval: must be greater than 0"),
        ({"check_replicas_interval": 5, "zero_optimization": {"stage": 3}}, "check_replicas_interval: with ZeRO 3"),
    ],
)  # fmt: skip
def test_spikes_and_checks_that_cannot_be_are_refused(keys: dict[str, Any], line: str) -> None:
    complete = {**MINIMUM, "train_iters": 1, "train_micro_batch_size_per_gpu": 1, "data_path": "x"}
    zero = keys.get("zero_optimization", {"stage": 1})
    with pytest.raises(UserError, match=line):
        resolve_config([], {**complete, **keys, "zero_optimization": zero}, checks=[find_training_mistakes])


def test_what_is_watched_for_spikes_can_be_given_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("spikes: {action: log, threshold: 4}\nskip_iterations: [[3, 5], [9, 9]]\n")
    config = load_config([tmp_path / "a.yml"], {**MINIMUM, "spikes.window": 16})
    assert (config.training.spikes.threshold, config.training.spikes.window) == (4, 16)
    assert config.training.skip_iterations == [[3, 5], [9, 9]]
    assert load_config([], config.flat()).training == config.training
