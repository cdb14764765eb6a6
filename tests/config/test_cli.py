"""The command line, --help, --explain and the generated reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import explain, resolve_config
from megatron.config.build import SECTION_OF
from megatron.config.cli import parse_arguments, parse_run
from megatron.config.reference import render
from megatron.errors import UserError, run_command

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo.yml")


def test_flags_set_their_keys_and_win_over_set() -> None:
    argv = ["-d", str(ROOT / "configs"), "demo", "--set", "iteration=3", "--iteration", "5", "-i", "in.txt"]
    argv += ["-o", "out.txt", "--eval_tasks", "lambada_openai", "piqa,arc_easy", "--limit", "7", "-H", "hosts"]
    argv += ["--eval-results-prefix", "r", "--wandb_group", "g", "--wandb_team", "t", "--text_gen_type", "interactive"]
    argv += ["--num_fewshot", "0", "--include_path", "tasks", "--eval_batch_size", "4", "--load", "l", "--save", "s"]
    config, args = parse_run(argv, "eval.py")
    assert config.checkpoint.iteration == 5
    assert (config.checkpoint.load, config.checkpoint.save) == ("l", "s")
    assert (config.generation.sample_input_file, config.generation.sample_output_file) == ("in.txt", "out.txt")
    assert config.evaluation.eval_tasks == ["lambada_openai", "piqa", "arc_easy"]
    assert (config.evaluation.eval_limit, config.evaluation.num_fewshot, config.evaluation.eval_batch_size) == (7, 0, 4)
    assert (config.evaluation.eval_results_prefix, config.evaluation.include_path) == ("r", "tasks")
    assert (config.logging.wandb_group, config.logging.wandb_team) == ("g", "t")
    assert (config.launch.hostfile, config.generation.text_gen_type) == ("hosts", "interactive")
    assert args.conf_dir == str(ROOT / "configs")


def test_files_may_stand_anywhere() -> None:
    overlay = str(ROOT / "configs/local_cpu.yml")
    config, _ = parse_run([DEMO, "--iteration", "5", overlay, "--eval_tasks", "piqa", overlay], "eval.py")
    assert config.evaluation.eval_tasks == ["piqa"]
    assert config.training.train_micro_batch_size_per_gpu == 2


def test_image_sets_stand_anywhere_too() -> None:
    digits = str(ROOT / "configs/vision/demo_digits.yml")
    flags = ["--per_class", "--confusion", "--eval_split", "test", "--eval_data_paths", "a_image_document", "~/b"]
    config, _ = parse_run([*flags, digits], "eval.py")
    found = config.evaluation
    assert found.eval_data_paths == ["a_image_document", str(Path.home() / "b")] and found.eval_split == "test"
    assert found.per_class and found.confusion


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([DEMO, "--itration", "5"], "train.py: unrecognized arguments: --itration 5; did you mean --iteration? (see"),
        ([DEMO, "--iteration"], "train.py: argument --iteration: expected one argument"),
        ([DEMO, "--iteration", "x"], "--iteration: iteration: expected a whole number, got 'x'"),
        ([DEMO, "--text_gen_type", "x"], "--text_gen_type: text_gen_type: 'x' is not supported; choose one of"),
        ([], "train.py: no config file given; for example: python train.py configs/demo.yml"),
        ([DEMO, "--set", "growth=[{qkv_slot_num: 9}]"], "growth: entry 1: needs at_iteration or at_tokens"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: parse_run(argv, "train.py") and 0) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_growth_key_does_not_stop_evaluation() -> None:
    assert parse_run([DEMO, "--set", "pretrain_partial_init=old"], "eval.py")[0].checkpoint.pretrain_partial_init


def test_help_lists_flags_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run(["--help"], "train.py")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--explain" in text and text.isascii()
    assert [key for key in SECTION_OF if f"  {key} (" not in text] == []


def test_explain_flag_prints_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run([DEMO, "--explain"], "train.py")
    assert stop.value.code == 0
    assert "demo.yml:3" in capsys.readouterr().out


def test_explain_tells_the_source_of_every_value(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("# c\nseed: 3\nadlr_autoresume: true\nfp16: {enabled: true}\n")
    resolved = resolve_config([DEMO, tmp_path / "a.yml"], ["lr=1e-3", "precision=null"])
    lines = {line.split()[0]: line for line in explain(resolved).splitlines() if line.startswith("  ")}
    assert lines["seed"].endswith("a.yml:2")
    assert lines["optimizer.params.lr"].split()[1:] == ["0.001", "--set"]
    assert lines["layernorm_epsilon"].endswith("default")
    assert lines["lr_decay_iters"].split()[1:] == [str(resolved.config.training.train_iters), "derived:", "train_iters"]
    assert "derived: stage 1 instead of 0" in lines["zero_optimization.stage"]
    assert lines["adlr_autoresume"].endswith("a.yml:3: a signal saves and stops the run instead")


def test_reference_page_is_up_to_date() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert text == render(), "run `python -m megatron.config.reference`"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size", "4"], ["--eval_batch_size", "train_micro_batch_size_per_gpu"]),
        (["--output-path", "out"], ["--eval_results_prefix"]),
        (["--log_samples"], ["python -m eval_tasks --model tokenformer"]),
        (["--log_samples", "--output_path=out", "--batch_size=auto"], ["eval_tasks", "_results_prefix", "_batch_size"]),
        (["--tasks", "piqa"], ["--eval_tasks is the word here"]),
        (["--gen_kwargs", "temperature=1"], ["python -m eval_tasks"]),
        (["--apply_chat_template"], ["prompts are plain text"]),
        (["--temperature", "0.5"], ["temperature is a key: --set temperature=VALUE"]),
        (["--evaltasks", "piqa"], ["did you mean --eval_tasks?"]),
    ],
)
def test_flags_of_other_programs_name_the_word_for_it(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_arguments(["demo.yml", *flags], "eval.py")
    message = str(error.value)
    assert message.startswith("eval.py: ") and "\n" not in message
    assert all(word in message for word in words)
    assert all(flag.partition("=")[0].replace("-p", "_p") in message for flag in flags if flag.startswith("--"))
