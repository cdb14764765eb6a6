"""configs/paper: the paper's numbers, each with the sentence it comes from, and a toy update of each file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig, load_config
from megatron.exchange import open_checkpoint
from megatron.model.build import build_model
from megatron.training import train
from tests.tasks.image_runs import KEYS, write_images
from tools.paper.widen import main as widen

FOLDER = Path(__file__).parents[3] / "configs" / "paper"
OVERLAYS = {"transformer_30B", "pythia_pile"}
"""Not the whole of a run."""
RUNS = sorted(path.stem for path in FOLDER.glob("*.yml") if path.stem not in OVERLAYS)
LANGUAGE = [name for name in RUNS if not name.startswith("B16")]


def loaded(*names: str) -> RunConfig:
    return load_config([FOLDER / f"{name}.yml" for name in names])


def test_no_file_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.yml")} == OVERLAYS | set(RUNS)
    assert len(LANGUAGE) == 11 and len(RUNS) == 13


SCALING = [name for name in LANGUAGE if not name.startswith("enwik8")]


@pytest.mark.parametrize("name", SCALING)
def test_section_4_1(name: str) -> None:
    """'We employ the AdamW optimizer ... batch size of 512 sequences of 1024 tokens, learning rate 6e-4, 2,000 warm-up
    steps, cosine decay to zero, no dropout, 600,000 iterations; a random 5 % of the documents for validation; segments
    sampled at random.'"""
    config = loaded(name)
    data = config.data
    assert (data.split, data.random_split, data.sample_order) == ("95,5,0", True, "random_segments")
    assert config.language.seq_length == 1024 and config.training.train_batch_size == 512
    options, params = config.optimization, config.optimization.optimizer.params
    assert (options.optimizer.type, params.lr, list(params.betas)) == ("Adam", 6e-4, [0.9, 0.95])
    assert (options.lr_decay_style, options.min_lr, options.warmup_iters(config.training.train_iters or 0)) == (
        "cosine", 0, 2000,
    )  # fmt: skip
    assert config.language.hidden_dropout == config.language.attention_dropout == 0
    first = config.scaling.growth[0].at_iteration if config.scaling.growth else config.training.train_iters
    assert first == 600_000, "300 billion tokens"


@pytest.mark.parametrize("billions", [15, 30, 60])
def test_growth_stages(billions: int) -> None:
    """Table 7: 12 layers, d 768, heads 12; tokens 576/2304, 2140/8560, 4850/19400, 8620/34480. 'New tokens are drawn at
    random', and a stage has 15, 30 or 60 billion tokens."""
    config = loaded(f"tokenformer_124M_to_1-4B_{billions}B")
    model = config.language
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (12, 768, 12)
    counts = [(model.qkv_slot_num, model.proj_slot_num, model.ffn_slot_num)]
    counts += [(g.qkv_slot_num, g.proj_slot_num, g.ffn_slot_num) for g in config.scaling.growth]
    assert counts == [(576, 576, 2304), (2140, 2140, 8560), (4850, 4850, 19400), (8620, 8620, 34480)]
    assert all(growth.new_keys == "official" and growth.lr_policy == "restart" for growth in config.scaling.growth)
    ends = [growth.at_iteration or 0 for growth in config.scaling.growth] + [config.training.train_iters or 0]
    stages = {end - begin for begin, end in zip(ends, ends[1:], strict=False)}
    assert len(stages) == 1 and stages.pop() * 512 * 1024 == pytest.approx(billions * 1e9, rel=0.05)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("124M", 123.6), ("354M", 353.5), ("757M", 756.7), ("1-4B", 1311.0)],
)
def test_transformers_have_the_parameters_of_their_names(name: str, millions: float) -> None:
    model = build_model(loaded(f"transformer_{name}").with_vocabulary(50254).model, device="meta")
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=2e-3)
    assert loaded(f"transformer_{name}", "transformer_30B").training.train_iters == 60_000


@pytest.mark.parametrize("name", ["enwik8_tokenformer", "enwik8_transformer"])
def test_section_4_3(name: str) -> None:
    """Appendix E: one pass over enwik8 is 2,204 updates of batch 512, at a constant 6e-4 from an empty AdamW state."""
    config = loaded(name)
    assert (config.training.train_iters, config.training.train_batch_size) == (2204, 512)
    assert (config.optimization.lr_decay_style, config.optimization.optimizer.params.lr) == ("constant", 6e-4)
    assert config.optimization.warmup_iters(2204) == 0 and config.checkpoint.finetune
    model = build_model(config.with_vocabulary(50254).model, device="meta")
    assert model.num_parameters() / 1e6 == pytest.approx(756, rel=4e-3)
    if name == "enwik8_tokenformer":
        assert (config.scaling.new_keys, config.language.qkv_slot_num) == ("zero", 4850)


