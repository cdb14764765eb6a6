"""The official code's training folders give the model of its flat file."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.exchange.convert import from_official
from megatron.exchange.official_folder import find_official_folder
from megatron.inference import load_model
from megatron.inference.prepare import checkpoint_source
from tests.exchange.official_folders import (
    pipeline_names,
    write_flat_folder,
    write_layers,
    write_model_file,
    write_shards,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
MODELS = ("model_A", "model_C_untied_gelu_l2")


def config_of(name: str) -> ModelConfig:
    arguments = json.loads((GOLDEN / name / "config.json").read_text())["neox_args"]
    return ModelConfig(**{key: value for key, value in arguments.items() if key in ModelConfig.model_fields})


def flat_of(name: str) -> OrderedDict[str, Tensor]:
    return OrderedDict(torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True))


WRITERS = {
    "mp_rank": write_model_file,
    "layers": write_layers,
    "pipeline names": lambda folder, flat: write_model_file(folder, pipeline_names(flat)),
    "flat file in a folder": write_flat_folder,
    "sharded flat files": write_shards,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_golden_logits_and_equal_tensors(tmp_path: Path, name: str, form: str) -> None:
    folder = WRITERS[form](tmp_path / "run" / "global_step5", flat_of(name))
    model = load_model(folder, config_of(name))
    io = load_file(GOLDEN / name / "io.safetensors")
    assert (model(io["input_ids"]) - io["logits"]).abs().max() < 1e-5
    expected = load_model(GOLDEN / name / "pytorch_model.bin", config_of(name)).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_latest_and_iteration_choose_the_folder(tmp_path: Path) -> None:
    flat = flat_of("model_A")
    write_layers(tmp_path / "global_step5", flat)
    write_model_file(tmp_path / "global_step10", {key: tensor * 2 for key, tensor in flat.items()})
    (tmp_path / "latest").write_text("global_step10\n")
    config = config_of("model_A")
    older, latest = load_model(tmp_path, config, iteration=5), load_model(tmp_path, config)
    weights = older.embedding.word_embeddings.weight, latest.embedding.word_embeddings.weight
    assert torch.equal(weights[0] * 2, weights[1])
    assert checkpoint_source(CheckpointConfig(eval_ckpt=str(tmp_path))) == tmp_path / "global_step10"
    assert checkpoint_source(CheckpointConfig(load=str(tmp_path), iteration=5)) == tmp_path / "global_step5"


def test_a_folder_becomes_a_canonical_checkpoint(tmp_path: Path) -> None:
    folder, config = write_layers(tmp_path / "global_step5", flat_of("model_A")), RunConfig(model=config_of("model_A"))
    from_official(folder, tmp_path / "canonical", config)
    expected = load_model(folder, config).state_dict()
    found = load_model(tmp_path / "canonical").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    with pytest.raises(UserError, match="no such file; give an official"):
        from_official(tmp_path / "canonical", tmp_path / "other", config)


def test_dtype_is_kept_or_converted(tmp_path: Path) -> None:
    flat = {key: tensor.bfloat16() for key, tensor in flat_of("model_A").items()}
    folder, config = write_model_file(tmp_path / "global_step1", flat), config_of("model_A")
    kept, converted = load_model(folder, config, dtype="saved"), load_model(folder, config)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    saved = flat["sequential.0.word_embeddings.weight"]
    assert torch.equal(kept.embedding.word_embeddings.weight, saved)
    assert torch.equal(converted.embedding.word_embeddings.weight, saved.float())


def test_saved_rotary_frequencies_are_not_needed(tmp_path: Path) -> None:
    flat = flat_of("model_A")
    flat["sequential.2.attention.rotary_emb.inv_freq"] = torch.ones(4)
    load_model(write_layers(tmp_path / "global_step1", flat), config_of("model_A"))


def test_what_does_not_fit_names_tensor_and_key(tmp_path: Path) -> None:
    config = config_of("model_A")
    folder = write_layers(tmp_path / "global_step1", flat_of("model_A"))
    with pytest.raises(UserError, match=r"qkv_slot_num: 32 in the configuration, 64 in checkpoint .*global_step1"):
        load_model(folder, config.model_copy(update={"qkv_slot_num": 32}))
    with pytest.raises(UserError, match="sequential.3.*num_layers 1 lacks"):
        load_model(folder, config.model_copy(update={"num_layers": 1}))
    with pytest.raises(UserError, match="give the YAML configuration"):
        load_model(folder)
    (folder / "layer_03-model_00-model_states.pt").unlink()
    with pytest.raises(UserError, match=r"has no tensor layers\.1\."):
        load_model(folder, config)


def test_models_split_over_ranks_are_refused(tmp_path: Path) -> None:
    config, flat, message = config_of("model_A"), flat_of("model_A"), "split over 2 model-parallel ranks"
    layers = write_layers(tmp_path / "layers", flat)
    write_layers(layers, flat, rank=1)
    two = write_model_file(tmp_path / "two", flat)
    (two / "mp_rank_01_model_states.pt").write_bytes((two / "mp_rank_00_model_states.pt").read_bytes())
    one = write_model_file(tmp_path / "one", flat, mp_world_size=2)
    for folder in (layers, two, one):
        with pytest.raises(UserError, match=message):
            load_model(folder, config)


def test_folders_without_a_model_say_what_is_missing(tmp_path: Path) -> None:
    config = config_of("model_A")
    shards = tmp_path / "zero3"
    shards.mkdir()
    (shards / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="ZeRO stage 3 shards; run its zero_to_fp32.py"):
        load_model(shards, config)
    stages = write_layers(tmp_path / "stages", flat_of("model_A"))
    for file in [*stages.glob("layer_*"), stages / "mp_rank_01_model_states.pt"]:
        file.unlink()
    with pytest.raises(UserError, match="are the layer files missing"):
        load_model(stages, config)
    sharded = write_shards(tmp_path / "sharded", flat_of("model_A"))
    index = sharded / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    with pytest.raises(UserError, match="names files outside its folder"):
        load_model(sharded, config)


class Evil:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (re.compile, ("a",))


def test_other_objects_are_never_loaded(tmp_path: Path) -> None:
    folder = write_model_file(tmp_path / "global_step1", flat_of("model_A"), anything=Evil())
    with pytest.raises(UserError, match=r"holds a re\._?compile\S* object, which could run code"):
        load_model(folder, config_of("model_A"))


@pytest.mark.parametrize("tag", ["../outside", "/", "..", "\0", "x" * 5000, ""])
def test_latest_leads_nowhere_but_to_a_folder_beside_it(tmp_path: Path, tag: str) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    torch.save({}, outside / "mp_rank_00_model_states.pt")
    (run / "latest").write_text(tag)
    assert find_official_folder(run) is None and find_official_folder(outside) == outside
