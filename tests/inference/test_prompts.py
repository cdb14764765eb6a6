"""Prompt files: lines of text and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import load_config
from megatron.config.sections.generation import GenerationConfig
from megatron.errors import UserError
from megatron.inference.prompts import read_requests
from megatron.inference.sampling import Sampling
from tests.conftest import TINY

OPTIONS = GenerationConfig(temperature=0.5, stop="END", samples_per_prompt=2, num_samples=10)
OFFICIAL = Path(__file__).parents[2] / "configs" / "text_generation.yml"


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_lines_of_text_all_have_the_settings_of_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", " The Union \n", "\n", '{"prompt": "as it is"}\n', "a\u2028b")
    requests = read_requests(path, OPTIONS)
    assert [request.prompt for request in requests] == ["The Union", '{"prompt": "as it is"}', "a\u2028b"]
    assert {request.sampling for request in requests} == {Sampling(temperature=0.5, stop=("END",), num_samples=2)}


@pytest.mark.parametrize(
    ("content", "end", "prompts"),
    [
        ("one\ntwo\n", "\n", ["one", "two"]),
        ("def f():\n    return 1\n###\n x\n y ###\n###", "###", ["def f():\n    return 1", "x\n y"]),
        ("a; b;;\n;c", ";", ["a", "b", "c"]),
        ("a\r\n\r\nb", "\n\n", ["a", "b"]),
        ("no end\nat all", "END", ["no end\nat all"]),
    ],
)
def test_prompts_end_with_prompt_end(tmp_path: Path, content: str, end: str, prompts: list[str]) -> None:
    (tmp_path / "prompts").write_bytes(content.encode())
    found = read_requests(str(tmp_path / "prompts"), GenerationConfig(prompt_end=end))
    assert [request.prompt for request in found] == prompts
    assert {request.sampling.num_samples for request in found} == {1}


def test_json_lines_end_with_the_line_whatever_prompt_end_is(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a,b"}, {"prompt": "c"})
    assert [r.prompt for r in read_requests(path, GenerationConfig(prompt_end=","))] == ["a,b", "c"]


def test_with_the_official_file_each_prompt_has_one_text(tmp_path: Path) -> None:
    options = load_config(OFFICIAL, TINY).generation
    assert (options.num_samples, options.prompt_end, options.temperature) == (10, "\n", 1.0)
    lines = write(tmp_path / "p.txt", "a\n", "b\n"), write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    for path in lines:
        assert [(r.prompt, r.sampling.num_samples) for r in read_requests(path, options)] == [("a", 1), ("b", 1)]
    path = write(tmp_path / "own.jsonl", {"prompt": "a", "num_samples": 3}, {"prompt": "b", "samples_per_prompt": 4})
    assert [request.sampling.num_samples for request in read_requests(path, options)] == [3, 4]


def test_json_lines_may_have_settings_of_their_own(tmp_path: Path) -> None:
    own = {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}
    own |= {"maximum_tokens": 7, "num_samples": 1, "stop": ["a", "b"], "seed": 5}
    path = write(tmp_path / "p.jsonl", {"prompt": " kept \n", **own}, {"prompt": "", "stop": "x"}, {"prompt": "c"})
    first, second, third = read_requests(path, OPTIONS)
    assert first.prompt == " kept \n"
    assert first.sampling == Sampling(**{**own, "stop": ("a", "b")})
    assert (second.prompt, second.sampling.stop, second.sampling.temperature) == ("", ("x",), 0.5)
    assert third.sampling == Sampling(temperature=0.5, stop=("END",), num_samples=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('"text"', "line 2 has no text called prompt"),
        ({"text": "a"}, "line 2 has no text called prompt"),
        ({"prompt": "a", "temprature": 1}, "line 2: unknown setting 'temprature'; did you mean temperature"),
        ({"prompt": "a", "zzz": 1}, "line 2: unknown setting 'zzz'; known: prompt, maximum_tokens"),
        ({"prompt": "a", "sample_output_file": "x"}, "line 2: unknown setting 'sample_output_file'"),
        ({"prompt": "a", "top_p": 1.5}, "line 2: top_p: must be at most 1, got 1.5"),
        ({"prompt": "a", "top_k": "many"}, "line 2: top_k: expected a whole number, got 'many'"),
        ({"prompt": "a", "seed": -1}, "line 2: seed: must be at least 0, got -1"),
        ({"prompt": "a", "stop": [""]}, "line 2: stop: "),
    ],
)
def test_mistakes_name_file_line_and_setting(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UserError, match=message) as error:
        read_requests(path, OPTIONS)
    assert "p.jsonl, line 2" in str(error.value)


def test_binary_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        read_requests(str(tmp_path / "prompts"), OPTIONS)
