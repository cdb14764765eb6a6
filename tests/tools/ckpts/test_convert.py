"""tools/ckpts/convert.py: every path between the forms, and its one-line mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron.checkpoint.store import CheckpointReader, RunFolder
from megatron.config.sections.model import ModelConfig
from megatron.errors import run_command
from megatron.exchange.convert import export_huggingface
from megatron.exchange.official import canonical_name, official_name
from megatron.inference import load_model
from tests.random_models import make_config, save_random_models
from tools.ckpts.convert import main

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
MODELS = ("model_A", "model_C_untied_gelu_l2")


def yaml_of(name: str, folder: Path, **keys: str) -> Path:
    """The model's part of a golden configuration, as a YAML file."""
    arguments = json.loads((GOLDEN / name / "config.json").read_text())["neox_args"]
    model = {key: value for key, value in arguments.items() if key in ModelConfig.model_fields}
    path = folder / "model.yml"
    path.write_text(yaml.safe_dump({**model, "tokenizer_type": "CharLevelTokenizer", **keys}))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_flat_file_goes_round_and_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    original, config = GOLDEN / name / "pytorch_model.bin", yaml_of(name, tmp_path)
    main(["from-official", str(original), str(tmp_path / "canonical"), "--config", str(config)])
    main(["to-hf", str(tmp_path / "canonical"), str(tmp_path / "hf")])
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "canonical_again")])
    main(["to-official", str(tmp_path / "canonical_again"), str(tmp_path / "flat")])
    io = load_file(GOLDEN / name / "io.safetensors")
    for form in ("canonical", "hf", "canonical_again"):
        assert (load_model(tmp_path / form)(io["input_ids"]) - io["logits"]).abs().max() < 1e-5
    first, second = (CheckpointReader(tmp_path / form / "global_step0") for form in ("canonical", "canonical_again"))
    assert first.names("model") == second.names("model")
    for key in first.names("model"):
        assert torch.equal(first.tensor("model", key), second.tensor("model", key))
    before, after = (
        torch.load(path, weights_only=True) for path in (original, tmp_path / "flat" / "pytorch_model.bin")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_runs_checkpoint_keeps_its_tokenizer(tmp_path: Path, tokenizer_file: Path) -> None:
    config = make_config(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file), padded_vocab_size=384)
    save_random_models(tmp_path / "run", config, (5, 10))
    main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--iteration", "5", "--dtype", "bf16"])
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    folder = RunFolder(tmp_path / "back").find()
    assert folder is not None
    saved = CheckpointReader(folder)
    assert saved.config["vocab_file"] == str(tmp_path / "back" / "tokenizer.json") and saved.iteration == 0
    source = CheckpointReader(tmp_path / "run" / "global_step5")
    name = "layers.1.mlp.key_tokens_0"
    assert torch.equal(saved.tensor("model", name), source.tensor("model", name).bfloat16().float())


@pytest.mark.parametrize("command", ["to-hf", "to-official"])
def test_weights_are_exported_or_on_demand_their_average(
    command: str, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    save_random_models(tmp_path / "run", make_config(), (5,), ema=True)
    for flags, kind in (([], "model"), (["--ema"], "ema")):
        package_log.clear()
        main([command, str(tmp_path / "run"), str(tmp_path / kind), *flags])
        assert ("--ema writes their average" in package_log.text) == (kind == "model")
        source = tmp_path / kind / ("pytorch_model.bin" if command == "to-official" else "")
        exported = load_model(source, make_config().language)
        saved = CheckpointReader(tmp_path / "run" / "global_step5")
        assert all(torch.equal(p, saved.tensor(kind, name)) for name, p in exported.named_parameters())


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_have_the_mode_that_the_umask_gives(umask: int, tmp_path: Path, tokenizer_file: Path) -> None:
    config = make_config(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file), padded_vocab_size=384)
    before = os.umask(umask)
    try:
        save_random_models(tmp_path / "run", config, (5,))
        main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
        export_huggingface(load_model(tmp_path / "run"), tmp_path / "shards", shard_bytes=50_000)
        main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
        main(["to-official", str(tmp_path / "run"), str(tmp_path / "flat")])
    finally:
        os.umask(before)
    assert len(list(tmp_path.rglob("*.safetensors"))) >= 5
    modes = {path: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    for path, mode in modes.items():
        assert mode == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_a_missing_tokenizer_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "model_A"
    config = yaml_of(name, tmp_path, tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "gone.json"))
    main(["to-hf", str(GOLDEN / name / "pytorch_model.bin"), str(tmp_path / "hf"), "--config", str(config)])
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_official_names_are_the_inverse_of_the_canonical_ones() -> None:
    for name in MODELS:
        for official in torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True):
            assert official_name(canonical_name(official, 2) or "", 2) == official


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, taken = str(GOLDEN / "model_A" / "pytorch_model.bin"), tmp_path / "taken"
    config, new = str(yaml_of("model_A", tmp_path)), str(tmp_path / "new")
    taken.mkdir()
    shutil.copy(config, taken)
    transformer = make_config(qkv_slot_num=None, proj_slot_num=None, ffn_slot_num=None)
    save_random_models(tmp_path / "transformer", transformer, (1,))
    for arguments, message in (
        (["to-hf", str(tmp_path / "none"), new], "no checkpoint in"),
        (["to-hf", flat, new], "give the YAML configuration"),
        (["from-hf", str(taken), new], "has no config.json"),
        (["from-official", str(tmp_path / "none"), new, "--config", config], "no such file"),
        (["from-official", flat, str(taken), "--config", config], "exists already"),
        (["to-official", str(tmp_path / "transformer"), new], "holds TokenFormer blocks only"),
        (["to-hf", str(tmp_path / "transformer"), new, "--ema"], "has no average of its weights (ema_decay)"),
    ):
        assert run_command(lambda arguments=arguments: main(arguments)) == 2  # type: ignore[misc]
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not Path(new).exists()


@pytest.mark.launches
@pytest.mark.parametrize("start", [["tools/ckpts/convert.py"], ["-m", "tools.ckpts.convert"]], ids=["path", "module"])
def test_the_tool_runs_by_path_and_as_a_module(start: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *start, "to-official", str(tmp_path / "none"), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["zero_to_fp32", "zero_to_fp32.py", "zero-to-fp32"])
def test_what_replaces_zero_to_fp32_is_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main([word, "checkpoints", "out"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "to-official" in error and "to-hf" in error
