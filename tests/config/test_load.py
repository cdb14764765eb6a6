"""Reading, merging, aliases and includes of YAML files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import RunConfig, load_config, resolve_config
from megatron.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = """\
# JSON-style YAML, as GPT-NeoX writes it
{
  "num-layers": 2,   # hyphens
  "hidden_size": 64,
  "num_attention_heads": 4,
  "seq_length": 32,
  "optimizer": {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95]}},
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yml").write_text(BASE)
    return tmp_path


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path.relative_to(folder))


def test_json_style_yaml_loads_with_comments_hyphens_and_exponents(folder: Path) -> None:
    config = load_config("base")
    assert config.model.num_layers == 2
    assert config.optimization.optimizer.params.lr == 6e-4


def test_later_file_wins_and_tables_merge_key_by_key(folder: Path) -> None:
    write(folder, "b.yml", "hidden_size: 128\noptimizer: {params: {lr: 1e-3}}\nzero_optimization: {stage: 2}\n")
    config = load_config(["base.yml", "b"], ["zero_optimization.reduce_bucket_size=5e8"])
    params = config.optimization.optimizer.params
    assert (config.model.hidden_size, params.lr, params.betas) == (128, 1e-3, (0.9, 0.95))
    assert config.parallel.zero_optimization.model_dump(exclude_none=True) == {"stage": 2, "reduce_bucket_size": 5e8}


def test_lists_are_replaced_and_null_takes_a_value_back(folder: Path) -> None:
    write(folder, "b.yml", "extra_save_iters: [1, 2]\nseed: 7\nfp16: {enabled: true}\n")
    write(folder, "c.yml", "extra_save_iters: [3]\nseed: null\nfp16: null\n")
    config = load_config(["base", "b", "c"])
    assert config.checkpoint.extra_save_iters == [3]
    assert config.training.seed == 1234
    assert config.precision.dtype == "fp32"


@pytest.mark.parametrize("name", ["lr", "learning_rate", "learning-rate", "optimizer.params.lr"])
def test_learning_rate_has_other_names(folder: Path, name: str) -> None:
    assert load_config("base", [f"{name}=2e-3"]).optimization.optimizer.params.lr == 2e-3
    assert load_config("base", {name: 2e-3}).optimization.optimizer.params.lr == 2e-3


def test_old_names_of_other_keys(folder: Path) -> None:
    values = ["clip_grad=0.5", "batch_size=3", "zero_stage=2", "optimizer_type=sgd", "hysteresis=4", "activation=swish"]
    config = load_config("base", values)
    assert config.optimization.gradient_clipping == 0.5
    assert config.training.train_micro_batch_size_per_gpu == 3
    assert config.parallel.zero_optimization.stage == 2
    assert config.optimization.optimizer.type == "SGD"
    assert config.precision.fp16.hysteresis == 4
    assert config.model.activation == "silu"


def test_true_and_false_switch_the_watchdog_and_leave_its_table(folder: Path) -> None:
    (folder / "a.yml").write_text("watchdog: {factor: 30, limits: {save: 900}}\n")
    off = load_config(["base", "a"], ["watchdog=false", "watchdog.limits.batch=60"]).training.watchdog
    assert not off.enabled and off.factor == 30 and off.given == {"save": 900, "batch": 60}
    assert load_config("base").training.watchdog.given == {"save": 3600}
    assert load_config(["base", "a"], ["watchdog=true"]).training.watchdog.enabled


def test_mapping_overrides_take_tables(folder: Path) -> None:
    config = load_config("base", {"optimizer": {"params": {"lr": 0.5}}, "vocab-file": "v.json"})
    assert config.optimization.optimizer.params.lr == 0.5
    assert config.tokenizer.vocab_file == "v.json"


def test_files_are_looked_up_in_the_config_folder_first(folder: Path) -> None:
    write(folder, "conf/a.yml", BASE)
    write(folder, "conf/seed.yml", "seed: 5\n")
    assert load_config(["a", "conf/seed.yml"], config_dir="conf").training.seed == 5


def test_includes_are_relative_to_their_file_and_come_before_its_own_keys(folder: Path) -> None:
    write(folder, "sub/a.yml", "include: [../base.yml, more]\nhidden_size: 32\n")
    write(folder, "sub/more.yml", "hidden_size: 16\nseed: 9\n")
    config = load_config("sub/a")
    assert (config.model.hidden_size, config.training.seed) == (32, 9)


