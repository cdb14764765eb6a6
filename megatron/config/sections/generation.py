"""Section `generation`: how texts are generated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megatron.config.sections.base import MAX_FACTOR, Section


class GenerationConfig(Section):
    """Text generation."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    """What generate.py does: texts from nothing, from a file of prompts, or in a dialogue."""
    maximum_tokens: int = Field(default=64, gt=0)
    """Most tokens generated per prompt."""
    prompt_end: str = Field(default="\n", min_length=1)
    """End of each prompt, in a file of prompts and in interactive mode."""
    temperature: float = Field(default=0.0, ge=0, le=MAX_FACTOR)
    """Softmax temperature; 0 means greedy, whatever the filters say."""
    top_k: int = Field(default=0, ge=0)
    """Sample among this many most probable tokens; 0 turns it off."""
    top_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among the most probable tokens that together have this probability; 0 turns it off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among the tokens that are at least this many times as probable as the most probable one; 0 turns it
    off."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=MAX_FACTOR)
    """Positive logits of tokens seen before are divided by it, negative ones multiplied; 1 turns it off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a text, one or a list of them; the text is cut before the first."""
    logprobs: bool = False
    """Also write the log-probability of each generated token."""
    recompute: bool = False
    """Generate without a key-value cache (slow; for checks)."""
    fast_decoding: bool = True
    """Decode with copies of the matrices laid out for it, and on a GPU with CUDA graphs; false takes less memory."""
    num_samples: int = Field(default=1, gt=0)
    """Number of texts that unconditional generation writes."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Number of texts for each prompt of a file."""
    interactive_history: bool = True
    """true: answer a typed prompt in the context of the earlier ones; false: answer each on its own, as GPT-NeoX
    does."""
    sample_input_file: str | None = None
    """File of prompts, each ended by prompt_end; in a .jsonl file, objects with a prompt and settings of its own."""
    sample_output_file: str = "samples.txt"
    """File that the texts are written to, one JSON object a line."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
