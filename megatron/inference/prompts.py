"""Prompt files: texts up to prompt_end, or JSON lines with settings of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from megatron.config.mistakes import config_error
from megatron.config.sections.base import Section
from megatron.config.sections.generation import GenerationConfig
from megatron.errors import UserError
from megatron.files import read_text
from megatron.inference.sampling import Sampling
from megatron.text import suggestion


class _OwnSeed(Section):
    seed: int | None = Field(default=None, ge=0, lt=2**63)


_SETTINGS = (
    "maximum_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop",
)  # fmt: skip
_COUNTS = ("samples_per_prompt", "num_samples")
"""Either is the number of texts of a prompt that has settings of its own."""


@dataclass(frozen=True)
class Request:
    """A prompt and how its texts are to be chosen."""

    prompt: str
    sampling: Sampling
    image: str | None = None
    """File of the image that stands before it."""


def sampling_of(options: GenerationConfig, num_samples: int = 1, seed: int | None = None) -> Sampling:
    """The configuration's settings, as those of a prompt without its own."""
    values = {name: getattr(options, name) for name in _SETTINGS}
    return Sampling(**{**values, "stop": tuple(options.stop), "num_samples": num_samples, "seed": seed})


def read_requests(path: str, options: GenerationConfig) -> list[Request]:
    """The prompts of a UTF-8 file; a name that ends in .jsonl means JSON lines, see _request_of.

    In other files each prompt ends with `prompt_end` or with the file, and has no white space around it; empty ones
    are skipped, as in GPT-NeoX. Raises UserError.
    """
    content = read_text(path, "sample_input_file")
    end = "\n" if path.endswith(".jsonl") else options.prompt_end
    numbered = [(number, text.strip()) for number, text in enumerate(content.split(end), 1) if text.strip()]
    if not numbered:
        raise UserError(f"sample_input_file: {path} holds no prompts; write some that end with prompt_end, {end!r}")
    if path.endswith(".jsonl"):
        return [_request_of(line, f"sample_input_file: {path}, line {number}", options) for number, line in numbered]
    common = sampling_of(options, options.samples_per_prompt)
    return [Request(text, common) for _, text in numbered]


def _request_of(line: str, where: str, options: GenerationConfig) -> Request:
    """A JSON object: `prompt`, used as it is, and _SETTINGS, _COUNTS or `seed` in place of the configuration's.

    `image` names the file of an image, which needs no prompt.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); a .jsonl file has one object a line") from None
    image = values.pop("image", None) if isinstance(values, dict) else None
    if image is not None and not isinstance(image, str):
        raise UserError(f'{where}: image is not the name of a file; write {{"image": "..."}}')
    if not isinstance(values, dict) or not isinstance(values.get("prompt", image and ""), str):
        raise UserError(f'{where} has no text called prompt; write {{"prompt": "..."}}')
    prompt = values.pop("prompt", "")
    _refuse_unknown(values, where)
    try:
        seed = _OwnSeed(seed=values.pop("seed", None)).seed
        own = options.replaced(**values)
        count = next((getattr(own, name) for name in _COUNTS if name in values), options.samples_per_prompt)
        return Request(prompt, sampling_of(own, count, seed), image)
    except ValidationError as error:
        raise config_error(error, where) from None


def _refuse_unknown(values: dict[str, Any], where: str) -> None:
    known = [*_SETTINGS, *_COUNTS, "seed", "image"]
    for name in values:
        if name not in known:
            advice = suggestion(name, known, f"known: prompt, {', '.join(known)}", 0.5)
            raise UserError(f"{where}: unknown setting '{name}'; {advice}")
