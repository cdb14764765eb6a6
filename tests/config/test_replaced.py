"""A configuration with other values."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron.config import ModelConfig, ParallelConfig, RunConfig
from megatron.config.sections.parallel import ZeroConfig

MODEL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
CONFIG = RunConfig(
    model=MODEL, parallel=ParallelConfig(zero_optimization=ZeroConfig(stage=2, **{"reduce_bucket_size": 8}))
)


def test_only_what_is_named_changes() -> None:
    changed = CONFIG.replaced(**{"checkpoint.load": "there", "checkpoint.finetune": True, "training.train_iters": 3})
    assert (changed.checkpoint.load, changed.checkpoint.finetune, changed.training.train_iters) == ("there", True, 3)
    assert changed.replaced(checkpoint=CONFIG.checkpoint, training=CONFIG.training) == CONFIG
    assert CONFIG.checkpoint.load is None


def test_a_dotted_key_reaches_into_a_table_and_keeps_its_other_entries() -> None:
    zero = CONFIG.replaced(**{"parallel.zero_optimization.stage": 1}).parallel.zero_optimization
    assert zero.model_dump(exclude_none=True) == {"stage": 1, "reduce_bucket_size": 8}


def test_a_default_keeps_its_form_in_saved_files() -> None:
    assert MODEL.replaced(num_layers=3).model_dump_json() == MODEL.model_dump_json().replace(
        '"num_layers":2', '"num_layers":3'
    )


def test_replaced_values_are_checked() -> None:
    with pytest.raises(ValidationError, match="num_attention_heads: 3 heads do not divide hidden_size 64"):
        MODEL.replaced(num_attention_heads=3)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        CONFIG.replaced(**{"checkpoint.lode": "there"})
