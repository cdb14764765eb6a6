"""Folders in Hugging Face's form that are damaged, incomplete or nonsense: one line, never another model in silence."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.config.sections.base import MAX_SIZE
from megatron.errors import EXIT_USER_ERROR, UserError, run_command
from megatron.exchange.convert import export_huggingface
from megatron.inference import load_model
from megatron.model import LanguageModel
from tests.damage import damaged
from tests.random_models import make_model
from tools.ckpts.convert import main

SEED = os.environ.get("SOAK_SEED", "1")
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
SECONDS_A_FILE = 20.0
KINDS: dict[str, dict[str, Any]] = {
    "tokenformer": {},
    "mixed": {"attention_config": [[["tokenformer", "global"], 1]], "intermediate_size": 48, "no_weight_tying": True},
    "gpt_neox": {"kind": "transformer", "norm": "layernorm"},
}


def export(folder: Path, kind: str, shard_bytes: int = 30_000) -> Path:
    """A folder of several files of weights."""
    model = make_model(dtype=torch.float32, padded_vocab_size=32, vocab_size=20, **KINDS[kind])
    export_huggingface(model, folder, shard_bytes=shard_bytes)
    return folder


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return export(tmp_path / "hf", request.param)


def outcome(folder: Path) -> LanguageModel | None:
    """The model, or None after one line that names the folder. Other errors and hangs fail the test."""
    start = time.monotonic()
    try:
        return load_model(folder)
    except UserError as error:
        assert str(folder) in str(error) and len(str(error)) < 1000
        return None
    finally:
        assert time.monotonic() - start < SECONDS_A_FILE


def damages(path: Path, count: int) -> Iterator[bytes]:
    """Damaged contents of a file, the same ones in every run; of weights, damaged headers."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for number in range(count * ROUNDS):
        draw = random.Random(f"{SEED}/{path.name}/{number}")
        yield damaged(content[:header], draw) + content[header:]


def test_damaged_files_are_refused_or_change_no_weight(folder: Path) -> None:
    expected = load_model(folder).state_dict()
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".py"]
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        for content in damages(path, 4):
            path.write_bytes(content)
            found = outcome(folder)
            if found is not None:
                state = found.state_dict()
                is_header = path.suffix == ".safetensors"  # a name or a place in it may mean another tensor of its kind
                assert state.keys() == expected.keys()
                assert is_header or all(torch.equal(state[name], expected[name]) for name in expected)
        path.write_bytes(whole)
    assert load_model(folder).state_dict().keys() == expected.keys()


def test_damaged_weights_with_checksums_are_refused_or_whole(tmp_path: Path) -> None:
    """pytorch_model.bin is an archive of parts that have checksums."""
    folder = export(tmp_path / "hf", "tokenformer", shard_bytes=10**9)
    expected, path = load_model(folder).state_dict(), folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    for content in damages(path, 12):
        path.write_bytes(content)
        found = outcome(folder)
        assert found is None or all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


NONSENSE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


def test_nonsense_under_any_key_of_a_configuration_is_one_line_or_no_matter(folder: Path) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    sizes = {"num_layers", "hidden_size", "num_hidden_layers", "qkv_slot_num", "ffn_slot_num", "proj_slot_num"}
    sizes |= {"padded_vocab_size"} if "padded_vocab_size" in whole else {"vocab_size"}
    draw = random.Random(f"{SEED}/nonsense")
    for key in [*whole, "rope_scaling", "rope_parameters"]:
        for value in draw.sample(NONSENSE, min(2 * ROUNDS, len(NONSENSE))):
            path.write_text(json.dumps({**whole, key: value}))
            assert outcome(folder) is None or key not in sizes, (key, value)
    for key in sizes & whole.keys():
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        assert outcome(folder) is None, key


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda c: [c], "not a JSON object"),
    "layers": (lambda c: {**c, "num_layers": 10**9}, "num_layers: 1000000000 does not fit the weights, which are of 2"),
    "beyond memory": (lambda c: {**c, "hidden_size": 10**30}, "hidden_size: expected a number of at most 64 bits"),
    "no vocabulary": (lambda c: {**c, "padded_vocab_size": None}, "the size of the vocabulary is missing"),
    "tying": (lambda c: {**c, "tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' is neither true nor false"),
    "another head": (lambda c: {**c, "tie_word_embeddings": True}, "lm_head.weight is another matrix than the embed"),
    "an escape": (lambda c: {**c, "architectures": ["\x1b[31m\nA"]}, r"architecture \x1b[31m A is not supported"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_describes_no_such_model_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = CONFIGS[kind]
    path = export(tmp_path / "hf", "mixed") / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert run_command(lambda: main(["from-hf", str(path.parent), str(tmp_path / "run")])) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and message in line and line.isprintable()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["tokenformer", "gpt_neox"])
def test_a_large_number_of_positions_takes_no_memory(kind: str, tmp_path: Path) -> None:
    path = export(tmp_path / "hf", kind) / "config.json"
    ids = torch.arange(20)[None]
    expected = load_model(path.parent)(ids)
    for positions in (MAX_SIZE, 10**12, 10**30):
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": positions}))
        if positions == MAX_SIZE:
            assert torch.equal(load_model(path.parent)(ids), expected)
        else:
            with pytest.raises(UserError, match="config.json"):
                load_model(path.parent)


@pytest.mark.parametrize("text", ["", "{", "{" * 100_000, '{"a":' * 5000, "\0", "1" * 5000, "NaN"])
def test_what_is_no_json_is_one_line(text: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        path = export(tmp_path / name, "tokenformer") / name
        path.write_text(text)
        assert outcome(path.parent) is None


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "{absolute}", "..", ".", "", "sub/model.safetensors", "a\0b", "gone.safetensors"]
)
def test_an_index_that_leaves_its_folder_or_names_no_file_is_refused(file: str, tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", "tokenformer")
    outside = tmp_path / "other.safetensors"
    save_file({name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}, outside)
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_bytes(outside.read_bytes())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = file.format(absolute=outside)
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json: names .*(outside its folder|not there)"):
        load_model(folder)


def test_an_index_and_its_files_agree(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", "tokenformer")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, second, *_ = sorted(set(whole["weight_map"].values()))
    moved = next(name for name, file in whole["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], moved: second}}))
    with pytest.raises(UserError, match=f"{second}: lacks the tensor '{moved}' of the index"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="its weights have no tensors"):
        load_model(folder)


def test_a_number_of_tokens_that_a_layer_never_had_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", "tokenformer", shard_bytes=10**9)
    tensors = load_file(folder / "model.safetensors")
    for count in (0, -3, 41, 10**12):
        changed = {**tensors, "model.layers.1.mlp.tau_tokens": torch.tensor(count)}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.tau_tokens is "):
            load_model(folder)


def test_tensors_of_odd_shapes_or_of_two_names_are_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", "gpt_neox", shard_bytes=10**9)
    tensors = load_file(folder / "model.safetensors")
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    for change, message in (
        ({fused: torch.zeros(97, 32)}, r"attention\.query\.weight has shape \[97, 32\]"),
        ({fused: torch.zeros(96)}, "has shape"),
        ({fused: torch.tensor(1.0)}, "has shape"),
        ({"lm_head.weight": torch.zeros(32, 32), "embed_out.weight": torch.ones(32, 32)}, "has two tensors for head"),
    ):
        save_file({**tensors, **change}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_model(folder)
