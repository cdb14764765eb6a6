"""What the rules for GPT-NeoX's keys make of the values that a configuration gives them."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.config.findings import Findings
from megatron.config.neox_keys import IGNORED, RULES
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.yaml_file import Setting
from megatron.text import shortened


def apply_rules(
    settings: Iterable[Setting], model: ModelSection, parallel: ParallelConfig, findings: Findings
) -> list[tuple[Setting, str]]:
    """The settings of GPT-NeoX's keys that are ignored, with the reason; refused ones go to the findings."""
    ignored = []
    for setting in settings:
        rule = RULES[setting.key]
        if not rule.refused:
            ignored.append((setting, rule.reason))
        elif rule.is_harmless(setting.value) or _asks_for_nothing(setting, model, parallel):
            ignored.append((setting, "asks for nothing"))
        else:
            value = str(setting.value).lower() if isinstance(setting.value, bool) else shortened(setting.value)
            findings.add(setting.mistake(f"{value} is refused: {rule.reason}"))
    return ignored


def _asks_for_nothing(setting: Setting, model: ModelSection, parallel: ParallelConfig) -> bool:
    """Whether a refused key asks for what is so anyway beside the other keys."""
    value = setting.value
    match setting.key:
        case "num_kv_heads":
            return value == model.num_attention_heads and value is not True
        case "use_bias_in_norms" if isinstance(model, ModelConfig):
            return value is False and "layernorm" not in (model.norm, model.final_norm_kind)
        case "use_bias_in_mlp":
            return value is False and "global" not in model.layer_kinds
        case "mlp_multiple_of" if isinstance(model, ModelConfig):
            width = model.intermediate_size or 4 * model.hidden_size
            return isinstance(value, int) and value is not True and value > 0 and width % value == 0
        case "fp32_allreduce":
            return parallel.model_parallel_size == 1
        case "deepspeed_extra_args":
            return isinstance(value, dict) and all(key in IGNORED for key in value)
    return False