def test_a_base_shared_by_two_files_is_merged_once(folder: Path) -> None:
    write(folder, "a.yml", "include: base.yml\nhidden_size: 32\n")
    write(folder, "b.yml", "include: base\nseed: 3\n")
    assert load_config(["a", "b"]).model.hidden_size == 32


@pytest.mark.parametrize("hosts", ["worker-0", "worker-0:0,1@worker-1"])
def test_include_of_nodes_is_the_launchers(folder: Path, hosts: str) -> None:
    write(folder, "a.yml", f'include: "{hosts}"\n')
    assert load_config(["base", "a"]).launch.include == hosts


def test_yaml_anchors_and_merges_work(folder: Path) -> None:
    write(folder, "a.yml", "bf16: &on {enabled: true}\nfp16: {<<: *on, enabled: false}\n")
    config = load_config(["base", "a"])
    assert config.precision.dtype == "bf16"


def test_sixteen_bit_stage_0_becomes_stage_1_with_one_warning(folder: Path) -> None:
    resolved = resolve_config("base", ["bf16.enabled=true"])
    assert resolved.config.parallel.zero_optimization.stage == 1
    assert len(resolved.warnings) == 1 and "stage 1 instead of 0" in resolved.warnings[0]
    assert resolve_config("base", ["bf16.enabled=true", "zero_stage=1"]).warnings == []
    assert resolve_config("base").config.parallel.zero_optimization.stage == 0


def test_flat_form_loads_again_to_the_same_config(folder: Path) -> None:
    config = load_config("base", ["bf16.enabled=true", "zero_optimization.reduce_bucket_size=1000"])
    assert load_config([], config.flat()) == config


def test_config_is_frozen(folder: Path) -> None:
    config = load_config("base")
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError):
        config.model.hidden_size = 1  # type: ignore[misc]


