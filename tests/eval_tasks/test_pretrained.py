"""lm-eval's own command and its simple_evaluate take a checkpoint by the name `tokenformer`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_tasks.__main__ import main
from eval_tasks.adapter import TokenFormerLM
from eval_tasks.pretrained import load_pretrained
from megatron.errors import UserError, run_command
from megatron.exchange import open_checkpoint
from megatron.exchange.convert import export_huggingface, to_huggingface
from tests.checkpoint.forged import forge, record
from tests.random_models import make_config, make_model, save_random_models

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(tmp_path / "run", config, (7,), ema=True)
    return tmp_path / "run"


@pytest.mark.launches
def test_the_command_line_evaluates_a_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval_tasks", "--model", "tokenformer", "--tasks", "harbor_choice"]
    command += ["--model_args", f"pretrained={run_folder},revision=main,add_bos_token=False", "--trust_remote_code"]
    command += ["--include_path", str(FIXTURES), "--batch_size", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=FIXTURES, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|harbor_choice|" in done.stdout and "acc_norm" in done.stdout


def test_every_form_of_a_model_brings_its_tokenizer(run_folder: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    lm = TokenFormerLM.create_from_arg_string(f"pretrained={run_folder},max_length=20", {"batch_size": "auto:4"})
    assert (lm.max_length, lm.batches.size, lm.tokenizer_name) == (20, None, "HFTokenizer-320")
    export_huggingface(make_model(padded_vocab_size=384), tmp_path / "hf", open_checkpoint(run_folder).tokenizer)
    lm = TokenFormerLM.create_from_arg_obj({"pretrained": str(tmp_path / "hf")}, {"device": None, "batch_size": 3})
    assert (lm.max_length, lm.batches.size, lm.tokenizer_name) == (48, 3, "HFTokenizer-320")
    export_huggingface(make_model(padded_vocab_size=384), tmp_path / "bare")
    with pytest.raises(UserError, match="bare has none; add tokenizer=tokenizer.json or config=YAML"):
        load_pretrained(str(tmp_path / "bare"))
    arguments = {"pretrained": str(tmp_path / "bare"), "tokenizer": str(tokenizer_file)}
    assert TokenFormerLM.create_from_arg_obj(arguments).tokenizer_name == "HFTokenizer-320"
    with pytest.raises(UserError, match="dtype: 'int8' is not supported"):
        TokenFormerLM.create_from_arg_obj({**arguments, "dtype": "int8"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained is missing; give pretrained=FOLDER"),
        ({"pretrained": ""}, "pretrained is missing"),
        ({"pretrained": "gpt2"}, "pretrained: gpt2 does not exist; name a folder or file here, nothing is downloaded"),
        ({"pretrained": 5}, "pretrained: 5 does not exist"),
        ({"revision": "step3000"}, "revision: 'step3000' is of the Hugging Face Hub; download it"),
        ({"add_bos_token": True}, "add_bos_token: the models are trained without such a token"),
        ({"pretraned": "x"}, "model_args: unknown 'pretraned'; did you mean pretrained?"),
        ({"load_in_8bit": True}, "model_args: unknown 'load_in_8bit'; known: pretrained, config"),
        ({"max_length": 0}, "max_length: expected a positive whole number, got 0"),
        ({"max_length": "long"}, "max_length: expected a positive whole number, got 'long'"),
        ({"batch_size": "many"}, "batch_size: expected a positive whole number or auto, got 'many'"),
        ({"device": "tpu9000"}, "device: 'tpu9000' is not one"),
        ({"config": "absent.yml"}, "absent.yml"),
        ({"tokenizer": "absent.json"}, "absent.json"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"use_ema": "maybe"}, "use_ema: expected true or false, got 'maybe'"),
    ],
)
def test_model_args_work_or_say_in_one_line_why_not(run_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        TokenFormerLM.create_from_arg_obj({"pretrained": str(run_folder), **arguments} if arguments else {})
    assert "\n" not in str(error.value)


def test_the_average_of_the_weights_is_evaluated_unless_told_otherwise(run_folder: Path) -> None:
    saved, name = open_checkpoint(run_folder).tensors, "layers.0.mlp.key_tokens_0"
    for more, kind in (("", "ema"), (",use_ema=True", "ema"), (",use_ema=False", "model")):
        lm = TokenFormerLM.create_from_arg_string(f"pretrained={run_folder}{more}")
        assert torch.equal(lm.model.get_parameter(name), saved.tensor(kind, name))


def test_words_of_other_models_that_change_nothing_are_taken(run_folder: Path) -> None:
    text = f"pretrained={run_folder},trust_remote_code=True,add_bos_token=False,revision=main"
    TokenFormerLM.create_from_arg_string(text, {"max_batch_size": 64, "device": None})


def test_a_damaged_tokenizer_section_is_named(run_folder: Path) -> None:
    forge(run_folder / "global_step7", record("config.yml", lambda config: config.update(tokenizer_type="Abacus")))
    with pytest.raises(UserError, match="config.yml cannot be used: tokenizer_type"):
        load_pretrained(str(run_folder))
    with pytest.raises(UserError, match="config.yml cannot be used: tokenizer_type"):
        to_huggingface(run_folder, run_folder.parent / "hf")


def test_mistakes_in_the_options_of_the_command_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path=None, **_: TaskManager(include_path=str(FIXTURES), include_defaults=False),
    )
    for arguments, message in [
        (["--tasks", "harbor_choice"], "error: model_args: pretrained is missing"),
        (["--tasks", "harbour"], "error: lm_eval: Tasks not found: harbour"),
        (["--tasks", "harbor_choice", "--log_samples"], "error: lm_eval: Specify --output_path"),
    ]:
        monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "tokenformer", *arguments])
        assert run_command(main) == 2
        assert message in capsys.readouterr().err


def test_a_chat_template_is_refused_before_the_first_request(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(FIXTURES)
    with pytest.raises(UserError, match="apply_chat_template: prompts are plain text here"):
        simple_evaluate(
            "tokenformer",
            model_args=f"pretrained={run_folder}",
            tasks=["harbor_choice"],
            task_manager=TaskManager(include_path=str(FIXTURES), include_defaults=False),
            apply_chat_template=True,
        )
