"""Models that training starts from where the product's own growth does not make them."""

from __future__ import annotations

import torch

from megatron.config.sections.model import ModelConfig
from megatron.model import LanguageModel
from tools.growth_experiment.net2net import NOISE, expanded_model
from tools.growth_experiment.regime.trials import Start
from tools.growth_experiment.runs import grown_as_official

CLONE_NOISE = 0.05
"""HyperCloning's noise, as a part of the weights it is added to: clones without any would stay alike for ever."""


def started_model(start: Start, base: LanguageModel, after: ModelConfig, seed: int) -> LanguageModel:
    """The larger model.

    | start | source | exact |
    |---|---|---|
    | official | the published code: new tokens as initialised, tau from the new count | no |
    | net2net | Chen, Goodfellow and Shlens, 2016: wider, with noise that cancels | yes |
    | clone | Samragh et al., HyperCloning, 2024: all widths doubled, with little noise that cancels | yes |
    | stack | Du et al., Stacking Your Transformers (G_stack), 2024: all blocks once more on top | no |
    """
    if start == "official":
        return grown_as_official(base, after, seed)
    if start == "stack":
        return stacked_model(base, after)
    return expanded_model(base, after, seed, CLONE_NOISE if start == "clone" else NOISE)


@torch.no_grad()
def stacked_model(base: LanguageModel, after: ModelConfig) -> LanguageModel:
    """A deeper model whose blocks are those of `base`, again and again."""
    deep, old = LanguageModel(after), dict(base.named_parameters())
    for name, parameter in deep.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) % base.config.num_layers)
        parameter.copy_(old[".".join(parts)])
    return deep
