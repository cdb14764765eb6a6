"""Interrupted generation goes on where it stopped: no answer lost, none twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.inference.answers import Answers, fingerprint
from megatron.inference.decoding import Decoder
from megatron.inference.generate import Completion, start_texts
from megatron.inference.modes import run_generation
from megatron.inference.sampling import Sampling
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, make_model, save_random_models

ROOT = Path(__file__).parents[2]
COUNT = 500


def completion(text: str) -> Completion:
    return Completion("context", text, len(text), False, None, 0.5)


def answers_of(path: Path) -> list[dict[str, Any]]:
    """The lines of an output file without their times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [{key: value for key, value in line.items() if key != "duration_seconds"} for line in lines]


def write_prompts(path: Path) -> None:
    """500 prompts of mixed length; every fourth has settings of its own."""
    generator = random.Random(4)
    with path.open("w", encoding="utf-8") as file:
        for i in range(COUNT):
            prompt = f"{i} " + "".join(generator.choices("abcdefgh ", k=generator.randrange(30)))
            own = {"temperature": 0.0, "top_k": 5, "maximum_tokens": 5, "seed": i} if i % 4 == 0 else {}
            file.write(json.dumps({"prompt": prompt, **own}) + "\n")


def config_of(folder: Path, output: str) -> RunConfig:
    keys = {"sample_input_file": str(folder / "prompts.jsonl"), "sample_output_file": str(folder / output)}
    options = {"text_gen_type": "input-file", "temperature": 0.8, "maximum_tokens": 12, "logprobs": True}
    return make_config(load=str(folder / "checkpoints"), eval_batch_size=8, launcher="local", **keys, **options)


def start_and_kill(command: list[str], unfinished: Path, lines: int) -> None:
    """SIGKILL once the unfinished file has so many lines, and a moment later."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not unfinished.exists() or unfinished.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.random() * 0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.launches
def test_a_killed_and_restarted_run_ends_with_the_same_500_answers(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    config = config_of(tmp_path, "killed.jsonl")
    save_random_models(tmp_path / "checkpoints", config, (1,))
    (tmp_path / "run.yml").write_text(json.dumps(config.flat()))
    command = [sys.executable, "generate.py", str(tmp_path / "run.yml")]
    unfinished = tmp_path / "killed.jsonl.unfinished"
    start_and_kill(command, unfinished, random.randrange(1, 350))
    kept = unfinished.read_bytes().count(b"\n") - 1
    assert not (tmp_path / "killed.jsonl").exists()
    restarted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert restarted.returncode == 0, restarted.stderr
    assert kept <= 0 or f"going on: {kept // 8 * 8} of 500 texts are there" in restarted.stdout
    assert not unfinished.exists()

    run_generation(config_of(tmp_path, "whole.jsonl"))
    whole = answers_of(tmp_path / "whole.jsonl")
    assert [answer["context"].split()[0] for answer in whole] == [str(i) for i in range(COUNT)]
    assert answers_of(tmp_path / "killed.jsonl") == whole


def test_answers_are_found_again_and_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    first = Answers(output, "one")
    first.add({3: completion("three"), 1: completion("\u00fc\u2028\r\nb")})
    first.close()
    unfinished = tmp_path / "out.jsonl.unfinished"
    whole = unfinished.read_bytes()
    for damage in (b'{"index": 0, "te', b"\0\0\0\n", b'{"text": "no index"}\n', b"[1]\n"):
        unfinished.write_bytes(whole + damage)
        again = Answers(output, "one")
        assert {i: answer["text"] for i, answer in again.found.items()} == {3: "three", 1: "\u00fc\u2028\r\nb"}
        assert unfinished.read_bytes() == whole
        again.add({0: completion("zero")})
        again.close()
        assert set(Answers(output, "one").found) == {0, 1, 3}


def test_an_answer_written_twice_counts_once(tmp_path: Path) -> None:
    answers = Answers(str(tmp_path / "out"), "one")
    answers.add({0: completion("a"), 1: completion("b")})
    answers.add({0: completion("a"), 2: completion("c")})
    answers.finish(3)
    assert [answer["text"] for answer in answers_of(tmp_path / "out")] == ["a", "b", "c"]
    assert os.listdir(tmp_path) == ["out"]


def test_answers_of_another_input_are_not_mixed_in(tmp_path: Path) -> None:
    first = Answers(str(tmp_path / "out"), "one")
    first.add({0: completion("a")})
    first.close()
    second = Answers(str(tmp_path / "out"), "two")
    assert second.found == {}
    second.close()
    assert Answers(str(tmp_path / "out"), "one").found == {}


def test_two_processes_cannot_write_the_same_answers(tmp_path: Path) -> None:
    first = Answers(str(tmp_path / "out"), "one")
    with pytest.raises(UserError, match="another process is writing .*out.unfinished"):
        Answers(str(tmp_path / "out"), "one")
    first.close()
    Answers(str(tmp_path / "out"), "one")


def test_the_fingerprint_follows_all_that_decides_the_texts() -> None:
    def of(prompt: str = "a", seed: int = 1, weights: int = 0, context: int = 48, **settings: Any) -> str:
        model = make_model()
        model.layers[0].attention.query.key_tokens_0.data[0, 0] += weights
        decoder = Decoder(model, CharLevelTokenizer(), context)
        return fingerprint(decoder, start_texts(decoder, [prompt], [Sampling(temperature=0.5, **settings)], seed))

    others = [of("b"), of(seed=2), of(weights=1), of(context=40), of(top_k=3), of(stop=("x",)), of(maximum_tokens=3)]
    assert of() == of()
    assert len({of(), *others}) == len(others) + 1
