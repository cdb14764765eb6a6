"""timm and torchvision beside a CPU build of torch."""

from __future__ import annotations

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[torch.library.Library] = []  # an operator lives as long as its library


def mend_torchvision() -> None:
    """Declare the compiled operators that PyPI's torchvision registers a fake for and does not have on a CPU build.

    To be called before timm or torchvision is imported, which fails otherwise.
    """
    if not _defined and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        _defined.append(library)
