"""Zero-shot figures of the paper (arXiv 2410.23168v2, Tables 1 and 10) and what they are measured by.

Perplexities are exp of nats a token with the GPT-NeoX-20B tokenizer; accuracies are in percent, those of HellaSwag and
ARC-C normalised by length. A figure that is not given is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.sections.model import TOKENFORMER, ModelConfig

Size = tuple[int, int, int | None, int | None, int | None]
"""Layers, width, and tokens of qkv, proj and ffn, None in a Transformer."""

# Column, task, metric.
PILE_COLUMN = ("Pile ppl", "perplexity", "token_perplexity,none")
PERPLEXITY_COLUMN = ("LAMBADA ppl", "lambada_openai", "perplexity,none")
ACCURACY_COLUMNS = (
    ("LAMBADA", "lambada_openai", "acc,none"),
    ("HellaSwag", "hellaswag", "acc_norm,none"),
    ("PIQA", "piqa", "acc,none"),
    ("ARC-E", "arc_easy", "acc,none"),
    ("ARC-C", "arc_challenge", "acc_norm,none"),
    ("WinoGrande", "winogrande", "acc,none"),
)
"""Their mean is the average; the perplexities do not enter it."""
COLUMNS = (PILE_COLUMN[0], PERPLEXITY_COLUMN[0], *(column for column, _, _ in ACCURACY_COLUMNS), "average")


@dataclass(frozen=True)
class Published:
    """A row of the table."""

    name: str
    figures: tuple[float | None, ...]
    """In the order of COLUMNS."""
    size: Size | None = None
    """Of a TokenFormer."""


ZERO_SHOT = (
    Published("TokenFormer-150M", (10.45, 16.38, 45.0, 35.5, 64.9, 47.3, 24.9, 50.4, 44.7), (12, 768, 768, 768, 3072)),
    Published("TokenFormer-450M", (8.28, 7.69, 57.3, 47.5, 69.5, 56.2, 26.7, 54.6, 52.0), (24, 1024, 1024, 1024, 4096)),
    Published("TokenFormer-900M", (7.38, 5.46, 64.0, 55.3, 72.4, 59.9, 30.6, 56.4, 56.4), (32, 1280, 1280, 1280, 5120)),
    Published("TokenFormer-1.5B", (6.91, 5.24, 64.7, 60.0, 74.8, 64.8, 32.0, 59.7, 59.3), (40, 1536, 1536, 1536, 6144)),
    Published("Pythia-160M", (29.64, 37.25, 35.4, 30.3, 62.3, 43.6, 23.6, 51.3, 40.1)),  # Table 10: 51.9, 40.6
    Published("Pythia-410M", (9.95, 10.84, 51.4, 40.6, 66.9, 52.1, 24.6, 53.8, 48.2)),
    Published("Pythia-1B", (7.82, 7.92, 56.1, 47.2, 70.7, 57.0, 27.1, 53.5, 51.9)),
    Published("Pythia-1.3B", (7.51, 6.08, 61.7, 52.1, 71.0, 60.5, 28.5, 57.2, 55.2)),
    Published("Pythia-2.8B", (None, 5.04, 64.7, 59.3, 74.0, 64.1, 32.9, 59.7, 59.1)),
    Published("GPT-Neo 1.3B", (None, 7.50, 57.2, 48.9, 71.1, 56.2, 25.9, 54.9, 52.4)),
    Published("GPT-Neo 2.7B", (None, 5.63, 62.2, 55.8, 71.1, 61.1, 30.2, 57.6, 56.5)),
    Published("OPT-1.3B", (None, 6.64, 58.0, 53.7, 72.4, 56.7, 29.6, 59.5, 55.0)),
    Published("OPT-2.7B", (None, 5.12, 63.6, 60.6, 74.8, 60.8, 31.3, 61.0, 58.7)),
    Published("Mamba-130M", (10.56, 16.07, 44.3, 35.3, 64.5, 48.0, 24.3, 51.9, 44.7)),
    Published("Mamba-370M", (8.28, 8.14, 55.6, 46.5, 69.5, 55.1, 28.0, 55.3, 50.0)),
    Published("Mamba-790M", (7.33, 6.02, 62.7, 55.1, 72.1, 61.2, 29.5, 56.1, 56.1)),
    Published("Mamba-1.4B", (6.80, 5.04, 64.9, 59.1, 74.2, 65.5, 32.8, 61.5, 59.7)),
    Published("RWKV-1.5B", (7.70, 7.04, 56.4, 52.5, 72.4, 60.5, 29.4, 54.6, 54.3)),
)


def size_of(config: ModelConfig) -> Size:
    """The size of a language model."""
    is_token = set(config.layer_kinds) == {TOKENFORMER}
    tokens = (config.qkv_slot_num, config.proj_slot_num, config.ffn_slot_num) if is_token else (None, None, None)
    return (config.num_layers, config.hidden_size, *tokens)


def published_row(config: ModelConfig) -> Published | None:
    """The row of the published model of this size."""
    return next((row for row in ZERO_SHOT if row.size is not None and row.size == size_of(config)), None)
