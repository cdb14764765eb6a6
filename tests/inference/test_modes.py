"""generate.py's three modes, and what they say when something is missing."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.errors import UserError
from megatron.inference.generate import generate
from megatron.inference.load import load_model
from megatron.inference.modes import run_generation
from megatron.inference.prepare import inference_dtype, load_for_inference
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, save_random_models

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "configs" / "text_generation.yml"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_input_file_gives_one_json_line_a_completion(checkpoint: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "new" / "out.jsonl"
    prompts.write_text("The Union\n\n  caf\u00e9 \n", encoding="utf-8")
    keys = {"sample_input_file": str(prompts), "sample_output_file": str(output), "samples_per_prompt": 2}
    options = {"temperature": 1.0, "maximum_tokens": 7, "seed": 3, "text_gen_type": "input-file"}
    run_generation(make_config(load=str(checkpoint), **keys, **options))
    found = lines_of(output)
    assert [line["context"] for line in found] == ["The Union"] * 2 + ["caf\u00e9"] * 2
    assert list(found[0]) == ["context", "text", "length", "finished", "message", "duration_seconds"]
    model = load_model(checkpoint)
    sampling: dict[str, Any] = {"temperature": 1.0, "maximum_tokens": 7, "seed": 3, "num_samples": 2}
    direct = generate(model, CharLevelTokenizer(), ["The Union", "caf\u00e9"], **sampling)
    assert [line["text"] for line in found] == [completion.text for completion in direct]


def test_unconditional_writes_num_samples_texts(checkpoint: Path, tmp_path: Path) -> None:
    keys = {"text_gen_type": "unconditional", "num_samples": 3, "temperature": 1.0, "maximum_tokens": 5}
    run_generation(make_config(load=str(checkpoint), sample_output_file=str(tmp_path / "out"), **keys))
    assert [line["context"] for line in lines_of(tmp_path / "out")] == ["", "", ""]


@pytest.mark.parametrize(
    ("typed", "prompt_end", "prompts"),
    [
        (["one", "", "two"], "\n", ["one", "two"]),
        (["one", "/reset", "two"], "\n", ["one", "two"]),
        (["one", "still one END", "/resetEND", "two"], "END", ["one\nstill one ", "two"]),
        ([], "\n", []),
    ],
)
def test_interactive_completes_what_is_typed(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: list[str],
    prompt_end: str,
    prompts: list[str],
) -> None:
    def keyboard() -> Iterator[str]:
        yield from typed
        raise EOFError

    lines = keyboard()
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(lines))
    keys = {"text_gen_type": "interactive", "prompt_end": prompt_end, "maximum_tokens": 6}
    run_generation(make_config(load=str(checkpoint), **keys))
    printed = capsys.readouterr().out
    completions = generate(load_model(checkpoint), CharLevelTokenizer(), prompts, maximum_tokens=6)
    assert all(completion.text in printed for completion in completions)


def test_the_official_file_generates_as_the_official_code(checkpoint: Path, tmp_path: Path) -> None:
    official = yaml.safe_load(OFFICIAL.read_text())
    keys = {"load": str(checkpoint), **official, "maximum_tokens": 4, "sample_output_file": str(tmp_path / "out")}
    run_generation(make_config(**keys))
    assert [line["context"] for line in lines_of(tmp_path / "out")] == [""] * 10
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo", encoding="utf-8")
    keys |= {"text_gen_type": "input-file", "sample_input_file": str(prompts)}
    run_generation(make_config(**keys))
    assert [line["context"] for line in lines_of(tmp_path / "out")] == ["one", "two"]
    run_generation(make_config(**{**keys, "prompt_end": "n", "samples_per_prompt": 2}))
    assert [line["context"] for line in lines_of(tmp_path / "out")] == ["o", "o", "e\ntwo", "e\ntwo"]


def test_settings_without_effect_are_said(
    checkpoint: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts").write_text("The Union")
    keys: dict[str, Any] = {"load": str(checkpoint), "sample_input_file": str(tmp_path / "prompts")}
    keys |= {"text_gen_type": "input-file", "sample_output_file": str(tmp_path / "out"), "maximum_tokens": 6}
    run_generation(make_config(**keys))
    greedy = [line["text"] for line in lines_of(tmp_path / "out")]
    for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)):
        package_log.clear()
        run_generation(make_config(**keys, **{name: value, "num_samples": 4}))
        assert [line["text"] for line in lines_of(tmp_path / "out")] == greedy
        assert f"temperature 0 is greedy: {name} has no effect; GPT-NeoX samples there" in package_log.messages
        assert "num_samples is for unconditional texts: samples_per_prompt is 1" in package_log.messages


def test_without_history_every_prompt_is_answered_on_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    alone = [c.text for c in generate(load_model(checkpoint), CharLevelTokenizer(), ["one", "two"], maximum_tokens=6)]
    for history in (True, False):
        lines = iter(["one", "two"])
        monkeypatch.setattr("megatron.inference.interactive._typed_prompts", lambda end, lines=lines: lines)
        keys = {"text_gen_type": "interactive", "maximum_tokens": 6, "interactive_history": history}
        run_generation(make_config(load=str(checkpoint), **keys))
        printed.append(capsys.readouterr().out)
    assert all(text in printed[1] for text in alone)
    assert alone[1] not in printed[0]


def test_eval_ckpt_wins_over_load_and_iteration_chooses(checkpoint: Path, tmp_path: Path) -> None:
    latest, _ = load_for_inference(make_config(load=str(checkpoint)))
    older, _ = load_for_inference(make_config(load=str(checkpoint), iteration=5))
    named, _ = load_for_inference(make_config(load=str(tmp_path), eval_ckpt=str(checkpoint / "global_step5")))
    weights = [model.embedding.word_embeddings.weight for model in (latest, older, named)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_fp16_becomes_fp32_on_a_cpu(package_log: pytest.LogCaptureFixture) -> None:
    assert inference_dtype("fp16", torch.device("cpu")) == torch.float32
    assert set(package_log.messages) == {"fp16: no GPU here, the model runs in fp32"}
    assert inference_dtype("fp16", torch.device("cuda")) == torch.float16
    assert inference_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_missing_settings_are_named(checkpoint: Path, tmp_path: Path) -> None:
    load = {"load": str(checkpoint)}
    absent, empty = str(tmp_path / "absent"), tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    unconditional = {"text_gen_type": "unconditional", "sample_output_file": str(tmp_path / "out")}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("text_gen_type: missing", load),
        ("sample_input_file: missing", {"text_gen_type": "input-file", **load}),
        ("absent cannot be read: No such file", {"text_gen_type": "input-file", "sample_input_file": absent, **load}),
        ("holds no prompts", {"text_gen_type": "input-file", "sample_input_file": str(empty), **load}),
        ("load: no checkpoint configured", unconditional),
        ("load: .*absent does not exist", {**unconditional, "load": absent}),
        ("eval_ckpt: .*absent does not exist", {**unconditional, **load, "eval_ckpt": absent}),
        ("no checkpoint in", {**unconditional, "load": str(tmp_path / "folder")}),
        ("iterations found there: 5, 10", {**unconditional, **load, "iteration": 7}),
        ("sample_output_file: .* cannot be written", {**unconditional, **load, "sample_output_file": str(checkpoint)}),
    ]
    for message, keys in cases:
        with pytest.raises(UserError, match=message):
            run_generation(make_config(**keys))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    small = make_config(padded_vocab_size=256)
    save_random_models(tmp_path / "small", small, (1,))
    with pytest.raises(UserError, match="the tokenizer has 512 ids, the model's embedding 256 rows"):
        load_for_inference(make_config(load=str(tmp_path / "small"), padded_vocab_size=256))


@pytest.mark.launches
def test_command_line_reports_one_line_and_other_ranks_do_nothing(tmp_path: Path) -> None:
    config = tmp_path / "model.yml"
    config.write_text(json.dumps(make_config().flat()), encoding="utf-8")

    def run(rank: str) -> subprocess.CompletedProcess[str]:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "PATH": ""}
        command = [sys.executable, str(ROOT / "generate.py"), str(config)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)

    first, second = run("0"), run("1")
    assert (first.returncode, first.stderr.count("\n")) == (2, 1)
    assert first.stderr.startswith("error: text_gen_type: missing")
    assert (second.returncode, second.stderr) == (0, "")
