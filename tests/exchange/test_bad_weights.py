"""Weights that no model can compute with are named in one line, in whatever form they come."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval_tasks.pretrained import load_pretrained
from eval_tasks.results import write_results
from eval_tasks.run import run_evaluation
from megatron.config import RunConfig
from megatron.errors import EXIT_USER_ERROR, UserError, run_command
from megatron.evaluation.corpus import corpus_documents
from megatron.evaluation.perplexity import perplexity
from megatron.exchange import open_checkpoint
from megatron.exchange.checkpoint import of_model
from megatron.exchange.convert import export_huggingface, from_official, to_huggingface
from megatron.exchange.official import official_tensors
from megatron.inference.generate import generate
from megatron.inference.load import load_model
from megatron.inference.modes import run_generation
from megatron.tokenizer import CharLevelTokenizer, HFTokenizer
from tests.checkpoint.forged import forge, tensors
from tests.exchange.official_folders import pipeline_names, write_layers, write_model_file, write_shards
from tests.random_models import make_config, make_model, save_random_models

PROJ = "sequential.3.attention.proj.value_param_tokens"
EMBEDDING = "sequential.0.word_embeddings.weight"
CANONICAL = "layers.1.attention.proj.value_tokens_0"
KEYS: dict[str, Any] = {"padded_vocab_size": None, "make_vocab_size_divisible_by": 1, "vocab_size": 640}


def flat() -> dict[str, Tensor]:
    """The tensors of a random model under their official names."""
    return official_tensors(of_model(make_model(dtype=torch.float32)))


def edit(tensors: dict[Any, Any], value: float) -> dict[Any, Any]:
    tensors[PROJ] = tensors[PROJ].clone().index_fill_(0, torch.tensor([1]), value)
    return tensors


def write_flat(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def exported(folder: Path, change: Callable[[dict[str, Tensor]], object], as_bin: bool = False) -> Path:
    """An export with changed tensors, in safetensors or in PyTorch's form."""
    export_huggingface(make_model(dtype=torch.float32), folder)
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    file.unlink()
    if as_bin:
        torch.save(found, folder / "pytorch_model.bin")
    else:
        save_file(found, file, {"format": "pt"})
    return folder


def canonical(root: Path, value: float) -> Path:
    """A checkpoint of a run with such a value under right checksums."""
    save_random_models(root, make_config(), (5,))
    forge(root / "global_step5", tensors("model", lambda found: found[CANONICAL][1].fill_(value)))
    return root


def with_value(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found[f"model.{name}"][1].fill_(value)


FORMS: dict[str, Callable[[Path, float], Path]] = {
    "a flat file": lambda path, value: write_flat(path / "pytorch_model.bin", edit(flat(), value)),
    "a flat file in pieces": lambda path, value: write_shards(path / "folder", edit(flat(), value)),
    "layer files": lambda path, value: write_layers(path / "global_step5", edit(flat(), value)),
    "a pipeline's model file": lambda path, value: write_model_file(
        path / "global_step5", pipeline_names(edit(flat(), value))
    ),
    "safetensors": lambda path, value: exported(path / "hf", with_value(CANONICAL, value)),
    "an export's pytorch_model.bin": lambda path, value: exported(path / "hf", with_value(CANONICAL, value), True),
    "a run's checkpoint": lambda path, value: canonical(path / "run", value),
}


@pytest.mark.parametrize("form", FORMS)
def test_non_finite_weights_are_named_by_every_command(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = FORMS[form](tmp_path, math.nan), tmp_path / "text.txt"
    text.write_text("The people of the states.")
    generation = {"text_gen_type": "unconditional", "sample_output_file": str(tmp_path / "samples.txt")}
    runs: dict[str, Callable[[RunConfig], object]] = {"generate.py": run_generation, "eval.py": run_evaluation}
    for name, run in runs.items():
        config = make_config(eval_ckpt=str(path), perplexity_data=str(text), **generation)
        assert run_command(lambda run=run, config=config: run(config) and None) == EXIT_USER_ERROR, name
        (line,) = capsys.readouterr().err.splitlines()
        assert CANONICAL in line and "values that are not finite" in line and str(path) in line
    assert not (tmp_path / "samples.txt").exists()
    with pytest.raises(UserError, match="not finite"):
        to_huggingface(path, tmp_path / "export", make_config() if not form.startswith("a run") else None)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_weights_are_no_better(value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{CANONICAL} has 32 of 640 values that are not finite"):
        load_model(FORMS["a flat file"](tmp_path, value), make_config())


def test_values_beyond_the_dtype_are_named(tmp_path: Path) -> None:
    path = FORMS["a flat file"](tmp_path, 7e4)
    load_model(path, make_config(), torch.bfloat16)
    with pytest.raises(UserError, match=rf"precision: {CANONICAL} .* float16 cannot hold; choose bf16 or fp32"):
        load_model(path, make_config(), torch.float16)


def test_logits_that_overflow_are_neither_scored_nor_sampled() -> None:
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(1e38)  # finite, as is the first normalisation's output
        model.final_norm.weight.mul_(10)
    message = "the model's logits are not finite in float32"
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=message):
            generate(model, CharLevelTokenizer(), ["The"], temperature=temperature, maximum_tokens=2)
    with pytest.raises(UserError, match=message):
        perplexity(model, torch.arange(20), 8)


NOT_A_MODEL: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "holds no tensors"),
    "a list": ([torch.zeros(2)], "not a flat dictionary"),
    "a single tensor": (torch.zeros(2), "not a flat dictionary"),
    "nested": ({"module": {}}, "not a flat dictionary"),
    "integer keys": ({0: torch.zeros(2), 1: torch.zeros(2)}, "under the key 0, which is no name"),
    "keys of bytes": ({b"a": torch.zeros(2)}, "which is no name"),
}


