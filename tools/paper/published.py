"""The paper's figures of growth, images and ablations (arXiv 2410.23168v2).

The zero-shot ones are in eval_tasks.published.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval_tasks.published import Size

GROWTH_COLUMNS = ("15B", "30B", "60B", "300B")
"""Tokens after a growth, or in all where a model is trained from scratch."""
COLUMN_TOKENS = (15e9, 30e9, 60e9, 300e9)


@dataclass(frozen=True)
class Growth:
    """A row of Tables 6 and 7: validation perplexity on OpenWebText."""

    name: str
    size: Size
    figures: tuple[float | None, ...]
    """In the order of GROWTH_COLUMNS."""
    config: str
    """The YAML file of this program that trains it."""


_CHAIN = "paper/tokenformer_124M_to_1-4B_30B.yml"
GROWTH = (
    Growth("TokenFormer 124M, from scratch", (12, 768, 576, 576, 2304), (None, None, 16.41, None),
           "paper/tokenformer_124M.yml"),
    Growth("TokenFormer 354M, grown", (12, 768, 2140, 2140, 8560), (14.58, 14.02, 13.59, None), _CHAIN),
    Growth("TokenFormer 757M, grown", (12, 768, 4850, 4850, 19400), (13.08, 12.59, 12.28, None), _CHAIN),
    Growth("TokenFormer 1.4B, grown", (12, 768, 8620, 8620, 34480), (12.14, 11.77, 11.60, None), _CHAIN),
    Growth("Transformer 124M", (12, 768, None, None, None), (None, None, None, 17.06), "paper/transformer_124M.yml"),
    Growth("Transformer 354M", (24, 1024, None, None, None), (None, 15.97, None, 13.02), "paper/transformer_354M.yml"),
    Growth("Transformer 757M", (24, 1536, None, None, None), (None, 13.78, None, 11.93), "paper/transformer_757M.yml"),
    Growth("Transformer 1.4B", (24, 2048, None, None, None), (None, 13.34, None, 11.63), "paper/transformer_1-4B.yml"),
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A row of Tables 2, 4 and 5: ImageNet-1K top-1 accuracy in percent."""

    name: str
    accuracy: float
    config: str | None = None
    """The YAML file that trains it; None for a model that this program has not."""


IMAGES = (
    Image("ViT-B/16 (384)", 77.9),
    Image("DeiT-B/16", 81.8),
    Image("ViT-B/16, MAE's recipe", 82.3, "vision/ViT_B16_in1k.yml"),
    Image("TokenFormer-B/16, matched", 82.1, "vision/B16_matched_in1k.yml"),
    Image("TokenFormer-B/16", 82.5, "vision/B16_in1k.yml"),
    Image("ViT-L/16 (384)", 76.5),
    Image("ViT-L/16, MAE's recipe", 82.6, "vision/ViT_L16_in1k.yml"),
    Image("TokenFormer-L/16, matched", 83.0, "vision/L16_matched_in1k.yml"),
    Image("TokenFormer-L/16", 83.1, "vision/L16_in1k.yml"),
)
ABLATIONS = (
    Image("theta: exp, L1 norm (softmax)", 79.6, "paper/B16_softmax_in1k.yml"),
    Image("theta: GELU, L1 norm", 81.7),
    Image("theta: GELU, L2 norm", 82.5, "vision/B16_in1k.yml"),
    Image("norms with weight and bias", 82.6, "paper/B16_norm_weights_in1k.yml"),
    Image("norms with bias only", 82.5),
    Image("norms without either", 82.5, "vision/B16_in1k.yml"),
)
