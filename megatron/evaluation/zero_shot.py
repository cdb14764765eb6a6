"""An image classifier made of a model of pairs: the vector of a class is that of texts about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.clip_model import ClipModel
from megatron.mpu import ALONE, Axis
from megatron.mpu.collectives import gather_objects
from megatron.tasks.texts import Texts

PLACE = "{}"
"""Where in a template the name of a class goes."""

_TEXTS_AT_ONCE = 256


class ZeroShotClassifier(nn.Module):
    """Images [b, c, H, W], normalised, to logits [b, classes]: their products with the classes' vectors.

    Args:
        model: of pairs.
        classes: `class_vectors`, [classes, e].
    """

    def __init__(self, model: ClipModel, classes: Tensor) -> None:
        super().__init__()
        self.config, self.model = model.config.image, model
        self.register_buffer("classes", classes)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = self.model.image_features(images)
        scale: Tensor = self.model.get_submodule("logit_scale")()
        return scale * features @ self.get_buffer("classes").T


@torch.no_grad()
def class_vectors(
    model: ClipModel, texts: Texts, names: Sequence[str], templates: Sequence[str], axis: Axis = ALONE
) -> Tensor:
    """The vectors [classes, e] of classes: of each the mean of its texts' features, of length 1. Collective.

    Args:
        model: in evaluation mode.
        texts: makes token ids of texts.
        names: of the classes.
        templates: of texts about a class, each with PLACE.
        axis: processes that share the classes.
    """
    mine = [template.replace(PLACE, name) for name in names[slice(*axis.share(len(names)))] for template in templates]
    device = next(model.parameters()).device
    parts = [
        model.text_features(texts.of_texts(mine[first : first + _TEXTS_AT_ONCE]).to(device)).cpu()
        for first in range(0, len(mine), _TEXTS_AT_ONCE)
    ]
    features = torch.cat(parts) if parts else torch.empty(0, model.config.embed_dim)
    means = features.view(-1, len(templates), features.shape[1]).mean(1)
    everyone = torch.cat([torch.as_tensor(part) for part in gather_objects(means.numpy(), axis)])
    return F.normalize(everyone, dim=-1).to(device)
