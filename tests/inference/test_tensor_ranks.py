"""Two tensor ranks generate what one process generates: through the function, from a file, and from the keyboard."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.inference.generate import generate
from megatron.inference.load import load_model
from megatron.inference.modes import run_generation
from megatron.inference.sparse import Select, heaviest, shares_used, sparse
from megatron.mpu import Layout
from megatron.mpu.environment import ensure_process_environment
from megatron.mpu.processes import join, leave_world
from megatron.ops.pattention_sparse import Selection
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, make_model, save_random_models
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

PROMPTS = ["The Union " * n + chr(97 + n) for n in range(9)]
GREEDY: dict[str, Any] = {"maximum_tokens": 12}
SAMPLED: dict[str, Any] = {"maximum_tokens": 9, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
TYPED = ["one", "", "two"]


def texts(layout: Layout) -> dict[str, list[str]]:
    """In fp64, where a cache and another order of summation change no greedy choice."""
    result = {}
    for kind in ("tokenformer", "transformer"):
        model = make_model(kind, layout=layout, padded_vocab_size=643)  # no multiple of two
        for name, options in (("greedy", GREEDY), ("no cache", {**GREEDY, "recompute": True}), ("sampled", SAMPLED)):
            found = generate(model, CharLevelTokenizer(), PROMPTS, batch_size=4, **options)
            result[f"{kind} {name}"] = [completion.text for completion in found]
    return result


ODD_SEGMENTS: dict[str, Any] = {
    "token_segments": {"qkv": [[9, 5, 7]] * 2, "proj": [[11, 8, 0], [12, 0, 7]], "ffn": [[19, 12, 8]] * 2},
    "segment_norms": ["joint", "segment", "joint"],
    "qkv_slot_num": 21, "proj_slot_num": 19, "ffn_slot_num": 39,
}  # fmt: skip
SPARSE: dict[str, Select] = {
    "share": partial(heaviest, share=0.3),
    "threshold": lambda layer: Selection(threshold=0.4),
}
SHARES = {"qkv": 6 / 21, "proj": 6 / 19, "ffn": 12 / 39}  # 0.3 in whole tokens


def sparse_logits(layout: Layout) -> dict[str, tuple[list[Any], dict[str, float]]]:
    """Those of models that leave tokens out, of which the ranks hold unequal numbers, and the shares they have used."""
    model = make_model(layout=layout, padded_vocab_size=643, **ODD_SEGMENTS)
    ids = torch.randint(1, 600, (3, 7), generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        for name, select in SPARSE.items():
            network = sparse(model, select)
            found[name] = network(ids).tolist(), shares_used(network, layout)
    return found


def texts_and_logits(tensor_size: int) -> tuple[dict[str, list[str]], dict[str, tuple[list[Any], dict[str, float]]]]:
    ensure_process_environment()
    layout = join(tensor_size, "gloo")
    return texts(layout), sparse_logits(layout)


def test_ranks_compute_what_one_process_does() -> None:
    """The texts, and the logits of sparse models: the tokens that they keep are chosen among those of all ranks."""
    expected, logits = texts_and_logits(1)
    assert len(set(expected["tokenformer greedy"])) >= 5
    assert logits["share"][1] == SHARES and all(0.1 < share < 0.4 for share in logits["threshold"][1].values())
    for found, own in run_ranks(2, texts_and_logits, 2):
        assert found == expected
        for name, (values, shares) in own.items():
            expected_values = torch.tensor(logits[name][0], dtype=torch.float64)
            torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected_values, rtol=1e-9, atol=1e-9)
            assert shares == logits[name][1]


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
