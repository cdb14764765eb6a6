"""lm-eval's generation arguments as arguments of megatron.inference.generate. Imports lm_eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from megatron.errors import UserError
from megatron.inference.sampling import Sampling

_SEED = 1234
_KNOWN = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "until", "stop", "max_gen_toks",
    "max_new_tokens", "max_tokens", "max_completion_tokens", "seed",
}  # fmt: skip
# What these words stand for is not there, but for the value that switches it off; None: any value does.
_WITHOUT_EFFECT: dict[str, float | bool | None] = {
    "num_beams": 1, "num_return_sequences": 1, "n": 1, "length_penalty": 1, "no_repeat_ngram_size": 0, "typical_p": 1,
    "frequency_penalty": 0, "presence_penalty": 0, "return_full_text": False, "use_cache": None,
}  # fmt: skip


def generation_options(gen_kwargs: Mapping[str, Any], default_maximum: int) -> dict[str, Any]:
    """Arguments of `generate` from those of a task and of --gen_kwargs.

    lm-eval's own normalisation decides what they mean together: greedy unless do_sample is true or a temperature is
    given without it, the first of the words for the most tokens, one stop string or a list. Empty stop strings stop
    nothing. `do_sample` without a temperature samples at 1, as transformers does.

    Raises: UserError for a value outside its range, and for an argument that would change the texts and is not there.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    _refuse_unknown(given)
    try:
        found: dict[str, Any] = dict(normalize_gen_kwargs(given, default_maximum))
        options = {
            "maximum_tokens": found["max_gen_toks"],
            "temperature": float(found.get("temperature", 1.0)) if found["do_sample"] else 0.0,
            "top_k": max(0, int(found.get("top_k", 0))),  # -1 is off too
            "top_p": float(found.get("top_p", 0.0)),
            "min_p": float(found.get("min_p", 0.0)),
            "repetition_penalty": float(found.get("repetition_penalty", 1.0)),
            "stop": [*_strings("until", found["until"]), *_strings("stop", found.get("stop", []))],
        }
        Sampling(**{**options, "stop": tuple(options["stop"])})
        return {**options, "seed": int(found.get("seed", _SEED))}
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"generation arguments {dict(gen_kwargs)}: {error}; correct the task or --gen_kwargs"
        ) from error


def _strings(name: str, value: Any) -> list[str]:
    """Stop strings, one or many; an empty one would stop nothing."""
    found = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(string, str) for string in found):
        raise UserError(f"generation argument {name}: expected text or a list of texts, got {value!r}")
    return [string for string in found if string]


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        neutral = _WITHOUT_EFFECT.get(name)
        if name in _KNOWN or (name in _WITHOUT_EFFECT and (neutral is None or value == neutral)):
            continue
        raise UserError(
            f"generation argument {name}: {value!r} is not supported; take it out of the task or --gen_kwargs "
            f"(known: {', '.join(sorted(_KNOWN))})"
        )