@pytest.mark.parametrize("kind", NOT_A_MODEL)
def test_a_file_that_is_no_dictionary_of_weights_is_one_line(kind: str, tmp_path: Path) -> None:
    content, message = NOT_A_MODEL[kind]
    path = write_flat(tmp_path / "pytorch_model.bin", content)
    for config in (make_config(), make_config(**KEYS)):
        with pytest.raises(UserError, match=message):
            load_model(path, config)
    with pytest.raises(UserError, match=message):
        open_checkpoint(path, make_config().model)


def without(name: str) -> dict[str, Tensor]:
    found = flat()
    del found[name]
    return found


BAD_TENSORS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no embedding": (lambda: without(EMBEDDING), r"embedding\.word_embeddings\.weight"),
    "no layer's tensor": (lambda: without(PROJ), rf"no tensor {CANONICAL}"),
    "integers": (lambda: {**flat(), PROJ: torch.ones(20, 32, dtype=torch.int64)}, "is int64; weights are floating"),
    "bytes": (lambda: {**flat(), EMBEDDING: torch.ones(640, 32, dtype=torch.uint8)}, "is uint8; weights are floating"),
    "booleans": (lambda: {**flat(), PROJ: torch.ones(20, 32, dtype=torch.bool)}, "is bool; weights are floating"),
    "complex numbers": (lambda: {**flat(), PROJ: torch.ones(20, 32, dtype=torch.complex64)}, "is complex64; weights"),
    "8-bit floats": (lambda: {**flat(), PROJ: torch.ones(20, 32).to(torch.float8_e4m3fn)}, "is float8_e4m3fn; weigh"),
    "sparse": (lambda: {**flat(), PROJ: torch.ones(20, 32).to_sparse()}, "is sparse, quantized or without values"),
    "a number": (lambda: {**flat(), PROJ: torch.tensor(1.0)}, "is a single number"),
    "a number of rows": (lambda: {**flat(), EMBEDDING: torch.tensor(1.0)}, "is a single number"),
    "no rows": (lambda: {**flat(), EMBEDDING: torch.ones(0, 32)}, r"embedding\.word_embeddings\.weight"),
    "two embeddings": (
        lambda: {**flat(), "tied_modules.embed.word_embeddings.weight": torch.ones(640, 32)},
        "two different tensors for embedding",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bad_tensor_is_named(kind: str, tmp_path: Path) -> None:
    make, message = BAD_TENSORS[kind]
    path = write_flat(tmp_path / "pytorch_model.bin", make())
    for config in (make_config(), make_config(**KEYS)):
        with pytest.raises(UserError, match=message):
            load_model(path, config)
    with pytest.raises(UserError, match=message):
        from_official(path, tmp_path / "run", make_config())
    with pytest.raises(UserError, match=message):
        open_checkpoint(path, make_config(**KEYS).model)


def test_two_names_of_one_tensor_are_fine(tmp_path: Path) -> None:
    found = OrderedDict(flat())
    found["tied_modules.embed.word_embeddings.weight"] = found[EMBEDDING].clone()
    load_model(write_flat(tmp_path / "pytorch_model.bin", found), make_config())


def test_a_damaged_flat_file_never_ends_in_a_traceback(tmp_path: Path) -> None:
    path = write_flat(tmp_path / "pytorch_model.bin", {name: flat()[name][:1] for name in (PROJ, EMBEDDING)})
    whole = path.read_bytes()
    pickle_at = whole.index(b"\x80\x02")
    for place in range(pickle_at, pickle_at + 220, 3):
        for byte in (b"\x00", b"R", b"u", b"\xff"):
            path.write_bytes(whole[:place] + byte + whole[place + 1 :])
            with pytest.raises(UserError):
                load_model(path, make_config())


def test_changed_bytes_of_a_flat_file_are_found_by_its_checksums(tmp_path: Path) -> None:
    found = flat()
    path = write_flat(tmp_path / "pytorch_model.bin", found)
    whole, place = path.read_bytes(), path.read_bytes().index(found[PROJ].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"its part pytorch_model/data/\d+ is damaged: the checksum differs"):
        load_model(path, make_config())
    torch.serialization.set_crc32_options(False)
    try:
        load_model(write_flat(path, found), make_config())  # it was saved without any
    finally:
        torch.serialization.set_crc32_options(True)


TAU = "model.layers.0.mlp.tau_tokens"
BAD_EXPORTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "integers": (lambda t: t.update({f"model.{CANONICAL}": torch.ones(20, 32, dtype=torch.int32)}), "is int32; weigh"),
    "no tensor": (lambda t: t.pop(f"model.{CANONICAL}"), rf"no tensor {CANONICAL}"),
    "no tau": (lambda t: t.pop(TAU), r"no tensor layers\.0\.mlp\.tau_tokens"),
    "a tau of 0": (lambda t: t[TAU].zero_(), "is 0, but has to be positive"),
    "two taus": (
        lambda t: t.update({TAU: torch.tensor([3, 3])}),
        r"tau_tokens of shape \[2\] in a layer with one row norm",
    ),
    "a fraction as tau": (lambda t: t.update({TAU: torch.tensor(3.5)}), "is float32 of shape"),
    "nothing": (lambda t: t.clear(), "no tensor"),
}


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("kind", BAD_EXPORTS)
def test_a_bad_tensor_of_an_export_is_named(kind: str, as_bin: bool, tmp_path: Path) -> None:
    change, message = BAD_EXPORTS[kind]
    with pytest.raises(UserError, match="holds no tensors" if as_bin and kind == "nothing" else message):
        load_model(exported(tmp_path / "hf", change, as_bin))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "has no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "has no weight_map"),
        ("model.safetensors.index.json", {}, "has no weight_map"),
        ("config.json", {"architectures": 5}, "architecture unknown is not supported"),
        ("config.json", {"architectures": ["GPTNeoXForCausalLM"], "rope_scaling": [1]}, "cannot be used"),
    ],
)
def test_small_files_of_an_export_with_other_content_are_one_line(
    file: str, content: Any, message: str, tmp_path: Path
) -> None:
    folder = exported(tmp_path / "hf", lambda found: None)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_results_are_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    numbers = {"a": math.nan, "b": [math.inf, 1.5], "c": torch.tensor(math.nan), "d": {"e": -math.inf}}
    write_results({"results": numbers}, tmp_path / "r.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert found["results"] == {"a": None, "b": [None, 1.5], "c": None, "d": {"e": None}}


def test_a_file_of_an_older_torch_is_read(tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = load_model(tmp_path / "pytorch_model.bin", make_config())
    expected = make_model(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer; fetch the file itself"),
        (b"<html>", "it is damaged, or of another kind"),
        (b"PK\x03\x04abc", "PytorchStreamReader failed"),
        (b"\x80\x02eeee", "it is damaged, or of another kind"),
    ],
)
def test_a_file_that_is_none_of_torch_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for read in (load_model, open_checkpoint):
        with pytest.raises(UserError, match=f"not a readable PyTorch file of tensors .{reason}") as error:
            read(tmp_path / "pytorch_model.bin", make_config().model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b"])
def test_names_that_no_file_can_have_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    unconditional = {"text_gen_type": "unconditional", "sample_output_file": str(tmp_path / "out")}
    text = {**unconditional, "text_gen_type": "input-file", "sample_input_file": name, "load": str(tmp_path)}
    calls: list[Callable[[], object]] = [
        lambda: run_generation(make_config(**unconditional, load=name)),
        lambda: run_generation(make_config(**unconditional, eval_ckpt=name)),
        lambda: run_generation(make_config(**text)),
        lambda: run_evaluation(make_config(load=name, perplexity_data=str(tmp_path / "a.txt"))),
        lambda: run_evaluation(make_config(load=str(tmp_path), perplexity_data=name)),
        lambda: run_evaluation(make_config(load=str(tmp_path), perplexity_data="a.txt", eval_results_prefix=name)),
        lambda: run_evaluation(make_config(load=str(tmp_path), eval_tasks=["a"], include_path=name)),
        lambda: list(corpus_documents(name, CharLevelTokenizer())),
        lambda: load_model(name),
        lambda: open_checkpoint(name, None),
        lambda: to_huggingface(name, tmp_path / "hf"),
        lambda: HFTokenizer(name),
        lambda: load_pretrained(pretrained=name),
    ]
    for call in calls:
        with pytest.raises(UserError):
            call()
