"""A mistake in a configuration tells code what it tells people."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron.config import load_config, resolve_config
from megatron.config.mistakes import config_error
from megatron.config.places import places_named
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.scaling import ScalingConfig
from megatron.errors import ConfigError, UserErrors

MODEL = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n"


def refused(folder: Path, text: str) -> ConfigError:
    (folder / "a.yml").write_text(MODEL + text)
    with pytest.raises(ConfigError) as error:
        load_config(folder / "a.yml")
    return error.value


def test_it_names_key_value_reason_advice_and_place(tmp_path: Path) -> None:
    error = refused(tmp_path, "lr: 2000")
    assert (error.key, error.value, error.reason) == ("optimizer.params.lr", 2000, "must be at most 1000")
    assert (error.where, error.spelling) == (f"{tmp_path}/a.yml:5", "lr")
    assert str(error) == f"{tmp_path}/a.yml:5: lr: must be at most 1000, got 2000"


def test_it_names_the_keys_that_the_value_is_wrong_beside(tmp_path: Path) -> None:
    error = refused(tmp_path, "pipe-parallel-size: 3")
    assert (error.key, error.beside, error.advice) == ("pipe_parallel_size", {"num_layers"}, "each needs a block")


def test_several_keep_theirs(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"{MODEL}seed: -1\nwarmup: 2\n")
    with pytest.raises(UserErrors) as errors:
        load_config(tmp_path / "a.yml")
    assert [error.key for error in errors.value.errors if isinstance(error, ConfigError)] == ["seed", "warmup"]


def test_one_that_is_found_later_gets_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"{MODEL}batch-size: 3\n")
    resolved = resolve_config(tmp_path / "a.yml")
    with pytest.raises(ConfigError) as error, places_named(resolved.settings):
        raise ConfigError("train_micro_batch_size_per_gpu", "3 do not fit in memory", "lower it")
    assert str(error.value) == f"{tmp_path}/a.yml:5: batch-size: 3 do not fit in memory; lower it"
    with pytest.raises(ConfigError) as error, places_named(resolved.settings):
        raise ConfigError("seed", "is its default")
    assert str(error.value) == "seed: is its default"


def test_it_survives_the_way_to_another_process() -> None:
    error = ConfigError("seed", "must be at least 0", "raise it", value=-1, where="a.yml:1", beside=["save"])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.yml:1: seed: must be at least 0, got -1; raise it"
    assert copy.beside == {"save"}


def test_what_pydantic_says_of_any_section_is_put_the_same_way() -> None:
    with pytest.raises(ValidationError) as error:
        GenerationConfig(top_p=2)
    assert str(config_error(error.value, "line 3")) == "line 3: top_p: must be at most 1, got 2"
    with pytest.raises(ValidationError) as error:
        ScalingConfig.model_validate({"growth": [{"at_iteration": 1, "ffn_slot_num": 8}, {"at_iteration": 2}]})
    assert str(config_error(error.value, "x")).startswith("x: growth: entry 2: needs qkv_slot_num, proj_slot_num or")
