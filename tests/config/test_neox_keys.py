"""Every GPT-NeoX key is used, another name, ignored or refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import load_config, resolve_config
from megatron.config.build import SECTION_OF
from megatron.config.checks import find_training_mistakes
from megatron.config.neox_keys import ALIASES, IGNORED, REFUSED, RULES
from megatron.config.zero_keys import ZERO_KEYS
from megatron.errors import UserError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "config"
FIELDS = json.loads((FIXTURES / "official_fields.json").read_text())
STAGE = {"at_iteration": 3, "ffn_slot_num": 80}
MINIMUM: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}


def default_of(name: str) -> Any:
    text = FIELDS[name]["default"]
    return {"None": None, "True": True, "False": False}.get(text) if text in ("None", "True", "False") else eval(text)


def test_no_official_field_is_unknown() -> None:
    assert len(FIELDS) == 276
    assert set(FIELDS) - set(SECTION_OF) - set(ALIASES) - set(RULES) == set()


def test_a_key_has_one_fate() -> None:
    names = [*SECTION_OF, *ALIASES, *IGNORED, *REFUSED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(set(FIELDS) & set(RULES) - {"git_hash"}))
def test_official_defaults_are_accepted_silently(name: str) -> None:
    assert resolve_config([], {**MINIMUM, name: default_of(name)}).warnings == []


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_keys_give_one_line_with_the_reason(name: str) -> None:
    value = not any(item is True for item in IGNORED[name].harmless)
    lines = resolve_config([], {**MINIMUM, name: value}).warnings
    assert lines == [f"override: {name} is ignored: {IGNORED[name].reason}"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_keys_give_the_reason(name: str) -> None:
    value = not any(item is True for item in REFUSED[name].harmless)
    with pytest.raises(UserError) as error:
        load_config([], {**MINIMUM, "model_parallel_size": 2, name: value})
    assert str(error.value) == f"override: {name}: {str(value).lower()} is refused: {REFUSED[name].reason}"


def test_disabled_tables_are_accepted() -> None:
    resolved = resolve_config([], {**MINIMUM, "soft_prompt_tuning": {"enabled": False}, "sparse_attention": {}})
    assert resolved.warnings == []
    assert len(resolved.ignored) == 2


def test_zero_keys_are_those_of_deepspeed() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).parent.joinpath("runtime/zero/config.py").read_text()
    assert [key for key in ZERO_KEYS if key not in text] == []


def test_training_names_missing_keys() -> None:
    with pytest.raises(UserError, match="training needs train_iters, train_micro_batch_size_per_gpu, data_path"):
        resolve_config([], MINIMUM, checks=[find_training_mistakes])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "cannot be checkpointed here"),
        ({"optimizer": {"type": "Muon"}, "model_parallel_size": 2}, "Muon orthogonalises whole matrices"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "min_lr: 0.0001 is above the learning rate lr, 1e-05; lower it"),
        ({"growth": [STAGE]}, "a run that grows goes through a checkpoint"),
        ({"growth": [STAGE], "save": "a", "no_save_optim": True}, "no_save_optim: a run that grows"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(keys: dict[str, Any], message: str) -> None:
    needed = {"train_iters": 5, "train_micro_batch_size_per_gpu": 2, "data_path": "a"}
    with pytest.raises(UserError, match=message):
        resolve_config([], {**MINIMUM, **needed, **keys}, checks=[find_training_mistakes])
