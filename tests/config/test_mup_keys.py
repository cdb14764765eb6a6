"""Keys of muP: what does not fit is one line; files of GPT-NeoX that say nothing of muP load as before."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import load_config
from megatron.config.checks import find_setting_mistakes

MODEL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "qkv_slot_num": 24,
    "proj_slot_num": 24, "ffn_slot_num": 40, "use_mup": True, "mup_base_hidden_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"mup_base_hidden_size": None},
            "use_mup: true scales from a base model, and none of its sizes is given (mup_",
        ),
        (
            {"optimizer": {"type": "SGD"}},
            "use_mup: true, and its rates are those of Adam and Lion, not of SGD; use",
        ),
        ({"optimizer": {"type": "Muon"}}, "use_mup: true, and its rates are those of Adam and Lion, not of Muon; use"),
        (
            {"norm": "layernorm_nonparam"},
            "final_norm: layernorm_nonparam has no weight, which with use_mup takes the factor of the logits; set",
        ),
        (
            {"mup_base_num_attention_heads": 3},
            "mup_base_num_attention_heads: 3 heads do not divide the base model's 16",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(keys: dict[str, Any], message: str) -> None:
    found = [str(mistake) for mistake in find_setting_mistakes(load_config([], {**MODEL, **keys}))]
    assert len(found) == 1 and found[0].startswith(message), found
    assert not list(find_setting_mistakes(load_config([], {**MODEL, **keys, "use_mup": False})))


def test_what_fits_is_accepted() -> None:
    for keys in ({}, {"norm": "layernorm_nonparam", "no_weight_tying": True}, {"optimizer": {"type": "Lion"}}):
        assert not list(find_setting_mistakes(load_config([], {**MODEL, **keys})))


def test_gpt_neox_files_with_mup_off_load_silently(package_log: pytest.LogCaptureFixture) -> None:
    keys = {
        "use_mup": False, "coord_check": False, "save_base_shapes": False, "base_shapes_file": None,
        "mup_width_scale": 2, "mup_init_scale": 1.0, "mup_attn_temp": 1.0, "mup_output_temp": 1.0,
        "mup_embedding_mult": 1.0,
        "mup_rp_embedding_mult": 1.0, "mup_base_hidden_size": None,
    }  # fmt: skip
    load_config([], {**MODEL, **keys})
    assert not package_log.messages