def test_section_4_4() -> None:
    """Table 4: exp with L1 norm, a softmax. Table 5: norms with weight and bias."""
    base, softmax, norms = (load_config([FOLDER / name]).model for name in (
        "../vision/B16_in1k.yml", "B16_softmax_in1k.yml", "B16_norm_weights_in1k.yml",
    ))  # fmt: skip
    assert (base.norm_activation_type, base.norm) == ("l2_norm_gelu", "layernorm_nonparam")
    assert softmax == base.replaced(norm_activation_type="softmax")
    assert norms == base.replaced(norm="layernorm")


TOY: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "max_position_embeddings": 16,
    "make_vocab_size_divisible_by": 64, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "train_iters": 2,
    "eval_iters": 1, "eval_interval": 10, "log_interval": 1, "num_workers": 0, "distributed_backend": "gloo",
    "fp16": {"enabled": False}, "precision": "fp32", "lr_warmup_iters": 0, "launcher": "local", "log_dir": None,
    "tensorboard_dir": None,
}  # fmt: skip
SLOTS = ("qkv_slot_num", "proj_slot_num", "ffn_slot_num")
TOKENS = ((24, 24, 40), (48, 48, 80), (60, 60, 100), (80, 80, 120))


@pytest.fixture
def toy(tmp_path: Path, tokenizer_file: Path, corpus_prefix: str) -> dict[str, Any]:
    """Keys of a toy run."""
    data = {"data_path": corpus_prefix, "train_data_paths": None, "valid_data_paths": None}
    return {
        **TOY,
        **data,
        "vocab_file": str(tokenizer_file),
        "save": str(tmp_path / "run"),
        "load": str(tmp_path / "run"),
    }


def sized(whole: RunConfig) -> dict[str, Any]:
    """Toy sizes of a file: of its model, and one update for each of its stages."""
    if not whole.language.qkv_slot_num:
        wide = {"intermediate_size": 384} if whole.language.intermediate_size else {}
        return {"attention_config": [[["global"], 2]], **wide}
    growths = [growth.model_dump(exclude_defaults=True) for growth in whole.scaling.growth]
    for number, growth in enumerate(growths, 1):
        growth |= {"at_iteration": number, **dict(zip(SLOTS, TOKENS[number], strict=True))}
    keys = dict(zip(SLOTS, TOKENS[bool(whole.checkpoint.pretrain_partial_init)], strict=True))
    stages = {"growth": growths, "train_iters": len(growths) + 1} if growths else {}
    return {"attention_config": [[["tokenformer"], 2]], **keys, **stages}


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.usefixtures("single_process")
def test_a_toy_update_of_language_runs(
    name: str, tmp_path: Path, toy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file says, at toy size: every growth is made one update after the last."""
    file, keys = FOLDER / f"{name}.yml", toy | sized(loaded(name))
    if name.startswith("enwik8"):
        keys |= goes_on_from(file, keys, str(tmp_path / "base"))
    capsys.readouterr()
    train(load_config([file], keys))
    output = capsys.readouterr().out
    assert output.count("growth at iteration") == len(keys.get("growth", [])) + bool(keys.get("pretrain_partial_init"))
    assert "validation loss" in output


def goes_on_from(file: Path, keys: dict[str, Any], source: str) -> dict[str, Any]:
    """Train the smaller model that a file of section 4.3 starts with; returns the keys that name it."""
    is_token = "qkv_slot_num" in keys
    small = dict(zip(SLOTS, TOKENS[0], strict=True)) if is_token else {"intermediate_size": None}
    anew = {"pretrain_partial_init": None, "finetune": False, "new_keys": None, "save": source, "load": source}
    train(load_config([file], {**keys, **small, **anew}))
    if is_token:
        return {"pretrain_partial_init": source}
    assert widen([source, f"{source}_wide", "--intermediate-size", "384"]) == 0
    return {"load": f"{source}_wide"}


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("B16")])
@pytest.mark.usefixtures("single_process")
def test_a_toy_update_of_image_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the file says, its augmentation and average of the weights too, at the size of toy images."""
    sizes = {key: value for key, value in KEYS.items() if key != "norm"}
    data = {"data_path": write_images(tmp_path / "images"), "train_data_paths": None, "valid_data_paths": None}
    here = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "log_dir": None, "bf16": {"enabled": False}}
    train(load_config([FOLDER / f"{name}.yml"], {**sizes, **data, **here, "train_micro_batch_size_per_gpu": 8}))
    assert "iteration 5/5" in capsys.readouterr().out
    section, model = loaded(name).model, open_checkpoint(tmp_path / "run").model_config
    assert (model.norm, model.norm_activation_type) == (section.norm, section.norm_activation_type)
