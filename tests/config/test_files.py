"""Every YAML in configs/ loads, and the official ones have the official values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import load_config, resolve_config
from megatron.config.neox_keys import IGNORED

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OFFICIAL = json.loads((ROOT / "tests/fixtures/config/official_configs.json").read_text())
SIZES = ["150M", "450M", "900M", "1-5B"]
GROWTH_FILES = [Path(name).stem for name in OFFICIAL if "incremental_scaling" in name]
OVERLAYS = {
    "bf16.yml", "local_cpu.yml", "slurm.yml", "text_generation.yml", "pythia_pile.yml", "transformer_30B.yml",
}  # fmt: skip
ABSENT = {
    "adlr_autoresume": "ignored",
    "bias_gelu_fusion": "ignored",
    "checkpoint_validation_with_forward_pass": "ignored",
    "layernorm_fusion": "ignored",
    "output_layer_parallelism": "ignored",
    "partition_activations": "ignored",
    "rope_fusion": "ignored",
    "scaled_upper_triang_masked_softmax_fusion": "ignored",
    "synchronize_each_layer": "ignored",
}
"""Keys of the official files that ours leave out, and why."""
DIFFERENCES = {"wall_clock_breakdown": False}
"""Values of ours that differ: the official true makes DeepSpeed wait for the device at every timer."""


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_loads_without_a_warning(path: Path) -> None:
    is_part = path.parent.name == "common" or path.name in OVERLAYS
    wholes = {"imagenet1k.yml": "vision/B16_in1k.yml", "clip.yml": "clip/B16_datacomp.yml"}
    whole = wholes.get(path.name, "tokenformer/150M_train_pile.yml")
    files = [CONFIGS / whole, path] if is_part else [path]
    assert resolve_config(files).warnings == []


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_files_are_accepted_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(json.dumps(OFFICIAL[name], indent=1))
    files: list[Path] = [tmp_path / "a.yml"]
    if name == "configs/text_generation.yml":
        files.insert(0, CONFIGS / "tokenformer/150M_eval.yml")
    resolve_config(files)


@pytest.mark.parametrize("name", [f"{size}_{kind}" for size in SIZES for kind in ("train_pile", "eval")])
def test_tokenformer_configs_have_the_official_values(name: str) -> None:
    official: dict[str, Any] = {k.replace("-", "_"): v for k, v in OFFICIAL[f"configs/tokenformer/{name}.yml"].items()}
    ours = resolve_config(CONFIGS / "tokenformer" / name)
    assert ours.config == load_config([], {**official, **DIFFERENCES})
    left_out = {key for key in official if not any(used.split(".")[0] == key for used in ours.settings)}
    assert left_out == set(ABSENT)
    assert left_out <= set(IGNORED)


@pytest.mark.parametrize("name", GROWTH_FILES)
def test_growth_configs_have_the_official_values(name: str) -> None:
    folder = "incremental_scaling_openwebtext2"
    official = {k.replace("-", "_"): v for k, v in OFFICIAL[f"configs/{folder}/{name}.yml"].items()}
    ours = resolve_config(CONFIGS / folder / name)
    assert ours.config == load_config([], {**official, **DIFFERENCES})
    left_out = {key for key in official if not any(used.split(".")[0] == key for used in ours.settings)}
    assert left_out == set(ABSENT)


@pytest.mark.parametrize("name", sorted(name for name in OFFICIAL if name != "configs/text_generation.yml"))
def test_every_official_value_is_ours_paths_too(name: str) -> None:
    ours = resolve_config(ROOT / name)
    flat, seen = ours.config.flat(), 0
    for key, value in OFFICIAL[name].items():
        key = key.replace("-", "_")
        if key in ABSENT or key in DIFFERENCES or isinstance(value, dict):
            continue
        seen += 1
        assert key in ours.settings and flat[key] == value, f"{key}: {flat[key]} instead of {value}"
    assert seen > 40


def test_growth_files_start_from_the_official_download_and_then_from_each_other() -> None:
    folder = CONFIGS / "incremental_scaling_openwebtext2"
    first, other, second = (
        load_config(folder / f"{name}.yml").checkpoint
        for name in (
            "354M_to_757M_train_openwebtext2_60k",
            "354M_to_757M_train_openwebtext2_120k",
            "757M_to_1-5B_train_openwebtext2_60k",
        )
    )
    download = "./354M_TokenFormer_Openwebtext2/checkpoints"
    assert (first.pretrain_partial_init, other.pretrain_partial_init) == (download, download)
    assert second.pretrain_partial_init == first.save
    base = load_config(folder / "354M_train_openwebtext2_basemodel").checkpoint
    assert len({step.save for step in (base, first, other, second)}) == 4


def test_text_generation_has_the_official_values() -> None:
    base = CONFIGS / "tokenformer/150M_eval.yml"
    official = load_config(base, OFFICIAL["configs/text_generation.yml"])
    assert load_config([base, CONFIGS / "text_generation.yml"]) == official


@pytest.mark.parametrize("size", SIZES)
def test_transformer_baseline_matches_data_schedule_and_parameters(size: str) -> None:
    ours = load_config(CONFIGS / f"tokenformer/{size}_train_pile.yml")
    baseline = load_config(CONFIGS / f"transformer/{size}_train_pile.yml")
    for section in ("optimization", "precision", "parallel", "training", "data", "tokenizer"):
        assert getattr(ours, section) == getattr(baseline, section)
    model = baseline.model
    assert set(model.layer_kinds) == {"global"}
    slots = 3 * (ours.model.qkv_slot_num or 0) + (ours.model.proj_slot_num or 0) + (ours.model.ffn_slot_num or 0)
    width, inner = model.hidden_size, model.intermediate_size or 0
    assert 4 * width**2 + 2 * width * inner == 2 * width * slots


def test_local_cpu_overlay_runs_anywhere() -> None:
    config = load_config([CONFIGS / "tokenformer/150M_train_pile.yml", CONFIGS / "local_cpu.yml"])
    assert (config.precision.dtype, config.data.num_workers, config.launch.launcher) == ("fp32", 0, "local")
    assert config.logging.tensorboard_dir is None
