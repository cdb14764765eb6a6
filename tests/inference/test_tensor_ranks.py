"""Two tensor ranks generate what one process generates: through the function, from a file, and from the keyboard."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.inference.generate import generate
from megatron.inference.load import load_model
from megatron.inference.modes import run_generation
from megatron.mpu.environment import ensure_process_environment
from megatron.mpu.processes import join, leave_world
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, make_model, save_random_models
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

PROMPTS = ["The Union " * n + chr(97 + n) for n in range(9)]
GREEDY: dict[str, Any] = {"maximum_tokens": 12}
SAMPLED: dict[str, Any] = {"maximum_tokens": 9, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
TYPED = ["one", "", "two"]


def texts(tensor_size: int) -> dict[str, list[str]]:
    """In fp64, where a cache and another order of summation change no greedy choice."""
    ensure_process_environment()
    layout = join(tensor_size, "gloo")
    result = {}
    for kind in ("tokenformer", "transformer"):
        model = make_model(kind, layout=layout, padded_vocab_size=643)  # no multiple of two
        for name, options in (("greedy", GREEDY), ("no cache", {**GREEDY, "recompute": True}), ("sampled", SAMPLED)):
            found = generate(model, CharLevelTokenizer(), PROMPTS, batch_size=4, **options)
            result[f"{kind} {name}"] = [completion.text for completion in found]
    return result


def test_generation_equals_that_of_one_process() -> None:
    expected = texts(1)
    assert len(set(expected["tokenformer greedy"])) >= 5
    for found in run_ranks(2, texts, 2):
        assert found == expected


def modes(tensor_size: int, folder: str) -> str:
    """generate.py from a file and from the keyboard; what this rank printed in the latter."""
    ensure_process_environment()
    layout = join(tensor_size, "gloo")
    root, output = Path(folder), Path(folder) / f"{tensor_size}.jsonl"
    keys = {"load": str(root / "run"), "sample_output_file": str(output), "model_parallel_size": tensor_size}
    file_keys = {"text_gen_type": "input-file", "sample_input_file": str(root / "prompts.txt"), **SAMPLED}
    run_generation(make_config(**keys, **file_keys), layout)

    def keyboard() -> Iterator[str]:
        yield from TYPED
        raise EOFError

    lines = keyboard()
    builtins.input = lambda prompt="": next(lines)  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_generation(make_config(**keys, text_gen_type="interactive", maximum_tokens=6), layout)
    return printed.getvalue().partition("\n")[2]  # behind the log line, which has the time


def test_the_modes_of_generate_py_work_over_tensor_ranks(tmp_path: Path) -> None:
    save_random_models(tmp_path / "run", make_config(), (3,))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    original = builtins.input
    try:
        expected = modes(1, str(tmp_path))
    finally:
        builtins.input = original
    first, second = run_ranks(2, modes, 2, str(tmp_path))
    assert second == "" and first == expected
    answers = [
        [(line["context"], line["text"]) for line in map(json.loads, (tmp_path / f"{n}.jsonl").open())] for n in (1, 2)
    ]
    assert len(answers[0]) == len(PROMPTS) and answers[0] == answers[1]
    assert not os.path.exists(tmp_path / "2.jsonl.unfinished")


def test_a_share_of_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    save_random_models(tmp_path / "run", make_config(), (3,))
    whole = load_model(tmp_path / "run")
    sizes = run_ranks(2, share_sizes, str(tmp_path / "run"))
    assert [size[0] for size in sizes] == [whole.num_parameters()] * 2
    assert sum(size[1] for size in sizes) == whole.num_parameters() + 2 * 32  # the final norm is on both


def share_sizes(folder: str) -> tuple[int, int]:
    model = load_model(folder, layout=join(2, "gloo"))
    leave_world()  # the first rank keeps what the other still has to read
    return model.num_parameters(), sum(parameter.numel() for parameter in model.parameters())