@pytest.mark.launches
def test_loading_imports_no_torch() -> None:
    modules = "megatron.config, megatron.config.cli, megatron.launch, megatron.mpu.environment"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("hiden_size: 3", [], "a.yml:1: hiden_size: unknown key; did you mean hidden_size?"),
        ("# c\nfp16:\n  enabeld: true", [], "a.yml:3: fp16.enabeld: unknown key; did you mean fp16.enabled?"),
        ("zero_optimization: {stag: 1}", [], "a.yml:1: zero_optimization.stag: unknown key; did you mean"),
        ("xyzzy_plugh: 3", [], "a.yml:1: xyzzy_plugh: unknown key; `python train.py --help` lists all keys"),
        ("seed: 1\nseed: 2", [], "a.yml:2: 'seed' is given twice, on lines 1 and 2; keep one"),
        ("vocab_file: a\n\nvocab-file: b", [], "a.yml:3: 'vocab_file' is given twice, on lines 1 and 3"),
        ("fp16:\n  enabled: true\n  enabled: true", [], "a.yml:3: 'enabled' is given twice, on lines 2 and 3"),
        ("lr: 1\noptimizer: {params: {lr: 2}}", [], "a.yml:2: 'optimizer.params.lr' and 'lr' (a.yml:1) are the same"),
        ("\nnum_layers: many", [], "a.yml:2: num_layers: expected a whole number, got 'many'"),
        ("num_layers: 2.5", [], "a.yml:1: num_layers: expected a whole number, got 2.5"),
        ("num-layers: 0", [], "a.yml:1: num-layers: must be greater than 0, got 0"),
        ("warmup: 2", [], "a.yml:1: warmup: must be at most 1, got 2"),
        ("hidden_dropout: much", [], "a.yml:1: hidden_dropout: expected a number, got 'much'"),
        ("hidden_dropout: true", [], "a.yml:1: hidden_dropout: expected a number, got true"),
        ("use_wandb: 3", [], "a.yml:1: use_wandb: expected true or false, got 3"),
        ("save: 3", [], "a.yml:1: save: expected text (in quotes), got 3"),
        ("train_data_paths: a", [], "a.yml:1: train_data_paths: expected a list, for example [a, b], got 'a'"),
        ("optimizer: Adam", [], "a.yml:1: optimizer: expected a table"),
        ("optimizer:\n  type: SM3", [], "a.yml:2: optimizer.type: 'SM3' is not supported; choose one of Adam, AdamW"),
        ("optimizer: {params: {betas: [1]}}", [], "a.yml:1: optimizer.params.betas: the list is too short"),
        ("lr: fast", [], "a.yml:1: lr: expected a number, got 'fast'"),
        ("norm: scalenorm", [], "a.yml:1: norm: 'scalenorm' is not supported; choose one of layernorm, "),
        ("pos_emb: learned", [], "a.yml:1: pos_emb: 'learned' is not supported; choose one of rotary, none"),
        ("num_attention_heads: 5", [], "a.yml:1: num_attention_heads: 5 heads do not divide hidden_size 64"),
        (
            "segment_norms: [joint, segment]",
            [],
            "a.yml:1: segment_norms: 2 norms do not belong to token_segments; leave",
        ),
        ("row_norm: own", [], "a.yml:1: row_norm: 'own' is not supported; choose one of joint, segment"),
        ("ffn_slot_num: 8", [], "base a: qkv_slot_num: a tokenformer block needs it"),
        ("fp16: {enabled: true}\nbf16: {enabled: true}", [], "a.yml:1: fp16.enabled: fp16 and bf16 are both enabled"),
        ("train_data_weights: [1]", [], "a.yml:1: train_data_weights: 1 weights for 0 train_data_paths"),
        ("model_parallel_size: 3", [], "a.yml:1: model_parallel_size: 3 ranks cannot share num_attention_heads "),
        ("pipe-parallel-size: 64", [], "a.yml:1: pipe-parallel-size: 64 stages for num_layers "),
        ("pipe_parallel_size: 2\nzero_optimization: {stage: 2}", [], "DeepSpeed has no stage 2 beside pipe_parallel"),
        ("model_parallel_size: 2\nsequence_parallel: true\nseq_length: 33", [], "seq_length 33 is no multiple of"),
        ("seed: [1", [], "a.yml:1: not valid YAML: "),
        ("- seed", [], "a.yml:1: expected `key: value` lines"),
        ("include: nothing.yml", [], "a.yml:1: include: config file 'nothing.yml' not found"),
        ("include: [bse.yml]", [], "did you mean base.yml?"),
        ("include: a.yml", [], "a.yml: include cycle a.yml -> a.yml"),
        ("seed: 1", ["seed"], "--set seed: expected KEY=VALUE, for example --set train_iters=1000"),
        ("seed: 1", ["seed=[1"], "--set seed=[1: '[1' is not a YAML value"),
        ("seed: 1", ["sead=1"], "--set: sead: unknown key; did you mean seed?"),
        ("seed: 1", ["seed=x"], "--set: seed: expected a whole number, got 'x'"),
        ("seed: 1", ["sead=null"], "--set: sead: unknown key; did you mean seed?"),
    ],
)
def test_mistakes_are_one_line_with_place_and_remedy(
    folder: Path, text: str, overrides: list[str], message: str
) -> None:
    write(folder, "a.yml", text)
    with pytest.raises(UserError) as error:
        load_config(["base", "a"], overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_after_loading_are_user_errors_too(folder: Path) -> None:
    config = load_config("base", ["padded_vocab_size=128"])
    assert config.with_vocabulary(100).model.vocab_size == 100
    with pytest.raises(UserError, match="padded_vocab_size: 128 rows cannot hold the vocabulary of 200 token ids"):
        config.with_vocabulary(200)
    with pytest.raises(UserError, match="train_iters: missing"):
        _ = config.lr_decay_iters
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu: missing"):
        config.update_size(1)


def test_longer_include_cycles_are_shown(folder: Path) -> None:
    write(folder, "a.yml", "include: b.yml")
    write(folder, "b.yml", "include: a.yml")
    with pytest.raises(UserError, match="include cycle a.yml -> b.yml -> a.yml"):
        load_config("a")


def test_missing_keys_are_named_together(folder: Path) -> None:
    write(folder, "a.yml", "hidden_size: 64")
    with pytest.raises(UserError, match="^a: missing num_layers, num_attention_heads, seq_length: add to a YAML file"):
        load_config("a")


def test_missing_files_name_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match="config file 'bas.yml' not found; did you mean base.yml?"):
        load_config("bas.yml")
    with pytest.raises(UserError, match="config file 'a' not found in conf, .;"):
        (folder / "conf").mkdir()
        load_config("a", config_dir="conf")
    with pytest.raises(UserError, match="--conf_dir: 'nowhere' is not a folder"):
        load_config("a", config_dir="nowhere")
