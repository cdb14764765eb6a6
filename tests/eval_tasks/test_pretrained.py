"""lm-eval's own command and its simple_evaluate take a checkpoint by the name `tokenformer`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_tasks.adapter import TokenFormerLM
from eval_tasks.pretrained import tokenizer_of
from megatron.errors import UserError
from megatron.inference.huggingface import export_huggingface
from tests.inference.helpers import make_config, make_model, save_random_models

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(tmp_path / "run", config, (7,))
    return tmp_path / "run"


def test_the_command_line_evaluates_a_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval_tasks", "--model", "tokenformer", "--tasks", "harbor_choice"]
    command += ["--model_args", f"pretrained={run_folder}", "--include_path", str(FIXTURES), "--batch_size", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=FIXTURES, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|harbor_choice|" in done.stdout and "acc_norm" in done.stdout


def test_every_form_of_a_model_brings_its_tokenizer(run_folder: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    lm = TokenFormerLM.create_from_arg_string(f"pretrained={run_folder},max_length=20", {"batch_size": "auto:4"})
    assert (lm.max_length, lm.batches.size, lm.tokenizer_name) == (20, None, "HFTokenizer-320")
    export_huggingface(make_model(padded_vocab_size=384), tmp_path / "hf", tokenizer_of(run_folder))
    lm = TokenFormerLM.create_from_arg_obj({"pretrained": str(tmp_path / "hf")}, {"device": None, "batch_size": 3})
    assert (lm.max_length, lm.batches.size, lm.tokenizer_name) == (48, 3, "HFTokenizer-320")
    export_huggingface(make_model(padded_vocab_size=384), tmp_path / "bare")
    with pytest.raises(UserError, match="bare has none; add tokenizer=tokenizer.json or config=YAML"):
        tokenizer_of(tmp_path / "bare")
    arguments = {"pretrained": str(tmp_path / "bare"), "tokenizer": str(tokenizer_file)}
    assert TokenFormerLM.create_from_arg_obj(arguments).tokenizer_name == "HFTokenizer-320"
    with pytest.raises(UserError, match="dtype: 'int8' is not supported"):
        TokenFormerLM.create_from_arg_obj({**arguments, "dtype": "int8"})
